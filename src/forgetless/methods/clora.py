"""CLoRA (Controlled LoRA): fixed random directions are kept out of both factors of the update.

    L = L_t + λ Σ_layers ( 1/2 ||A P_A||_F² + 1/2 ||Bᵀ P_B||_F² )          arXiv 2410.16801

P_A (in, k) and P_B (out, k): random, with orthonormal columns, drawn once. What is pushed into the null space of the
update ΔW = s B A, on both sides, are k directions that no data chose.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from forgetless.errors import UsageError
from forgetless.methods.base import ADAPTER, Check, Method
from forgetless.seeds import generator

MEANING = "square of {} / what random factors have; 1 means that the penalty does nothing"


class CLoRA(Method):
    """Controlled low-rank adaptation.

    Args:
        lam: λ, weight of the penalty
        k: directions kept out of each side; in a layer of width n at most n - r, which leaves the pair its rank
    """

    paper = "2410.16801"
    adopts = ADAPTER
    summary = "one adapter, kept out of fixed random directions on both sides"
    extra_memory = "k (in + out) numbers a layer"
    extra_compute = "two products with k directions a layer and step, whatever the batch"
    off: ClassVar[dict] = {"lam": 0.0}
    example: ClassVar[dict] = {"lam": 0.1, "k": 8}

    def __init__(self, lam: float = 1.0, k: int = 512):
        if lam < 0 or k < 1:
            raise UsageError(f"clora: lam {lam}, k {k}: lam is 0 or more, k is 1 or more")
        self.lam, self.k = lam, k

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        self.P: dict[str, tuple[Tensor, Tensor]] = {}  # P_A and P_B of each layer
        for name, pair in adapters.pairs().items():
            (r, width), out = pair.A.shape, pair.B.shape[0]
            self.P[name] = tuple(  # type: ignore[assignment]
                orthonormal(n, max(1, min(self.k, n - r)), seed, side, name).to(pair.A.device)
                for side, n in (("A", width), ("B", out))
            )

    def penalty(self) -> Tensor | None:
        if not self.lam:
            return None
        terms = [controlled(pair.A, pair.B, *self.P[name]) for name, pair in self.adapters.pairs().items()]
        return self.lam * torch.stack(terms).sum()

    def checks(self) -> list[Check]:
        inputs, outputs = self._shares()
        acts = max(inputs, outputs) < 1 or not self.lam
        return [
            *super().checks(),
            Check("A in P_A", inputs, acts, MEANING.format("||A P_A||")),
            Check("B in P_B", outputs, acts, MEANING.format("||Bᵀ P_B||")),
        ]

    def _shares(self) -> tuple[float, float]:
        """Σ||A P_A||² / Σ k/in ||A||², and the same of B: about 1 for random factors."""
        inside, expected = torch.zeros(2), torch.zeros(2)
        with torch.no_grad():
            for name, pair in self.adapters.pairs().items():
                for side, (factor, P) in enumerate(zip((pair.A, pair.B.T), self.P[name], strict=True)):
                    inside[side] += (factor @ P).square().sum().cpu()
                    expected[side] += factor.square().sum().cpu() * P.shape[1] / P.shape[0]
        inputs, outputs = (inside / expected.clamp_min(1e-30)).tolist()
        return inputs, outputs


def controlled(A: Tensor, B: Tensor, P_A: Tensor, P_B: Tensor) -> Tensor:
    """1/2 ||A P_A||_F² + 1/2 ||Bᵀ P_B||_F²."""
    return 0.5 * (A @ P_A).square().sum() + 0.5 * (B.T @ P_B).square().sum()


def orthonormal(n: int, k: int, *seed: int | str) -> Tensor:
    """k random orthonormal columns, (n, k), a function of the seed."""
    return torch.linalg.qr(torch.randn(n, k, generator=generator("directions", *seed))).Q
