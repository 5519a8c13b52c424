"""LoRI: A is random and never trained; a task changes only a few entries of B.

    ΔW = s B A,   A drawn once and frozen,   B_t = B_{t-1} + M_t ∘ D_t,   only D_t is trained          arXiv 2504.07448

M_t (out, rank) has ones at a share `density` of all layers' entries together. They are drawn at random, or
chosen by size: a few steps of the task train all of B (calibration), the entries that moved furthest are kept, and B
starts again from B_{t-1}.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.methods.base import Check, Method
from forgetless.seeds import generator


class LoRI(Method):
    """LoRA with reduced interference.

    Args:
        density: share of B's entries, over all layers, that a task may change
        calibration_steps: steps of each task that choose these entries by size; 0: they are drawn at random
    """

    paper = "2504.07448"
    adopts = "it trains a few entries of B behind a frozen A, and an adopted B is full; take olora"
    summary = "A random and frozen, and a task changes only a sparse choice of B's entries"
    extra_memory = "a copy of B and one byte for each of its entries"
    extra_compute = "none; calibration steps are taken from the task's own"
    within_task: ClassVar[tuple[str, ...]] = ("steps", "before", "mask")
    off: ClassVar[str] = "A is frozen in every task, the first too"
    example: ClassVar[dict] = {"calibration_steps": 4}

    def __init__(self, density: float = 0.1, calibration_steps: int = 10):
        if not 0 < density <= 1:
            raise UsageError(f"density {density}: above 0, at most 1 (all of B)")
        if calibration_steps < 0:
            raise UsageError(f"calibration_steps {calibration_steps}: 0 (entries drawn at random) or more")
        self.density, self.calibration_steps = density, calibration_steps

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        self.adapters.train_only("B")

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.steps = 0
        self.before = {name: B.detach().clone() for name, B in self._B().items()}
        self.mask: dict[str, Tensor] = {}  # empty while it is being calibrated
        if not self.calibration_steps:
            scores = {
                name: torch.rand(B.shape, generator=generator("mask", self.seed, task, name)).to(B.device)
                for name, B in self.before.items()
            }
            self.mask = largest(scores, self.density)

    def after_backward(self) -> None:
        for name, B in self._B().items():
            if self.mask and B.grad is not None:
                B.grad *= self.mask[name]

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1
        if self.mask:
            self._restore_unmasked()  # nothing but weight decay may have moved them
        elif self.steps == self.calibration_steps:
            self._choose()
            with torch.no_grad():
                for name, B in self._B().items():
                    B.copy_(self.before[name])
            optimizer.state.clear()  # its averages are of the calibration

    def end_task(self, task: int, rows: tuple[Row, ...]) -> None:
        if not self.mask:  # the task was over before its calibration
            self._choose()
            self._restore_unmasked()

    def _choose(self) -> None:
        self.mask = largest({name: (B - self.before[name]).abs() for name, B in self._B().items()}, self.density)

    def _restore_unmasked(self) -> None:
        with torch.no_grad():
            for name, B in self._B().items():
                B.copy_(torch.where(self.mask[name], B, self.before[name]))

    def _B(self) -> dict[str, Tensor]:
        return {name: pair.B for name, pair in self.adapters.pairs().items()}

    def checks(self) -> list[Check]:
        changed = sum(int((self.before[name] != B).sum()) for name, B in self._B().items())
        entries = sum(B.numel() for B in self.before.values())
        allowed = math.ceil(self.density * entries)
        moved = max(
            float((pair.A.detach().cpu() - self.adapters.drawn_A(name, 0)).abs().max())
            for name, pair in self.adapters.pairs().items()
        )
        learnt = self.steps - self.calibration_steps
        return [
            *super().checks(),
            Check("changed entries", changed / entries, 0 < changed <= allowed, "share of B that this task changed"),
            Check("A moved", moved, moved == 0, "largest change of A since it was drawn"),
            Check("steps with the mask", learnt, learnt > 0, "steps after calibration; the task is learnt in these"),
        ]


def largest(scores: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """True at the ⌈density x entries⌉ largest scores of all layers together."""
    flat = torch.cat([score.detach().flatten() for score in scores.values()])
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    mask[flat.topk(math.ceil(density * flat.numel())).indices] = True
    sizes = [score.numel() for score in scores.values()]
    return {name: part.view_as(scores[name]) for name, part in zip(scores, mask.split(sizes), strict=True)}
