"""LwF: on the current rows, the model's answers stay near those it gave before the task.

    L = CE + λ T² KL( softmax(z_old / T) || softmax(z_new / T) )          Li and Hoiem 2016, arXiv 1606.09282

z_old: the logits of the adapter as the previous task left it, z_new: those of the adapter in training; both at the
answer tokens of the step's rows, over which both terms are means. No old rows are kept. In the first task L = CE.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from forgetless.data.batches import Example, Part
from forgetless.errors import UsageError
from forgetless.methods.base import ADAPTER, Check, Method
from forgetless.model.answers import token_losses


class LwF(Method):
    """Learning without forgetting.

    Args:
        lam: λ, weight of the distillation
        temperature: T, which softens both distributions
    """

    paper = "1606.09282"
    adopts = ADAPTER
    summary = "keeps the answers to the new task's rows near those that the model gave before the task"
    snapshots = True
    extra_memory = "one more adapter: the previous task's"
    extra_compute = "1.5x: one more forward pass, through the previous task's adapter"
    under_any: ClassVar[bool] = True
    within_task: ClassVar[tuple[str, ...]] = ("old", "distillation", "step_distillation")
    off: ClassVar[dict] = {"lam": 0.0}

    def __init__(self, lam: float = 1.0, temperature: float = 2.0):
        if lam < 0:
            raise UsageError(f"lam {lam}: a negative weight would reward new answers for being other; 0 or more")
        if temperature <= 0:
            raise UsageError(f"temperature {temperature}: above 0")
        self.lam, self.temperature = lam, temperature

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.old = self.adapters.snapshot() if task > 0 else {}
        self.distillation, self.step_distillation = 0.0, 0.0  # summed over steps; of the step

    def batch(self, examples: list[Example], step: int) -> list[Example]:
        self.step_distillation = 0.0
        return super().batch(examples, step)

    def loss(self, part: Part) -> Tensor:
        if not self.lam or not self.old:
            return super().loss(part)
        with torch.no_grad(), self.adapters.using(self.old):
            before = self.logits(part)
        now = self.logits(part)
        distillation = (part.weights * distilled(before, now, self.temperature)).sum()
        self.step_distillation += float(distillation.detach())
        return (part.weights * token_losses(now, part.targets)).sum() + self.lam * distillation

    def passes(self, rows: int, task: int) -> tuple[float, float]:
        return (2 * rows if self.lam and task else rows), rows

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.distillation += self.step_distillation

    def told(self) -> dict[str, float]:
        return {"distillation": self.step_distillation} if self.old else {}

    def checks(self) -> list[Check]:
        needed = self.lam > 0 and self.task > 0
        meaning = "Σ over steps of the distillation term; 0 means that it never pulled"
        return [
            *super().checks(),
            Check("distillation", self.distillation, self.distillation > 0 or not needed, meaning),
        ]


def distilled(old: Tensor, new: Tensor, T: float) -> Tensor:
    """T² KL( softmax(old / T) || softmax(new / T) ): (answers, vocabulary), (answers, vocabulary) -> (answers,)."""
    p, q = log_softmax(old.float() / T, -1), log_softmax(new.float() / T, -1)
    return T**2 * kl_div(q, p, log_target=True, reduction="none").sum(-1)
