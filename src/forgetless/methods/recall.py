"""Recall: replay in which the untouched base is the first thing to be remembered.

    L = (1 - p) 1/2 (CE(current rows) + CE(kept rows)) + p CE(the base's own answers to general prompts)

A method of this project: what the base says is a task like any other, its rows are the base's own answers, and it is
there from the first step on. In the first task nothing is kept yet: L = (1 - p) CE(current rows) + p CE(own answers).
"""

from __future__ import annotations

from typing import ClassVar

from forgetless.data.batches import Example
from forgetless.learning.memory import Memory
from forgetless.methods.base import Check, State
from forgetless.methods.general_replay import GeneralReplay
from forgetless.methods.replay import Replay

BASE = -1  # the task whose rows are the base's own answers


class Recall(Replay):
    """Replay of earlier tasks' rows and of the base's own answers.

    Args:
        share: p, the share of the loss that the base's own answers have
        memory: rows kept in all (a number), or a share of each task (a number and a percent sign)
        policy: 'reservoir' or 'quota', for a number of rows
        replay_rows: replayed rows of a step; 0: as many as the step has current rows
        text: a file of general text in the place of the base's own answers
        general_rows: own answers of a step
        prompts: how many packaged prompts the base answers
    """

    paper: ClassVar[str] = ""
    ours: ClassVar[bool] = True
    summary: ClassVar[str] = "replays kept rows of earlier tasks and what the untouched base says"
    extra_memory: ClassVar[str] = "the kept rows and the base's own answers"
    extra_compute: ClassVar[str] = (
        "2x and `general_rows` more rows a step: as many replayed as current rows; at the start `prompts` answers of "
        "the base"
    )
    plain: ClassVar = Replay
    off: ClassVar[dict] = {"share": 0.0}
    example: ClassVar[dict] = {"memory": 6, "prompts": 1}
    within_task: ClassVar[tuple[str, ...]] = (*Replay.within_task, "recalled")

    def __init__(
        self,
        share: float = 0.1,
        memory: int | str = "10%",
        policy: str = "reservoir",
        replay_rows: int = 0,
        text: str = "",
        general_rows: int = 2,
        prompts: int = 64,
    ):
        super().__init__(memory, policy, replay_rows)
        self.general = GeneralReplay(share, text, general_rows, prompts)

    @property
    def recalled(self) -> int:
        """How many own answers the task's steps have learnt, with repetitions."""
        return self.general.replayed

    @recalled.setter
    def recalled(self, count: int) -> None:
        self.general.replayed = count

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        self.general.start(adapters, encoder, seed)

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.general.begin_task(task)

    def batch(self, examples: list[Example], step: int) -> list[Example]:
        return self.general.mixed(super().batch(examples, step), step)

    def passes(self, rows: int, task: int) -> tuple[float, float]:
        replayed, own = super().passes(rows, task)[0], self.general.passes(0, task)[0]
        return replayed + own, replayed + own

    def state(self) -> State:
        """One memory: the base's answers as those of a task before all others."""
        kept, own = super().state(), self.general.state()
        rows = own.memory.rows if own.memory is not None else []
        memory = Memory(0, rows=rows + self.memory.rows, tasks=[BASE] * len(rows) + self.memory.tasks)
        return State({}, {"kept": kept.values, "general": own.values}, memory)

    def restore(self, state: State) -> None:
        assert state.memory is not None  # `state` gives one
        super().restore(State({}, state.values["kept"], _rows(state.memory, of_base=False)))
        own = None if self.general.text else _rows(state.memory, of_base=True)
        self.general.restore(State({}, state.values["general"], own))

    def checks(self) -> list[Check]:
        acts = self.recalled > 0 or not self.general.share
        return [*super().checks(), Check("own answers", self.recalled, acts, "of the base, learnt, with repetitions")]


def _rows(memory: Memory, *, of_base: bool) -> Memory:
    """The base's own answers, or the tasks' rows."""
    chosen = [(row, task) for row, task in zip(memory.rows, memory.tasks, strict=True) if (task == BASE) == of_base]
    return Memory(0, rows=[row for row, _ in chosen], tasks=[task for _, task in chosen])
