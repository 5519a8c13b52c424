"""SIGINT and SIGTERM: the running step, or what a task does at its end, is finished and saved, then the run stops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from forgetless.errors import Stopped

STOPPING = (
    b"\nstopping: the running step, or a task's end, is finished and saved first; Ctrl-C once more stops at once\n"
)
UNSAVED = "Finished tasks and saved steps are kept: give the same command again to go on after them."


class Signals:
    """Inside `with signals:` these signals raise `Stopped` with what is `told`; inside `with signals.held():` the first
    one waits.

    Signals that are ignored stay so, and outside the main thread nothing is changed.
    """

    def __init__(self, told: str = UNSAVED, numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self.told, self.numbers = told, numbers
        self.holding, self.received = False, 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in self.numbers:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]  # as signal() gave it
        self._before.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """A signal waits in `received` until it is asked for, at the latest until the block ends."""
        self.holding, self.received = True, 0
        try:
            yield
        finally:
            self.holding = False
        if self.received:
            raise Stopped(self.received, self.told)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.holding or (self.received and number == signal.SIGINT):
            raise Stopped(number, self.told)
        if not self.received:
            os.write(2, STOPPING)  # not through Python's own file: it may be in the middle of a write
        self.received = number
