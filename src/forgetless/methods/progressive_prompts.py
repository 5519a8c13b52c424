"""Progressive Prompts: a new soft prompt for each task before those of the earlier ones, which are frozen.

    p(y | x, t) = base(y | [P_t; P_{t-1}; ... P_1; E(x)]),   only P_t is trained        Razdaibiedina et al. 2023,
                                                                                        arXiv 2301.12314

Rows of task t are answered with the prompts of t and of the tasks before it: the task must be told at test, and later
tasks cannot change an answer.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from forgetless.methods.base import Check, Method, State
from forgetless.methods.prompt_tuning import PromptTuning
from forgetless.model.prompts import PROMPT
from forgetless.model.tables import Table, Tables


class ProgressivePrompts(PromptTuning):
    """Progressive Prompts.

    Args:
        tokens: virtual tokens of each task's prompt
    """

    paper = "2301.12314"
    summary = "a new soft prompt per task before the frozen earlier ones; chosen by task at test"
    task_id = True
    extra_memory = "one prompt a finished task"
    extra_compute = "`tokens` more tokens a row and task so far; rows are not packed"
    growth = "`tokens` more virtual tokens in every row a task"
    plain: ClassVar[type[Method]] = PromptTuning
    off: ClassVar[None] = None

    def begin_task(self, task: int) -> None:
        self.task = task
        self.adapters.check_room((task + 1) * self.tokens, self.encoder.max_length)
        if task > 0:
            self.adapters.freeze(self.export())
            self.adapters.set_current({PROMPT: Table(self.adapters.drawn(self.tokens, task))})
        self.adapters.mark()

    def earlier(self) -> list[Tensor]:
        """[P_{t-1}; ... P_1], one table; none in the first task."""
        return [one.P for one in self.adapters.past().values()]

    def whole(self) -> Tensor:
        """[P_t; P_{t-1}; ... P_1]: (t tokens, width)."""
        return torch.cat([self.adapters.pairs()[PROMPT].P, *self.earlier()])

    def before(self, ids: Tensor, context: Tensor) -> Tensor:
        return self.whole().expand(len(ids), -1, -1)

    def export(self) -> Tables:  # type: ignore[override]
        return {PROMPT: Table(self.whole().detach())}

    def weights_for(self, learnt: int, task: int) -> int | None:
        return task if task <= learnt else None

    def resume(self, adapter: Tables, state: State, task: int) -> None:  # type: ignore[override]
        """The deployed prompt begins with the task's own; the rest are the earlier ones."""
        own, earlier = adapter[PROMPT].P[: self.tokens], adapter[PROMPT].P[self.tokens :]
        self.adapters.set_current({PROMPT: Table(own)})
        self.adapters.freeze({PROMPT: Table(earlier)} if len(earlier) else {})
        self.restore(state)

    def checks(self) -> list[Check]:
        frozen = sum(len(one) for one in self.earlier())
        ok = frozen == self.task * self.tokens
        return [*super().checks(), Check("frozen tokens", frozen, ok, "virtual tokens of earlier tasks' prompts")]
