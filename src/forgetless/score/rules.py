"""Scorers of generated answers: one greedy answer a row, shared by all the rules of a task."""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from forgetless.data.scoring import GENERATED, SCORERS, Scoring
from forgetless.data.tasks import Row, Task
from forgetless.errors import DataError, UsageError, nearest, quoted
from forgetless.score.texts import (
    LETTERS,
    choice_letter,
    code_similarity,
    compared,
    json_value,
    last_number,
    rouge_l,
    same_json,
    same_number,
    sari,
    words,
)
from forgetless.usercode import run_file

Scores = dict[str, dict]
"""Measure -> {"score"}, and "found" where the rule took a part of the answer."""


class Rule:
    """One scorer of generated answers, made once for a task and then asked row by row."""

    def __init__(self, task: Task, scoring: Scoring):
        """UsageError where the scorer cannot work at all."""

    def gold(self, row: Row) -> Any:
        """What an answer is compared with; ValueError where the row cannot be judged by this rule."""
        return row.label

    def scores(self, answer: str, gold: Any) -> Scores:
        raise NotImplementedError


class ExactMatch(Rule):
    def __init__(self, task: Task, scoring: Scoring):
        _told_apart(task.options, scoring.name)

    def gold(self, row: Row) -> str:
        return compared(row.label)

    def scores(self, answer: str, gold: str) -> Scores:
        return {"exact_match": {"score": int(compared(answer) == gold)}}


class Number(Rule):
    def gold(self, row: Row) -> str:
        number = last_number(row.label)
        if number is None:
            raise ValueError(f"the right answer {quoted(row.label)} holds no number")
        return number

    def scores(self, answer: str, gold: str) -> Scores:
        found = last_number(answer)
        return {"number": {"score": int(found is not None and same_number(found, gold)), "found": found}}


class Choice(Rule):
    def __init__(self, task: Task, scoring: Scoring):
        single = all(re.fullmatch("[A-Za-z]", option) for option in task.options)
        self.letters = "".join(option.upper() for option in task.options) if task.options and single else LETTERS

    def gold(self, row: Row) -> str:
        letter = choice_letter(row.label, self.letters)
        if letter is None:
            raise ValueError(f"the right answer {quoted(row.label)} names none of the letters {self.letters}")
        return letter

    def scores(self, answer: str, gold: str) -> Scores:
        found = choice_letter(answer, self.letters)
        return {"choice": {"score": int(found == gold), "found": found}}


class RougeL(Rule):
    def __init__(self, task: Task, scoring: Scoring):
        self.similarity = rouge_l()

    def gold(self, row: Row) -> str:
        if not words(row.label):
            raise ValueError(f"the right answer {quoted(row.label)} holds no word")
        return row.label

    def scores(self, answer: str, gold: str) -> Scores:
        return {"rouge_l": {"score": self.similarity(answer, gold)}}


class Sari(Rule):
    """The source is the prompt (in a chat the turn before the answer), or what the pattern's group finds in it."""

    def __init__(self, task: Task, scoring: Scoring):
        self.pattern = _pattern(scoring, groups=(1,)) if scoring.argument else None

    def gold(self, row: Row) -> tuple[str, str]:
        source = row.prompt
        if row.shape == "chat":
            source = row.turns_before[-1][1]
        if self.pattern:
            found = self.pattern.search(source)
            if not found or not (found[1] or "").strip():
                raise ValueError(f"{self.pattern.pattern!r} finds no text to simplify in the prompt {quoted(source)}")
            source = found[1]
        return source, row.label

    def scores(self, answer: str, gold: tuple[str, str]) -> Scores:
        source, right = gold
        return {"sari": {"score": sari(source, answer, [right])}}


class CodeSimilarity(Rule):
    def __init__(self, task: Task, scoring: Scoring):
        self.similarity = code_similarity()

    def scores(self, answer: str, gold: str) -> Scores:
        return {"code_similarity": {"score": self.similarity(answer, gold)}}


class Regex(Rule):
    def __init__(self, task: Task, scoring: Scoring):
        self.pattern = _pattern(scoring, groups=(0, 1))
        if self.pattern.groups:
            _told_apart(task.options, scoring.name)

    def scores(self, answer: str, gold: str) -> Scores:
        match = self.pattern.search(answer)
        if not self.pattern.groups:
            return {"regex": {"score": int(match is not None)}}
        found = match[1] if match else None
        return {"regex": {"score": int(found is not None and compared(found) == compared(gold)), "found": found}}


