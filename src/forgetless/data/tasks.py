"""Row -> Task -> Stream: what is learnt, in which order, and how it is scored."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from forgetless.data.scoring import Scoring


@dataclass(frozen=True)
class Row:
    """One example, in one of three shapes.

    * pair: `prompt` and `answer`; the loss is on the answer.
    * chat: `messages`; the loss is on the assistant's turns. `answer` is the last assistant turn.
    * text: `prompt` is empty and there are no messages; the loss is on the whole `answer`.
    """

    prompt: str
    answer: str
    messages: tuple[tuple[str, str], ...] = ()  # (role, content)
    source: str = ""  # "train.jsonl:17", for messages to people; not part of what the row is
    options: tuple[str, ...] = ()  # what the answer is chosen among, where each row has its own choices
    domain: str = ""  # what it is about, where its source says so; not part of what the row is either

    @property
    def shape(self) -> str:
        return "chat" if self.messages else "pair" if self.prompt else "text"

    def content(self) -> dict:
        """The row as JSON, without where it came from."""
        own = {"options": list(self.options)} if self.options else {}
        if self.messages:
            return {"messages": [{"role": role, "content": text} for role, text in self.messages]} | own
        return {"prompt": self.prompt, "answer": self.answer} | own if self.prompt else {"text": self.answer}

    @cached_property
    def key(self) -> str:
        """Sixteen hex digits that name the row by its content, wherever it lies."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def turns_before(self) -> tuple[tuple[str, str], ...]:
        """A chat's turns before the answer, which is the last assistant turn."""
        last = max(i for i, (role, _) in enumerate(self.messages) if role == "assistant")
        return self.messages[:last]

    @property
    def label(self) -> str:
        """The answer without the white space around it: what an option is compared with."""
        return self.answer.strip()

    @property
    def lead(self) -> str:
        """The white space before the answer; an option is scored as `lead + option`."""
        return self.answer[: len(self.answer) - len(self.answer.lstrip())]


@dataclass(frozen=True)
class Task:
    """Rows to learn from, rows to choose by, rows to judge by, and how answers are scored.

    `scorers` names entries of `data.scoring.SCORERS`, or says more (`Scoring`); the first gives the headline number.
    `options` are the label words, in their order; empty for free answers.
    """

    name: str
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    options: tuple[str, ...] = ()
    scorers: tuple[str | Scoring, ...] = ("exact_match",)
    max_new_tokens: int = 32
    notes: tuple[str, ...] = ()  # counted warnings: dropped rows, overlap, ...
    gone: str = ""  # why its rows are no longer here; then it has none, and what was learnt of it is in a run's folder

    @cached_property
    def fingerprint(self) -> str:
        """Names the task by what is learnt and scored; notes and file places do not count."""
        told = {
            "name": self.name,
            "rows": [[row.key for row in rows] for rows in self.splits.values()],
            "options": self.options,
            "scorers": self.scoring,
            "max_new_tokens": self.max_new_tokens,
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def splits(self) -> dict[str, tuple[Row, ...]]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @cached_property
    def digests(self) -> dict[str, str]:
        """Sixteen hex digits for the rows of each split: they say which of them have changed."""
        keys = {split: " ".join(row.key for row in rows) for split, rows in self.splits.items()}
        return {split: hashlib.sha256(told.encode()).hexdigest()[:16] for split, told in keys.items()}

    @property
    def scoring(self) -> list:
        """The scorers as JSON: a name, or [name, arguments or the hash of the user's file]."""
        return [one if isinstance(one, str) else one.content() for one in self.scorers]

    def majority(self) -> tuple[str, float] | None:
        """The commonest test answer and its share: the score of a model that always says it."""
        if not self.options or not self.test:
            return None
        return commonest(row.label for row in self.test)


def commonest(labels: Iterable[str]) -> tuple[str, float]:
    """The commonest label, the first in the alphabet of equals, and its share.

    >>> commonest(["no", "yes", "yes", "no"])
    ('no', 0.5)
    """
    counts = Counter(labels)
    label = min(counts, key=lambda word: (-counts[word], word))
    return label, counts[label] / counts.total()


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they arrive."""

    name: str
    tasks: tuple[Task, ...]

    @cached_property
    def options(self) -> tuple[str, ...]:
        """The union of all tasks' label words, in order of first appearance."""
        return tuple(dict.fromkeys(option for task in self.tasks for option in task.options))
