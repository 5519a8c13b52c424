"""Findings and verdict: what these rows show about every loss, and whether all of it is within its budget.

    pass           every budgeted loss is below its budget with the stated confidence      exit code 0
    regression     one is above its budget, Holm-adjusted for the number of budgets        exit code 2
    insufficient   neither is shown                                                        exit code 3

A pass is an intersection-union test (Berger 1982): a model over one of its budgets passes with probability 1 -
confidence at most, and another budget can only turn a pass into something else. Of a text this holds for the mean over
its documents of nats per token, each counted as the clip at most. Without the clip nothing bounds the mean: a document
beyond it rules a pass out, but a share of 3 in n of such documents goes unseen among n with a probability of 5 %, of 1
in n with 37 %, and their nats may be any number. The other way around, many
budgets mean many chances of a false alarm, so claims of a loss are adjusted for their number, by lowering the level at
which each is tested: a finding's `low` is the bound at that level, and a claim holds where it is above the budget.
Losses without a budget are claimed against 0 in a family of their own, and decide nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from forgetless.auditing.budgets import MAX_DROP, MAX_KL, Budget, resolve, written
from forgetless.auditing.measures import ANCHOR, KL_CLIP, REFERENCE, Divergence, Measure, Scores
from forgetless.errors import UsageError, nearest
from forgetless.score.bounds import Betting, like, rows_needed
from forgetless.score.intervals import holm

PASS, REGRESSION, INSUFFICIENT = "pass", "regression", "insufficient evidence"
EXIT_CODES = {PASS: 0, REGRESSION: 2, INSUFFICIENT: 3, None: 0}
ERROR_EXIT_CODE = 1
WITHIN, OVER, UNCLEAR = "within budget", "over budget", "insufficient evidence"  # with a budget
WORSE, NOT_SHOWN, MEASURED = "worse", "no loss shown", "no budget"  # without one; the last for a divergence


@dataclass(frozen=True)
class Waiver:
    """Somebody answers for one budget being exceeded, until and including a day."""

    option: str
    name: str
    owner: str
    reason: str
    until: datetime.date
    against: str = REFERENCE

    def __str__(self) -> str:
        return f"{self.option} {self.name}, waived until {self.until} by {self.owner}: {self.reason}"


@dataclass(frozen=True)
class Terms:
    """What a model is held to, and the day on which it is."""

    today: datetime.date
    budgets: tuple[Budget, ...] = ()
    anchor_budgets: tuple[Budget, ...] = ()
    confidence: float = 0.95
    waivers: tuple[Waiver, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What the rows of one measure show. Losses are shares of the full score, or nats per token."""

    name: str
    option: str
    against: str
    status: str
    rows: int
    loss: float | None  # the mean, without the clip; None without rows
    low: float  # with the confidence, Holm-adjusted, the loss is no smaller
    high: float  # with the confidence, the loss is no larger; no bound where documents lie beyond the clip
    p: float | None  # of "within its budget" (without a budget: "nothing lost"), Holm-adjusted
    budget: float | None
    lost: int | None  # rows that score less than before, and more; None for a divergence
    gained: int | None
    clipped: int | None  # documents above the clip; None for scores
    clip: float | None  # what `low` and `high` count a document as at most; None for scores
    least_shown: float | None  # the smallest loss that a typical sample of as many rows shows to be above the limit
    rows_needed: int | None  # about how many rows like these would settle it; None where none would, or it is settled
    waived: bool = False

    @property
    def budget_text(self) -> str:
        """`max-drop invoices=2pp`; without a budget `max-drop invoices`."""
        return f"{self.option} {self.name}" + ("" if self.budget is None else f"={written(self.option, self.budget)}")


@dataclass(frozen=True)
class Verdict:
    """All findings about one model, budgeted ones first, and what follows from them; no budget, no outcome."""

    outcome: str | None
    confidence: float
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.outcome]

    @property
    def waived(self) -> tuple[Finding, ...]:
        """Of a pass: the budgets that are not shown to be kept, for which somebody answers."""
        return tuple(one for one in self.findings if self.outcome == PASS and one.waived and one.status != WITHIN)


def judge(measures: Sequence[Measure], terms: Terms) -> Verdict:
    """The verdict on one model's measures.

    Raises UsageError for a budget or waiver of something that is not measured.
    """
    confidence = terms.confidence
    if not 0.5 <= confidence < 1:
        raise UsageError(f"confidence must be from 0.5 to below 1, such as 0.95, not {confidence}")
    limits = _limits(measures, {REFERENCE: terms.budgets, ANCHOR: terms.anchor_budgets})
    waived, notes = _waivers(terms, limits)
    families = (  # each claims against its own limits; a divergence without a budget claims nothing
        [one for one in measures if _key(one) in limits],
        [one for one in measures if _key(one) not in limits and isinstance(one, Scores)],
    )
    claims = [claim for family in families for claim in _claims(family, limits, confidence)]
    rest = [one for one in measures if not any(one is claim.measure for claim in claims)]
    claims += [_Claim(one, None, _test(one, confidence), 1 - confidence, None) for one in rest]
    findings = tuple(_finding(claim, confidence, waived) for claim in claims)
    notes += [_clipped(one) for one in measures if isinstance(one, Divergence) and one.clipped and _key(one) in limits]
    return Verdict(outcome(findings), confidence, findings, tuple(notes))


