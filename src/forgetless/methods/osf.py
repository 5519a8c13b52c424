"""OSF: of each weight the leading singular directions are kept, and all of the rest is trained.

    W = U_h Σ_h V_hᵀ + U Σ Vᵀ,   h: the k leading directions;   U, Σ, V are trained           arXiv 2504.07097
    ∂U <- (1 - U_h U_hᵀ) ∂U,   ∂V <- ∂V (1 - V_h V_hᵀ),   and so U and V after each step

Then U_hᵀ ΔW = 0 and ΔW V_h = 0: what W does along its leading directions stays. Each task decomposes anew what the
tasks before have made of W. ΔW is of the layer's own size: deployed, it is a pair whose one factor is the identity.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.methods.base import ADAPTER, Check, Method, State
from forgetless.model.adapters import Pair, whole

ROUNDING = 1e-3


class Low(NamedTuple):
    """What is trained of a layer: U Σ Vᵀ."""

    U: nn.Parameter  # (out, low)
    S: nn.Parameter  # (low,)
    V: nn.Parameter  # (low, in), the rows are directions

    def product(self) -> Tensor:
        return (self.U * self.S).detach() @ self.V.detach()


class OSF(Method):
    """Orthogonal subspace fine-tuning.

    Args:
        effective_rank: share of each layer's singular directions, the leading ones, that are kept
    """

    paper = "2504.07097"
    adopts = ADAPTER
    summary = "full matrices trained outside the leading singular directions of the weights, which are kept"
    plain_pairs = False
    extra_memory = "five matrices of each adapted layer's size; the deployed adapter has twice the layers' size"
    extra_compute = "an SVD of each adapted layer at each task's start; two more products of about a layer's own size"
    within_task: ClassVar[tuple[str, ...]] = ("trained",)
    off: ClassVar[str] = "whatever is kept, the rest is trained at full rank, in the first task too"

    def __init__(self, effective_rank: float = 0.5):
        if not 0 < effective_rank < 1:
            raise UsageError(f"effective_rank {effective_rank}: a share of the directions, above 0 and below 1")
        self.effective_rank = effective_rank

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        adapters.train_only("")
        self.low: dict[str, Low] = {}
        self.learnt: dict[str, Tensor] = {}  # ΔW of the finished tasks
        for name in adapters.pairs():
            W = adapters.base_weight(name)
            low = min(W.shape) - self._kept(W)
            shapes = (W.shape[0], low), (low,), (low, W.shape[1])
            self.low[name] = Low(*(nn.Parameter(torch.zeros(shape, device=W.device)) for shape in shapes))
            self.learnt[name] = torch.zeros(W.shape, device=W.device)
        self.rest = dict(self.learnt)  # what is added to W and U Σ Vᵀ; ΔW = rest + U Σ Vᵀ
        adapters.compute_by(self._update, [one for low in self.low.values() for one in low])

    def _kept(self, W: Tensor) -> int:
        return max(1, int(self.effective_rank * min(W.shape)))

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.high: dict[str, tuple[Tensor, Tensor]] = {}  # U_h (out, k) and V_hᵀ (k, in)
        self.before = self.learnt
        for name, low in self.low.items():
            W = self.adapters.base_weight(name).float() + self.learnt[name]
            (U, S, V), k = torch.linalg.svd(W, full_matrices=False), self._kept(W)
            self.high[name] = U[:, :k].contiguous(), V[:k].contiguous()
            with torch.no_grad():
                for mine, part in zip(low, (U[:, k:], S[k:], V[k:]), strict=True):
                    mine.copy_(part)
        self.rest = {name: learnt - self.low[name].product() for name, learnt in self.learnt.items()}

    def _update(self, name: str, x: Tensor) -> Tensor:
        x, (U, S, V) = x.float(), self.low[name]
        return linear(x, self.rest[name]) + linear(linear(x, V) * S, U)

    def after_backward(self) -> None:
        self._project(gradients=True)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._project(gradients=False)

    @torch.no_grad()
    def _project(self, gradients: bool) -> None:
        for name, low in self.low.items():
            U, V = (low.U.grad, low.V.grad) if gradients else (low.U, low.V)
            U_h, V_h = self.high[name]
            if U is not None and V is not None:
                U -= U_h @ (U_h.T @ U)
                V -= (V @ V_h.T) @ V_h

    @torch.no_grad()
    def end_task(self, task: int, rows: tuple[Row, ...]) -> None:
        """From here on it computes with what it deploys, to the bit."""
        scale = self._scale
        self.learnt = {name: scale * ((self.rest[name] + low.product()) / scale) for name, low in self.low.items()}
        self._settle()

    def _settle(self) -> None:
        self.rest = self.learnt
        for low in self.low.values():
            low.S.data.zero_()

    @property
    def _scale(self) -> float:
        return next(iter(self.adapters.pairs().values())).scale

    @property
    def trained(self) -> list[Tensor]:
        return [one.detach() for low in self.low.values() for one in low]

    @trained.setter
    def trained(self, values: list[Tensor]) -> None:
        for mine, value in zip(self.trained, values, strict=True):
            mine.copy_(value)

    def export(self) -> dict[str, Pair]:
        largest = max(min(one.shape) for one in self.learnt.values())
        return {name: whole(one / self._scale, largest, self._scale) for name, one in self.learnt.items()}

    def resume(self, adapter: dict[str, Pair], state: State, task: int) -> None:
        self._take(adapter)

    def adopt(self, task: int, pairs: dict[str, Pair], rows: tuple[Row, ...] | None) -> dict[str, Pair]:
        """The adopted update is what the next task decomposes the weights with."""
        self.task = task
        self._take(pairs)
        return self.export()

    def _take(self, pairs: dict[str, Pair]) -> None:
        device = self.adapters.device
        given = {name: pair.scale * (pair.B.float() @ pair.A.float()) for name, pair in pairs.items()}
        self.learnt = {name: given.get(name, torch.zeros_like(one)).to(device) for name, one in self.learnt.items()}
        self._settle()

    def checks(self) -> list[Check]:
        now = {name: learnt - self.before[name] for name, learnt in self.learnt.items()}
        size = sum(float(one.square().sum()) for one in now.values()) ** 0.5
        inside = max(share_inside(now[name], U_h, V_h) for name, (U_h, V_h) in self.high.items())
        meaning = "largest ||U_hᵀ ΔW|| / ||ΔW|| or ||ΔW V_h|| / ||ΔW|| of the task's own update, over layers"
        return [
            Check("update", size, size > 0, "norm of what this task has added to the weights"),
            Check("in kept directions", inside, inside < ROUNDING, meaning),
        ]


def share_inside(update: Tensor, U_h: Tensor, V_h: Tensor) -> float:
    """max(||U_hᵀ ΔW||, ||ΔW V_h||) / ||ΔW||, with V_hᵀ's rows (k, in) given as V_h."""
    within = max(float((U_h.T @ update).norm()), float((update @ V_h.T).norm()))
    return within / max(float(update.norm()), 1e-30)
