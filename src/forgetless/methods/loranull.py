"""LoRA-Null: the pair begins as what each weight makes of the directions that general text hardly reads.

    C = mean of x xᵀ over general text, per layer;   N: eigenvectors of C's r smallest eigenvalues, (in, r)
    W N Nᵀ = U Σ Vᵀ,   B_0 = U_r √Σ_r,   A_0 = √Σ_r V_rᵀ                                          arXiv 2503.02659

With `freeze`, A stays A_0: then the whole update, (B - B_0) A_0, reads nothing but N's directions.
"""

from __future__ import annotations

from torch import Tensor
from torch.linalg import eigh, svd

from forgetless.methods.aware_start import AwareStart


class LoRANull(AwareStart):
    """Initialisation in the null space of activations.

    Args:
        freeze: train B alone
        text: a file of general text (plain text, JSONL, JSON, Parquet) or hub:NAME; empty: the base's own answers to
            packaged prompts
        prompts: how many packaged prompts the base answers, where no text is given
    """

    paper = "2503.02659"
    summary = "one adapter, begun as what the weights make of directions that general text hardly reads"

    def __init__(self, freeze: bool = False, text: str = "", prompts: int = 64):
        super().__init__(text, prompts)
        self.freeze = freeze

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        if self.freeze:
            adapters.train_only("B")

    def part(self, W: Tensor, C: Tensor, r: int) -> tuple[Tensor, Tensor]:
        return unread(W, C, r)


def unread(W: Tensor, C: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A_0 (r, in) and B_0 (out, r) with B_0 A_0 = W N Nᵀ, in fp64."""
    N = eigh(C.double()).eigenvectors[:, :r]
    U, S, Vh = svd(W.double() @ N, full_matrices=False)  # of W N: that of W N Nᵀ has Vᵀ Nᵀ
    root = S.sqrt()
    return (root[:, None] * (Vh @ N.T)).float(), (U * root).float()
