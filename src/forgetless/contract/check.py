"""`forgetless check`: the contract on methods by name, which clause fails and why."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from forgetless.contract.clauses import CLAUSES, DoesNotApply, Fails
from forgetless.contract.trial import Bench, Trial
from forgetless.errors import ForgetlessError, short
from forgetless.methods.finding import find_method, label_of

HOLDS, FAILS, NOT_ASKED = "holds", "fails", "does not apply"
COLOURS = {HOLDS: "green", FAILS: "red", NOT_ASKED: "dim"}


@dataclass(frozen=True)
class Finding:
    """A clause on a method: what was found, or why it fails or cannot be asked."""

    clause: str
    outcome: str  # HOLDS, FAILS, NOT_ASKED
    why: str


def check(told: str, bench: Bench | None = None) -> list[Finding]:
    """The whole contract on the method that `told` stands for. UsageError where there is no such method.

    >>> all(one.outcome != FAILS for one in check("sequential"))
    True
    """
    trial = Trial(label_of(told), find_method(told), bench or Bench())
    try:
        _ = trial.whole
    except Exception as error:  # none of the other clauses can be looked at
        return [Finding("learns two tasks", FAILS, _told(error)), judge("options explained", trial)]
    return [judge(clause, trial) for clause in CLAUSES]


def judge(clause: str, trial: Trial) -> Finding:
    """One clause on one method; an error of the method's code is a failure too."""
    try:
        return Finding(clause, HOLDS, CLAUSES[clause](trial))
    except Fails as reason:
        return Finding(clause, FAILS, str(reason))
    except DoesNotApply as reason:
        return Finding(clause, NOT_ASKED, str(reason))
    except Exception as error:
        return Finding(clause, FAILS, _told(error))


def check_all(names: Sequence[str]) -> dict[str, list[Finding]]:
    """The contract on several methods, which share the tiny model and the plain runs."""
    kinds = {name: find_method(name) for name in names}  # a wrong name is said before anything is run
    bench = Bench()
    return {name: check(name, bench) for name in kinds}


def failed(findings: Sequence[Finding]) -> bool:
    return any(one.outcome == FAILS for one in findings)


def as_json(found: dict[str, list[Finding]]) -> dict:
    """{method: {"holds": bool, "clauses": [{"clause", "outcome", "why"}]}}"""
    return {name: {"holds": not failed(one), "clauses": [asdict(line) for line in one]} for name, one in found.items()}


def print_findings(found: dict[str, list[Finding]], out: Console) -> None:
    """One table a method; where there are many, of those that hold only what could not be asked."""
    for name, findings in found.items():
        if len(found) > 3 and not failed(findings):
            out.print(f"{name}: holds", style="green", highlight=False, markup=False)
            for one in findings:
                if one.outcome == NOT_ASKED:
                    out.print(f"  {one.clause} {NOT_ASKED}: {one.why}", highlight=False, markup=False)
            continue
        table = Table(title=name, title_justify="left", title_style="bold")
        for column in ("clause", "", "found"):
            table.add_column(column)
        for one in findings:
            table.add_row(one.clause, f"[{COLOURS[one.outcome]}]{one.outcome}", one.why.replace("[", r"\["))
        out.print(table)


def _told(error: Exception) -> str:
    """An error of the method's code, with its place there."""
    if isinstance(error, ForgetlessError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}, line {place.lineno}, in {place.name}"
    return f"raised {type(error).__name__}: {short(str(error), 300)} ({where})"
