"""SLAO: each task begins at an orthonormal basis of the last one's A, and a time-aware average of the B's is deployed.

A_i starts as Qᵀ,  A_{i-1}ᵀ = Q R,  R_jj >= 0          B_i starts as B_{i-1}, as it was trained
A_merge = A_i                                        B_merge <- B_merge + (B_i - B_merge) / √i     arXiv 2512.23017
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from forgetless.data.tasks import Row
from forgetless.methods.base import ADAPTER, Check, Method, State
from forgetless.model.adapters import Pair, named


class SLAO(Method):
    """Single LoRA, orthogonal starts, merged over time."""

    paper = "2512.23017"
    adopts = ADAPTER
    summary = "one adapter, restarted from an orthonormal basis of its A; a running merge of its B is deployed"
    plain_pairs = False
    extra_memory = "one more B"

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        self.B_merge = {name: torch.zeros_like(pair.B) for name, pair in adapters.pairs().items()}

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        if task > 0:
            with torch.no_grad():
                for pair in self.adapters.pairs().values():
                    pair.A.copy_(row_basis(pair.A))

    def end_task(self, task: int, rows: tuple[Row, ...]) -> None:
        for name, pair in self.adapters.pairs().items():
            self.B_merge[name] = merged(self.B_merge[name], pair.B.detach(), task + 1)

    def export(self) -> dict[str, Pair]:
        return {
            name: Pair(pair.A.detach(), self.B_merge[name], pair.scale) for name, pair in self.adapters.pairs().items()
        }

    def views(self) -> dict[str, AbstractContextManager]:
        return {"merged": self.adapters.using(named(self.export()))}

    def state(self) -> State:
        return State({f"{name}.B": pair.B for name, pair in self.adapters.pairs().items()}, {})

    def adopt(self, task: int, pairs: dict[str, Pair], rows: tuple[Row, ...] | None) -> dict[str, Pair]:
        """The merge begins at the adopted B: its trainer kept none of those before."""
        super().adopt(task, pairs, rows)
        self.B_merge = {name: pair.B.detach().clone() for name, pair in self.adapters.pairs().items()}
        return self.export()

    def resume(self, adapter: dict[str, Pair], state: State, task: int) -> None:
        trained = {name: Pair(pair.A, state.tensors[f"{name}.B"], pair.scale) for name, pair in adapter.items()}
        self.adapters.set_current(trained)
        pairs = self.adapters.pairs()
        self.B_merge = {name: pair.B.to(pairs[name].B.device, copy=True) for name, pair in adapter.items()}

    def checks(self) -> list[Check]:
        pairs = self.adapters.pairs()
        apart = sum(float((pair.B.detach() - self.B_merge[name]).square().sum()) for name, pair in pairs.items())
        size = sum(float(B.square().sum()) for B in self.B_merge.values())
        share = math.sqrt(apart / max(size, 1e-30))
        meaning = "||B_merge - B|| / ||B_merge||: what is deployed is not just the last task's; 0 after the first task"
        return [*super().checks(), Check("merge differs", share, share > 0 or self.task == 0, meaning)]


def row_basis(A: Tensor) -> Tensor:
    """Qᵀ of Aᵀ = Q R with R's diagonal not negative: orthonormal rows that span those of A (rank, in)."""
    Q, R = torch.linalg.qr(A.detach().T)
    return (Q * torch.where(R.diagonal() < 0, -1.0, 1.0)).T


def merged(B_merge: Tensor, B: Tensor, i: int) -> Tensor:
    """B_merge + (B - B_merge) / √i, of task i = 1, 2, ..."""
    return B_merge + (B - B_merge) / math.sqrt(i)
