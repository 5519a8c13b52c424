"""Continual-learning metrics on R, where R[i, j] is the score on task j after learning task i.

Formulas as in the literature named beside each; papers differ in divisors, so each metric carries its own. A cell
that was not scored makes a metric `None` with the reason, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

Matrix = Sequence[Sequence[float | None]]


class NotScored(Exception):
    """A metric needs something that is not there."""


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
    """R with T tasks, the untouched model's scores b, and the number of test rows n of each task; indices from 1."""

    matrix: Matrix
    base: Sequence[float | None] | None
    sizes: Sequence[int] | None

    @property
    def T(self) -> int:
        return max((len(row) for row in self.matrix), default=0)

    def R(self, i: int, j: int) -> float:
        if i > len(self.matrix):
            raise NotScored(f"there is no row R[{i}, .]: the matrix has {len(self.matrix)} of {self.T} rows")
        row = self.matrix[i - 1]
        value = row[j - 1] if j <= len(row) else None
        if value is None:
            raise NotScored(f"R[{i},{j}] was not scored")
        return value

    def last(self, j: int) -> float:
        """The score on task j after the last row, which is R[T, j] once all tasks are learnt."""
        return self.R(len(self.matrix), j)

    def b(self, j: int) -> float:
        value = self.base[j - 1] if self.base else None
        if value is None:
            raise NotScored(f"the untouched model was not scored on task {j}")
        return value

    def n(self, j: int) -> int:
        if not self.sizes:
            raise NotScored("the numbers of test rows are not known")
        return self.sizes[j - 1]


def metrics(
    matrix: Matrix, base: Sequence[float | None] | None = None, sizes: Sequence[int] | None = None
) -> dict[str, Metric]:
    """Every metric by its key.

    >>> R = [[.9, .1, .1], [.7, .8, .2], [.6, .7, .9]]
    >>> found = metrics(R, base=[.1, .1, .1])
    >>> round(found["average_accuracy"].value, 4), round(found["bwt"].value, 2), round(found["forgetting"].value, 2)
    (0.7333, -0.2, 0.2)
    """
    scores = Scores(matrix, base, sizes)
    return {key: _compute(scores, *told) for key, told in METRICS.items()}


def _compute(scores: Scores, name: str, formula: str, divisor: str, compute: Callable) -> Metric:
    try:
        return Metric(name, compute(scores), formula, divisor)
    except NotScored as missing:
        return Metric(name, None, formula, divisor, f"cannot compute: {missing}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def average_accuracy(s: Scores) -> float:
    return _mean([s.last(j) for j in range(1, s.T + 1)])


def weighted_accuracy(s: Scores) -> float:
    rows = [s.n(j) for j in range(1, s.T + 1)]
    return sum(s.last(j) * s.n(j) for j in range(1, s.T + 1)) / sum(rows)


def average_incremental(s: Scores) -> float:
    return _mean(running_averages(s))


def running_averages(s: Scores) -> list[float]:
    return [_mean([s.R(t, j) for j in range(1, t + 1)]) for t in range(1, s.T + 1)]


def learning_accuracy(s: Scores) -> float:
    return _mean([s.R(j, j) for j in range(1, s.T + 1)])


def _backward(s: Scores) -> float:
    """Σ_{j<T} (R[T,j] - R[j,j])."""
    _several(s)
    return sum(s.R(s.T, j) - s.R(j, j) for j in range(1, s.T))


def bwt(s: Scores) -> float:
    return _backward(s) / (s.T - 1)


def bwt_over_all(s: Scores) -> float:
    return _backward(s) / s.T


def fwt(s: Scores) -> float:
    _several(s)
    return _mean([s.R(j - 1, j) - s.b(j) for j in range(2, s.T + 1)])


def forgetting(s: Scores) -> float:
    _several(s)
    return _mean([max(s.R(l, j) for l in range(j, s.T)) - s.R(s.T, j) for j in range(1, s.T)])


def retention(s: Scores) -> float:
    _several(s)
    shares = []
    for j in range(1, s.T):
        learnt = s.R(j, j)
        if learnt == 0:
            raise NotScored(f"R[{j},{j}] is 0, so no share of it can be kept")
        shares.append(s.R(s.T, j) / learnt)
    return _mean(shares)


def _several(s: Scores) -> None:
    if s.T < 2:
        raise NotScored("one task has no earlier task to forget")
    if len(s.matrix) < s.T:
        raise NotScored(f"the matrix has {len(s.matrix)} of {s.T} rows")


METRICS: dict[str, tuple[str, str, str, Callable]] = {
    "average_accuracy": ("average accuracy", "(1/T) Σ_j R[T,j]", "T (macro over tasks)", average_accuracy),
    "weighted_accuracy": (
        "sample-weighted accuracy",
        "Σ_j n_j R[T,j] / Σ_j n_j",
        "test rows of all tasks",
        weighted_accuracy,
    ),
    "average_incremental": (
        "average incremental accuracy",
        "(1/T) Σ_i (1/i) Σ_{j<=i} R[i,j]",
        "T, and i inside",
        average_incremental,
    ),
    "learning_accuracy": ("learning accuracy", "(1/T) Σ_j R[j,j]", "T", learning_accuracy),
    "bwt": ("backward transfer (GEM)", "(1/(T-1)) Σ_{j<T} (R[T,j] - R[j,j])", "T-1", bwt),
    "bwt_over_all": ("backward transfer (TRACE, SAPT)", "(1/T) Σ_{j<T} (R[T,j] - R[j,j])", "T", bwt_over_all),
    "fwt": ("forward transfer (GEM)", "(1/(T-1)) Σ_{j>=2} (R[j-1,j] - b_j)", "T-1", fwt),
    "forgetting": ("forgetting", "(1/(T-1)) Σ_{j<T} (max_{j<=l<T} R[l,j] - R[T,j])", "T-1", forgetting),
    "retention": ("retention", "(1/(T-1)) Σ_{j<T} R[T,j] / R[j,j]", "T-1", retention),
    "running_average": (
        "overall performance after each task (TRACE OP_t)",
        "(1/t) Σ_{j<=t} R[t,j]",
        "t",
        running_averages,
    ),
}
"""key -> name, formula, divisor, function."""
