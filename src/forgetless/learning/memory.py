"""Rows kept from earlier tasks for replay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.seeds import generator

POLICIES = ("reservoir", "quota")


def some(rows: Sequence[Row], count: int, *seed: int | str) -> list[Row]:
    """`count` distinct rows (fewer if there are fewer), as a function of the seed."""
    order = torch.randperm(len(rows), generator=generator(*seed))
    return [rows[i] for i in order[:count].tolist()]


@dataclass
class Memory:
    """At most `capacity` rows of everything seen.

    * reservoir: every row ever seen is kept with the same probability capacity / seen (Vitter 1985,
      algorithm R); large tasks get more rows.
    * quota: each task seen so far has the same number of rows.
    * a capacity in percent keeps that share of each task, drawn uniformly, and never drops a row.

    Where a task's rows were deleted (`forgetless forget-rows`), later rows take the places of the deleted ones, kept or
    not, in a reservoir's random pairing (Gemulla, Lehner and Haas 2006): all rows but those keep equal probabilities.
    """

    capacity: int | str
    policy: str = "reservoir"
    seed: int = 0
    rows: list[Row] = field(default_factory=list)
    tasks: list[int] = field(default_factory=list)  # the task of each kept row
    seen: int = 0  # rows so far, deleted tasks' left out
    forgotten: dict[str, int] = field(default_factory=dict)  # a deleted task -> how many rows it had
    replaced: int = 0  # of all these, how many a later row has stood in for

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"memory policy {self.policy!r}: one of {', '.join(POLICIES)}")
        self.share = _share(self.capacity)
        self.room = int(self.capacity) if self.share is None else 0  # rows, where capacity is no share

    def add_task(self, task: int, rows: tuple[Row, ...]) -> None:
        """Takes in a finished task's rows, each once."""
        if self.share is not None:
            self._keep(task, rows, math.ceil(round(self.share * len(rows), 9)))
        elif self.policy == "quota":
            self._share_out(task, rows)
        else:
            self._reservoir(task, rows)
        self.seen += len(rows)

    def counts(self) -> dict:
        """What is needed to go on beside the rows, as JSON."""
        deleted = {"forgotten": self.forgotten, "replaced": self.replaced} if self.forgotten else {}
        return {"seen": self.seen} | deleted

    def go_on(self, kept: Memory, counts: dict) -> None:
        """Takes over rows and the `counts` that belong to them."""
        self.rows, self.tasks, self.seen = kept.rows, kept.tasks, counts["seen"]
        self.forgotten, self.replaced = counts.get("forgotten", {}), counts.get("replaced", 0)

    def draw(self, count: int, *seed: int | str) -> list[Row]:
        """`count` distinct rows (fewer if fewer are kept), as a function of the seed."""
        return some(self.rows, count, "replay", self.seed, *seed)

    def _keep(self, task: int, rows: tuple[Row, ...], count: int) -> None:
        order = torch.randperm(len(rows), generator=generator("memory", self.seed, task))
        chosen = order[:count].tolist()  # in random order, so that a cut leaves a uniform choice
        self.rows += [rows[i] for i in chosen]
        self.tasks += [task] * len(chosen)

    def _share_out(self, task: int, rows: tuple[Row, ...]) -> None:
        known = sorted({*self.tasks, task})
        quota = {t: self.room // len(known) + (i < self.room % len(known)) for i, t in enumerate(known)}
        kept: list[tuple[Row, int]] = []
        for row, owner in zip(self.rows, self.tasks, strict=True):
            if quota[owner] > 0:
                kept.append((row, owner))
                quota[owner] -= 1
        self.rows, self.tasks = [row for row, _ in kept], [owner for _, owner in kept]
        self._keep(task, rows, quota[task])

    def _reservoir(self, task: int, rows: tuple[Row, ...]) -> None:
        draw = generator("memory", self.seed, task)
        for seen, row in enumerate(rows, start=self.seen):
            if left := sum(self.forgotten.values()) - self.replaced:
                gaps = min(self.room, seen + left) - len(self.rows)  # of the deleted rows, these were kept ones
                self.replaced += 1
                if int(torch.randint(left, (), generator=draw)) < gaps:
                    self.rows.append(row)
                    self.tasks.append(task)
                continue
            if len(self.rows) < self.room:
                self.rows.append(row)
                self.tasks.append(task)
                continue
            slot = int(torch.randint(seen + 1, (), generator=draw))  # uniform in 0..seen
            if slot < self.room:
                self.rows[slot], self.tasks[slot] = row, task


def _share(capacity: int | str) -> float | None:
    """0.1 for '10%', None for a number of rows."""
    text = str(capacity).strip()
    try:
        if text.endswith("%") and 0 <= float(text[:-1]) <= 100:
            return float(text[:-1]) / 100
        if int(text) >= 0:
            return None
    except ValueError:
        pass
    raise UsageError(f"memory {capacity!r}: a number of rows such as 500, or a share of each task such as '10%'")
