"""Incremental fine-tuning: a new pair for each task, the earlier ones frozen, all summed.

    W_t = W_0 + s Σ_{j<=t} B_j A_j,   only j = t is trained,   L_t = CE(task t)

"IncLoRA" in Wang et al. 2023 (arXiv 2310.14152).
"""

from __future__ import annotations

from forgetless.data.tasks import Row
from forgetless.methods.base import ADAPTER, Check, Method, State
from forgetless.model.adapters import Pair


class Incremental(Method):
    paper = "2310.14152"
    adopts = ADAPTER
    summary = "a new adapter for each task, earlier ones frozen, all summed"
    extra_memory = "one frozen pair of rank r a finished task"
    extra_compute = "one more product a layer, of rank r x finished tasks"
    growth = "linear: the rank of the frozen pair of a layer grows by r a task"

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        self._trained = False  # whether the current pair holds a finished task

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        if task > 0 and self._trained:
            self.adapters.finish(task)
        self._trained = True

    def resume(self, adapter: dict[str, Pair], state: State, task: int) -> None:
        """The deployed adapter holds all pairs, joined: it is the past of the next task."""
        self.adapters.set_past(adapter)
        self.adapters.reset(task + 1)
        self._trained = False
        self.restore(state)

    def adopt(self, task: int, pairs: dict[str, Pair], rows: tuple[Row, ...] | None) -> dict[str, Pair]:
        """Pairs of any rank are the past of the next task."""
        self.check_adoption(rows is not None)
        self.task = task
        past = self.adapters.filled(pairs)
        self.adapters.set_past(past)
        self.adapters.reset(task + 1)
        self._trained = False
        self.end_task(task, rows or ())
        return past

    def checks(self) -> list[Check]:
        frozen = len(self.adapters.past())
        ok = frozen > 0 or self.task == 0
        return [*super().checks(), Check("frozen pairs", frozen, ok, "layers that keep earlier tasks' pairs frozen")]
