"""EWC: weights that earlier tasks' answers depend on are held where those tasks left them.

    L   = CE + λ/2 Σ_i Σ_k F_ik (θ_k - θ*_ik)²                   Kirkpatrick et al. 2017, arXiv 1612.00796
    F_i = 1/N Σ_n (∂ log p(y_n | x_n) / ∂θ)²   at θ*_i, the end of task i; entry by entry, one gradient a row

θ are the entries of A and B. The tasks' penalties are one: with F = Σ_i F_i and θ̄ = Σ_i F_i θ*_i / F,

    Σ_i F_i (θ - θ*_i)² = F (θ - θ̄)² + c,   c independent of θ,

so a step costs the same however many tasks came before. `online` forgets old tasks' Fisher by degrees and holds the
last optimum instead:   F <- γ F + F_i,   θ̄ <- θ*_i.   (Schwarz et al. 2018, arXiv 1805.06370)
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.learning.gradients import each_gradient, flat
from forgetless.learning.memory import some
from forgetless.methods.base import ROWS, Check, Method, State
from forgetless.model.answers import token_losses
from forgetless.seeds import generator

FISHERS = ("empirical", "true")


class EWC(Method):
    """Elastic weight consolidation.

    Args:
        lam: λ, weight of the penalty
        fisher: whose answers y the Fisher information is taken of: 'empirical' (the rows' own) or 'true' (each answer
            token drawn from the model)
        fisher_rows: rows of a task, drawn once, over which the Fisher information is a mean
        online: one anchor, the last optimum, and a running Fisher, instead of one anchor a task
        gamma: γ, what an earlier task's Fisher keeps at each later one; only with `online`
    """

    paper = "1612.00796"
    adopts = ROWS
    summary = "holds the weights that earlier tasks' answers depend on near where those tasks left them"
    extra_memory = "two more adapters: Fisher information and anchor"
    extra_compute = "at each task's end one pass, forward and backward, over `fisher_rows` rows, one by one"
    within_task: ClassVar[tuple[str, ...]] = ()
    off: ClassVar[dict] = {"lam": 0.0}
    example: ClassVar[dict] = {"lam": 1.0, "fisher_rows": 4}

    def __init__(
        self,
        lam: float = 400.0,
        fisher: str = "empirical",
        fisher_rows: int = 256,
        online: bool = False,
        gamma: float = 0.95,
    ):
        if lam < 0:
            raise UsageError(f"lam {lam}: a negative weight would drive weights away from their anchor; 0 or more")
        if fisher not in FISHERS:
            raise UsageError(f"fisher {fisher!r}: one of {', '.join(FISHERS)}")
        if fisher_rows < 1:
            raise UsageError(f"fisher_rows {fisher_rows}: 1 or more")
        if not 0 <= gamma <= 1:
            raise UsageError(f"gamma {gamma}: from 0 (only the last task counts) to 1 (all count alike)")
        self.lam, self.fisher, self.fisher_rows, self.online, self.gamma = lam, fisher, fisher_rows, online, gamma

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        self.anchor = flat(adapters.parameters()).detach().clone()  # θ̄ (parameters,)
        self.F = torch.zeros_like(self.anchor)
        self.holds = False  # whether a task's Fisher is in F
        self.constant = 0.0  # Σ_k c_k

    def penalty(self) -> Tensor | None:
        if not (self.lam and self.holds):
            return None
        return self.lam / 2 * (quadratic(flat(self.adapters.parameters()), self.F, self.anchor) + self.constant)

    def end_task(self, task: int, rows: tuple[Row, ...]) -> None:
        if not (self.lam and rows):  # a trainer's task ends without rows
            return
        self.holds = True
        F, optimum = self.information(task, rows), flat(self.adapters.parameters()).detach().clone()
        if self.online:
            self.F, self.anchor = self.gamma * self.F + F, optimum
        else:
            self.F, self.anchor, more = joined(self.F, self.anchor, F, optimum)
            self.constant += more

    def information(self, task: int, rows: tuple[Row, ...]) -> Tensor:
        """F of a task, (parameters,): the mean over rows of the squared gradient of log p(y | x)."""
        chosen = some(rows, self.fisher_rows, "fisher", self.seed, task)

        def log_likelihood(row: int, logits: Tensor, targets: Tensor) -> Tensor:
            if self.fisher == "true":
                draw = generator("fisher answers", self.seed, task, row)
                targets = drawn(logits, draw).to(targets.device)
            return -token_losses(logits, targets).sum()

        total = torch.zeros_like(self.F)
        for gradient in each_gradient(self.adapters, self.encoder, chosen, log_likelihood):
            total += gradient.square()
        return total / len(chosen)

    def state(self) -> State:
        return State({"fisher": self.F, "anchor": self.anchor}, {"constant": self.constant})

    def restore(self, state: State) -> None:
        self.F, self.anchor = (state.tensors[name].to(self.F.device) for name in ("fisher", "anchor"))
        self.constant, self.holds = state.values["constant"], True

    def checks(self) -> list[Check]:
        trace = float(self.F.sum())
        meaning = "Σ F over the entries of A and B: 0 means that nothing is held in the next task"
        return [*super().checks(), Check("fisher", trace, trace > 0 or not self.lam, meaning)]


def quadratic(theta: Tensor, F: Tensor, anchor: Tensor) -> Tensor:
    """Σ_k F_k (θ_k - θ̄_k)²."""
    return (F * (theta - anchor).square()).sum()


def joined(F: Tensor, a: Tensor, G: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float]:
    """H, m, c with F (θ - a)² + G (θ - b)² = H (θ - m)² + c, where c is summed over the entries.

    H = F + G,   m = a + G/H (b - a),   c = F G / H (b - a)²; where H = 0 nothing is held, and m = b.
    """
    H = F + G
    share = torch.where(H > 0, G / H, 1.0)
    return H, torch.lerp(a, b, share), float((F * share * (b - a).square()).sum())


def drawn(logits: Tensor, draw: torch.Generator) -> Tensor:
    """A token from each distribution: (answers, vocabulary) -> (answers,)."""
    return torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=draw).squeeze(1)
