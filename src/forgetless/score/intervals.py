"""Intervals and paired tests: what a change on these rows can and cannot show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, norm


@dataclass(frozen=True)
class Change:
    """After minus before, on the same rows. `lost`: right before and wrong after; `gained`: the reverse."""

    change: float
    low: float
    high: float
    p: float | None
    lost: int
    gained: int
    n: int


def wilson(correct: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share of right answers (Wilson 1927)."""
    if n <= 0 or not 0 <= correct <= n:
        raise ValueError(f"{correct} right answers of {n}")
    z = norm.ppf((1 + confidence) / 2)
    share, spread = correct / n, z**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * np.sqrt(share * (1 - share) / n + spread / (4 * n))
    # at 0 and n right answers the limits are exactly 0 and 1; rounding must not say otherwise
    return (0.0 if correct == 0 else float(middle - half)), (1.0 if correct == n else float(middle + half))


def paired_change(before: Sequence[float], after: Sequence[float], confidence: float = 0.95, seed: int = 0) -> Change:
    """The change of the mean score with its interval.

    Right/wrong scores: Newcombe's score interval for a difference of paired shares (Newcombe 1998, Statistics in
    Medicine 17:2635, method 10) and the exact McNemar test (two-sided binomial over the rows that changed). Other
    scores: the paired bootstrap's percentiles (2,000 draws, fixed seed) and no p.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(f"the same rows before and after are needed, not {len(before)} and {len(after)}")
    old, new = np.asarray(before, float), np.asarray(after, float)
    lost, gained, n = int((new < old).sum()), int((new > old).sum()), len(old)
    change = float(new.mean() - old.mean())
    if set(np.unique(np.concatenate([old, new]))) <= {0.0, 1.0}:
        low, high = _newcombe(int(((old == 1) & (new == 1)).sum()), lost, gained, n, confidence)
        return Change(change, low, high, mcnemar(lost, gained), lost, gained, n)
    draws = np.random.default_rng(seed).integers(0, n, (2000, n))
    means = (new - old)[draws].mean(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Change(change, float(low), float(high), None, lost, gained, n)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p of "a changed row is as likely to be lost as gained" (McNemar 1947)."""
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def _newcombe(both: int, lost: int, gained: int, n: int, confidence: float) -> tuple[float, float]:
    """Method 10: Wilson limits of both shares, joined by their correlation φ with a continuity correction."""
    neither = n - both - lost - gained
    after, before = (both + gained) / n, (both + lost) / n
    low_after, high_after = wilson(both + gained, n, confidence)
    low_before, high_before = wilson(both + lost, n, confidence)
    product = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    cross = both * neither - lost * gained
    cross = max(cross - n / 2, 0) if cross > 0 else cross
    phi = cross / np.sqrt(product) if product else 0.0
    down, up = after - low_after, high_after - after
    down_before, up_before = before - low_before, high_before - before
    low = (after - before) - np.sqrt(max(down**2 - 2 * phi * down * up_before + up_before**2, 0))
    high = (after - before) + np.sqrt(max(up**2 - 2 * phi * up * down_before + down_before**2, 0))
    return float(max(low, -1.0)), float(min(high, 1.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979): the family-wise error stays at the level they are compared with."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
