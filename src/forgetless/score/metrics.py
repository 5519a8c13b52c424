"""Continual-learning metrics on R, where R[i,j] is the score on task j after learning task i (both from 1 to T).

Papers differ in divisors, so each metric carries its own beside its formula. A cell that was not scored makes the
metrics that need it `None` with the reason, never 0. The last row stands for R[T,.]: a joint run has only that one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

Matrix = Sequence[Sequence[float | None]]


class NotScored(Exception):
    """A metric needs a number that is not there."""


@dataclass(frozen=True)
class Metric:
    """A figure with its formula and divisor; `why` says what is missing where `value` is None."""

    name: str
    value: float | list[float] | None
    formula: str
    divisor: str
    why: str | None = None

    def as_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Scores:
    """R, the untouched model's scores b and the numbers of test rows n, all read with the papers' indices from 1."""

    matrix: Matrix
    base: Sequence[float | None]
    sizes: Sequence[int]

    @property
    def T(self) -> int:
        return max(len(self.base), len(self.sizes), *(len(row) for row in self.matrix), 0)

    def R(self, i: int, j: int) -> float:
        if i > len(self.matrix):
            raise NotScored(f"R[{i},{j}]: the matrix has {_rows(len(self.matrix))} for {self.T} tasks")
        return _cell(self.matrix[i - 1], j, f"R[{i},{j}]")

    def last(self, j: int) -> float:
        """R[T,j], or the only row's score of a joint run."""
        if not self.matrix:
            raise NotScored("nothing has been scored after learning")
        return self.R(len(self.matrix), j)

    def b(self, j: int) -> float:
        return _cell(self.base, j, f"b_{j}, the untouched model on task {j},")

    def n(self, j: int) -> int:
        if j > len(self.sizes):
            raise NotScored(f"n_{j}, the number of test rows of task {j}, is not known")
        return self.sizes[j - 1]


def _cell(row: Sequence[float | None], j: int, name: str) -> float:
    value = row[j - 1] if j <= len(row) else None
    if value is None:
        raise NotScored(f"{name} was not scored")
    if not math.isfinite(value):
        raise NotScored(f"{name} is {value}")
    return value


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def metrics(
    matrix: Matrix, base: Sequence[float | None] | None = None, sizes: Sequence[int] | None = None
) -> dict[str, Metric]:
    """Every metric by its key.

    >>> R = [[.9, .1, .1], [.7, .8, .2], [.6, .7, .9]]
    >>> found = metrics(R, base=[.1, .1, .1])
    >>> round(found["average_accuracy"].value, 4), round(found["bwt"].value, 2), round(found["forgetting"].value, 2)
    (0.7333, -0.2, 0.2)
    >>> metrics([[.9, None], [None, .8]])["bwt"].why
    'cannot compute: R[2,1] was not scored'
    """
    scores = Scores(matrix, base or (), sizes or ())
    return {key: _compute(scores, *told) for key, told in METRICS.items()}


