"""N-LoRA: sparse updates that rarely touch the weights that earlier tasks changed.

    L = L_t + λ Σ_layers ||ΔW_t||_1,   ΔW_t = B_t A_t          Yang et al. 2024, arXiv 2410.10179

||B A||_1 is the sum of the absolute values of an out x in matrix. `product_l1` computes it and its gradient in
blocks of rows and never holds that matrix. The released code penalises ||A B||_1, of an r x r matrix, which is
only defined for square layers (`as_released`). L1 through AdamW leaves small numbers, not zeros: `proximal`
soft-thresholds the factors after each step instead, which gives exact zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forgetless.errors import UsageError
from forgetless.methods.base import Check
from forgetless.methods.incremental import Incremental
from forgetless.model.adapters import Pair

DENSITY = "share of the update's entries that are not 0; `proximal` makes zeros, if large enough"
BLOCK_ENTRIES = 1 << 17  # entries of the product that exist at a time: 512 KiB in fp32, which stays in a core's cache


class NLoRA(Incremental):
    """Non-collision low-rank adaptation.

    Args:
        lam: λ, weight of ||B A||_1 summed over layers
        proximal: soft-threshold A and B by learning rate x proximal after each step; 0: off
        as_released: penalise the r x r product ||A B||_1, as the released code does (square layers only)
    """

    paper = "2410.10179"
    summary = "a new adapter per task, kept sparse so that tasks rarely change the same weights"
    extra_compute = "one more product a layer, of rank r x finished tasks; ||BA||_1 and its gradient each step"
    plain = Incremental
    off = {"lam": 0.0}
    example = {"lam": 1e-3}

    def __init__(self, lam: float = 1e-5, proximal: float = 0.0, as_released: bool = False):
        if not 0 <= proximal < 1:
            raise UsageError(
                f"proximal {proximal}: from 0 to below 1; AdamW moves an entry by about the learning "
                "rate a step, so a threshold of that size never lets one leave 0"
            )
        if lam < 0:
            raise UsageError(f"lam {lam}: a negative weight would reward dense updates; 0 or more")
        self.lam, self.proximal, self.as_released = lam, proximal, as_released

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        if self.as_released:
            for name, pair in adapters.pairs().items():
                if pair.A.shape[1] != pair.B.shape[0]:
                    raise UsageError(
                        f"nlora as_released multiplies A B, which {name} ({pair.B.shape[0]} x {pair.A.shape[1]}) "
                        "does not allow: it is not square. Choose square target_modules, or as_released=false."
                    )

    def penalty(self) -> Tensor | None:
        if not self.lam:
            return None
        norm = released_l1 if self.as_released else product_l1
        return self.lam * torch.stack([norm(pair.B, pair.A) for pair in self.adapters.pairs().values()]).sum()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.proximal:
            return
        threshold = self.proximal * optimizer.param_groups[0]["lr"]
        with torch.no_grad():
            for pair in self.adapters.pairs().values():
                for tensor in (pair.A, pair.B):
                    tensor.copy_(torch.nn.functional.softshrink(tensor, threshold))

    def checks(self) -> list[Check]:
        pairs = list(self.adapters.pairs().values())
        size = sum(float(product_l1(pair.B.detach(), pair.A.detach())) for pair in pairs)
        found = density(pairs)
        acts = size > 0 or not (self.lam or self.proximal)
        return [
            *super().checks(),
            Check("||BA||_1", size, acts, "the penalised norm, summed over layers; 0 means that nothing is penalised"),
            Check("density exact", found["exact"], found["exact"] < 1 or not self.proximal, DENSITY),
            Check("density absolute", found["absolute"], True, "share of entries above 1e-6"),
            Check("density relative", found["relative"], True, "share of entries above 1e-3 of their layer's largest"),
        ]


class _ProductL1(torch.autograd.Function):
    """||B A||_1 with its gradient, in one pass over blocks of rows of S = sign(B A).

    d||BA||_1/dB = S Aᵀ,   d||BA||_1/dA = Bᵀ S,   and   ||BA||_1 = <S, B A> = <S Aᵀ, B>.
    """

    @staticmethod
    def forward(ctx, B: Tensor, A: Tensor) -> Tensor:
        dB, dA = torch.empty_like(B), torch.zeros_like(A)
        block = B.new_empty(_rows_of_a_block(B.shape[0], A), A.shape[1])
        for rows in _row_blocks(B, A):
            sign = torch.mm(B[rows], A, out=block[: rows.stop - rows.start]).sign_()
            torch.mm(sign, A.T, out=dB[rows])
            dA.addmm_(B[rows].T, sign)
        ctx.save_for_backward(dB, dA)
        return (dB * B).sum()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        dB, dA = ctx.saved_tensors
        return gradient * dB, gradient * dA


def product_l1(B: Tensor, A: Tensor) -> Tensor:
    """||B A||_1 = Σ|B A| for B (out, r) and A (r, in), without holding the (out, in) product; differentiable."""
    return _ProductL1.apply(B, A)


def released_l1(B: Tensor, A: Tensor) -> Tensor:
    """The released code's ||A B||_1, (r, r); defined where in == out."""
    return (A @ B).abs().sum()


def density(pairs: list[Pair]) -> dict[str, float]:
    """Shares of the entries of s B A of all layers that are not 0, above 1e-6, above 1e-3 of their layer's largest."""
    counts, entries = {"exact": 0, "absolute": 0, "relative": 0}, 0
    with torch.no_grad():
        for pair in pairs:
            blocks = _row_blocks(pair.B, pair.A)
            largest = max(pair.scale * float((pair.B[rows] @ pair.A).abs().max()) for rows in blocks)
            for rows in blocks:
                size = pair.scale * (pair.B[rows] @ pair.A).abs_()
                counts["exact"] += int((size > 0).sum())
                counts["absolute"] += int((size > 1e-6).sum())
                counts["relative"] += int((size > 1e-3 * largest).sum())
                entries += size.numel()
    return {name: count / entries for name, count in counts.items()}


def _rows_of_a_block(rows: int, A: Tensor) -> int:
    """On a GPU a block is 1/32 of the product at least: each block costs kernel launches."""
    on_cpu = max(1, BLOCK_ENTRIES // A.shape[1])
    return on_cpu if A.device.type == "cpu" else max(on_cpu, rows // 32)


def _row_blocks(B: Tensor, A: Tensor) -> list[slice]:
    rows = _rows_of_a_block(B.shape[0], A)
    return [slice(start, min(start + rows, B.shape[0])) for start in range(0, B.shape[0], rows)]
