"""O-LoRA: the new pair's input directions stay orthogonal to those of earlier tasks.

    L = L_t + λ1 Σ_layers Σ_{i<t} ||A_i A_tᵀ||_F² + λ2 Σ ||θ_t||₂          Wang et al. 2023, arXiv 2310.14152

with PEFT's letters, where A is the input-side factor (the paper's are the other way round).
The earlier pairs are kept joined, A_past = [A_1; ...; A_{t-1}], so that one product a layer gives all terms:
Σ_i ||A_i A_tᵀ||_F² = ||A_past A_tᵀ||_F². The released code sums absolute values instead of
squares, and has the λ2 term (0 in its main runs), which is not known from the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forgetless.methods.base import Check, each_layer
from forgetless.methods.incremental import Incremental


class OLoRA(Incremental):
    """Orthogonal low-rank adaptation.

    Args:
        lam: λ1, weight of the orthogonality term
        lam_norm: λ2, weight of the un-squared 2-norms of the new pair's tensors
        as_released: sum absolute values, as the released code does, instead of squares
    """

    paper = "2310.14152"
    summary = "a new adapter per task, its inputs kept orthogonal to the earlier ones'"
    extra_compute = "one more product a layer, of rank r x finished tasks; one r x (r x finished tasks) penalty"
    plain = Incremental
    off = {"lam": 0.0}

    def __init__(self, lam: float = 0.5, lam_norm: float = 0.0, as_released: bool = False):
        self.lam, self.lam_norm, self.as_released = lam, lam_norm, as_released

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.overlap_before = self.overlap()

    def penalty(self) -> Tensor | None:
        terms, (olds, news) = [], self.inputs()
        if self.lam and olds:
            terms = [self.lam * overlap(olds, news, self.as_released)]
        if self.lam_norm:
            terms += [self.lam_norm * tensor.norm() for tensor in self.adapters.parameters()]
        return torch.stack(terms).sum() if terms else None

    def inputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """A of the earlier tasks and A of this one, for each layer that has both."""
        layers = list(each_layer(self.adapters.pairs(), self.adapters.past()))
        return [old.A for _, old in layers], [new.A for new, _ in layers]

    def overlap(self) -> float:
        """Σ_layers ||A_past A_tᵀ||_F² now."""
        olds, news = self.inputs()
        with torch.no_grad():
            return float(overlap(olds, news)) if olds else 0.0

    def checks(self) -> list[Check]:
        now = self.overlap()
        falls = now < self.overlap_before or self.task == 0
        meaning = f"overlap with earlier inputs, Σ||A_i A_tᵀ||²; it was {self.overlap_before:.4g} at the task's start"
        return [*super().checks(), Check("overlap", now, falls or self.lam == 0, meaning)]


class Overlap(torch.autograd.Function):
    """Σ_layers ||A_old A_newᵀ||_F², or Σ|A_old A_newᵀ|:  [(r_old, in), ...], (r, in), ... -> scalar.

    The gradient is written out, 2 (A_old A_newᵀ)ᵀ A_old or sign(·)ᵀ A_old: two products a layer are all the work.
    """

    @staticmethod
    def forward(ctx, absolute: bool, olds: list[Tensor], *news: Tensor) -> Tensor:
        products = [new @ old.to(new.dtype).T for old, new in zip(olds, news, strict=True)]
        ctx.absolute, ctx.olds, ctx.products = absolute, olds, products
        return torch.stack([p.abs().sum() if absolute else p.square().sum() for p in products]).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        slopes = (p.sign() if ctx.absolute else 2 * p for p in ctx.products)
        return None, None, *(grad * (s @ old.to(s.dtype)) for s, old in zip(slopes, ctx.olds, strict=True))


def overlap(olds: list[Tensor], news: list[Tensor], absolute: bool = False) -> Tensor:
    """`Overlap` of the layers of two lists."""
    return Overlap.apply(absolute, olds, *news)
