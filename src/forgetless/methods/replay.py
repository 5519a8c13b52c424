"""Experience replay: each step also learns rows kept from earlier tasks.

    L = 1/2 (CE(current rows) + CE(replayed rows))

Each term is a mean over its own answer tokens of the whole step. In the first task there is nothing to
replay and L = CE(current rows).
"""

from __future__ import annotations

from typing import ClassVar

from forgetless.data.batches import Example, weigh
from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.learning.memory import Memory
from forgetless.methods.base import ROWS, Check, Method, State


class Replay(Method):
    """Experience replay.

    Args:
        memory: rows kept in all (a number), or a share of each task (a number and a percent sign)
        policy: for a number of rows: 'reservoir' (each row seen is kept with equal probability) or 'quota' (each
            task has equal room); a share of each task is that share under both
        replay_rows: replayed rows of a step; 0: as many as the step has current rows
    """

    paper = "2310.14152"
    adopts = ROWS
    summary = "replays kept rows of earlier tasks in every step"
    old_rows = True
    extra_memory = "the kept rows"
    extra_compute = "2x: as many replayed as current rows"
    under_any = True
    off = {"memory": 0}
    example = {"memory": 6}
    within_task: ClassVar[tuple[str, ...]] = ("replayed",)

    def __init__(self, memory: int | str = "10%", policy: str = "reservoir", replay_rows: int = 0):
        if replay_rows < 0:
            raise UsageError(f"replay_rows {replay_rows}: 0 for as many as the step has current rows, or more")
        self.replay_rows = replay_rows
        self.memory = Memory(memory, policy)

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        self.memory.seed = seed

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.replayed = 0

    def batch(self, examples: list[Example], step: int) -> list[Example]:
        drawn = self.memory.draw(self.replay_rows or len(examples), self.task, step)
        if not drawn:
            return weigh(examples, 1.0)
        self.replayed += len(drawn)
        # L = 1/2 CE_current + 1/2 CE_memory
        return weigh(examples, 0.5) + weigh([self.encoder(row) for row in drawn], 0.5, memory=True)

    def passes(self, rows: int, task: int) -> tuple[float, float]:
        return rows + self.asked(rows, task), rows + self.asked(rows, task)

    def asked(self, rows: int, task: int) -> int:
        """Kept rows of a step with `rows` new ones."""
        count = self.replay_rows or rows
        room = count if self.memory.share else self.memory.room
        return min(count, room) if task else 0

    def end_task(self, task: int, rows: tuple[Row, ...]) -> None:
        self.memory.add_task(task, rows)

    def state(self) -> State:
        return State({}, self.memory.counts(), self.memory)

    def restore(self, state: State) -> None:
        assert state.memory is not None  # `state` gives one
        self.memory.go_on(state.memory, state.values)

    def checks(self) -> list[Check]:
        needed = self.task > 0
        return [
            *super().checks(),
            Check("replayed rows", self.replayed, self.replayed > 0 or not needed, "old rows learnt again"),
            Check("kept rows", len(self.memory.rows), len(self.memory.rows) > 0, "rows in memory after the task"),
        ]