def _compute(scores: Scores, name: str, formula: str, divisor: str, compute: Callable) -> Metric:
    try:
        if scores.T == 0:
            raise NotScored("there are no tasks")
        return Metric(name, compute(scores), formula, divisor)
    except NotScored as missing:
        return Metric(name, None, formula, divisor, f"cannot compute: {missing}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def average_accuracy(s: Scores) -> float:
    """How well all tasks are known at the end, each counting the same. (GEM, arXiv 1706.08840)"""
    return _mean([s.last(j) for j in range(1, s.T + 1)])


def weighted_accuracy(s: Scores) -> float:
    """The same with each test row counting the same; what O-LoRA's `predict_exact_match` is. (arXiv 2310.14152)"""
    return sum(s.n(j) * s.last(j) for j in range(1, s.T + 1)) / sum(s.n(j) for j in range(1, s.T + 1))


def running_averages(s: Scores) -> list[float]:
    """OP_t: the average accuracy over the tasks learnt so far, after each task. (TRACE, arXiv 2310.06762)"""
    return [_mean([s.R(t, j) for j in range(1, t + 1)]) for t in range(1, s.T + 1)]


def average_incremental(s: Scores) -> float:
    """How well the tasks learnt so far were known, on average over the stream. (iCaRL, arXiv 1611.07725)"""
    return _mean(running_averages(s))


def learning_accuracy(s: Scores) -> float:
    """How well each task was known just after it was learnt: plasticity. (MER, arXiv 1810.11910)"""
    return _mean([s.R(j, j) for j in range(1, s.T + 1)])


def bwt(s: Scores) -> float:
    """What learning later tasks did to earlier ones; negative is forgetting. (GEM, arXiv 1706.08840)"""
    return _mean([s.R(s.T, j) - s.R(j, j) for j in _earlier(s)])


def bwt_over_all(s: Scores) -> float:
    """The same sum over T instead of T-1. (TRACE, arXiv 2310.06762; SAPT, arXiv 2401.08295)"""
    return bwt(s) * (s.T - 1) / s.T


def fwt(s: Scores) -> float:
    """What learning earlier tasks did to tasks not yet learnt. (GEM, arXiv 1706.08840)"""
    return _mean([s.R(j, j + 1) - s.b(j + 1) for j in _earlier(s)])


def forgetting(s: Scores) -> float:
    """The fall of each earlier task from its best score before the last task; at least -BWT. (arXiv 1801.10112)"""
    return _mean([max(s.R(l, j) for l in range(j, s.T)) - s.R(s.T, j) for j in _earlier(s)])


def retention(s: Scores) -> float:
    """The share of what was learnt that is still there, averaged over earlier tasks."""
    for j in _earlier(s):
        if s.R(j, j) == 0:
            raise NotScored(f"R[{j},{j}] is 0, and no share of nothing can be kept")
    return _mean([s.R(s.T, j) / s.R(j, j) for j in _earlier(s)])


def _earlier(s: Scores) -> range:
    """The tasks that could be forgotten: all but the last."""
    if s.T < 2:
        raise NotScored("with one task there is no earlier task")
    return range(1, s.T)


METRICS: dict[str, tuple[str, str, str, Callable]] = {
    "average_accuracy": ("average accuracy", "(1/T) Σ_j R[T,j]", "T", average_accuracy),
    "weighted_accuracy": ("sample-weighted accuracy", "Σ_j n_j R[T,j] / Σ_j n_j", "Σ_j n_j", weighted_accuracy),
    "average_incremental": (
        "average incremental accuracy",
        "(1/T) Σ_i (1/i) Σ_{j≤i} R[i,j]",
        "i inside, T outside",
        average_incremental,
    ),
    "learning_accuracy": ("learning accuracy", "(1/T) Σ_j R[j,j]", "T", learning_accuracy),
    "bwt": ("backward transfer (GEM)", "(1/(T-1)) Σ_{j<T} (R[T,j] - R[j,j])", "T-1", bwt),
    "bwt_over_all": ("backward transfer (TRACE, SAPT)", "(1/T) Σ_{j<T} (R[T,j] - R[j,j])", "T", bwt_over_all),
    "fwt": ("forward transfer (GEM)", "(1/(T-1)) Σ_{j≥2} (R[j-1,j] - b_j)", "T-1", fwt),
    "forgetting": ("forgetting", "(1/(T-1)) Σ_{j<T} (max_{j≤l<T} R[l,j] - R[T,j])", "T-1", forgetting),
    "retention": ("retention", "(1/(T-1)) Σ_{j<T} R[T,j] / R[j,j]", "T-1", retention),
    "running_average": ("accuracy so far (TRACE OP_t)", "(1/t) Σ_{j≤t} R[t,j]", "t", running_averages),
}
"""key -> name, formula, divisor, function."""
