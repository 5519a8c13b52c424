"""O-LoRA: the new pair's input directions stay orthogonal to those of earlier tasks.

    L = L_t + λ1 Σ_layers Σ_{i<t} ||A_i A_tᵀ||_F² + λ2 Σ ||θ_t||₂          Wang et al. 2023, arXiv 2310.14152

with PEFT's letters, where A is the input-side factor (the paper's are the other way round, methods.md 0.3).
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

    def __init__(self, lam: float = 0.5, lam_norm: float = 0.0, as_released: bool = False):
        self.lam, self.lam_norm, self.as_released = lam, lam_norm, as_released

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.overlap_before = self.overlap()

    def penalty(self) -> Tensor | None:
        current, past = self.adapters.pairs(), self.adapters.past()
        terms = []
        if self.lam:
            terms = [self.lam * overlap(old.A, new.A, self.as_released) for new, old in each_layer(current, past)]
        if self.lam_norm:
            terms += [self.lam_norm * tensor.norm() for pair in current.values() for tensor in (pair.A, pair.B)]
        return torch.stack(terms).sum() if terms else None

    def overlap(self) -> float:
        """Σ_layers ||A_past A_tᵀ||_F² now."""
        with torch.no_grad():
            layers = each_layer(self.adapters.pairs(), self.adapters.past())
            return float(sum(overlap(old.A, new.A) for new, old in layers))

    def checks(self) -> list[Check]:
        now = self.overlap()
        falls = now < self.overlap_before or self.task == 0
        meaning = f"overlap with earlier inputs, Σ||A_i A_tᵀ||²; it was {self.overlap_before:.4g} at the task's start"
        return [*super().checks(), Check("overlap", now, falls or self.lam == 0, meaning)]


def overlap(old: Tensor, new: Tensor, absolute: bool = False) -> Tensor:
    """||A_old A_newᵀ||_F², or Σ|A_old A_newᵀ|:  (r_old, in), (r, in) -> scalar."""
    product = old @ new.T
    return product.abs().sum() if absolute else product.square().sum()
