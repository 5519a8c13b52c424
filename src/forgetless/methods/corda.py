"""CorDA: the pair begins as the directions of a weight in which general text makes the smallest outputs.

    W C = U Σ Vᵀ,   W = Σ_i σ_i u_i v_iᵀ C⁻¹                                                     arXiv 2406.05223
    B_0 = U_r √Σ_r,   A_0 = √Σ_r V_rᵀ C⁻¹,   of the r smallest σ                 (knowledge-preserved mode)

C: mean of x xᵀ over general text, per layer, with 1 % of its mean diagonal added to it, as in PEFT.
"""

from __future__ import annotations

from torch import Tensor, eye
from torch.linalg import inv, svd

from forgetless.methods.aware_start import AwareStart

DAMPING = 0.01  # of C's mean diagonal


class CorDA(AwareStart):
    """Context-oriented decomposition adaptation, knowledge-preserved mode.

    Args:
        text: a file of general text (plain text, JSONL, JSON, Parquet) or hub:NAME; empty: the base's own answers to
            packaged prompts
        prompts: how many packaged prompts the base answers, where no text is given
    """

    paper = "2406.05223"
    summary = "one adapter, begun as the part of the weights in which general text makes the smallest outputs"

    def __init__(self, text: str = "", prompts: int = 64):
        super().__init__(text, prompts)

    def part(self, W: Tensor, C: Tensor, r: int) -> tuple[Tensor, Tensor]:
        return least_outputs(W, C, r)


def least_outputs(W: Tensor, C: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A_0 (r, in) and B_0 (out, r): the terms of the r smallest singular values of W C, in fp64."""
    W, C = W.double(), C.double()
    C = C + DAMPING * C.diagonal().mean() * eye(len(C), device=C.device, dtype=C.dtype)
    U, S, Vh = svd(W @ C, full_matrices=False)
    root = S[-r:].sqrt()
    return (root[:, None] * (Vh[-r:] @ inv(C))).float(), (U[:, -r:] * root).float()
