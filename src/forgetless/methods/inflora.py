"""InfLoRA: A is fixed before a task, in the span of its inputs and orthogonal to all earlier tasks' inputs.

    C_t = mean of x xᵀ over the task's tokens, per layer            M: orthonormal basis of old inputs (in, m)
    A_t = (leading r eigenvectors of (I - M Mᵀ) C_t (I - M Mᵀ))ᵀ / √3,   frozen;   only B_t is trained
    after the task:  M <- [M, leading eigenvectors of (I - M Mᵀ) C_t (I - M Mᵀ)], as few as are needed for
                     tr(Mᵀ C_t M) >= ε tr(C_t)                                       Liang and Li, CVPR 2024, 2404.00228

A_t M = 0, so ΔW_t x = 0 for every x in M's span: what earlier tasks' rows read is answered as before.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from forgetless.data.batches import Example
from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.methods.base import Check, State
from forgetless.methods.incremental import Incremental
from forgetless.model.adapters import Pair
from forgetless.model.encoder_decoder import refuse_encoder_decoder
from forgetless.model.inputs import Moments, second_moments

NOTHING = 1e-6  # of the largest eigenvalue of C_t: directions that are rounding
ROUNDING = 1e-3


class InfLoRA(Incremental):
    """Interference-free LoRA.

    Args:
        energy: ε, share of a task's input energy in each layer that later tasks stay away from
    """

    paper = "2404.00228"
    summary = "a new adapter per task whose A reads the task's inputs and none of the earlier tasks'"
    extra_memory = "one frozen pair of rank r a finished task; old inputs' directions, up to in x in a layer"
    extra_compute = "two passes over each task's rows, and two eigendecompositions of in x in a layer and task"
    off: ClassVar[str] = "A is built from the inputs in every task, the first too"
    example: ClassVar[dict] = {"energy": 0.8}

    def __init__(self, energy: float = 0.95):
        if not 0 < energy <= 1:
            raise UsageError(f"energy {energy}: a share of the inputs' energy, above 0, at most 1")
        self.energy = energy

    def start(self, adapters, encoder, seed) -> None:
        refuse_encoder_decoder(adapters.model, "inflora", "it looks at what a decoder alone reads; take another method")
        super().start(adapters, encoder, seed)
        self.adapters.train_only("B")
        self.M: dict[str, Tensor] = {}  # (in, m) by the first layer that reads these inputs
        self.first: dict[str, str] = {}

    def prepare(self, examples: list[Example]) -> None:
        moments = self._moments(examples)
        new = {first: new_directions(C, self.M.get(first), self._r) for first, C in moments.of.items()}
        with torch.no_grad():
            for name, pair in self.adapters.pairs().items():
                pair.A.copy_(new[moments.first[name]].T / math.sqrt(3))

    def end_task(self, task: int, rows: tuple[Row, ...]) -> None:
        moments = self._moments([self.encoder(row) for row in rows])
        self.protected = {first: M for first, M in self.M.items()}  # in this task, for `checks`
        self.M = {first: extended(C, self.M.get(first), self.energy) for first, C in moments.of.items()}

    @property
    def _r(self) -> int:
        return self.adapters.settings.r

    def _moments(self, examples: list[Example]) -> Moments:
        moments = second_moments(self.adapters, examples, self.encoder.tokenizer.pad_token_id)
        self.first = moments.first
        return moments

    def state(self) -> State:
        return State({f"{first}.M": M for first, M in self.M.items()}, {})

    def resume(self, adapter: dict[str, Pair], state: State, task: int) -> None:
        super().resume(adapter, state, task)
        device = next(iter(self.adapters.pairs().values())).A.device
        self.M = {name.removesuffix(".M"): M.to(device) for name, M in state.tensors.items()}

    def checks(self) -> list[Check]:
        pairs = {name: pair.A.detach() for name, pair in self.adapters.pairs().items()}
        overlaps = [
            float((A @ M).norm() / A.norm().clamp_min(1e-30))
            for name, A in pairs.items()
            if (M := self.protected.get(self.first[name])) is not None
        ]
        overlap = max(overlaps, default=0.0)
        least = min(int((A.norm(dim=1) > 0).sum()) for A in pairs.values())
        filled = max(M.shape[1] / M.shape[0] for M in self.M.values())
        return [
            *super().checks(),
            Check("overlap with old inputs", overlap, overlap < ROUNDING, "largest ||A_t M|| / ||A_t|| over layers"),
            Check("directions of A", least, least > 0, "rows of A_t that are not 0, in the layer with the fewest"),
            Check("inputs protected", filled, True, "m / in, after this task, in the layer with the most; 1: no room"),
        ]


def new_directions(C: Tensor, M: Tensor | None, r: int) -> Tensor:
    """Leading r eigenvectors of C outside M's span, (in, r); 0 where no inputs are left."""
    values, vectors = leading_outside(C, M)
    vectors = vectors[:, :r] * (values[:r] > NOTHING * C.trace() / len(C))
    return torch.nn.functional.pad(vectors, (0, r - vectors.shape[1]))


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
