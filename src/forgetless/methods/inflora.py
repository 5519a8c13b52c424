"""InfLoRA: A is fixed before a task, in the span of its inputs and orthogonal to all earlier tasks' inputs.

    C_t = mean of x xᵀ over the task's tokens, per layer            M: orthonormal basis of old inputs (in, m)
    A_t = (leading r eigenvectors of (I - M Mᵀ) C_t (I - M Mᵀ))ᵀ / √3,   frozen;   only B_t is trained
    after the task:  M grows by the task's inputs (spared_inputs.py)         Liang and Li, CVPR 2024, 2404.00228

A_t M = 0, so ΔW_t x = 0 for every x in M's span: what earlier tasks' rows read is answered as before.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from forgetless.data.batches import Example
from forgetless.methods.base import ROWS, Check
from forgetless.methods.spared_inputs import ROUNDING, SparedInputs, new_directions, share_inside


class InfLoRA(SparedInputs):
    """Interference-free LoRA.

    Args:
        energy: ε, share of a task's input energy in each layer that later tasks stay away from
    """

    paper = "2404.00228"
    adopts = ROWS
    summary = "a new adapter per task whose A reads the task's inputs and none of the earlier tasks'"
    extra_compute = "two passes over each task's rows, and two eigendecompositions of in x in a layer and task"
    off: ClassVar[str] = "A is built from the inputs in every task, the first too"
    example: ClassVar[dict] = {"energy": 0.8}

    def __init__(self, energy: float = 0.95):
        super().__init__(energy)

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        self.adapters.train_only("B")

    def prepare(self, examples: list[Example]) -> None:
        super().prepare(examples)
        moments, r = self.moments(examples), self.adapters.settings.r
        new = {first: new_directions(C, self.M.get(first), r) for first, C in moments.of.items()}
        with torch.no_grad():
            for name, pair in self.adapters.pairs().items():
                pair.A.copy_(new[self.first[name]].T / math.sqrt(3))

    def checks(self) -> list[Check]:
        pairs = {name: pair.A.detach() for name, pair in self.adapters.pairs().items()}
        old = {name: self.spared[first] for name, first in self.first.items() if first in self.spared}
        overlap = max((share_inside(pairs[name], M) for name, M in old.items()), default=0.0)
        least = min(int((A.norm(dim=1) > 0).sum()) for A in pairs.values())
        return [
            *super().checks(),
            Check("overlap with old inputs", overlap, overlap < ROUNDING, "largest ||A_t M|| / ||A_t|| over layers"),
            Check("directions of A", least, least > 0, "rows of A_t that are not 0, in the layer with the fewest"),
        ]
