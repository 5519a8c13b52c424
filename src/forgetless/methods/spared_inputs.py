"""What InfLoRA and DualLoRA share: earlier tasks' inputs, layer by layer, as an orthonormal basis that grows.

C_t = mean of x xᵀ over the task's tokens, per layer            M: orthonormal basis of old inputs (in, m)
after the task:  M <- [M, leading eigenvectors of (I - M Mᵀ) C_t (I - M Mᵀ)], as few as are needed for
                 tr(Mᵀ C_t M) >= ε tr(C_t)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from forgetless.data.batches import Example
from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.methods.base import Check, State
from forgetless.methods.incremental import Incremental
from forgetless.model.encoder_decoder import refuse_reading_inputs
from forgetless.model.inputs import Moments, second_moments

NOTHING = 1e-6  # of the mean eigenvalue of C_t: directions that are rounding
ROUNDING = 1e-3


class SparedInputs(Incremental):
    """A new adapter per task, beside a basis M of what earlier tasks' rows gave each layer to read."""

    extra_memory = "one frozen pair of rank r a finished task; old inputs' directions, up to in x in a layer"

    def __init__(self, energy: float):
        if not 0 < energy <= 1:
            raise UsageError(f"energy {energy}: a share of the inputs' energy, above 0, at most 1")
        self.energy = energy

    def start(self, adapters, encoder, seed) -> None:
        refuse_reading_inputs(adapters.model)
        super().start(adapters, encoder, seed)
        self.M: dict[str, Tensor] = {}  # (in, m) by the first layer that reads these inputs
        self.spared: dict[str, Tensor] = {}  # M of the task in training
        self.first: dict[str, str] = {}  # by layer: the first that reads what it reads

    def prepare(self, examples: list[Example]) -> None:
        self.spared = dict(self.M)

    def end_task(self, task: int, rows: tuple[Row, ...]) -> None:
        moments = self.moments([self.encoder(row) for row in rows])
        self.M = {first: extended(C, self.M.get(first), self.energy) for first, C in moments.of.items()}

    def moments(self, examples: list[Example]) -> Moments:
        """C of the examples' tokens, with the adapters as they are."""
        moments = second_moments(self.adapters, examples, self.encoder.tokenizer.pad_token_id)
        self.first = moments.first
        return moments

    def state(self) -> State:
        return State({f"{first}.M": M for first, M in self.M.items()}, {})

    def restore(self, state: State) -> None:
        self.M = {name.removesuffix(".M"): M.to(self.adapters.device) for name, M in state.tensors.items()}

    def checks(self) -> list[Check]:
        filled = max(M.shape[1] / M.shape[0] for M in self.M.values())
        meaning = "m / in, after this task, in the layer with the most; 1: no room"
        return [*super().checks(), Check("inputs protected", filled, True, meaning)]


def new_directions(C: Tensor, M: Tensor | None, r: int) -> Tensor:
    """Leading r eigenvectors of C outside M's span, (in, r); 0 where no inputs are left."""
    values, vectors = leading_outside(C, M)
    vectors = vectors[:, :r] * (values[:r] > NOTHING * C.trace() / len(C))
    return pad(vectors, (0, r - vectors.shape[1]))


def extended(C: Tensor, M: Tensor | None, energy: float) -> Tensor:
    """M with as few more directions as are needed to hold the share `energy` of C's trace; at least one in all."""
    values, vectors = leading_outside(C, M)
    inside = C.trace() - values.sum()
    held = inside + torch.cat([values.new_zeros(1), values.cumsum(0)])  # with 0, 1, 2, ... more directions
    more = int((held < energy * C.trace() * (1 - NOTHING)).sum())
    if M is None:
        return vectors[:, : max(more, 1)].contiguous()
    return torch.cat([M, vectors[:, : min(more, len(C) - M.shape[1])]], dim=1)


def leading_outside(C: Tensor, M: Tensor | None) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest first, and eigenvectors of (I - M Mᵀ) C (I - M Mᵀ)."""
    outside = torch.eye(len(C), device=C.device) - (M @ M.T if M is not None else 0)
    values, vectors = torch.linalg.eigh(outside @ C @ outside)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def share_inside(A: Tensor, M: Tensor) -> float:
    """||A M|| / ||A||: what A (rank, in) reads of M's span (in, m)."""
    return float((A @ M).norm() / A.norm().clamp_min(1e-30))
