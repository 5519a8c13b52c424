"""One-sided bounds of a mean that hold at the stated confidence for any number of rows, however rare the losses.

An interval drawn by resampling or from a normal curve does not: where one row in a thousand is lost and 500 rows are
looked at, most samples show no loss at all, and neither would bound it. What is assumed here: rows drawn
independently from the same source, and values within known limits. Nothing else.

Every bound is the inversion of a test: `upper(confidence)` is the least limit with `p_at_least(limit)` within
1 - confidence. So a claim with its p value and a decision by the bound cannot contradict each other.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import beta, binom

ORDERS = 10  # of the rows, over which capital is averaged
LARGEST_BET = 0.9  # share of the capital that one row can cost
PRIOR_ROWS = 3  # rows of mean 1/2 and variance 1/4 that the first bets believe in
STEP = 1e-12  # of the range: how near a test is inverted
MOST_PLANNED = 20_000  # rows for which a plan is tried out; beyond, the growth rate decides


class Bound(ABC):
    """Tests of "the mean is at least (at most) this", and the bounds they give, all in the unit of the values."""

    def __init__(self, least: float, most: float):
        if not least < most:
            raise ValueError(f"values lie between {least} and {most}?")
        self.least, self.most = least, most

    @abstractmethod
    def p_at_least(self, limit: float) -> float:
        """Small where the rows show that the mean is below `limit`: at most α with probability α if it is not."""

    @abstractmethod
    def p_at_most(self, limit: float) -> float:
        """Small where the rows show that the mean is above `limit`."""

    def upper(self, confidence: float) -> float:
        """With this confidence the mean is no higher."""
        return _invert(self.p_at_least, self.least, self.most, 1 - confidence)

    def lower(self, confidence: float) -> float:
        """With this confidence the mean is no lower."""
        return _invert(self.p_at_most, self.most, self.least, 1 - confidence)


def _invert(p: Callable[[float], float], inside: float, end: float, level: float) -> float:
    """The limit nearest to `inside` that the test rejects, or `end`; p falls from `inside` to `end`."""
    if p(end) > level:
        return end
    step = (end - inside) * STEP
    limit = float(brentq(lambda limit: p(limit) - level, inside, end, xtol=abs(step)))
    while p(limit) > level:  # the root is found up to a step, on either side
        limit += step
    return limit


class Binomial(Bound):
    """The share of rows of which something happened, exactly. (Clopper & Pearson 1934, Biometrika 26:404)

    >>> Binomial(0, 149).upper(0.95) < 0.02 < Binomial(0, 148).upper(0.95)
    True
    """

    def __init__(self, count: int, n: int):
        if n < 0 or not 0 <= count <= n:
            raise ValueError(f"{count} of {n} rows")
        super().__init__(0.0, 1.0)
        self.count, self.n = count, n

    def p_at_least(self, limit: float) -> float:
        return float(binom.cdf(self.count, self.n, limit))

    def p_at_most(self, limit: float) -> float:
        return float(binom.sf(self.count - 1, self.n, limit))

    def upper(self, confidence: float) -> float:
        # P(Binomial(n, p) <= k) = 1 - I_p(k + 1, n - k)
        return 1.0 if self.count == self.n else float(beta.ppf(confidence, self.count + 1, self.n - self.count))

    def lower(self, confidence: float) -> float:
        return 0.0 if self.count == 0 else float(beta.ppf(1 - confidence, self.count, self.n - self.count + 1))


class BoundedMean(Bound):
    """What the bounds of a mean have in common: the values brought to 0..1, and tests from above by reflection."""

    def __init__(self, values: Sequence[float] | np.ndarray, least: float, most: float):
        super().__init__(least, most)
        self.values = np.asarray(values, float)
        if not ((self.values >= least) & (self.values <= most)).all():  # NaN is neither
            raise ValueError(f"values outside {least} to {most}, or no numbers")
        self.x = (self.values - least) / (most - least)
        self.n = len(self.x)

    def p_at_least(self, limit: float) -> float:
        return self._p_below(limit, self.least, self.most, mirrored=False)

    def p_at_most(self, limit: float) -> float:
        return self._p_below(-limit, -self.most, -self.least, mirrored=True)

    def _p_below(self, limit: float, least: float, most: float, mirrored: bool) -> float:
        if limit <= least:
            return 1.0
        if limit > most:
            return 0.0
        return self._p((limit - least) / (most - least), mirrored)

    @abstractmethod
    def _p(self, m: float, mirrored: bool) -> float:
        """p of "the mean of x is m or more", 0 < m <= 1; of 1 - x where `mirrored`."""


class Betting(BoundedMean):
    """The mean of bounded values by betting. (Waudby-Smith & Ramdas 2024, JRSS-B 86:1; one side of the hedged capital)

    Somebody who doubts "the mean is m or more" bets on every row that it comes out below m. The game is fair or worse
    for him if the mean is m or more, so that his capital K exceeds 1/α with probability α at most; p = 1/K.

        K(m) = Π_t (1 + λ_t (m - x_t)),   λ_t = min(√(2 log(1/α) / (n σ̂²_{t-1})), c / (1 - m))
        μ̂_t = (r/2 + Σ_{i≤t} x_i) / (t + r),   σ̂²_t = (r/4 + Σ_{i≤t} (x_i - μ̂_i)²) / (t + r)

    λ_t looks only at rows before t, which is all that validity needs; α is the level for which the bets are tuned,
    c = 0.9 and r = 3 were chosen for few and rare losses (the paper has c = 1/2 or 3/4 and r = 1). K grows with m, so
    the values of m that are not rejected form an interval. So that no one order of the rows decides, K is the mean
    over a few orders that depend on nothing but the seed and n: a mean of fair games is one.
    """

    def __init__(
        self,
        values: Sequence[float] | np.ndarray,
        least: float = 0.0,
        most: float = 1.0,
        tuned_for: float = 0.95,
        seed: int = 0,
    ):
        super().__init__(values, least, most)
        orders = [_order(self.n, seed, number) for number in range(ORDERS)]
        self.rows = self.x[np.array(orders, dtype=int)]  # (orders, n)
        self.bets = _bets(self.rows, 1 - tuned_for)  # (orders, n), before they are capped

    def _p(self, m: float, mirrored: bool) -> float:
        rows = 1 - self.rows if mirrored else self.rows
        cap = LARGEST_BET / (1 - m) if m < 1 else math.inf
        log_capital = np.log1p(np.minimum(self.bets, cap) * (m - rows)).sum(axis=1)
        largest = float(log_capital.max())  # taken out: a capital may be more than a float holds
        if largest <= 0:
            return 1.0
        return min(1.0, math.exp(-largest) / float(np.exp(log_capital - largest).mean()))


def _order(n: int, seed: int, number: int) -> np.ndarray:
    """A permutation of n rows from a hash: the same on every machine and with every version of numpy."""
    drawn = hashlib.shake_256(f"order {number} of {n} rows, seed {seed}".encode()).digest(8 * n)
    return np.argsort(np.frombuffer(drawn, "<u8"), kind="stable")


def _bets(rows: np.ndarray, level: float) -> np.ndarray:
    """√(2 log(1/α) / (n σ̂²_{t-1})) for every row t of every order."""
    t = np.arange(1, rows.shape[1] + 1)
    mean = (PRIOR_ROWS / 2 + np.cumsum(rows, axis=1)) / (t + PRIOR_ROWS)
    variance = (PRIOR_ROWS / 4 + np.cumsum((rows - mean) ** 2, axis=1)) / (t + PRIOR_ROWS)
    before = np.hstack([np.full((len(rows), 1), 0.25), variance[:, :-1]])[:, : len(t)]
    return np.sqrt(2 * math.log(1 / level) / (len(t) * before))


class HoeffdingBentkus(BoundedMean):
    """A second bound, from the mean alone. (Bates et al. 2021, J. ACM 68:43; Angelopoulos et al., arXiv 2110.01052)

    p = min(exp(-n h(min(x̄, m), m)), e P(Binomial(n, m) <= ⌈n x̄⌉)),   h(a, b) = a log(a/b) + (1-a) log((1-a)/(1-b))

    It does not see the variance: where most values lie in the middle of their range it is far wider than betting.
    """

    def _p(self, m: float, mirrored: bool) -> float:
        if not self.n:
            return 1.0
        total = float((1 - self.x if mirrored else self.x).sum())
        hoeffding = math.exp(-self.n * _relative_entropy(min(total / self.n, m), m))
        bentkus = math.e * float(binom.cdf(math.ceil(total - 1e-9), self.n, m))
        return min(1.0, hoeffding, bentkus)


def _relative_entropy(a: float, b: float) -> float:
    """Of two coins, in nats; 0 log 0 = 0."""
    terms = ((a, b), (1 - a, 1 - b))
    return sum(p * (math.log(p / q) if q > 0 else math.inf) for p, q in terms if p > 0)


def rows_needed(
    values: Sequence[float] | np.ndarray, limit: float, confidence: float, least: float, most: float
) -> int | None:
    """About how many rows like these `values` show by betting that their mean is below `limit`; None if none do.

    The capital of whoever knows the distribution grows by max_λ E log(1 + λ (m - x)) a row. From the number of rows at
    which it would reach 1/α the plan is tried out on that many rows with this distribution, and enlarged until they
    do. A real sample has luck of its own: about half of those with this many rows succeed.
    """
    values = np.sort(np.asarray(values, float))
    m, x = (limit - least) / (most - least), (values - least) / (most - least)
    largest = LARGEST_BET / (1 - m)
    best = minimize_scalar(lambda bet: -np.log1p(bet * (m - x)).mean(), bounds=(0, largest), method="bounded")
    if m <= x.mean() or -best.fun < 1e-9:
        return None
    n = math.ceil(-math.log(1 - confidence) / -best.fun)
    while n <= MOST_PLANNED and Betting(like(values, n), least, most, confidence).p_at_least(limit) > 1 - confidence:
        n = math.ceil(1.02 * n)
    return n


def like(ordered: np.ndarray, n: int) -> np.ndarray:
    """n values with the distribution of these, by their quantiles."""
    return ordered[((np.arange(n) + 0.5) * len(ordered) / n).astype(int)]
