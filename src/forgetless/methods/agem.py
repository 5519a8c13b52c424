"""A-GEM: as GEM, but with one constraint: the gradient on rows drawn from all earlier tasks together.

g~ = g - <g, g_ref> / <g_ref, g_ref> g_ref   if <g, g_ref> < 0,   else g          Chaudhry et al. 2019,
                                                                                  arXiv 1812.00420
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from forgetless.data.tasks import Row
from forgetless.methods.gem import GEM
from forgetless.methods.replay import Replay


class AGEM(GEM):
    """Averaged gradient episodic memory.

    Args:
        memory: rows kept in all (a number), or a share of each task (a number and a percent sign)
        policy: for a number of rows: 'reservoir' (each row seen is kept with equal probability) or 'quota' (each
            task has equal room)
        replay_rows: kept rows on which a step takes the reference gradient; 0: as many as the step has current rows
    """

    paper = "1812.00420"
    summary = "projects each step so that it does not go against the gradient on rows of earlier tasks"
    extra_memory = "the kept rows, and one gradient of the adapter"
    extra_compute = "2x: forward and backward on as many kept rows as current ones"
    growth: ClassVar[str] = ""
    example: ClassVar[dict] = {"memory": 6}

    def __init__(self, memory: int | str = "10%", policy: str = "reservoir", replay_rows: int = 0):
        super().__init__(memory, policy, replay_rows, margin=0.0)

    def draw(self, count: int, step: int) -> list[list[Row]]:
        rows = self.memory.draw(count, self.task, step)
        return [rows] if rows else []

    def passes(self, rows: int, task: int) -> tuple[float, float]:
        return Replay.passes(self, rows, task)

    def project(self, g: Tensor, G: Tensor) -> Tensor:
        return project(g, G[0])


def project(g: Tensor, reference: Tensor) -> Tensor:
    """g~ (parameters,); g itself where the inner product is not negative."""
    inner = g @ reference
    return g - inner / (reference @ reference) * reference if inner < 0 else g
