"""OPLoRA: the update stays out of the base weights' leading singular directions, on both sides.

    ΔW = s P_L B A P_R,   P_L = I - U_k U_kᵀ,   P_R = I - V_k V_kᵀ,   W_0 = U Σ Vᵀ          arXiv 2510.13003

so that (W_0 + ΔW) v_i = σ_i u_i and u_iᵀ (W_0 + ΔW) = σ_i v_iᵀ for i <= k: these triples are kept.
The projection is worked on the factors: gradients before the optimizer, B <- P_L B and A <- A P_R after it. P is
linear and idempotent, so B A is at every step what training free factors through P_L and P_R would give
(docs/methods/oplora.md).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.methods.base import ADAPTER, Check, Method
from forgetless.model.adapters import Pair

ROUNDING = 1e-4  # of a projected factor's norm


class OPLoRA(Method):
    """Orthogonal projection LoRA.

    Args:
        k: leading singular directions of each layer that are kept; in a layer at most min(in, out) - r
    """

    paper = "2510.13003"
    adopts = ADAPTER
    summary = "one adapter, projected off the base weights' leading singular directions"
    extra_memory = "k (in + out) numbers a layer"
    extra_compute = "an eigendecomposition a layer at the start; four products with k directions a layer and step"
    off: ClassVar[dict] = {"k": 0}
    example: ClassVar[dict] = {"k": 4}

    def __init__(self, k: int = 64):
        if k < 0:
            raise UsageError(f"k {k}: 0 (nothing is projected) or more")
        self.k = k

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        self.UV: dict[str, tuple[Tensor, Tensor]] = {}  # U_k (out, k) and V_k (in, k) of each layer
        for name, pair in adapters.pairs().items():
            (r, width), out = pair.A.shape, pair.B.shape[0]
            self.UV[name] = leading(adapters.base_weight(name), max(0, min(self.k, min(out, width) - r)))
        self._project(gradients=False)

    def adopt(self, task: int, pairs: dict[str, Pair], rows: tuple[Row, ...] | None) -> dict[str, Pair]:
        """What is trained on is projected, so the adopted update must stay out of the kept directions already."""
        taken = super().adopt(task, pairs, rows)
        lost = max(_lost(pair, *self.UV[name]) for name, pair in taken.items())
        if lost > ROUNDING:
            raise UsageError(
                f"OPLoRA cannot take this adapter over: up to {lost:.0%} of a layer's update lies in the leading "
                "singular directions of the base, and the first step would take that out; take olora, or a smaller k"
            )
        self._project(gradients=False)  # the ranks that the adapter leaves free
        return self.export()

    def after_backward(self) -> None:
        self._project(gradients=True)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._project(gradients=False)

    def _project(self, gradients: bool) -> None:
        with torch.no_grad():
            for name, pair in self.adapters.pairs().items():
                A, B = (pair.A.grad, pair.B.grad) if gradients else (pair.A, pair.B)
                if A is not None and B is not None:
                    for tensor, projected in zip((A, B), projected_off(A, B, *self.UV[name]), strict=True):
                        tensor.copy_(projected)

    def checks(self) -> list[Check]:
        worst = max(alignment(pair, *self.UV[name]) for name, pair in self.adapters.pairs().items())
        meaning = "largest share of a factor in the kept directions, ||U_kᵀB||/||B|| or ||A V_k||/||A||"
        return [*super().checks(), Check("in kept directions", worst, worst < ROUNDING, meaning)]


def leading(W: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """U_k (out, k) and V_k (in, k) of W's k largest singular values, from W Wᵀ or Wᵀ W, the smaller, in fp64."""
    if W.shape[0] > W.shape[1]:
        V, U = leading(W.T, k)
        return U, V
    W = W.double()
    vectors = torch.linalg.eigh(W @ W.T).eigenvectors
    U = vectors.flip(1)[:, :k]
    V = torch.linalg.qr(W.T @ U).Q  # W^T u_i = σ_i v_i: only the signs are not v_i's
    return U.float().contiguous(), V.float().contiguous()


def projected_off(A: Tensor, B: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """A (I - V Vᵀ) and (I - U Uᵀ) B."""
    return A - (A @ V) @ V.T, B - U @ (U.T @ B)


def _lost(pair: Pair, U: Tensor, V: Tensor) -> float:
    """||ΔW - P_L ΔW P_R|| / ||ΔW||, ΔW = B A."""
    A, B = pair.A.detach(), pair.B.detach()
    kept_A, kept_B = projected_off(A, B, U, V)
    update = B @ A
    return float((update - kept_B @ kept_A).norm() / update.norm().clamp_min(1e-30))


def alignment(pair: Pair, U: Tensor, V: Tensor) -> float:
    """max(||U_kᵀ B|| / ||B||, ||A V_k|| / ||A||)."""
    A, B = pair.A.detach(), pair.B.detach()
    return max(float((U.T @ B).norm() / B.norm().clamp_min(1e-30)), float((A @ V).norm() / A.norm().clamp_min(1e-30)))
