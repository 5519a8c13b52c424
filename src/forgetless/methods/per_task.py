"""One adapter per task, chosen by the task's name at test: nothing can be forgotten, nothing is shared.

    W_t = W_0 + s B_t A_t,   L_t = CE(task t)

The bound for methods that are not told the task, and often the right product: "do you need one adapter?"
"""

from __future__ import annotations

from forgetless.methods.base import ADAPTER, Method


class PerTask(Method):
    paper = "2310.14152"
    adopts = ADAPTER
    summary = "one adapter per task, chosen by task at test (bound; nothing is forgotten)"
    task_id = True
    bound = True
    extra_memory = "one adapter a task on disk"

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.adapters.reset(task)

    def weights_for(self, learnt: int, task: int) -> int | None:
        return task if task <= learnt else None
