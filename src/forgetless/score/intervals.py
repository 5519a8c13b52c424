"""Intervals and paired tests: what a change on these rows can and cannot show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, t

from forgetless.score.bounds import Betting

DRAWS = 5_000  # of the bootstrap and of the sign-flip test
FEWEST_CLUSTERS = 10  # of which a ratio's interval is given
CHUNK = 250  # draws held at once: 250 x 10,000 rows are 20 MB


@dataclass(frozen=True)
class Change:
    """After minus before in the mean score, on the same rows.

    `low` and `high` bound the change; `lost` counts the rows that were right before and are wrong after (for
    other scores: rows that got less), `gained` the reverse.
    """

    change: float
    low: float
    high: float
    p: float
    lost: int
    gained: int
    n: int


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a share of right answers: (p̂ + z²/2n ± z √(p̂(1-p̂)/n + z²/4n²)) / (1 + z²/n). (Wilson 1927)"""
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"{correct} right answers of {n}")
    z, share = norm.ppf((1 + confidence) / 2), correct / n
    middle = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    # with 0 or n right answers the limits are exactly 0 or 1; rounding must not say otherwise
    return (0.0 if correct == 0 else (middle - half) / scale), (1.0 if correct == n else (middle + half) / scale)


def mean_interval(scores: Sequence[float], confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Of the mean of scores in 0..1 that are not all right or wrong: expanded-percentile bootstrap over rows."""
    low, high = _bootstrap(np.asarray(scores, float), confidence, seed)
    return max(low, 0.0), min(high, 1.0)


def paired_change(
    before: Sequence[bool | float], after: Sequence[bool | float], confidence: float = 0.95, seed: int = 0
) -> Change:
    """How the mean score of the same rows changed, with an interval and a p value.

    Right/wrong scores: Tango's score interval with a continuity correction, and the exact McNemar test. Other
    scores in 0..1: expanded-percentile paired bootstrap and a sign-flip test, both drawn from `seed`.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(f"the same rows before and after are needed, not {len(before)} and {len(after)}")
    old, new = np.asarray(before, float), np.asarray(after, float)
    lost, gained, n = int((new < old).sum()), int((new > old).sum()), len(old)
    if np.isin(old, (0, 1)).all() and np.isin(new, (0, 1)).all():
        low, high = tango(lost, gained, n, confidence)
        return Change((gained - lost) / n, low, high, mcnemar(lost, gained), lost, gained, n)
    difference = new - old
    low, high = _bootstrap(difference, confidence, seed)
    return Change(float(difference.mean()), low, high, _sign_flip(difference, seed), lost, gained, n)


def ratio_of_means(
    numerator: Sequence[float] | np.ndarray, denominator: Sequence[float] | np.ndarray, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Interval of mean(numerator) / mean(denominator) over the same rows; None where the denominator may be 0.

    All ρ for which Student's t does not reject mean(numerator - ρ denominator) = 0 (Fieller 1954). A row (1, 1) and a
    row (0, 1) are added, as Agresti and Caffo (2000) add a success and a failure to shares: else a loss that comes
    back whole, or not at all, would have an interval without width.

    >>> [round(end, 2) for end in ratio_of_means([1] * 40 + [0] * 60, [1] * 40 + [0] * 60)]
    [0.93, 1.02]
    """
    y, x = np.append(numerator, [1.0, 0.0]), np.append(denominator, [1.0, 1.0])
    n = len(x)
    q = t.ppf((1 + confidence) / 2, n - 1) ** 2 / n
    (var_y, cov), (_, var_x) = np.cov(y, x)
    # ρ² a - 2 ρ b + c <= 0
    a, b, c = x.mean() ** 2 - q * var_x, x.mean() * y.mean() - q * cov, y.mean() ** 2 - q * var_y
    if a <= 0:
        return None
    half = math.sqrt(max(b * b - a * c, 0.0))
    return float((b - half) / a), float((b + half) / a)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p of "a row that changed was as likely to be lost as gained". (McNemar 1947)"""
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def tango(lost: int, gained: int, n: int, confidence: float = 0.95, correction: float = 1.0) -> tuple[float, float]:
    """Score interval of Δ = P(gained) - P(lost) on paired rows: all Δ with |S(Δ)| < z.

    S(Δ) = (|gained - lost - nΔ| - correction)₊ / √(n (2 q̂(Δ) + Δ - Δ²)), q̂(Δ) the likeliest P(lost) if Δ is true
    (Tango 1998, Statistics in Medicine 17:891). It needs no correction for coverage on average, but dips to 93 % and
    can exclude 0 where the exact McNemar test does not (4 lost, 0 gained: p = .125). One row of correction, as in
    the corrected McNemar test, keeps the coverage at 95 % or more from n = 20 on and lets both agree.
    """
    z = float(norm.ppf((1 + confidence) / 2))
    observed = (gained - lost) / n

    def beyond(delta: float) -> float:
        """Above 0 where Δ is too far from what was observed."""
        distance = max(abs(gained - lost - n * delta) - correction, 0.0)
        linear = (2 * n - gained + lost) * delta - lost - gained
        root = math.sqrt(max(linear**2 + 8 * n * lost * delta * (1 - delta), 0.0))
        variance = n * (2 * (root - linear) / (4 * n) + delta * (1 - delta))
        return distance - z * math.sqrt(max(variance, 0.0))

    return _edge(beyond, observed, -1.0), _edge(beyond, observed, 1.0)


def _edge(beyond: Callable[[float], float], inside: float, end: float) -> float:
    """Where `beyond` turns positive on the way from `inside` to `end`; `end` itself if it never does."""
    # a hair inside the interval and the range: at their ends the variance can be 0, which would be a false root
    start, near_end = inside + end * 1e-9, end * (1 - 1e-12)
    if inside == end or beyond(near_end) <= 0:
        return end
    return float(brentq(beyond, start, near_end, xtol=1e-12))


def ratio_intervals(
    sums: np.ndarray, counts: np.ndarray, confidence: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of Σ_d sums[d, g] / Σ_d counts[d, g] for every group g: (groups,) each, from two of (clusters, groups).

    What lies in one cluster d (the tokens of a document) is not independent, so whole clusters are resampled; how much
    of a group each one holds then varies as well. Expanded percentiles as in `paired_change`, by the number of
    clusters that have the group; NaN where that is below ten. Where clusters differ much, and their ratios are skewed,
    simulated 95 % intervals hold the truth in 90 % of cases with 30 clusters, and with ten in no more than 80 %.
    """
    n = len(sums)
    with np.errstate(invalid="ignore"):  # a group of which nothing was drawn is 0 / 0: that draw says nothing of it
        ratios = np.concatenate([(drawn @ sums) / (drawn @ counts) for drawn in _resamples(n, seed)])
    bounds = np.full((2, sums.shape[1]), np.nan)
    for group, holding in enumerate((counts > 0).sum(axis=0)):
        if holding >= FEWEST_CLUSTERS:
            tail = _tail(holding, confidence)
            told = ratios[:, group]
            bounds[:, group] = np.quantile(told[~np.isnan(told)], [tail, 1 - tail])
    return bounds[0], bounds[1]


@dataclass(frozen=True)
class Band:
    """Several quantities of the same rows, with bounds that hold for all of them together; NaN where there are none."""

    value: np.ndarray  # (quantities,)
    low: np.ndarray
    high: np.ndarray


def band(
    tasks: Sequence[tuple[np.ndarray, np.ndarray]], confidence: float = 0.95, added: tuple[float, ...] = (),
    seed: int = 0,
) -> Band:  # fmt: skip
    """(1/T) Σ_t Σ_i sums[i, q] / Σ_i counts[i] for every quantity q, with simultaneous bounds.

    `tasks`: each task's sums (rows, quantities) and counts (rows,). Rows are resampled within their task, the same
    rows for all quantities, and c of value ± c se is such that the largest of |draw - value| / se is within it in the
    stated share of draws, so that one may look for the largest or smallest of the quantities (a max-t band). c is
    widened by the number of rows as in `paired_change`. `added`: scores of rows that are added to each task for the
    bounds, such as (1, -1) for differences of right and wrong (Bonett & Price 2012): rows that are all equal bound
    nothing otherwise. Below ten rows in a task there are no bounds.
    """
    value = np.mean([sums.sum(axis=0) / counts.sum() for sums, counts in tasks], axis=0)
    fewest = min(len(sums) for sums, _ in tasks)
    if fewest < FEWEST_CLUSTERS:
        return Band(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
    tasks = [(_with_rows(sums, added), np.append(counts, np.ones(len(added)))) for sums, counts in tasks]
    middle = np.mean([sums.sum(axis=0) / counts.sum() for sums, counts in tasks], axis=0)
    error = np.sqrt(sum(map(_ratio_variance, tasks))) / len(tasks)
    moves = np.zeros((DRAWS, len(value)))
    for number, (sums, counts) in enumerate(tasks):
        drawn = [(times @ sums) / (times @ counts)[:, None] for times in _resamples(len(sums), seed + number)]
        moves += np.concatenate(drawn) / len(tasks)
    moving = error > 1e-12
    largest = np.max(np.abs(moves - middle)[:, moving] / error[moving], axis=1, initial=0.0)
    half = np.quantile(largest, 1 - 2 * _tail(fewest, confidence)) * error
    return Band(value, np.minimum(value, middle - half), np.maximum(value, middle + half))


def _with_rows(sums: np.ndarray, added: tuple[float, ...]) -> np.ndarray:
    return np.vstack([sums, *(np.full((1, sums.shape[1]), score) for score in added)])


def _ratio_variance(task: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Of Σ sums / Σ counts, by its linearisation: Σ (sums - ratio counts)² / (n (n-1) mean(counts)²)."""
    sums, counts = task
    n = len(counts)
    rest = sums - np.outer(counts, sums.sum(axis=0) / counts.sum())
    return (rest**2).sum(axis=0) / (n * (n - 1) * counts.mean() ** 2)


def _bootstrap(difference: np.ndarray, confidence: float, seed: int) -> tuple[float, float]:
    """Percentiles of the mean over resampled rows, widened as Student's t is.

    Of equal rows every resample is the same, which bounds nothing: there the bounds of any mean in -1 to 1 hold.
    """
    n = len(difference)
    if not n or np.ptp(difference) < 1e-9:
        side = (1 + confidence) / 2
        mean = Betting(difference, -1.0, 1.0, side)
        return mean.lower(side), mean.upper(side)
    means = np.concatenate([drawn @ difference / n for drawn in _resamples(n, seed)])
    tail = _tail(n, confidence)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _resamples(n: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n rows is drawn, (CHUNK, n) at a time, DRAWS in all."""
    rng, draws = np.random.default_rng(seed), n * np.arange(CHUNK)[:, None]
    for _ in range(DRAWS // CHUNK):  # counting drawn numbers takes a fifth of the time of rng.multinomial
        drawn = rng.integers(n, size=(CHUNK, n)) + draws
        yield np.bincount(drawn.ravel(), minlength=CHUNK * n).reshape(CHUNK, n).astype(float)


def _tail(n: int, confidence: float) -> float:
    """The percentile that a bootstrap over n rows takes: Φ(√(n/(n-1)) t_{n-1, (1-confidence)/2}).

    (Hesterberg 2015, section 5.3)
    """
    return float(norm.cdf(math.sqrt(n / (n - 1)) * t.ppf((1 - confidence) / 2, n - 1)))


def _sign_flip(difference: np.ndarray, seed: int) -> float:
    """Two-sided p of "before and after could be swapped in any row", by swapping at random."""
    rng, observed = np.random.default_rng(seed), abs(difference.sum())
    extreme = 0
    for _ in range(DRAWS // CHUNK):
        sums = rng.choice([-1.0, 1.0], (CHUNK, len(difference))) @ difference
        extreme += int((np.abs(sums) >= observed - 1e-9).sum())
    return (1 + extreme) / (1 + DRAWS)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number: max over the smaller ones of min(1, (m - rank) p). (Holm 1979)

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
