"""Charts as coordinates; the template only draws them."""

from __future__ import annotations

import math
from collections.abc import Callable

from forgetless.report import words
from forgetless.report.contents import is_number
from forgetless.report.words import clean, number, percent, row_label

COLOURS = 8  # of lines; the ninth has the first's colour and another mark
POINTS_PER_LINE = 120  # of a loss curve; longer ones are averaged over windows of steps
NAMED = 6  # lines that have room for a name beside them
DODGE = 4.0  # between lines that share their places
MINI = {"width": 240, "height": 112, "left": 26, "right": 232, "top": 8, "bottom": 100}


# ---- scores over time --------------------------------------------------------------------------------


def score_chart(summary: dict, width: int) -> dict:
    """A line per task: its score before, at and after its own training."""
    tasks, names = summary["tasks"], _moments(summary)
    slanted = len(names) * 90 > width - 200
    below = 90 if slanted else 40
    height = 250 + below
    box = {"left": 56, "top": 16, "right": width - 130, "bottom": height - below}
    x = scale(0, max(1, len(names) - 1), box["left"] + 16, box["right"] - 16)
    y = scale(0, 1, box["bottom"], box["top"])
    series = [_score_line(summary, j, x, y) | _series(task["name"], j) for j, task in enumerate(tasks)]
    return {
        "kind": "scores",
        "desc": " ".join(_told(summary, j) for j in range(len(tasks))),
        "width": width,
        "height": height,
        "box": box,
        "x_name": "",
        "y_name": "score, % of test rows",
        "slanted": slanted,
        "x_ticks": [(x(i), _shorten(name, 18), name) for i, name in enumerate(names)],
        "y_ticks": [(y(tick), str(round(100 * tick))) for tick in (0, 0.25, 0.5, 0.75, 1)],
        "series": _spread([one for one in series if one["points"]], box["top"] + 4, box["bottom"]),
        "rules": [],
        "note": "",
    }


def border_chart(summary: dict, width: int) -> dict | None:
    """KL from the untouched base after each lesson, with its interval; None where it was not measured."""
    found = {one["after"]: one for one in summary.get("forgetting", []) if "kl" in one}
    if not found:
        return None
    names = _moments(summary)
    slanted = len(names) * 90 > width - 200
    below = 90 if slanted else 40
    box = {"left": 56, "top": 16, "right": width - 130, "bottom": 190}
    levels = ticks(0.0, max(one["high"] or one["kl"] for one in found.values()) or 1.0, about=4)
    x = scale(0, max(1, len(names) - 1), box["left"] + 16, box["right"] - 16)
    y = scale(0.0, levels[-1], box["bottom"], box["top"])
    points: list[dict] = [{"x": x(0), "y": y(0.0), "learnt": False, "title": "base: 0"}]
    places: list[tuple[float, float] | None] = [(x(0), y(0.0))]
    for i, learned in enumerate(summary["learned"], start=1):
        one = found.get(learned)
        places.append(None if one is None else (x(i), y(one["kl"])))
        if one is not None:
            points.append({"x": x(i), "y": y(one["kl"]), "learnt": False} | _whisker(one, y, names[i]))
    series = [_series("KL", 0) | {"path": svg_path(places), "faint": "", "points": points}]
    return {
        "kind": "scores",
        "desc": " ".join(f"{point['title']}." for point in points),
        "width": width,
        "height": 190 + below,
        "box": box,
        "x_name": "",
        "y_name": "nats per token",
        "slanted": slanted,
        "x_ticks": [(x(i), _shorten(name, 18), name) for i, name in enumerate(names)],
        "y_ticks": [(y(level), words.figure(level)) for level in levels],
        "series": _spread(series, box["top"] + 4, box["bottom"]),
        "rules": [],
        "note": "",
    }


def _whisker(one: dict, y: Callable[[float], float], name: str) -> dict:
    """Where a point's interval ends, and what the pointer shows."""
    if one["low"] is None:
        return {"title": f"{name}: {words.nats(one['kl'])} nats per token"}
    between = f"95 % interval {words.between(one)}"
    ends = {"low": y(max(one["low"], 0.0)), "high": y(one["high"])}
    return ends | {"title": f"{name}: {words.nats(one['kl'])} nats per token, {between}"}


