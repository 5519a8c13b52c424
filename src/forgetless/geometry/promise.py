"""Which points of a path keep every budget, as far as held-out rows show it.

Fixed-sequence testing ("Learn then Test", Angelopoulos et al., arXiv 2110.01052). The points are tested one after
another in an order that is fixed beforehand, each at the whole level δ, up to the first that is not certified:

    point α is certified   <=>   every budget b rejects "its loss at α is above b" at the level δ
    P(any certified point is over any of its budgets) <= δ

A point that is over a budget is certified with probability δ at most, whatever its other budgets are (an intersection-
union test, Berger 1982), and of all such points only the first in the order matters: past it nothing is certified
unless it was. So nothing is corrected for the numbers of points and budgets, losses need not grow along the path, and
any of the certified points may be chosen, by the same rows too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from scipy.stats import binom

from forgetless.auditing.budgets import MAX_LOST, Budget
from forgetless.auditing.measures import Divergence, Measure, Scores
from forgetless.auditing.verdict import plan
from forgetless.score.bounds import Betting, Binomial, Bound, rows_needed


@dataclass(frozen=True)
class Held:
    """One budget at one point. Losses are shares of rows, differences of mean scores, or nats per token."""

    budget: Budget
    rows: int
    loss: float  # as measured, without the clip
    high: float  # with confidence 1 - δ the loss is no larger
    p: float  # of "the loss is above the budget"
    shown: bool  # to be within the budget
    lost: int | None  # rows that score less than before, and more; None for a divergence
    gained: int | None
    clipped: int | None  # documents above the clip, which rule a point out; None for scores


def held(measure: Measure, budget: Budget, level: float) -> Held:
    """What a measure's rows show of its budget, at the level δ."""
    test, scores = test_of(measure, budget, level), isinstance(measure, Scores)
    lost, gained = int((measure.losses > 0).sum()), int((measure.losses < 0).sum())
    return Held(
        budget,
        rows=len(measure.losses),
        loss=lost / len(measure.losses) if budget.option == MAX_LOST else measure.mean,
        high=test.upper(1 - level),
        p=test.p_at_least(budget.limit),
        shown=is_shown(measure, budget, level),
        lost=lost if scores else None,
        gained=gained if scores else None,
        clipped=None if isinstance(measure, Scores) else measure.clipped,
    )


def is_shown(measure: Measure, budget: Budget, level: float) -> bool:
    """Whether the rows reject "the loss is above the budget"; documents beyond the clip rule it out, as in an audit."""
    beyond = isinstance(measure, Divergence) and measure.clipped > 0
    return not beyond and test_of(measure, budget, level).p_at_least(budget.limit) <= level


def test_of(measure: Measure, budget: Budget, level: float) -> Bound:
    """Rows lost are counted exactly; a net drop (-1, 0, 1 or graded) and nats up to the clip are means, by betting."""
    if budget.option == MAX_LOST:
        return Binomial(int((measure.losses > 0).sum()), len(measure.losses))
    return Betting(measure.losses, measure.least, measure.most, 1 - level)


def certified(shown: Iterable[bool]) -> Iterator[bool]:
    """For each point in the fixed order whether it is certified: all budgets shown, here and at every point before.

    >>> list(certified([True, False, True]))
    [True, False, False]
    """
    still = True
    for one in shown:
        still = still and one
        yield still


def chosen(alphas: Sequence[float], certified: Sequence[bool], learnt: Sequence[float] | None) -> float:
    """Of the certified points the one that learns most, of equals the smallest; 0 where none learns more than before.

    `learnt`: the mean score on the new tasks before, at α = 0, and then at each point; None: the largest point is best.

    >>> chosen([0.1, 0.2, 0.3], [True, True, False], [0.5, 0.6, 0.6, 0.9]), chosen([0.1], [False], None)
    (0.1, 0.0)
    """
    candidates = [0.0, *(alpha for alpha, good in zip(alphas, certified, strict=True) if good)]
    if learnt is None:
        return max(candidates)
    score = dict(zip([0.0, *alphas], learnt, strict=True))
    return max(candidates, key=lambda alpha: (score[alpha], -alpha))


# ---------------------------------------------------------------------------------------- enough rows?


def can_be_shown(measure: Measure, budget: Budget, level: float) -> bool:
    """Whether these rows could show the budget with nothing lost: no row changed, or all that can be gained."""
    n = len(measure.losses)
    if isinstance(measure, Divergence):
        best: list[Measure] = [Divergence(measure.name, (0.0,) * n, (1,) * n, measure.clip)]
    else:
        best = [Scores(measure.name, measure.before, after) for after in (measure.before, (1.0,) * n)]
    return any(is_shown(one, budget, level) for one in best)


def least_rows(budget: Budget, level: float, clip: float) -> int | None:
    """How many rows show the budget if nothing is lost; None where no number would do.

    >>> least_rows(Budget(MAX_LOST, "invoices", 0.02), 0.05, 1.0)
    149
    """
    if budget.option == MAX_LOST:  # (1 - limit)^n <= δ
        return math.ceil(math.log(level) / math.log1p(-budget.limit))
    return plan(budget, 1 - level, clip=clip)


def more_rows(measure: Measure, budget: Budget, level: float) -> int | None:
    """About how many rows like these would show the budget; None where none would, or where it is shown."""
    losses = measure.losses
    if is_shown(measure, budget, level) or (isinstance(measure, Divergence) and measure.clipped):
        return None
    if budget.option != MAX_LOST:
        needed = rows_needed(losses, budget.limit, 1 - level, measure.least, measure.most)
        return needed and max(needed, len(losses) + 1)
    share = float((losses > 0).mean())
    if share >= budget.limit:
        return None
    n = least_rows(budget, level, 1.0) or 1
    while binom.cdf(round(share * n), n, budget.limit) > level:
        n = math.ceil(1.02 * n)
    return max(n, len(losses) + 1)
