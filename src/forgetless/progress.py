"""Progress of long work: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)  # what is going on
out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)  # results


class Steps:
    """Told about each step; shows it."""

    def __init__(self, label: str, total: int, bar: Progress | None = None, show: bool = True, before: int = 0):
        self.label, self.total, self.bar, self.show = label, total, bar, show
        self.done, self.before, self.tokens, self.began, self.said = before, before, 0, time.monotonic(), 0.0
        if bar is not None:
            self.id = bar.add_task(label, total=total, completed=before, note="")

    def advance(self, tokens: int = 0, loss: float | None = None) -> None:
        self.done += 1
        self.tokens += tokens
        seconds = max(time.monotonic() - self.began, 1e-9)
        note = f"loss {loss:.3f}  " if loss is not None else ""
        note += f"{self.tokens / seconds:,.0f} tokens/s" if self.tokens else ""
        if self.bar is not None:
            self.bar.update(self.id, advance=1, note=note)
        elif self.show and (self.done == self.total or seconds - self.said > 20):
            self.said = seconds
            left = seconds / (self.done - self.before) * (self.total - self.done)
            console.print(f"{self.label}: {self.done}/{self.total}  {note}  {left:.0f} s left")


@contextmanager
def steps(label: str, total: int, *, show: bool = True, before: int = 0) -> Iterator[Steps]:
    """Shows `total` steps of work called `label`, of which `before` were done earlier."""
    if show and sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            yield Steps(label, total, bar, before=before)
    else:
        yield Steps(label, total, show=show, before=before)


def seconds_of(act: Callable[[], object]) -> float:
    """How long `act()` takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
