"""DualLoRA, reconstructed: one part of a task's adapter reads no earlier inputs, the other only directions of theirs.

    A_t = [O_t; R_t],   B_t A_t = B_O O_t + B_R R_t,   both trained                        after arXiv 2411.00623
    orthogonal   O_t <- O_t (I - U Uᵀ)       U: orthonormal basis of earlier tasks' inputs (in, m)
    residual     R_t <- R_t V Vᵀ             V: leading eigenvectors of U Uᵀ C_t U Uᵀ, the task's basis in U's span
    after the task:  U <- [U, leading eigenvectors of (I - U Uᵀ) C_t (I - U Uᵀ)], as few as hold the share ε of tr(C_t)

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
from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.methods.base import Check, State
from forgetless.methods.incremental import Incremental
from forgetless.methods.inflora import extended, new_directions
from forgetless.model.adapters import Pair
from forgetless.model.encoder_decoder import refuse_encoder_decoder
from forgetless.model.inputs import Moments, second_moments

ROUNDING = 1e-3


class DualLoRAReconstructed(Incremental):
    """DualLoRA as far as its abstract describes it, without its memory at inference.

    Args:
        energy: ε, share of a task's input energy in each layer that later orthogonal parts stay away from
        residual: share of the rank that is the residual part's, from 0 to 1
    """

    paper = "2411.00623"
    summary = "a new adapter per task: one part reads no earlier task's inputs, the other only directions of theirs"
    extra_memory = "one frozen pair of rank r a finished task; old inputs' directions, up to in x in a layer"
    extra_compute = "two passes over each task's rows, two eigendecompositions of in x in a layer and task; projections"
    plain = Incremental
    example: ClassVar[dict] = {"energy": 0.6}

    def __init__(self, energy: float = 0.95, residual: float = 0.5):
        if not 0 < energy <= 1:
            raise UsageError(f"energy {energy}: a share of the inputs' energy, above 0, at most 1")
        if not 0 <= residual <= 1:
            raise UsageError(f"residual {residual}: a share of the rank, from 0 to 1")
        self.energy, self.residual = energy, residual

    def start(self, adapters, encoder, seed) -> None:
        refuse_encoder_decoder(
            adapters.model, "duallora_reconstructed", "it looks at what a decoder alone reads; take another method"
        )
        super().start(adapters, encoder, seed)
        self.U: dict[str, Tensor] = {}  # (in, m) by the first layer that reads these inputs
        self.V: dict[str, Tensor] = {}  # (in, residual rows), of the task in training
        self.protected: dict[str, Tensor] = {}  # U in the task in training
        self.first: dict[str, str] = {}
        self.rows = round(self.residual * adapters.settings.r)  # of R_t

    def prepare(self, examples: list[Example]) -> None:
        self.protected = dict(self.U)
        if not self.U:
            return
        moments = self._moments(examples)
        self.V = {first: shared_directions(C, self.U[first], self.rows) for first, C in moments.of.items()}
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
            if self.protected and (A := of(pair)) is not None:
                A.copy_(projected(A, self.protected[self.first[name]], self.V[self.first[name]]))

    def end_task(self, task: int, rows: tuple[Row, ...]) -> None:
        moments = self._moments([self.encoder(row) for row in rows])
        self.U = {first: extended(C, self.U.get(first), self.energy) for first, C in moments.of.items()}

    def _moments(self, examples: list[Example]) -> Moments:
        moments = second_moments(self.adapters, examples, self.encoder.tokenizer.pad_token_id)
        self.first = moments.first
        return moments

    def state(self) -> State:
        return State({f"{first}.U": U for first, U in self.U.items()}, {})

    def resume(self, adapter: dict[str, Pair], state: State, task: int) -> None:
        super().resume(adapter, state, task)
        device = next(iter(self.adapters.pairs().values())).A.device
        self.U = {name.removesuffix(".U"): U.to(device) for name, U in state.tensors.items()}

    def checks(self) -> list[Check]:
        outside, inside = zip(*(self._astray(name, pair) for name, pair in self.adapters.pairs().items()), strict=True)
        filled = max(U.shape[1] / U.shape[0] for U in self.U.values())
        return [
            *super().checks(),
            Check("overlap with old inputs", max(outside), max(outside) < ROUNDING, "largest ||O_t U|| / ||A_t||"),
            Check("residual elsewhere", max(inside), max(inside) < ROUNDING, "largest ||R_t (I - V Vᵀ)|| / ||A_t||"),
            Check("inputs protected", filled, True, "m / in, after this task, in the layer with the most; 1: no room"),
        ]

    def _astray(self, name: str, pair: Pair) -> tuple[float, float]:
        """What of O_t is inside U's span and what of R_t outside V's, as shares of A_t."""
        if not self.protected:
            return 0.0, 0.0
        A, V = pair.A.detach(), self.V[self.first[name]]
        O, R = A.split([len(A) - self.rows, self.rows])
        size = A.norm().clamp_min(1e-30)
        return float((O @ self.protected[self.first[name]]).norm() / size), float((R - (R @ V) @ V.T).norm() / size)


def shared_directions(C: Tensor, U: Tensor, count: int) -> Tensor:
    """The leading eigenvectors of U Uᵀ C U Uᵀ, (in, count); 0 where U has fewer directions, or C nothing in them."""
    return U @ new_directions(U.T @ C @ U, None, count)


def projected(A: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """[O (I - U Uᵀ); R V Vᵀ], where R has as many rows as V has columns."""
    O, R = A.split([len(A) - V.shape[1], V.shape[1]])
    return torch.cat([O - (O @ U) @ U.T, (R @ V) @ V.T])
