"""How much may be lost: `--max-drop NAME=2pp` and `--max-kl [NAME=]0.05`, in flags, in a policy and in results alike.

One name and one unit each. A drop is a difference of mean scores, so it is told in percentage points; a divergence is
told in nats per token. Nothing else is understood: `2` and `2%` could each mean several things. A blend also takes
`--max-lost NAME=2pp`, which counts the rows that score less than before, whatever is gained elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from forgetless.errors import UsageError, nearest

MAX_DROP, MAX_LOST, MAX_KL = "max-drop", "max-lost", "max-kl"
IN_A_POLICY = (MAX_DROP, MAX_KL)
EXAMPLES = {MAX_DROP: "invoices=2pp", MAX_LOST: "invoices=2pp", MAX_KL: "manual=0.05"}
MEANINGS = {
    MAX_DROP: "percentage points of the mean score on a task or probe",
    MAX_LOST: "percentage points: share of a task's or probe's rows that score less than before",
    MAX_KL: "nats per token of KL(reference || model) on a text",
}


@dataclass(frozen=True)
class Budget:
    """The most that may be lost on one task, probe or text.

    `limit` is a share of the full score (2pp = 0.02) or nats per token; an empty `name` stands for every text.
    """

    option: str  # MAX_DROP, MAX_LOST or MAX_KL
    name: str
    limit: float

    def __str__(self) -> str:
        """As it is written: `max-drop invoices=2pp`."""
        return f"{self.option} {f'{self.name}=' if self.name else ''}{written(self.option, self.limit)}"


def written(option: str, limit: float) -> str:
    """A limit with its unit, as a flag takes it.

    >>> written(MAX_DROP, 0.025), written(MAX_KL, 0.05)
    ('2.5pp', '0.05')
    """
    return f"{limit:.10g}" if option == MAX_KL else f"{100 * limit:.10g}pp"


def flag_budgets(
    max_drop: Iterable[str] = (), max_kl: Iterable[str] = (), max_lost: Iterable[str] = ()
) -> tuple[Budget, ...]:
    """The budgets of the flags `--max-drop NAME=2pp ...`, `--max-kl [NAME=]0.05 ...` and `--max-lost NAME=2pp ...`.

    >>> [str(one) for one in flag_budgets(["invoices=2pp"], ["0.05"])]
    ['max-drop invoices=2pp', 'max-kl 0.05']
    """
    given = ((MAX_DROP, max_drop), (MAX_LOST, max_lost), (MAX_KL, max_kl))
    told = [(option, one) for option, texts in given for text in texts for one in _several(text)]
    return _once([_flag(option, text) for option, text in told], "--")


def read_budgets(told: Any, place: str) -> tuple[Budget, ...]:
    """The budgets of a mapping in YAML: `max-drop: {invoices: 2pp}`, `max-kl: 0.05` or `max-kl: {manual: 0.05}`."""
    if not isinstance(told, dict):
        raise UsageError(
            f"{place}: expected `max-drop:` and `max-kl:`, found {told!r}; for example max-drop: {{invoices: 2pp}}"
        )
    found = []
    for option, limits in told.items():
        if option not in IN_A_POLICY:
            raise UsageError(f"{place}: unknown key {option!r}{nearest(str(option), IN_A_POLICY)}")
        if not isinstance(limits, dict):
            found.append(_budget(option, "", limits, f"{place}.{option}"))
            continue
        found += [_budget(option, str(name), limit, f"{place}.{option}.{name}") for name, limit in limits.items()]
    return _once(found, f"{place}.")


def resolve(
    budgets: Iterable[Budget], drops: Collection[str], texts: Collection[str], where: str = ""
) -> tuple[Budget, ...]:
    """The budgets with a name each: every one belongs to a task or probe (`drops`) or to a text that is measured.

    A limit for every text becomes one for each text that has none of its own.
    """
    budgets, resolved = list(budgets), []
    own = {budget.name for budget in budgets if budget.option == MAX_KL}
    for budget in budgets:
        known, what = (texts, "text") if budget.option == MAX_KL else (drops, "task or probe")
        if not budget.name:
            if not texts:
                raise UsageError(f"{where}{budget}: no text is measured; name one with --text")
            resolved += [Budget(MAX_KL, name, budget.limit) for name in texts if name not in own]
        elif budget.name in known:
            resolved.append(budget)
        elif budget.name in drops or budget.name in texts:
            other = MAX_DROP if budget.option == MAX_KL else MAX_KL
            raise UsageError(f"{where}{budget}: {budget.name!r} is no {what}; its budget is --{other}")
        else:
            near = nearest(budget.name, known) if known else f"; no {what} is measured"
            raise UsageError(f"{where}{budget}: no {what} {budget.name!r}{near}")
    return tuple(resolved)


def _several(text: str) -> list[str]:
    """`a=2pp,b=2pp` are two budgets; a name may have a comma."""
    parts = text.split(",")
    return parts if all("=" in part for part in parts) else [text]


def _flag(option: str, text: str) -> Budget:
    name, _, limit = text.rpartition("=")
    return _budget(option, name.strip(), limit.strip(), f"--{option} {text}")


def _budget(option: str, name: str, limit: Any, place: str) -> Budget:
    example = f"for example --{option} {EXAMPLES[option]} ({MEANINGS[option]})"
    if option != MAX_KL and not name:
        raise UsageError(f"{place}: which task or probe? Name it: {example}")
    value = _nats(limit) if option == MAX_KL else _points(limit)
    if value is None:
        raise UsageError(f"{place}: {limit!r} is {_wrong(option, limit)}; {example}")
    if not 0 < value < (math.inf if option == MAX_KL else 1):
        most = "" if option == MAX_KL else " and below 100pp"
        raise UsageError(f"{place}: a budget is above 0{most}, since no sample shows that nothing at all is lost")
    return Budget(option, name, value)


MOST = 1e300  # beyond it a whole number of YAML may be no float
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def _points(limit: Any) -> float | None:
    told = re.fullmatch(rf"({NUMBER})\s*pp", limit.strip()) if isinstance(limit, str) else None
    return float(told[1]) / 100 if told else None


def _nats(limit: Any) -> float | None:
    if isinstance(limit, str):
        return float(limit) if re.fullmatch(NUMBER, limit.strip()) else None
    if isinstance(limit, bool) or not isinstance(limit, int | float):
        return None
    return float(limit) if limit < MOST else math.inf


def _wrong(option: str, limit: Any) -> str:
    if option == MAX_KL:
        return "not a plain number of nats per token"
    bare = isinstance(limit, int | float) or re.fullmatch(NUMBER, str(limit))
    return "a number without a unit" if bare else "not in percentage points"


def _once(budgets: list[Budget], prefix: str) -> tuple[Budget, ...]:
    seen: set[tuple[str, str]] = set()
    for budget in budgets:
        if (budget.option, budget.name) in seen:
            raise UsageError(f"{prefix}{budget}: {budget.name or 'every text'} has two budgets; give one")
        seen.add((budget.option, budget.name))
    return tuple(budgets)