def task_charts(runs: list[tuple[str, int, dict]]) -> list[dict]:
    """A small chart per task, all runs in it; for streams whose lines would hide one another in one chart.

    `runs`: (label, colour, summary). Their moments differ in number, so a line's ends are the base and the run's end.
    """
    charts = []
    for task in runs[0][2]["tasks"]:
        lines, told = [], []
        for label, slot, summary in runs:
            names = [one["name"] for one in summary["tasks"]]
            if task["name"] not in names:
                continue
            j, last = names.index(task["name"]), len(_moments(summary)) - 1
            x = scale(0, max(1, last), MINI["left"] + 4, MINI["right"] - 4)
            y = scale(0, 1, MINI["bottom"], MINI["top"])
            line = _score_line(summary, j, x, y)
            if line["points"]:
                lines.append(line | {"slot": slot})
                told.append((f"{label}. " if len(runs) > 1 else "") + _told(summary, j))
        y = scale(0, 1, MINI["bottom"], MINI["top"])
        ends = [(line["slot"], percent(line["last"])) for line in lines]
        level = y(task["majority"]["share"]) if task["majority"] else None
        charts.append({
            "name": task["name"],
            "desc": " ".join(told),
            "lines": lines,
            "ends": ends,
            "level": level,
            "y_ticks": [(y(tick), str(round(100 * tick))) for tick in (0, 0.5, 1)],
        })  # fmt: skip
    return charts


def _moments(summary: dict) -> list[str]:
    return ["base", *(row_label(summary, learned) for learned in summary["learned"])]


def _column(summary: dict, j: int) -> list[float | None]:
    return [row[j] for row in (summary["headline"]["base"], *summary["headline"]["matrix"])]


def _score_line(summary: dict, j: int, x: Callable[[float], float], y: Callable[[float], float]) -> dict:
    task, scores, names = summary["tasks"][j]["name"], _column(summary, j), _moments(summary)
    learnt = _learnt(summary, task)
    points = [
        {
            "x": x(i),
            "y": y(score),
            "learnt": i == learnt,
            "title": f"{clean(task)}, {names[i]}: {percent(score)}" + (" (just learnt)" if i == learnt else ""),
        }
        for i, score in enumerate(scores)
        if score is not None
    ]
    places = [None if score is None else (x(i), y(score)) for i, score in enumerate(scores)]
    known = [score for score in scores if score is not None]
    return {
        "path": svg_path(places[learnt:]),
        "faint": svg_path(places[: learnt + 1]),
        "points": points,
        "last": known[-1] if known else None,
    }


def _learnt(summary: dict, task: str) -> int:
    """The moment at which a task was just learnt; beyond the last one where it is not learnt yet."""
    if words.at_once(summary):
        return 1
    return 1 + (summary["learned"].index(task) if task in summary["learned"] else len(summary["learned"]))


def _told(summary: dict, j: int) -> str:
    """A line of the chart, in words."""
    task, scores = summary["tasks"][j]["name"], _column(summary, j)
    learnt = _learnt(summary, task)
    said = [f"untouched base {percent(scores[0])}"]
    said += [f"just learnt {percent(scores[learnt])}"] if learnt < len(scores) else []
    said += [f"at the end {percent(scores[-1])}"] if learnt < len(scores) - 1 else []
    return f"{clean(task)}: {', '.join(said)}."


