"""What the pages are made of: the template's environment, cells of heat maps, lines with bars on a common scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from forgetless.report import charts, contents, words
from forgetless.report.words import NOT_SCORED, clean, number, percent

COMPACT = 6  # tasks above which a matrix has the full width and small cells, and lines are drawn apart
MOST_TEXTS = 40  # of a task's turned rows whose texts are shown on a page
LONGEST_TEXT = 700  # characters of a prompt on a page

SHAPES = {"range": (12, 6, 3), "value": (9, 12, 2), "lost": (9, 12, 2), "gained": (9, 12, 2), "floor": (9, 12, 2),
          "whisker": (14, 2, 1)}  # fmt: skip
"""Kind of bar -> its top, height and round in the 30 pixels of a line."""


def render(template: str, view: dict) -> str:
    """A page as text."""
    return _environment().get_template(template).render({"not_scored": NOT_SCORED, "mini": charts.MINI} | view)


@cache
def _environment() -> Environment:
    """Made once: it keeps compiled templates, and to compile a page takes longer than to fill it."""
    environment = Environment(
        loader=PackageLoader("forgetless", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "clean": clean,
        "percent": percent,
        "number": number,
        "figure": words.figure,
        "answer": contents.shown,
        "whole": lambda text: text.replace(" %", "\u00a0%"),
    }
    return environment


# ---- heat maps -------------------------------------------------------------------------------------


def heatmap(columns: list[dict], rows: list[dict], more: int = 0) -> dict:
    """`columns`: name and number of test rows of each; `more`: columns beside those of tasks."""
    return {"columns": columns, "rows": rows, "compact": len(columns) > COMPACT + more}


def row(name: str, anchor: str, cells: list[dict], first: bool = False) -> dict:
    return {"name": name, "anchor": anchor, "cells": cells, "first": first}


def cell(
    score: float | None, small: str = "", told: Iterable[str] = (), just_learnt: bool = False, later: bool = False
) -> dict:
    """A score with its colour's share, a small line below it, and what the pointer shows (the score, if not `told`)."""
    return {
        "text": percent(score),
        "heat": None if score is None else round(100 * score),
        "between": small,
        "just_learnt": just_learnt,
        "later": later,
        "title": "; ".join(told) or percent(score),
    }


# ---- lines on a common scale -----------------------------------------------------------------------


def forest(groups: list[dict], values: Iterable[float], unit: str, label: Callable[[float], str]) -> dict:
    """Groups of lines over one ruler; `groups`: a name, and functions that draw a line on the ruler's ticks."""
    values = list(values)
    ticks = charts.ticks(min(0.0, *values), max(0.0, *values))
    return {
        "groups": [group | {"lines": [draw(ticks) for draw in group["lines"]]} for group in groups],
        "ticks": [(place(tick, ticks), label(tick)) for tick in ticks],
        "zero": place(0, ticks),
        "unit": unit,
    }


def bar(kind: str, start: float, end: float, ticks: list[float]) -> dict:
    """A bar between two values."""
    top, height, round_ = SHAPES[kind]
    left, right = sorted((place(start, ticks), place(end, ticks)))
    return {"kind": kind, "left": left, "width": round(right - left, 2), "top": top, "height": height, "round": round_}


def place(value: float, ticks: list[float]) -> float:
    """Where a value lies between the outer ticks, in percent."""
    return round(100 * (value - ticks[0]) / (ticks[-1] - ticks[0]), 2)
