"""SD-LoRA (first S-LoRA): the directions of finished tasks are frozen, and all magnitudes go on being trained.

    W_t = W_0 + s ( Σ_{j<t} a_j D_j + B_t A_t ),   D_j = B_j A_j / (||A_j||_F ||B_j||_F)          arXiv 2501.13198

The newest direction's magnitude is the size of its pair: a_t D_t = B_t A_t with a_t = ||A_t||_F ||B_t||_F, so at a
task border nothing jumps. Variants: RR (`rank_reduction`), the rank falls with the task index; KD (`fold`), a new
direction that is nearly Σ_{j<t} c_j D_j is dropped, and a_j <- a_j + c_j.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.methods.base import Check, State
from forgetless.methods.incremental import Incremental
from forgetless.model.adapters import Magnitudes, Pair, inner, join

REDUCED = ((8, 0.6), (4, 0.8), (0, 1.0))  # (from this task on, share of the rank): 10, 8, 6 of 10


class SDLoRA(Incremental):
    """Scalable decoupled LoRA.

    Args:
        shared: one magnitude a task for all layers, as in the released code, instead of one a task and layer
        rank_reduction: variant RR: the rank is r for tasks 1 to 4, 0.8 r for tasks 5 to 8, then 0.6 r
        fold: variant KD: drop a new direction whose part outside the earlier ones has at most this share of its square
            norm; 0: never
    """

    paper = "2501.13198"
    adopts = "its directions have magnitudes that it trained, and an adopted adapter has none; take olora"
    plain_pairs = False
    summary = "a new direction per task, earlier ones frozen, the magnitudes of all trained on"
    extra_compute = "PEFT's own forward, and one more product a layer, of rank r x finished tasks"
    within_task: ClassVar[tuple[str, ...]] = ("magnitudes",)

    def __init__(self, shared: bool = False, rank_reduction: bool = False, fold: float = 0.0):
        if not 0 <= fold < 1:
            raise UsageError(f"fold {fold}: a share of the squared norm, from 0 (never) to below 1")
        self.shared, self.rank_reduction, self.fold = shared, rank_reduction, fold

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        self.a = nn.Parameter(torch.empty(0))  # (1 or layers, directions)
        self.ranks: tuple[int, ...] = ()  # of the frozen directions

    def begin_task(self, task: int) -> None:
        if task > 0 and self._trained:
            self._freeze()
        self._trained = False
        super().begin_task(task)
        self.adapters.reset(task)
        with torch.no_grad():
            for pair in self.adapters.pairs().values():
                pair.A[self._rank(task) :] = 0  # with B = 0 these ranks get no gradient: they stay 0
        self.a_before = self.a.detach().clone()
        self.folded = 0.0

    def _rank(self, task: int) -> int:
        share = next(share for first, share in REDUCED if task >= first) if self.rank_reduction else 1.0
        return math.ceil(round(share * self.adapters.settings.r, 9))

    def _freeze(self) -> None:
        """The trained pairs become directions, with the magnitudes that leave the function as it is."""
        r = self._rank(self.task)
        new = {name: Pair(pair.A[:r], pair.B[:, :r], pair.scale) for name, pair in self.adapters.pairs().items()}
        a = torch.stack([magnitude(pair) for pair in new.values()])  # (layers,)
        a = a.square().mean().sqrt().reshape(1) if self.shared else a
        each = a.expand(len(new))
        past = self.adapters.past()
        pairs = {name: [direction(pair, a_j)] for (name, pair), a_j in zip(new.items(), each, strict=True)}
        magnitudes = torch.cat([self.a.detach().to(a.device).reshape(len(a), -1), a[:, None]], dim=1)
        self._keep(
            {name: join([past[name], *new] if past else new) for name, new in pairs.items()},
            magnitudes, (*self.ranks, r),
        )  # fmt: skip

    def _keep(self, directions: dict[str, Pair], magnitudes: Tensor, ranks: tuple[int, ...]) -> None:
        self.adapters.set_past(directions)
        self.a, self.ranks = nn.Parameter(magnitudes), ranks
        self.adapters.magnify(Magnitudes(self.a, ranks))

    @property
    def magnitudes(self) -> list[Tensor]:
        return [self.a.detach()] if self.ranks else []

    @magnitudes.setter
    def magnitudes(self, values: list[Tensor]) -> None:
        for value in values:
            self.a.data.copy_(value)

    def end_task(self, task: int, rows: tuple[Row, ...]) -> None:
        if self.fold and self.ranks:
            self._fold()

    def _fold(self) -> None:
        """Drops the new direction if Σ c_j D_j, with least-squares c, is near enough to it."""
        past = self.adapters.past()
        new = {name: Pair(p.A.detach(), p.B.detach(), p.scale) for name, p in self.adapters.pairs().items()}
        names = list(new)
        gram = torch.stack([gram_of(parts(past[name], self.ranks)) for name in names])  # (layers, t-1, t-1)
        right = torch.stack([
            torch.tensor([inner(old, new[name]) for old in parts(past[name], self.ranks)], dtype=torch.float64)
            for name in names
        ])  # (layers, t-1)  # fmt: skip
        if self.shared:
            gram, right = gram.sum(0, keepdim=True), right.sum(0, keepdim=True)
        c = (torch.linalg.pinv(gram, hermitian=True) @ right[..., None])[..., 0]
        whole = sum(inner(pair, pair) for pair in new.values())
        outside = 1 - float((c * right).sum()) / max(whole, 1e-30)
        if outside <= self.fold:
            with torch.no_grad():
                self.a.add_(c.to(self.a))
                for pair in self.adapters.pairs().values():
                    pair.B.zero_()
            self.folded, self._trained = 1 - outside, False

    def state(self) -> State:
        if not self.ranks:
            return State({}, {"ranks": [], "trained": self._trained})
        frozen = {f"{name}.B": pair.B for name, pair in self.adapters.past().items()}
        return State(frozen | {"magnitudes": self.a}, {"ranks": list(self.ranks), "trained": self._trained})

    def resume(self, adapter: dict[str, Pair], state: State, task: int) -> None:
        """The deployed adapter holds the directions times their magnitudes, then the trained pair."""
        self.task, self._trained = task, state.values["trained"]
        r = self.adapters.settings.r
        current = {n: Pair(pair.A[-r:], pair.B[:, -r:], pair.scale) for n, pair in adapter.items()}
        self.adapters.set_current(current)
        if state.values["ranks"]:
            directions = {n: Pair(pair.A[:-r], state.tensors[f"{n}.B"], pair.scale) for n, pair in adapter.items()}
            magnitudes = state.tensors["magnitudes"].to(self.adapters.device)
            self._keep(directions, magnitudes, tuple(state.values["ranks"]))

    def told(self) -> dict[str, float]:
        means = self.a.detach().mean(0).tolist() if self.ranks else []
        return {f"magnitude_{j}": a for j, a in enumerate(means, start=1)}

    def checks(self) -> list[Check]:
        adapter, frozen = super().checks()
        if self.folded:
            meaning = "share of the new direction's square norm that the earlier ones took over; it was dropped"
            return [frozen, Check("folded", self.folded, True, meaning)]
        change = (self.a.detach() - self.a_before).norm() / self.a_before.norm().clamp_min(1e-12) if self.ranks else 0.0
        moved = float(change)
        meaning = "||a - a at the task's start|| / ||a at the task's start||, over the frozen directions"
        return [adapter, frozen, Check("magnitudes moved", moved, moved > 0 or not self.ranks, meaning)]


def magnitude(pair: Pair) -> Tensor:
    """||A||_F ||B||_F."""
    return pair.A.detach().norm() * pair.B.detach().norm()


def direction(pair: Pair, a: Tensor) -> Pair:
    """B A / a, with A of norm 1; D = B A / (||A||_F ||B||_F) for a = `magnitude(pair)`."""
    A, B = pair.A.detach(), pair.B.detach()
    return Pair(A / A.norm(), B * (A.norm() / a.clamp_min(1e-12)), pair.scale)


def parts(pair: Pair, ranks: tuple[int, ...]) -> list[Pair]:
    """A joined pair's pairs."""
    both = zip(pair.A.split(ranks), pair.B.split(ranks, dim=1), strict=True)
    return [Pair(A, B, pair.scale) for A, B in both]


def gram_of(pairs: list[Pair]) -> Tensor:
    """<ΔW_i, ΔW_j>, (pairs, pairs), in fp64."""
    return torch.tensor([[inner(a, b) for b in pairs] for a in pairs], dtype=torch.float64)