def _series(name: str, j: int) -> dict:
    """A line's name, colour and mark."""
    return {
        "name": clean(name),
        "label": _shorten(clean(name), 16),
        "slot": j % COLOURS,
        "square": (j // COLOURS) % 2 == 1,
    }


# ---- between two models ------------------------------------------------------------------------------


def path_chart(path: dict, key: str, width: int, marked: float | None = None) -> dict:
    """A line per group of tasks along a path between two models, with intervals; `key`: loss or score.

    Dashed: the straight line between the ends. Filled: the ends. `marked`: where a dotted line stands.
    """
    alphas, shown = path["alphas"], percent if key == "score" else words.figure
    told = {name: group[key] for name, group in path["groups"].items()}
    ends = [one for line in told.values() for part in line.values() for one in part if one is not None]
    levels = [0.0, 0.25, 0.5, 0.75, 1.0] if key == "score" else ticks(min(ends), max(ends), about=4)
    box = {"left": 56, "top": 16, "right": width - 100, "bottom": 250}
    x = scale(0, 1, box["left"] + 16, box["right"] - 16)
    y = scale(levels[0], levels[-1], box["bottom"], box["top"])
    names = {0: "A", len(alphas) - 1: "B"}
    series, said = [], []
    for j, (name, line) in enumerate(told.items()):
        aside = DODGE * (j - (len(told) - 1) / 2)  # so that intervals do not hide one another
        places = [(x(alpha) + aside, y(value)) for alpha, value in zip(alphas, line["value"], strict=True)]
        points = [
            {"x": places[i][0], "y": places[i][1], "learnt": i in names}
            | {"title": f"{name}, λ = {alphas[i]:.3g}: {shown(line['value'][i])}"}
            | ({} if line["low"][i] is None else {"low": y(line["low"][i]), "high": y(line["high"][i])})
            for i in range(len(alphas))
        ]
        faint = svg_path([places[0], places[-1]])
        series.append(_series(name, j) | {"path": svg_path([*places]), "faint": faint, "points": points})
        said.append(f"{name}: " + ", ".join(shown(value) for value in line["value"]) + ".")
    every = math.ceil(len(alphas) / 11)
    return {
        "kind": "scores",
        "desc": " ".join(said),
        "width": width,
        "height": 290,
        "box": box,
        "x_name": "",
        "y_name": "mean score, %" if key == "score" else "loss, nats per answer token",
        "slanted": False,
        "x_ticks": [
            (x(alpha), names.get(i, f"{alpha:.3g}"), "")
            for i, alpha in enumerate(alphas)
            if i in names or i % every == 0
        ],
        "y_ticks": [(y(one), number(100 * one) if key == "score" else words.figure(one)) for one in levels],
        "series": _spread(series, box["top"] + 4, box["bottom"]),
        "rules": [] if marked is None else [x(marked)],
        "note": "",
    }


def landscape(plane: dict, key: str, group: str, names: list[str], width: int) -> dict:
    """A group's loss or score on the plane through three models as coloured cells, the three marked, to scale."""
    xs, ys, values = plane["x"], plane["y"], plane["groups"][group][key]
    shown = percent if key == "score" else words.figure
    step_x, step_y = xs[1] - xs[0], ys[1] - ys[0]
    height = round(min(1.2, max(0.3, (ys[-1] - ys[0] + step_y) / (xs[-1] - xs[0] + step_x))) * width)
    x = scale(xs[0] - step_x / 2, xs[-1] + step_x / 2, 0, width)
    y = scale(ys[0] - step_y / 2, ys[-1] + step_y / 2, height, 0)
    every = [one for row in values for one in row]
    low, high = min(every), max(every)
    share = scale(low, high, 0, 100) if high > low else lambda value: 0.0
    cells = [
        {
            "x": x(one - step_x / 2),
            "y": y(other + step_y / 2),
            "width": round(x(one + step_x / 2) - x(one - step_x / 2) + 0.5, 1),
            "height": round(y(other - step_y / 2) - y(other + step_y / 2) + 0.5, 1),
            "share": share(value),
            "title": f"x = {one:.3g}, y = {other:.3g}: {shown(value)}",
        }
        for other, row in zip(ys, values, strict=True)
        for one, value in zip(xs, row, strict=True)
    ]
    marks = [{"x": x(a), "y": y(b), "label": name} for (a, b), name in zip(plane["corners"], names, strict=True)]
    return {
        "width": width,
        "height": height,
        "cells": cells,
        "marks": marks,
        "low": shown(low),
        "high": shown(high),
        "desc": f"From {shown(low)} to {shown(high)} on {len(ys)} rows of {len(xs)} points.",
    }


# ---- step by step ------------------------------------------------------------------------------------


def highest(summaries: list[dict], key: str) -> float:
    """The highest point that any run's curve has, for a scale that they share."""
    curves = (_thinned(records, key) for summary in summaries for records in summary["losses"].values())
    return max((value for points in curves for _, value in points), default=0.0)


def step_chart(summary: dict, key: str, width: int, height: int, top: float = 0.0) -> dict | None:
    """One task's steps after the other's; None where no step has the value. `top`: a value that must fit."""
    curves = [(task, len(records), _thinned(records, key)) for task, records in summary["losses"].items()]
    values = [value for *_, points in curves for _, value in points]
    if not values:
        return None
    named, name = len(curves) <= NAMED, key.replace("_", " ")
    below = 48 if named else 96
    height += below - 48
    box = {"left": 56, "top": 16, "right": width - (130 if named else 24), "bottom": height - below}
    levels = ticks(min(0.0, *values), max(top, *values) or 1.0, about=4)
    total = sum(steps for _, steps, _ in curves)
    x = scale(0, total, box["left"], box["right"])
    y = scale(levels[0], levels[-1], box["bottom"], box["top"])
    slots = {task["name"]: j for j, task in enumerate(summary["tasks"])}
    series, rules, middles, start = [], [], [], 0
    for i, (task, steps, points) in enumerate(curves):
        rules += [x(start)] if start else []
        middles.append((x(start + steps / 2), _shorten(clean(task), 16), clean(task)))
        marks: list[dict] = [
            {
                "x": x(start + step),
                "y": y(value),
                "learnt": False,
                "title": f"{clean(task)}, step {step}: {name} {value:.4g}",
            }
            for step, value in points
        ]
        path = svg_path([(mark["x"], mark["y"]) for mark in marks])
        series.append(_series(task, slots.get(task, i)) | {"path": path, "faint": "", "points": marks})
        start += steps
    window = max(_window(steps) for _, steps, _ in curves)
    steps_told = [(x(step), number(step), "") for step in ticks(0, total) if step <= total]
    return {
        "kind": "steps",
        "desc": " ".join(
            f"{clean(task)}: from {points[0][1]:.4g} to {points[-1][1]:.4g} in {steps} steps."
            for task, steps, points in curves
            if points
        ),
        "width": width,
        "height": height,
        "box": box,
        "x_name": "training step, one task after the other",
        "y_name": name,
        "slanted": not named,
        "x_ticks": steps_told if named else middles,
        "y_ticks": [(y(tick), words.figure(tick)) for tick in levels],
        "series": _spread([one for one in series if one["points"]], box["top"] + 4, box["bottom"], by_place=False),
        "rules": rules,
        "note": f"Each point is the mean of up to {window} steps." if window > 1 else "",
    }


def _thinned(records: list[dict], key: str) -> list[tuple[int, float]]:
    """(last step, mean) of windows of steps, few enough to draw; steps without the value are left out."""
    window = _window(len(records))
    points = []
    for start in range(0, len(records), window):
        part = [record for record in records[start : start + window] if is_number(record.get(key))]
        if part:
            points.append((part[-1]["step"], sum(record[key] for record in part) / len(part)))
    return points


def _window(steps: int) -> int:
    return max(1, math.ceil(steps / POINTS_PER_LINE))


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """From values to places on the drawing."""
    return lambda value: round(start + (end - start) * (value - low) / (high - low), 1)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover low to high.

    >>> ticks(-36, 3)
    [-40.0, -30.0, -20.0, -10.0, 0.0, 10.0]
    """
    rough = ((high - low) or 1.0) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.6g}") for i in range(first, max(last, first + 1) + 1)]


def svg_path(places: list[tuple[float, float] | None]) -> str:
    """SVG path; a missing place is a gap."""
    parts, pen_up = [], True
    for place in places:
        if place is not None:
            parts.append(f"{'M' if pen_up else 'L'}{place[0]:g} {place[1]:g}")
        pen_up = place is None
    return "".join(parts)


def _spread(series: list[dict], top: float, bottom: float, by_place: bool = True) -> list[dict]:
    """Gives each line's name a height beside the line's end, without names over one another."""
    gap = min(17.0, (bottom - top) / max(1, len(series)))
    order = sorted(series, key=lambda one: one["points"][-1]["y"]) if by_place else series
    lowest, last = bottom - gap * (len(order) - 1), top - gap
    for i, one in enumerate(order):
        wanted = one["points"][-1]["y"] if by_place else top + gap * i
        last = max(last + gap, min(wanted, lowest + gap * i))
        one["label_y"] = round(last, 1)
    return series


def _shorten(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
