"""What is judged: the same rows under both models, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from forgetless.auditing.budgets import MAX_DROP, MAX_KL
from forgetless.errors import DataError

REFERENCE, ANCHOR = "reference", "anchor"
AGAINST = (REFERENCE, ANCHOR)
KL_CLIP = 1.0  # nats per token of one document


@dataclass(frozen=True)
class Scores:
    """A task's or probe's rows scored from 0 to 1 before and after; what is lost is before - after, row by row."""

    name: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    against: str = REFERENCE

    option: ClassVar[str] = MAX_DROP
    least: ClassVar[float] = -1.0
    most: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        _equally_many(self.name, self.before, self.after)
        _within(self.name, "score", [*self.before, *self.after], 0.0, 1.0)

    @property
    def losses(self) -> np.ndarray:
        return np.asarray(self.before, float) - np.asarray(self.after, float)

    @property
    def mean(self) -> float:
        return float(self.losses.mean())

    @property
    def right_or_wrong(self) -> bool:
        return bool(np.isin([*self.before, *self.after], (0, 1)).all())


@dataclass(frozen=True)
class Divergence:
    """A text's documents: KL(before || after) summed over a document's tokens, in nats, and how many tokens.

    What is lost is the document's nats per token, `clip` at most: without a limit no sample bounds a mean. A document
    counts once, however long.
    """

    name: str
    kl_sum: tuple[float, ...]
    tokens: tuple[int, ...]
    clip: float = KL_CLIP
    against: str = REFERENCE

    option: ClassVar[str] = MAX_KL
    least: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        _equally_many(self.name, self.kl_sum, self.tokens)
        _within(self.name, "number of tokens", self.tokens, 1, math.inf)
        _within(self.name, "KL", self.kl_sum, -math.inf, math.inf)

    @property
    def most(self) -> float:
        return self.clip

    @property
    def per_token(self) -> np.ndarray:
        """Nats per token of each document, as measured."""
        return np.asarray(self.kl_sum, float) / np.asarray(self.tokens, float)

    @property
    def losses(self) -> np.ndarray:
        return np.clip(self.per_token, 0.0, self.clip)  # below 0 is rounding

    @property
    def mean(self) -> float:
        """As measured, without the clip."""
        return float(self.per_token.mean())

    @property
    def clipped(self) -> int:
        """Documents above the clip."""
        return int((self.per_token > self.clip).sum())


Measure = Scores | Divergence


def _equally_many(name: str, one: Sequence, other: Sequence) -> None:
    if len(one) != len(other):
        raise DataError(f"{name}: {len(one)} and {len(other)} numbers; both models must be measured on the same rows")


def _within(name: str, what: str, values: Sequence[float], least: float, most: float) -> None:
    for value in values:
        if not (math.isfinite(value) and least <= value <= most):
            raise DataError(f"{name}: a {what} of {value}; measure this row again, or leave it out and count it")