def outcome(findings: Iterable[Finding]) -> str | None:
    """What follows from the findings that have a budget; a waived one stays visible and decides nothing."""
    budgeted = [finding for finding in findings if finding.budget is not None]
    decide = {finding.status for finding in budgeted if not finding.waived}
    if not budgeted:
        return None
    return REGRESSION if OVER in decide else PASS if decide <= {WITHIN} else INSUFFICIENT


def worst(outcomes: Iterable[str | None]) -> str | None:
    """Of several models' outcomes the one that decides the exit code: a regression, then insufficient evidence."""
    found = set(outcomes)
    return next((one for one in (REGRESSION, INSUFFICIENT, PASS) if one in found), None)


def holm_levels(p_values: Sequence[float], level: float) -> list[float]:
    """At which level Holm's procedure tests each hypothesis. (Holm 1979)

    Of m hypotheses the one with the smallest p is tested at α/m, after every rejection the next at α/(m - 1), ...;
    from the first that is kept, all others are kept at its level. So p <= its level exactly where the adjusted p <= α,
    and the bounds at these levels hold jointly for all losses that are within their budgets.

    >>> holm_levels([0.01, 0.9, 0.02], 0.06)
    [0.02, 0.06, 0.03]
    """
    levels, adjusted, remaining = [level] * len(p_values), holm(p_values), len(p_values)
    for place in sorted(range(len(p_values)), key=lambda i: p_values[i]):
        levels[place] = level / remaining
        remaining -= adjusted[place] <= level
    return levels


def plan(
    budget: Budget, confidence: float = 0.95, *, lost: float = 0.0, gained: float = 0.0, clip: float = KL_CLIP
) -> int | None:
    """How many rows show that a loss is within `budget`: none lost, or these shares of rows lost and gained.

    For a divergence `lost` is the nats per token of every document. None where no number of rows would do.

    >>> plan(Budget(MAX_DROP, "invoices", 0.02)), plan(Budget(MAX_DROP, "invoices", 0.02), lost=0.02)
    (189, None)
    """
    if budget.option == MAX_KL:
        return rows_needed([lost], budget.limit, confidence, 0.0, clip)
    rows = np.repeat([1.0, -1.0, 0.0], np.rint(10_000 * np.array([lost, gained, 1 - lost - gained])).astype(int))
    return rows_needed(rows, budget.limit, confidence, Scores.least, Scores.most)


@dataclass(frozen=True)
class _Claim:
    """A measure with its limit, if it has a budget, its test, the level of the test and the adjusted p."""

    measure: Measure
    limit: float | None
    test: Betting
    level: float
    p: float | None


def _claims(family: Sequence[Measure], limits: dict[tuple, float], confidence: float) -> list[_Claim]:
    """That the loss is above its limit (without a budget: above 0), for every measure of a family."""
    tests = [_test(measure, confidence) for measure in family]
    own = [limits.get(_key(measure)) for measure in family]
    p_values = [test.p_at_most(limit or 0.0) for test, limit in zip(tests, own, strict=True)]
    levels = holm_levels(p_values, 1 - confidence)
    return [_Claim(*told) for told in zip(family, own, tests, levels, holm(p_values), strict=True)]


def _test(measure: Measure, confidence: float) -> Betting:
    return Betting(measure.losses, measure.least, measure.most, confidence)


def _finding(claim: _Claim, confidence: float, waived: set[tuple]) -> Finding:
    measure, test = claim.measure, claim.test
    losses, rows = measure.losses, test.n
    low, high = test.lower(1 - claim.level), test.upper(confidence)
    status = _status(measure, claim.limit, low, high)
    scores = isinstance(measure, Scores)
    return Finding(
        name=measure.name,
        option=measure.option,
        against=measure.against,
        status=status,
        rows=rows,
        loss=measure.mean if rows else None,
        low=low,
        high=high,
        p=claim.p,
        budget=claim.limit,
        lost=int((losses > 0).sum()) if scores else None,
        gained=int((losses < 0).sum()) if scores else None,
        clipped=None if isinstance(measure, Scores) else measure.clipped,
        clip=None if isinstance(measure, Scores) else measure.clip,
        least_shown=_least_shown(claim, confidence),
        rows_needed=_rows_needed(claim, confidence) if status == UNCLEAR else None,
        waived=_key(measure) in waived,
    )


def _status(measure: Measure, limit: float | None, low: float, high: float) -> str:
    if limit is not None:
        shown = high <= limit and not _beyond_the_clip(measure)
        return OVER if low > limit else WITHIN if shown else UNCLEAR
    if isinstance(measure, Divergence):
        return MEASURED
    return WORSE if low > 0 else NOT_SHOWN


