"""What a task may say of its scoring: names, names with an argument, and the user's own functions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetless.errors import UsageError, nearest
from forgetless.usercode import digest, read_code

GENERATED = ("exact_match", "number", "choice", "rouge_l", "sari", "code_similarity", "regex", "json")
"""Scorers of the generated answer; `forgetless.score.rules` has them."""

SCORERS = ("options", "completions", "next_token", *GENERATED)
"""How a task may be scored; `forgetless.score.scorers` says what each measures."""

ARGUMENTS = {
    "regex": "a pattern, as in `regex: 'Total: (\\d+)'`",
    "sari": "a pattern whose one group is the text to simplify, as in `sari: 'Text: (.*)'`",
    "json": "a list of fields, as in `json: [name, date]`",
}
"""Scorer -> the argument that it takes; only `regex` needs one."""


@dataclass(frozen=True)
class Scoring:
    """A scorer that is more than a name of `SCORERS`: one with an argument, or a user's function."""

    name: str  # an entry of ARGUMENTS, or "scorers.py:polite"
    argument: tuple[str, ...] = ()  # regex and sari: the pattern; json: the fields
    file: str = ""  # that holds the user's function
    sha256: str = ""  # of the file's bytes

    def content(self) -> list[str]:
        """What the scores depend on: the file's bytes count, its place does not."""
        return [self.name, *self.argument, *([self.sha256] if self.sha256 else [])]


def name_of(scorer: str | Scoring) -> str:
    return scorer if isinstance(scorer, str) else scorer.name


def read_scorers(told: Any, folder: Path) -> tuple[str | Scoring, ...]:
    """One scorer or a list of them, as a stream file has them.

    >>> read_scorers(["number", {"regex": "x"}], Path("."))
    ('number', Scoring(name='regex', argument=('x',), file='', sha256=''))
    """
    scorers = tuple(_scorer(one, folder) for one in (told if isinstance(told, list) else [told]))
    if not scorers:
        raise UsageError(f"`scorers:` names none; leave it out, or name some of {', '.join(SCORERS)}")
    names = [name_of(one) for one in scorers]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"the scorer {name!r} is named twice; a task has each at most once")
    return scorers


def _scorer(told: Any, folder: Path) -> str | Scoring:
    if isinstance(told, Scoring):
        return told
    name, argument = next(iter(told.items())) if isinstance(told, dict) and len(told) == 1 else (told, None)
    if not isinstance(name, str):
        raise UsageError(f"a scorer is a name or `NAME: ARGUMENT`, found {told!r}")
    if name not in SCORERS and (".py" in name or ":" in name):
        if argument is not None:
            raise UsageError(f"{name}: a function of yours takes no argument here, found {argument!r}")
        return own_function(name, folder)
    if name not in SCORERS:
        own = "; a function of yours is named ./FILE.py:FUNCTION"
        raise UsageError(f"unknown scorer {name!r}{nearest(name, SCORERS)}{own}")
    if argument is None and name != "regex":
        return name
    if name not in ARGUMENTS:
        raise UsageError(f"the scorer {name!r} takes no argument, found {argument!r}")
    words: list = argument if isinstance(argument, list) and name == "json" else [argument]
    if not words or not all(isinstance(word, str) and word for word in words) or len(set(words)) < len(words):
        found = "none" if argument is None else repr(argument)
        raise UsageError(f"the scorer {name!r} takes {ARGUMENTS[name]}; found {found}")
    return Scoring(name, tuple(words))


def own_function(told: str, folder: Path = Path(".")) -> Scoring:
    """A user's function, told as FILE.py:FUNCTION with the file relative to `folder`. Nothing is run here.

    The function is called as `function(answer, row)` with the generated text and the `Row`, and gives a number from 0
    to 1. The hash of the file's bytes goes into the task's fingerprint, so that a run notices a changed file.
    """
    parts = re.fullmatch(r"(.*\.py):([^\W\d]\w*)", told)
    if not parts:
        raise UsageError(f"{told!r} names no function; write ./FILE.py:FUNCTION")
    file = folder / Path(parts[1]).expanduser()
    content = read_code(file)
    return Scoring(f"{file.name}:{parts[2]}", file=str(file.resolve()), sha256=digest(content))
