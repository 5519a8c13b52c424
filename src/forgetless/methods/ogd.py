"""OGD: steps leave out the directions in which earlier tasks' answers change.

    g~ = g - Vᵀ V g,   V Vᵀ = 1             Farajtabar et al. 2020, arXiv 1910.07104

The rows of V are an orthonormal set of earlier tasks' gradients, one a row of the task, taken at the end of the task:
of the logits of the right answer tokens (OGD-GTL, ground truth logit), or of the loss. The paper steps along g~;
AdamW's step leaves the subspace again (momentum, and a step size of its own for each entry), so by default the step
itself is projected too:   θ <- θ_before + (1 - Vᵀ V)(θ - θ_before).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.learning.gradients import each_gradient, flat, set_step_gradient, shaped, step_gradient
from forgetless.learning.memory import some
from forgetless.methods.base import ROWS, Check, Method, State
from forgetless.model.answers import token_losses

DIRECTIONS_OF = ("logit", "loss")
PROJECTED = ("step", "gradient")
DEPENDENT = 1e-3  # what must be left of a gradient outside the span of the earlier ones, as a share of its norm
LEAVES = 0.01  # share of a task's change within the span, above which it is not what the method promises
WITHIN = (
    f"||V Δθ|| / ||Δθ|| of the task's whole change; above {LEAVES} earlier answers were not spared: "
    "project 'step' spares them"
)


class OGD(Method):
    """Orthogonal gradient descent.

    Args:
        directions: the most directions that a task adds, from as many of its rows, drawn once
        of: what the directions are gradients of: 'logit' (the mean logit of a row's answer tokens) or 'loss' (their
            -log p)
        project: what is projected: 'step' (the gradient and the step that AdamW makes of it) or 'gradient' (only
            the gradient, as in the paper)
    """

    paper = "1910.07104"
    adopts = ROWS
    summary = "steps leave out the directions that change the answers to rows of earlier tasks"
    extra_memory = "`directions` gradients of the adapter a finished task, in memory and on disk"
    extra_compute = "two products a step with all kept directions; at a task's end one pass over `directions` rows"
    within_task: ClassVar[tuple[str, ...]] = ("before_task", "removed", "all_removed", "steps", "step_share")
    off: ClassVar[dict] = {"directions": 0}
    growth: ClassVar[str] = "two products with `directions` more vectors a finished task"
    example: ClassVar[dict] = {"directions": 4}

    def __init__(self, directions: int = 16, of: str = "logit", project: str = "step"):
        if directions < 0:
            raise UsageError(f"directions {directions}: 0 (plain fine-tuning) or more")
        if of not in DIRECTIONS_OF:
            raise UsageError(f"of {of!r}: one of {', '.join(DIRECTIONS_OF)}")
        if project not in PROJECTED:
            raise UsageError(f"project {project!r}: one of {', '.join(PROJECTED)}")
        self.directions, self.of, self.project = directions, of, project

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        self.V = flat(adapters.parameters()).detach().new_empty(0, sum(p.numel() for p in adapters.parameters()))
        self.added = 0  # directions of the last task

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.before_task = self.theta()
        self.steps, self.removed, self.all_removed, self.step_share = 0, 0.0, 0.0, 0.0

    def theta(self) -> Tensor:
        """A copy of the trainable entries, (parameters,)."""
        return flat(self.adapters.parameters()).detach().clone()

    def after_backward(self) -> None:
        if not len(self.V):
            return
        parameters = self.adapters.parameters()
        g = step_gradient(parameters)
        set_step_gradient(parameters, outside(g, self.V))
        self.removed = share_within(g, self.V)
        self.steps, self.all_removed = self.steps + 1, self.all_removed + self.removed
        self.before_step = self.theta()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not len(self.V):
            return
        step = self.theta() - self.before_step
        self.step_share = share_within(step, self.V)
        if self.project == "step":
            parameters = self.adapters.parameters()
            spared = self.before_step + outside(step, self.V)
            with torch.no_grad():
                for parameter, value in zip(parameters, shaped(spared, parameters), strict=True):
                    parameter.copy_(value)

    def end_task(self, task: int, rows: tuple[Row, ...]) -> None:
        self.within = share_within(self.theta() - self.before_task, self.V)
        chosen = some(rows, self.directions, "directions", self.seed, task)
        value = answer_logit if self.of == "logit" else answer_loss
        before = len(self.V)
        self.V = orthonormal(self.V, each_gradient(self.adapters, self.encoder, chosen, value))
        self.added = len(self.V) - before

    def state(self) -> State:
        return State({"directions": self.V} if len(self.V) else {}, {})

    def restore(self, state: State) -> None:
        if "directions" in state.tensors:
            self.V = state.tensors["directions"].to(self.V.device)

    def told(self) -> dict[str, float]:
        return {"removed": self.removed, "step_within_span": self.step_share} if len(self.V) else {}

    def checks(self) -> list[Check]:
        removed, constrained = self.all_removed / max(1, self.steps), self.steps > 0
        needed = self.directions > 0
        return [
            *super().checks(),
            Check("directions", self.added, self.added > 0 or not needed, "directions that this task adds"),
            Check("gradient removed", removed, removed > 0 or not constrained, "mean ||V g|| / ||g|| over steps"),
            Check("change within span", self.within, self.within < LEAVES, WITHIN),
        ]


def outside(vector: Tensor, V: Tensor) -> Tensor:
    """The part of a vector (parameters,) that is orthogonal to the rows of V (directions, parameters)."""
    return vector - (V @ vector) @ V


def share_within(vector: Tensor, V: Tensor) -> float:
    """||V x|| / ||x||, 0 where x is 0: what lies in the span of V's orthonormal rows."""
    return float((V @ vector).norm() / vector.norm().clamp_min(1e-30))


def orthonormal(V: Tensor, vectors: Iterable[Tensor]) -> Tensor:
    """V with more orthonormal rows, by Gram-Schmidt; a vector that (almost) lies in the span so far adds none."""
    for vector in vectors:
        left = outside(vector, V)
        if left.norm() > DEPENDENT * vector.norm():
            left = outside(left / left.norm(), V)  # once more: the first pass leaves rounding errors that add up
            V = torch.cat([V, (left / left.norm()).unsqueeze(0)])
    return V


def answer_logit(row: int, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the answer tokens of the logit of the right one."""
    return logits.gather(1, targets.unsqueeze(1)).mean()


def answer_loss(row: int, logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of the answer."""
    return token_losses(logits, targets).sum()
