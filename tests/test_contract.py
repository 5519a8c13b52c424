"""The contract catches what it is for: every clause fails on a method that breaks it, and names it."""

from __future__ import annotations

import json
import textwrap

import broken_methods
import pytest
import torch

from forgetless.cli import main
from forgetless.contract.check import FAILS, HOLDS, NOT_ASKED, Finding, as_json, check, failed, judge
from forgetless.contract.clauses import CLAUSES
from forgetless.contract.trial import Bench, Trial, Work
from forgetless.methods import METHODS


@pytest.fixture(scope="module")
def bench():
    return Bench()


@pytest.mark.parametrize("kind, clause", broken_methods.CAUGHT_BY, ids=lambda one: getattr(one, "__name__", None))
def test_a_broken_method_is_caught_by_the_right_clause(kind, clause, bench):
    found = judge(clause, Trial(kind.__name__, kind, bench))
    assert found.outcome == FAILS and "raised" not in found.why, found


def test_every_clause_is_shown_to_fail():
    assert {clause for _, clause in broken_methods.CAUGHT_BY} == set(CLAUSES)


def test_what_is_not_broken_holds(bench):
    """A leak into earlier tasks' pairs, which no checkpoint holds, is caught by the two clauses that it concerns."""
    found = check("broken_methods:LeaksIntoThePast", bench)
    assert [one.clause for one in found if one.outcome == FAILS] == ["frozen weights stay", "resumes inside a task"]


def test_an_error_of_the_method_is_named_with_its_place(bench):
    first = check("broken_methods:Raises", bench)[0]
    assert "ZeroDivisionError: nothing to divide by" in first.why and "broken_methods.py, line" in first.why
    assert "in begin_task" in first.why


def test_a_clause_that_cannot_be_asked_says_why(bench):
    found = judge("resumes at a border", Trial("joint", METHODS["joint"], bench))
    assert found.outcome == NOT_ASKED and "one lesson" in found.why


def test_work_is_counted_in_operations():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with Work() as work:
        c = a @ b  # 2 x 3 x 4 x 5 operations
        c + 1  # 15 more
    assert work.operations == 120 + 15


def test_findings_as_json():
    findings = [Finding("it acts", HOLDS, "x"), Finding("cost of a step", FAILS, "y")]
    assert failed(findings) and not failed(findings[:1])
    told = as_json({"a": findings})["a"]
    assert not told["holds"] and told["clauses"][1] == {"clause": "cost of a step", "outcome": "fails", "why": "y"}


MINE = """
from forgetless.methods import Method

class Mine(Method):
    hooks = 1
    summary = "keeps A small"
    off = {"lam": 0.0}

    def __init__(self, lam: float = LAM):
        '''Nothing.'''
        self.lam = lam

    def penalty(self):
        return self.lam * sum(pair.A.square().sum() for pair in self.adapters.pairs().values()) if self.lam else None
"""


def test_the_command_says_which_clause_fails(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(textwrap.dedent(MINE.replace("LAM", "0.01")))
    assert main(["check", f"{tmp_path}/mine.py:Mine", "--json"]) == 2
    [(name, told)] = json.loads(capsys.readouterr().out).items()
    assert name.endswith("mine.py:Mine") and not told["holds"]
    assert [one["clause"] for one in told["clauses"] if one["outcome"] == "fails"] == ["options explained"]
    assert main(["check"]) == 1 and "check which methods?" in capsys.readouterr().err
    assert main(["check", "olra"]) == 1 and "did you mean 'olora'" in capsys.readouterr().err
