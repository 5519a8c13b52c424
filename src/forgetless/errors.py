"""The errors a user can cause and cure. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class ForgetlessError(Exception):
    """Says what was found, where, and what to do. The command line prints it and exits 1."""


class UsageError(ForgetlessError):
    """An option, a key or a name that does not exist or does not fit."""


class DataError(ForgetlessError):
    """Rows or tasks that cannot be learnt from or scored."""


class RunError(ForgetlessError):
    """A run folder, checkpoint or adapter that cannot be used as it is."""


class DivergedError(RunError):
    """Training whose loss or gradient is no finite number."""


class DownloadError(ForgetlessError):
    """Something that must be fetched and could not be, or is not what it should be."""


class Stopped(KeyboardInterrupt):
    """A run was told to stop by SIGINT or SIGTERM; the text says what is kept and how to go on."""

    def __init__(self, number: int, told: str):
        super().__init__(told)
        self.number = number  # of the signal


class EndpointError(ForgetlessError):
    """A served model that cannot be reached, or does not answer as it should."""


_quoting = ContextVar("quoting", default=True)


@contextmanager
def quoting(allowed: bool) -> Iterator[None]:
    """Whether messages made inside the block may quote rows and answers."""
    before = _quoting.set(allowed)
    try:
        yield
    finally:
        _quoting.reset(before)


def quoted(text: str) -> str:
    """What a message quotes of a row or an answer.

    >>> quoted("a  long\\ntext")
    "'a long text'"
    >>> with quoting(False):
    ...     quoted("a  long\\ntext")
    '(text not shown)'
    """
    return repr(short(text)) if _quoting.get() else "(text not shown)"


def short(text: str, most: int = 60) -> str:
    """What a message quotes of a text: on one line, cut.

    >>> short("a  long\\ntext", 6)
    'a lon…'
    """
    folded = " ".join(text.split())
    return folded if len(folded) <= most else folded[: most - 1] + "…"


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or `; known: a, b, c` when nothing is near.

    >>> nearest("olra", ["olora", "nlora"])
    "; did you mean 'olora'?"
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "; known: " + ", ".join(sorted(known))
