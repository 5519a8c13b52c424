"""GEM: no step may go against the gradient of any earlier task, taken afresh on rows kept of it.

    g~ = argmin ½ ||g~ - g||²   such that   <g~, g_k> >= 0 for every earlier task k      Lopez-Paz and Ranzato 2017,
                                                                                         arXiv 1706.08840
    solved in its dual, with the g_k as rows of G:
    v  = argmin_{v >= margin} ½ vᵀ G Gᵀ v + (G g)ᵀ v,     g~ = g + Gᵀ v;     g~ = g where G g >= 0

A margin above 0 also steps along every g_k where any of them is violated. AdamW turns g~ into a step that need not
keep the inequalities exactly.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import Tensor

from forgetless.data.batches import Example, Part, weigh
from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.learning.gradients import mean_gradient, set_step_gradient, step_gradient
from forgetless.learning.memory import Memory
from forgetless.methods.base import Check, Method
from forgetless.methods.replay import Replay

PROJECTED = "share of the steps whose gradient went against an earlier task's; 0 means plain fine-tuning"


class GEM(Replay):
    """Gradient episodic memory.

    Args:
        memory: rows kept in all (a number), or a share of each task (a number and a percent sign)
        policy: for a number of rows: 'quota' (each task has equal room) or 'reservoir' (each row seen is kept with
            equal probability)
        replay_rows: rows of each earlier task on which a step takes that task's gradient; 0: as many as the step has
            current rows
        margin: the least weight v_k of each earlier task's gradient in a projected step
    """

    paper = "1706.08840"
    summary = "projects each step so that it goes against no earlier task's gradient on kept rows"
    extra_memory = "the kept rows, and one gradient of the adapter a finished task"
    extra_compute = "one more pass a finished task: forward and backward on as many of its rows as current ones"
    within_task: ClassVar[tuple[str, ...]] = (
        "replayed", "rows_at_once", "steps", "projected", "violated", "removed", "all_removed",
    )  # fmt: skip
    off: ClassVar[dict] = {"memory": 0}
    growth: ClassVar[str] = "one gradient on memory a finished task"
    example: ClassVar[dict] = {"memory": 6, "replay_rows": 2}

    def __init__(self, memory: int | str = "10%", policy: str = "quota", replay_rows: int = 0, margin: float = 0.5):
        super().__init__(memory, policy, replay_rows)
        if margin < 0:
            raise UsageError(f"margin {margin}: a step may not be pushed against earlier tasks; 0 or more")
        self.margin = margin

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.rows_at_once = 1  # of memory: as many as the largest micro-batch had
        self.steps, self.projected, self.all_removed = 0, 0, 0.0
        self.violated, self.removed = 0, 0.0  # of the last step

    def batch(self, examples: list[Example], step: int) -> list[Example]:
        """L = CE(current rows): kept rows only constrain the step."""
        self.drawn = self.draw(self.replay_rows or len(examples), step)
        return weigh(examples, 1.0)

    def draw(self, count: int, step: int) -> list[list[Row]]:
        """The rows of each constraint: `count` of every earlier task of which rows are kept."""
        kept: dict[int, list[Row]] = {}
        for row, task in zip(self.memory.rows, self.memory.tasks, strict=True):
            kept.setdefault(task, []).append(row)
        return [Memory(0, seed=self.seed, rows=rows).draw(count, self.task, step, task) for task, rows in kept.items()]

    def passes(self, rows: int, task: int) -> tuple[float, float]:
        on_memory = task * self.asked(rows, task)
        return rows + on_memory, rows + on_memory

    def loss(self, part: Part) -> Tensor:
        self.rows_at_once = max(self.rows_at_once, len(part.ids))
        return Method.loss(self, part)

    def after_backward(self) -> None:
        if not self.drawn:
            return
        parameters = self.adapters.parameters()
        g = step_gradient(parameters)
        G = torch.stack(
            [mean_gradient(self.adapters, self.encoder, rows, self.rows_at_once) for rows in self.drawn]
        )  # (tasks, parameters)
        kept = self.project(g, G)
        self.replayed += sum(len(rows) for rows in self.drawn)
        self.steps += 1
        self.violated = int((G @ g < 0).sum())
        self.removed = float((kept - g).norm() / g.norm().clamp_min(1e-30))
        if self.violated:
            self.projected += 1
            self.all_removed += self.removed
            set_step_gradient(parameters, kept)

    def project(self, g: Tensor, G: Tensor) -> Tensor:
        return project(g, G, self.margin)

    def told(self) -> dict[str, float]:
        return {"violated": self.violated, "removed": self.removed} if self.steps else {}

    def checks(self) -> list[Check]:
        share, removed = self.projected / max(1, self.steps), self.all_removed / max(1, self.projected)
        return [
            *super().checks(),
            Check("projected steps", share, share > 0 or self.task == 0, PROJECTED),
            Check("gradient changed", removed, removed > 0 or self.task == 0, "mean ||g~ - g|| / ||g|| of those steps"),
        ]


def project(g: Tensor, G: Tensor, margin: float = 0.0) -> Tensor:
    """g~ (parameters,) for g (parameters,) and G (tasks, parameters); g itself where no inner product is negative."""
    q = G @ g
    if bool((q >= 0).all()):
        return g
    rounding = 10 * torch.finfo(G.dtype).eps
    v = dual((G @ G.T).double().cpu().numpy(), q.double().cpu().numpy(), margin, rounding)
    return g + torch.from_numpy(v).to(G) @ G


def dual(P: np.ndarray, q: np.ndarray, margin: float, rounding: float) -> np.ndarray:
    """argmin_{v >= margin} ½ vᵀ P v + qᵀ v for P = G Gᵀ and q in its range, by least squares with bounds.

    With v = margin + D u, D = diag(1 / ||g_k||) and D P D = Rᵀ R it is min_{u >= 0} ||R u + R⁻ᵀ D (q + margin P 1)||.
    Eigenvalues of D P D up to `rounding` count as 0: the g_k may depend on each other.
    """
    D = 1 / np.sqrt(np.where(np.diag(P) > 0, np.diag(P), 1.0))
    values, vectors = np.linalg.eigh(D[:, None] * P * D)
    kept = values > rounding
    R = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    c = D * (q + margin * P.sum(1))
    # not scipy.optimize.nnls: that of SciPy 1.17 leaves the optimum where gradients there are 0 up to rounding
    u = lsq_linear(R, -(vectors[:, kept].T @ c) / np.sqrt(values[kept]), (0, np.inf), method="bvls", tol=1e-12).x
    return margin + D * u
