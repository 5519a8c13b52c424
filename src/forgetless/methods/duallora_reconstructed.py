"""DualLoRA, reconstructed: one part of a task's adapter reads no earlier inputs, the other only directions of theirs.

    A_t = [O_t; R_t],   B_t A_t = B_O O_t + B_R R_t,   both trained                        after arXiv 2411.00623
    orthogonal   O_t <- O_t (I - M Mᵀ)       M: orthonormal basis of earlier tasks' inputs (in, m)
    residual     R_t <- R_t V Vᵀ             V: leading eigenvectors of M Mᵀ C_t M Mᵀ, the task's basis in M's span
    after the task:  M grows by the task's inputs (spared_inputs.py)

C_t: mean of x xᵀ over the task's tokens. Gradients are projected before the optimizer and A after it. The paper's
formulas were not to be had: what is taken from its abstract and what is ours stands on the method's page.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from forgetless.data.batches import Example
from forgetless.errors import UsageError
from forgetless.methods.base import ROWS, Check
from forgetless.methods.incremental import Incremental
from forgetless.methods.spared_inputs import ROUNDING, SparedInputs, new_directions
from forgetless.model.adapters import Pair


class DualLoRAReconstructed(SparedInputs):
    """DualLoRA as far as its abstract describes it, without its memory at inference.

    Args:
        energy: ε, share of a task's input energy in each layer that later orthogonal parts stay away from
        residual: share of the rank that is the residual part's, from 0 to 1
    """

    paper = "2411.00623"
    adopts = ROWS
    summary = "a new adapter per task: one part reads no earlier task's inputs, the other only directions of theirs"
    extra_compute = "two passes over each task's rows, two eigendecompositions of in x in a layer and task; projections"
    plain = Incremental
    example: ClassVar[dict] = {"energy": 0.6}

    def __init__(self, energy: float = 0.95, residual: float = 0.5):
        super().__init__(energy)
        if not 0 <= residual <= 1:
            raise UsageError(f"residual {residual}: a share of the rank, from 0 to 1")
        self.residual = residual

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        self.V: dict[str, Tensor] = {}  # (in, residual rows), of the task in training
        self.rows = round(self.residual * adapters.settings.r)  # of R_t

    def prepare(self, examples: list[Example]) -> None:
        super().prepare(examples)
        if not self.spared:
            return
        moments = self.moments(examples)
        self.V = {first: shared_directions(C, self.spared[first], self.rows) for first, C in moments.of.items()}
        with torch.no_grad():
            for name, pair in self.adapters.pairs().items():
                pair.A[len(pair.A) - self.rows :] = self.V[self.first[name]].T / math.sqrt(3)
        self._project(lambda pair: pair.A.data)

    def after_backward(self) -> None:
        self._project(lambda pair: pair.A.grad)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._project(lambda pair: pair.A.data)

    def _project(self, of: Callable[[Pair], Tensor | None]) -> None:
        for name, pair in self.adapters.pairs().items():
            if self.spared and (A := of(pair)) is not None:
                A.copy_(projected(A, self.spared[self.first[name]], self.V[self.first[name]]))

    def checks(self) -> list[Check]:
        outside, inside = zip(*(self._astray(name, pair) for name, pair in self.adapters.pairs().items()), strict=True)
        return [
            *super().checks(),
            Check("overlap with old inputs", max(outside), max(outside) < ROUNDING, "largest ||O_t M|| / ||A_t||"),
            Check("residual elsewhere", max(inside), max(inside) < ROUNDING, "largest ||R_t (I - V Vᵀ)|| / ||A_t||"),
        ]

    def _astray(self, name: str, pair: Pair) -> tuple[float, float]:
        """What of O_t is inside M's span and what of R_t outside V's, as shares of A_t."""
        if not self.spared:
            return 0.0, 0.0
        A, V = pair.A.detach(), self.V[self.first[name]]
        O, R = A.split([len(A) - self.rows, self.rows])
        size = A.norm().clamp_min(1e-30)
        return float((O @ self.spared[self.first[name]]).norm() / size), float((R - (R @ V) @ V.T).norm() / size)


def shared_directions(C: Tensor, M: Tensor, count: int) -> Tensor:
    """The leading eigenvectors of M Mᵀ C M Mᵀ, (in, count); 0 where M has fewer directions, or C nothing in them."""
    return M @ new_directions(M.T @ C @ M, None, count)


def projected(A: Tensor, M: Tensor, V: Tensor) -> Tensor:
    """[O (I - M Mᵀ); R V Vᵀ], where R has as many rows as V has columns."""
    O, R = A.split([len(A) - V.shape[1], V.shape[1]])
    return torch.cat([O - (O @ M) @ M.T, (R @ V) @ V.T])
