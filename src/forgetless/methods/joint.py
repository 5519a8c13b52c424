"""Joint training: all tasks' rows shuffled together, as if they had never come one after another.

    L = CE(task 1 ∪ ... ∪ task T)

The same number of visits to each row as the sequence. The bound for learning without forgetting.
"""

from __future__ import annotations

from forgetless.data.tasks import Stream
from forgetless.methods.base import Lesson, Method


class Joint(Method):
    paper = "2310.14152"
    adopts = "it learns the rows of all tasks at once; choose a method that learns one task after another"
    summary = "all tasks at once (bound; needs all rows together)"
    old_rows = True
    bound = True
    off = "it learns all tasks at once, from the first step"

    def lessons(self, stream: Stream) -> list[Lesson]:
        rows = tuple(row for task in stream.tasks for row in task.train)
        return [Lesson("joint", rows, len(stream.tasks) - 1, len(stream.tasks))]