def _beyond_the_clip(measure: Measure) -> bool:
    """Whether a document moved so far that nothing bounds the mean from above."""
    return isinstance(measure, Divergence) and measure.clipped > 0


def _least_shown(claim: _Claim, confidence: float) -> float | None:
    """The smallest loss that a typical sample of as many rows shows to be above the limit, at the claim's level.

    About half of the samples from such a loss do. Right-or-wrong rows: as many turn right as did here. Others: the
    losses of these rows, all moved. None where no loss would be shown, or none is claimed.
    """
    measure, losses, limit = claim.measure, claim.measure.losses, claim.limit or 0.0
    if not len(losses) or claim.p is None:
        return None

    def shown(loss: float) -> bool:
        rows = like(_with_mean(measure, losses, loss), len(losses))
        return Betting(rows, measure.least, measure.most, confidence).p_at_most(limit) <= claim.level

    low, high = limit, measure.most
    if not shown(high):
        return None
    while high - low > 0.005 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high


def _with_mean(measure: Measure, losses: np.ndarray, mean: float) -> np.ndarray:
    """Losses like these, in order, of which the mean is about this."""
    if isinstance(measure, Scores) and measure.right_or_wrong:
        gained = min(float((losses < 0).mean()), (1 - mean) / 2)
        shares = np.array([gained, 1 - 2 * gained - mean, gained + mean])
        return np.repeat([-1.0, 0.0, 1.0], np.rint(10_000 * shares).astype(int))
    return np.sort(np.clip(losses + mean - losses.mean(), measure.least, measure.most))


def _clipped(text: Divergence) -> str:
    name = text.name if text.against == REFERENCE else f"{text.name} (against the {text.against})"
    return (
        f"{name}: {text.clipped} of {len(text.tokens)} documents moved by more than {text.clip:g} nats per token; they "
        "count as that much, so no bound says how much was lost, and a budget is not shown to be kept"
    )


def _rows_needed(claim: _Claim, confidence: float) -> int | None:
    """More rows like these until the loss is shown to be on the side of its budget on which its mean lies."""
    measure, limit = claim.measure, claim.limit or 0.0
    losses = measure.losses if claim.test.n else np.zeros(1)
    if losses.mean() < limit and _beyond_the_clip(measure):
        return None
    if losses.mean() < limit:
        needed = rows_needed(losses, limit, confidence, measure.least, measure.most)
    else:
        needed = rows_needed(-losses, -limit, 1 - claim.level, -measure.most, -measure.least)
    return needed and max(needed, claim.test.n + 1)


# ---------------------------------------------------------------- budgets and waivers of what is measured


def _key(one: Measure | Waiver) -> tuple[str, str, str]:
    return one.against, one.option, one.name


def _limits(measures: Sequence[Measure], budgets: dict[str, Iterable[Budget]]) -> dict[tuple, float]:
    """The limit of each measure that has a budget, by its key."""
    keys = [_key(measure) for measure in measures]
    for key in keys:
        if keys.count(key) > 1:
            raise UsageError(f"{key[2]}: two measures have this name; give each task, probe and text its own")
    limits: dict[tuple, float] = {}
    for against, told in budgets.items():
        drops, texts = (
            [name for where, what, name in keys if (where, what) == (against, option)] for option in (MAX_DROP, MAX_KL)
        )
        where = "" if against == REFERENCE else f"{against}: "
        limits |= {(against, one.option, one.name): one.limit for one in resolve(told, drops, texts, where)}
    for measure in measures:
        limit = limits.get(_key(measure), 0.0)
        if limit >= measure.most:
            raise _over_the_clip(measure.name, limit, measure.most)
    return limits


def check_clip(budgets: Iterable[Budget], clip: float) -> None:
    """UsageError for a budget on a text that is no smaller than the clip, in nats per token."""
    for budget in budgets:
        if budget.option == MAX_KL and budget.limit >= clip:
            raise _over_the_clip(budget.name, budget.limit, clip)


def _over_the_clip(name: str, limit: float, clip: float) -> UsageError:
    return UsageError(
        f"max-kl {name}={limit:g}: a document counts as {clip:g} nats per token at most, so every model would pass; "
        "give a smaller budget, or a policy with a larger kl-clip"
    )


def _waivers(terms: Terms, limits: dict[tuple, float]) -> tuple[set[tuple], list[str]]:
    """The keys of waived budgets, and what must be said about every waiver."""
    for waiver in terms.waivers:
        if _key(waiver) not in limits:
            known = [name for against, option, name in limits if (against, option) == (waiver.against, waiver.option)]
            near = nearest(waiver.name, known) if known else f"; there is no {waiver.option} budget"
            raise UsageError(f"waiver of {waiver.option} {waiver.name}: no such budget{near}")
    valid = {_key(waiver) for waiver in terms.waivers if waiver.until >= terms.today}
    return valid, [
        f"{one}{'' if one.until >= terms.today else ' (expired: it has no effect)'}" for one in terms.waivers
    ]
