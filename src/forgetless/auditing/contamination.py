"""Contamination: probe rows that stand among the training rows, exactly or nearly, and so measure nothing.

Near: at least 70 % of a row's 8-grams of words were seen in training, PaLM's rule (Chowdhery et al. 2022, section 8).
The n-grams of the probe are indexed and the training rows go past once, so time grows with the sum of their words and
memory with the probe alone.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from forgetless.data.tasks import Row, Task
from forgetless.errors import DataError
from forgetless.score.texts import words

GRAM, NEAR = 8, 0.7
FRAME_ROWS, FRAME_SHARE = 10, 0.5


@dataclass(frozen=True)
class Contamination:
    """Numbers of the rows, from 0: of the same words as a training row or its prompt, and nearly so."""

    exact: tuple[int, ...]
    near: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.exact) + len(self.near)


def contamination(rows: Sequence[Row], training: Iterable[Row]) -> Contamination:
    """The rows that are found in the training rows.

    Exact: the row's words, or those of its prompt alone, are all the words of a training row or of its prompt; case,
    punctuation and white space do not count. Near: 70 % of the row's 8-grams are seen in the training rows together;
    a row of less than 8 words can only be exact. In a probe of 10 rows or more, the n-grams of more than half of its
    rows are the frame of the prompt and do not count.
    """
    texts = [_texts(row) for row in rows]
    grams = _without_frame([_grams(whole) for whole, _ in texts])
    rows_of: dict[str, list[int]] = defaultdict(list)
    for number, own in enumerate(grams):
        for gram in own:
            rows_of[gram].append(number)
    rows_with: dict[str, list[int]] = defaultdict(list)
    for number, told in enumerate(texts):
        for text in told:
            rows_with[" ".join(text)].append(number)
    rows_with.pop("", None)  # of prompts without a word
    exact: set[int] = set()
    hits: Counter[int] = Counter()
    for trained in training:
        told = _texts(trained)
        for text in told:
            exact.update(rows_with.pop(" ".join(text), ()))  # seen once is seen
        for gram in _grams(told[0]):
            hits.update(rows_of.pop(gram, ()))
    near = {i for i, own in enumerate(grams) if own and hits[i] >= NEAR * len(own)} - exact
    return Contamination(tuple(sorted(exact)), tuple(sorted(near)))


def without(task: Task, found: Contamination) -> Task:
    """The task without these test rows, with a note that counts them; DataError where no row would be left."""
    if not len(found):
        return task
    out = {*found.exact, *found.near}
    kept = tuple(row for i, row in enumerate(task.test) if i not in out)
    note = (
        f"{len(out)} of {len(task.test)} rows left out: found in the training rows ({len(found.exact)} exact, "
        f"{len(found.near)} near)"
    )
    if not kept:
        raise DataError(f"{task.name!r}: all {len(task.test)} rows are in the training rows; take another probe")
    return dataclasses.replace(task, test=kept, notes=(*task.notes, note))


def _texts(row: Row) -> tuple[list[str], list[str]]:
    """The words of the whole row, and of what it asks (none where it is a text)."""
    if row.shape == "chat":
        asked = " ".join(text for role, text in row.turns_before if role != "system")
        return words(" ".join(text for _, text in row.messages)), words(asked)
    return words(f"{row.prompt} {row.answer}"), words(row.prompt)


def _grams(told: list[str]) -> set[str]:
    return {" ".join(told[start : start + GRAM]) for start in range(len(told) - GRAM + 1)}


def _without_frame(grams: list[set[str]]) -> list[set[str]]:
    if len(grams) < FRAME_ROWS:
        return grams
    counts = Counter(gram for own in grams for gram in own)
    frame = {gram for gram, count in counts.items() if count > FRAME_SHARE * len(grams)}
    return [own - frame for own in grams]
