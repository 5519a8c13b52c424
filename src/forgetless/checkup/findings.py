"""What a check found: fine, worth knowing, or a problem with what to do. Each is a line of a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from forgetless.errors import ForgetlessError

OK, NOTE, PROBLEM = "OK", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """A line of the table; of a problem, `said` ends with the remedy."""

    check: str
    level: Literal["OK", "note", "problem"]
    said: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def ok(check: str, said: str) -> Finding:
    return Finding(check, "OK", said)


def note(check: str, said: str) -> Finding:
    return Finding(check, "note", said)


def problem(check: str, said: str) -> Finding:
    return Finding(check, "problem", said)


def checked(check: str, find: Callable[[], Finding]) -> Finding:
    """What `find` found; an error that says what to do is a problem."""
    try:
        return find()
    except ForgetlessError as error:
        return problem(check, str(error))