class Json(Rule):
    def __init__(self, task: Task, scoring: Scoring):
        self.fields = scoring.argument

    def gold(self, row: Row) -> Any:
        try:
            right = json_value(row.label)
        except ValueError as error:
            raise ValueError(f"the right answer {quoted(row.label)} is no JSON ({error})") from error
        missing = [field for field in self.fields if not isinstance(right, dict) or field not in right]
        if missing:
            raise ValueError(f"the right answer {quoted(row.label)} has no field {missing[0]!r}")
        return right

    def scores(self, answer: str, gold: Any) -> Scores:
        try:
            value, valid = json_value(answer), True
        except ValueError:
            value, valid = None, False
        fields = self.fields or (tuple(gold) if isinstance(gold, dict) else ())
        if fields:
            told = value if isinstance(value, dict) else {}
            share = sum(name in told and same_json(told[name], gold[name]) for name in fields) / len(fields)
        else:
            share = float(valid and same_json(value, gold))
        return {"json_fields": {"score": share}, "json_valid": {"score": int(valid)}}


class OwnFunction(Rule):
    """A user's `function(answer, row)`, out of exactly the file that the task names."""

    def __init__(self, task: Task, scoring: Scoring):
        self.name = scoring.name
        self.function = _function(scoring)

    def gold(self, row: Row) -> Row:
        return row

    def scores(self, answer: str, gold: Row) -> Scores:
        where = f"{_place(gold)}: {self.name}, for the answer {quoted(answer)},"
        try:
            value = self.function(answer, gold)
        except Exception as error:
            raise DataError(f"{where} raised {type(error).__name__}: {quoted(str(error))}") from error
        known = isinstance(value, numbers.Real | np.bool_)
        if not known or not 0 <= value <= 1:
            found, most = repr(value) if known else f"a {type(value).__name__}", "divide by the most there can be"
            raise DataError(f"{where} gave {found}; a score is a number from 0 to 1 ({most}), or True or False")
        return {self.name: {"score": float(value)}}


RULES: dict[str, type[Rule]] = {
    "exact_match": ExactMatch,
    "number": Number,
    "choice": Choice,
    "rouge_l": RougeL,
    "sari": Sari,
    "code_similarity": CodeSimilarity,
    "regex": Regex,
    "json": Json,
}


def rules_of(task: Task) -> dict[str, Rule]:
    """The rules of a task's generated answers, by scorer; empty where nothing is generated.

    UsageError names the task, and what is wrong: an unknown scorer, a pattern that is none, a package that is not
    installed, a file or function of the user's that is not there.
    """
    if not task.scorers:
        raise UsageError(f"task {task.name!r}: no scorer; give at least one of {', '.join(SCORERS)}")
    rules: dict[str, Rule] = {}
    for scorer in task.scorers:
        scoring = Scoring(scorer) if isinstance(scorer, str) else scorer
        try:
            if scoring.file:
                rules[scoring.name] = OwnFunction(task, scoring)
            elif scoring.name in GENERATED:
                rules[scoring.name] = RULES[scoring.name](task, scoring)
            elif scoring.name not in SCORERS:
                own = "; a function of yours is made by forgetless.data.scoring.own_function"
                raise UsageError(f"unknown scorer {scoring.name!r}{nearest(scoring.name, SCORERS)}{own}")
        except UsageError as error:
            raise UsageError(f"task {task.name!r}: {error}") from error
    return rules


def check_row(rules: dict[str, Rule], row: Row) -> None:
    """DataError where a row's right answer, or its prompt, is not what a rule needs."""
    for name, rule in rules.items():
        try:
            rule.gold(row)
        except ValueError as error:
            raise DataError(
                f"{_place(row)}: the scorer {name!r} cannot judge this row: {error}; repair the row, "
                "name another scorer, or leave such rows out (on_bad_row=skip)"
            ) from error


def _told_apart(options: tuple[str, ...], name: str) -> None:
    """UsageError where two options are the same answer to a rule that compares normal forms."""
    seen: dict[str, str] = {}
    for option in options:
        other = seen.setdefault(compared(option), option)
        if other != option:
            raise UsageError(
                f"the scorer {name!r} cannot tell the options {other!r} and {option!r} apart: case, punctuation and "
                "white space do not count; rename one, or leave it to the scorer 'options'"
            )


# ---------------------------------------------------------------- patterns and files of the user's


def _pattern(scoring: Scoring, groups: tuple[int, ...]) -> re.Pattern:
    if not scoring.argument:
        raise UsageError(f"the scorer {scoring.name!r} needs a pattern: `{scoring.name}: PATTERN`")
    [told] = scoring.argument
    try:
        pattern = re.compile(told)
    except re.error as error:
        raise UsageError(f"the scorer {scoring.name!r}: {told!r} is no regular expression: {error}") from error
    if pattern.groups not in groups:
        raise UsageError(
            f"the scorer {scoring.name!r}: {told!r} has {pattern.groups} groups, wanted is "
            f"{' or '.join(map(str, groups))}; write groups that only bracket as (?:...)"
        )
    return pattern


def _function(scoring: Scoring) -> Callable[[str, Row], Any]:
    file, name = scoring.file, scoring.name.rpartition(":")[2]
    found = run_file(file, scoring.sha256).__dict__
    if name not in found or not callable(found[name]):
        functions = [key for key, value in found.items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"{file}: no function {name!r}{nearest(name, functions) if functions else ''}")
    return found[name]


def _place(row: Row) -> str:
    return row.source or f"row {row.key}"
