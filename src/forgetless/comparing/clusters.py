"""Means over runs that share seeds and orders of tasks, with errors that know it.

Runs with one order err together (the order is easy or hard), and so do runs with one seed, so that 3 seeds x 3 orders
are not nine independent runs. For each of the two that was varied, f, the residuals e = y - ȳ are summed within its
levels g:

    V_f = G/(G-1) Σ_g (Σ_{i in g} e_i)² / n²,      V = Σ_f V_f,      ν = V² / Σ_f V_f²/(G_f - 1)

    ȳ ± t_ν √V

V_f is the variance of a mean over G clusters; with every seed in every order that of the levels' means over G.
Two-way clustering (Cameron, Gelbach and Miller 2011, J. of Business & Economic Statistics 29:238) takes off V of their
intersection; left in, what runs differ by beyond seed and order counts twice, which errs to the wide side. ν is
Satterthwaite's (1946, Biometrics Bulletin 2:110).

What has fewer than three levels is no sample: the mean is of these levels, and V has no part of it. Where one lies
within the other (each order has seeds of its own) the outer one says all.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t

FEWEST = 3  # levels of what varies, of which an interval is given
SAME = 1e-9  # an error below it is rounding: runs that agree to the row bound nothing

Levels = Mapping[str, Sequence[Hashable]]
"""What varies -> its level in each run: {"seeds": [0, 1, 2], "orders": [...]}."""


@dataclass(frozen=True)
class Mean:
    """A mean over runs with its standard error."""

    value: float
    error: float
    freedom: float  # ν
    groups: int  # the fewest levels of what varies

    def interval(self, confidence: float) -> tuple[float, float] | None:
        """None where the runs agree up to rounding."""
        if self.error <= SAME:
            return None
        half = float(t.ppf((1 + confidence) / 2, self.freedom)) * self.error
        return self.value - half, self.value + half

    def p(self) -> float:
        """Two-sided, of "the mean is 0". Values without a spread have no t: there it is the sign test's, 2^(1-G)."""
        if self.error <= SAME:
            return 1.0 if abs(self.value) <= SAME else 2.0 ** (1 - self.groups)
        return float(2 * t.sf(abs(self.value) / self.error, self.freedom))


def sampled(levels: Levels) -> list[str]:
    """What varies enough for an interval over it; where one lies within another, the outer one."""
    many = [name for name, told in levels.items() if len(set(told)) >= FEWEST]
    inner = {one for one in many for other in many if one != other and _within(levels[one], levels[other])}
    return [name for name in many if name not in inner] or many[:1]


def _within(inner: Sequence[Hashable], outer: Sequence[Hashable]) -> bool:
    """Whether each level of `inner` has one of `outer`."""
    return len(set(zip(inner, outer, strict=True))) == len(set(inner))


def mean_over(values: Sequence[float], levels: Levels) -> Mean | None:
    """The mean of runs at these levels; None where nothing varies over three levels."""
    parts = [(_variance(values, levels[name]), len(set(levels[name]))) for name in sampled(levels)]
    if not parts:
        return None
    V = sum(part for part, _ in parts)
    freedom = V**2 / sum(part**2 / (G - 1) for part, G in parts) if V > SAME**2 else 1.0
    return Mean(statistics.fmean(values), V**0.5, freedom, min(G for _, G in parts))


def _variance(values: Sequence[float], level: Sequence[Hashable]) -> float:
    """G/(G-1) Σ_g (Σ_{i in g} e_i)² / n²."""
    mean, sums = statistics.fmean(values), defaultdict[Hashable, float](float)
    for value, one in zip(values, level, strict=True):
        sums[one] += value - mean
    G = len(sums)
    return G / (G - 1) * sum(found**2 for found in sums.values()) / len(values) ** 2
