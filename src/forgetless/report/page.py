"""The report: one HTML page that needs no network, and the same in short as Markdown."""

from __future__ import annotations

import html
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from forgetless.report import words
from forgetless.report.words import NOT_SCORED, clean, number, percent, row_label

COLOURS = 8  # of lines; the ninth has the first's colour and another mark
POINTS_PER_LINE = 120  # of a loss curve; longer ones are averaged over windows of steps
COMPACT = 6  # tasks above which a matrix has the full width and small cells


def write_report(summaries: list[dict], folder: Path) -> dict[str, Path]:
    """Writes report.html and report.md; several summaries are shown side by side."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"html": folder / "report.html", "markdown": folder / "report.md"}
    _write(files["html"], render_html(summaries))
    _write(files["markdown"], render_markdown(summaries))
    return files


def render_html(summaries: list[dict]) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("forgetless", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clean": clean, "percent": percent, "number": number, "figure": words.figure}
    return environment.get_template("page.html.jinja").render(view(summaries))


def view(summaries: list[dict]) -> dict:
    """What the template draws: texts, cells and coordinates."""
    labels = words.run_labels(summaries)
    wide = len(summaries) == 1 or max(len(s["tasks"]) for s in summaries) > COMPACT
    runs = [_run(summary, label, i, wide) for i, (summary, label) in enumerate(zip(summaries, labels, strict=True))]
    return {
        "title": words.title(summaries),
        "runs": runs,
        "wide": wide,
        "cards": _cards(summaries, labels),
        "changes": _changes(summaries, labels),
        "metrics": _metrics(summaries),
        "differences": _differences(summaries, labels),
        "glossary": words.GLOSSARY,
        "not_scored": NOT_SCORED,
    }


def _run(summary: dict, label: str, slot: int, wide: bool) -> dict:
    """One run's part of every section."""
    width = 1080 if wide else 560
    told = summary["measures"].items()
    return {
        "label": label,
        "slot": slot % COLOURS,
        "verdict": words.verdict(summary),
        "sentences": words.sentences(summary),
        "running": summary["status"] != "complete",
        "method": summary["method"],
        "model": summary["model"],
        "tasks": summary["tasks"],
        "matrix": _matrix(summary, summary["headline"], summary["intervals"], majority=True),
        "scores": _score_chart(summary, width),
        "losses": _loss_chart(summary, "loss", width, 250),
        "penalty": _loss_chart(summary, "penalty", width, 190),
        "checks": _checks(summary),
        "warnings": summary["warnings"],
        "measures": [_measure(summary, name, measure) for name, measure in told],
        "others": [_other(summary, name, other) for name, other in summary["views"].items()],
        "counts": _counts(summary),
        "notes": [(task["name"], note) for task in summary["tasks"] for note in task["notes"]],
        "facts": {
            "configuration": list(_flat(summary["config"])),
            "model and method": list(_flat({"model": summary["model"], "method": summary["method"]})),
            "versions": list(_flat(summary["versions"])),
        },
    }


def _other(summary: dict, name: str, other: dict) -> dict:
    """Another view of the model; the counted answers are the deployed one's and are not told here."""
    uncounted = summary | {"counts": {}}
    sentences = [words.forgotten_sentence(uncounted, entry) for entry in other["forgotten"]]
    return {"name": name, "matrix": _matrix(summary, other["headline"]), "sentences": sentences}


# ---- numbers above the fold ------------------------------------------------------------------------


def _cards(summaries: list[dict], labels: list[str]) -> list[dict]:
    """The figures that people look for first, for each run."""
    told: list[tuple[str, str, Callable[[dict], str | None]]] = [
        ("Average score at the end", "score", lambda s: _metric(s, "average_accuracy")),
        ("Score when just learnt", "just-learnt", lambda s: _metric(s, "learning_accuracy")),
        ("Change since, on average", "backward", lambda s: _metric(s, "bwt")),
        ("Largest loss", "change", _largest_loss),
        ("Weights trained", "", _trained),
    ]
    return [
        {
            "name": name,
            "anchor": anchor,
            "values": [(label, value(summary)) for label, summary in zip(labels, summaries, strict=True)],
        }
        for name, anchor, value in told
    ]


def _metric(summary: dict, key: str) -> str | None:
    value = words.metric_value(key, summary["metrics"].get(key, {}).get("value"))
    return value and value.replace("-", "−")


def _largest_loss(summary: dict) -> str | None:
    losses = [entry for entry in summary["forgotten"] if entry["high"] < 0]
    if not losses:
        return "none shown" if summary["forgotten"] else None
    worst = min(losses, key=lambda entry: entry["change"])
    return f"{words.points(worst['change'])}: {clean(worst['task'])}"


def _trained(summary: dict) -> str:
    model = summary["model"]
    share = number(100 * model["trainable"] / model["parameters"], 2) if model["parameters"] else "?"
    return f"{_short_count(model['trainable'])} ({share} %)"


def _short_count(many: int) -> str:
    """1,234,567 -> 1.2 M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if many >= size:
            return f"{number(many / size)} {unit}"
    return str(many)


def _metrics(summaries: list[dict]) -> list[dict]:
    """A line per metric with each run's value or the reason why there is none."""
    lines = []
    for key in dict.fromkeys(key for summary in summaries for key in summary["metrics"]):
        found = [summary["metrics"].get(key) for summary in summaries]
        told = next(metric for metric in found if metric)
        values = [_value_or_reason(key, metric) for metric in found]
        lines.append({"name": told["name"], "formula": told["formula"], "divisor": told["divisor"], "values": values})
    return lines


def _value_or_reason(key: str, metric: dict | None) -> dict:
    if metric is None:
        return {"value": None, "why": "cannot compute: this run does not have it"}
    value = words.metric_value(key, metric["value"])
    return {"value": value, "why": None if value else words.reason(metric)}


def _differences(summaries: list[dict], labels: list[str]) -> list[str]:
    """What makes the runs hard to compare."""
    first = summaries[0]
    told: dict[str, Callable[[dict], object]] = {
        "model": lambda s: s["model"]["name"],
        "tasks or their order": lambda s: [task["name"] for task in s["tasks"]],
        "number of test rows": lambda s: [task["test"] for task in s["tasks"]],
        "number of training rows": lambda s: [task["train"] for task in s["tasks"]],
    }
    return [
        f"{label} and {labels[0]} do not have the same {name}."
        for summary, label in zip(summaries[1:], labels[1:], strict=True)
        for name, of in told.items()
        if of(summary) != of(first)
    ]


# ---- matrices --------------------------------------------------------------------------------------


def _matrix(summary: dict, scores: dict, intervals: list | None = None, majority: bool = False) -> dict:
    """Rows of cells for the heat map."""
    tasks = summary["tasks"]
    rows = []
    if majority:
        told = [task["majority"] for task in tasks]
        cells = [_cell(one and one["share"], title=_majority_title(one)) for one in told]
        rows.append({"name": "majority answer", "anchor": "majority", "cells": cells, "first": False})
    base = [_cell(one) for one in scores["base"]]
    rows.append({"name": "base, untouched", "anchor": "base", "cells": base, "first": False})
    for i, (learned, line) in enumerate(zip(summary["learned"], scores["matrix"], strict=True)):
        ranges = intervals[i] if intervals else [None] * len(tasks)
        cells = [
            _cell(score, interval, just_learnt=task["name"] == learned, later=_later(summary, i, task["name"]))
            for task, score, interval in zip(tasks, line, ranges, strict=True)
        ]
        rows.append({"name": row_label(summary, learned), "anchor": "", "cells": cells, "first": i == 0})
    return {"columns": tasks, "rows": rows, "compact": len(tasks) > COMPACT}


def _cell(
    score: float | None, interval: list | None = None, just_learnt: bool = False, later: bool = False, title: str = ""
) -> dict:
    """A score with its colour's share, and what the pointer shows."""
    between = f"{number(100 * interval[0])} to {number(100 * interval[1])}" if interval else ""
    told = [title or percent(score)]
    told += [f"95 % interval {between}"] if between else []
    told += ["just learnt"] if just_learnt else ["not learnt yet"] if later else []
    return {
        "text": percent(score),
        "heat": None if score is None else round(100 * score),
        "between": between,
        "just_learnt": just_learnt,
        "later": later,
        "title": "; ".join(told),
    }


def _majority_title(majority: dict | None) -> str:
    if not majority:
        return "free answers: there is no commonest one to count"
    return f'always "{clean(majority["label"])}": {percent(majority["share"])}'


def _later(summary: dict, row: int, task: str) -> bool:
    """Is the task not yet learnt in this row?"""
    return not words.at_once(summary) and task not in summary["learned"][: row + 1]


def _measure(summary: dict, name: str, told: dict) -> dict:
    heading, anchor = words.MEASURES.get(name, (clean(name), "score"))
    return {
        "heading": heading,
        "anchor": anchor,
        "meaning": told["meaning"],
        "headline": all(task["headline"] == name for task in summary["tasks"]),
        "matrix": _matrix(summary, told),
    }


def _counts(summary: dict) -> list[dict]:
    """For each task, how often each label was the answer, a line per row of the matrix."""
    after = summary["counts"].get("after", [])
    tables = []
    for j, task in enumerate(summary["tasks"]):
        columns = [row[j] for row in after]
        labels = list(dict.fromkeys([*task["options"], *(label for one in columns for label in one or {})]))
        if not any(columns) or not labels:
            continue
        lines = [
            (row_label(summary, learned), [_count(one, label) for label in labels] if one else None)
            for learned, one in zip(summary["learned"], columns, strict=True)
        ]
        tables.append({"task": task["name"], "labels": labels, "lines": lines, "n": task["test"]})
    return tables


def _count(counts: dict[str, int], label: str) -> dict:
    many, total = counts.get(label, 0), sum(counts.values())
    return {"many": many, "heat": round(100 * many / total) if total else 0}


def _checks(summary: dict) -> dict:
    """Every check of every task: a line per check, a column per task."""
    names = dict.fromkeys(check["name"] for one in summary["acts"] for check in one["checks"])
    by_task = [(one["task"], {check["name"]: check for check in one["checks"]}) for one in summary["acts"]]
    lines = []
    for name in names:
        found = [checks.get(name) for _, checks in by_task]
        meaning = next(check["meaning"] for check in reversed(found) if check)
        lines.append({"name": name, "meaning": meaning, "found": found})
    return {"tasks": [task for task, _ in by_task], "lines": lines}


def _flat(value: object, name: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as dotted names."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{i}]")
    else:
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        yield name, words.figure(text) if text not in ("", {}) else "none"


# ---- charts: coordinates only, the template draws them ---------------------------------------------


def _changes(summaries: list[dict], labels: list[str]) -> dict | None:
    """Each earlier task's change with its interval, all runs under one another on one scale."""
    entries = [(i, entry) for i, summary in enumerate(summaries) for entry in summary["forgotten"]]
    if not entries:
        return None
    low = min(0.0, *(100 * entry["low"] for _, entry in entries))
    high = max(0.0, *(100 * entry["high"] for _, entry in entries))
    ticks = _ticks(low, high)
    groups = [
        {
            "task": task,
            "lines": [_change(entry, labels[i], i % COLOURS, ticks) for i, entry in entries if entry["task"] == task],
        }
        for task in dict.fromkeys(entry["task"] for _, entry in entries)
    ]
    marks = [(_share(tick, ticks), _signed(tick)) for tick in ticks]
    return {"groups": groups, "ticks": marks, "zero": _share(0, ticks)}


def _change(entry: dict, run: str, slot: int, ticks: list[float]) -> dict:
    low, high = 100 * entry["low"], 100 * entry["high"]
    return {
        "run": run,
        "slot": slot,
        "left": _share(low, ticks),
        "width": _share(high, ticks) - _share(low, ticks),
        "at": _share(100 * entry["change"], ticks),
        "text": _signed(100 * entry["change"]),
        "between": f"{_signed(low)} to {_signed(high)}",
        "shown": high < 0 or low > 0,
        "p": "" if entry["p"] is None else "< 0.001" if entry["p"] < 0.001 else f"{entry['p']:.3f}",
        **{key: entry[key] for key in ("lost", "gained", "n", "learned", "now")},
    }


def _share(value: float, ticks: list[float]) -> float:
    """Where a value lies between the outer ticks, in percent."""
    return 100 * (value - ticks[0]) / (ticks[-1] - ticks[0])


def _signed(value: float) -> str:
    text = number(abs(value))
    return text if text == "0" else f"{'−' if value < 0 else '+'}{text}"


def _score_chart(summary: dict, width: int) -> dict:
    """A line per task: its score before, at and after its own training."""
    tasks, names = summary["tasks"], ["base", *(row_label(summary, learned) for learned in summary["learned"])]
    rows = [summary["headline"]["base"], *summary["headline"]["matrix"]]
    slanted = len(names) * 90 > width - 200
    below = 90 if slanted else 40
    height = max(250, 17 * len(tasks) + 20) + below
    box = {"left": 56, "top": 16, "right": width - 130, "bottom": height - below}
    x = _scale(0, max(1, len(names) - 1), box["left"] + 16, box["right"] - 16)
    y = _scale(0, 1, box["bottom"], box["top"])
    series = [_score_line(summary, j, [row[j] for row in rows], names, x, y) for j in range(len(tasks))]
    return {
        "kind": "scores",
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


def _score_line(summary: dict, j: int, scores: list, names: list[str], x: Callable, y: Callable) -> dict:
    task = summary["tasks"][j]["name"]
    learnt = 1 if words.at_once(summary) else 1 + _index(summary["learned"], task)
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
    return _series(clean(task), j) | {
        "path": _path(places[learnt:]),
        "faint": _path(places[: learnt + 1]),
        "points": points,
    }


def _series(name: str, j: int) -> dict:
    """A line's name, colour and mark."""
    return {"name": name, "label": _shorten(name, 16), "slot": j % COLOURS, "square": (j // COLOURS) % 2 == 1}


def _index(names: list[str], name: str) -> int:
    return names.index(name) if name in names else len(names)


def _loss_chart(summary: dict, name: str, width: int, height: int) -> dict | None:
    """One task's steps after the other's; None where no step has the value."""
    curves = [(task, len(records), _thinned(records, name)) for task, records in summary["losses"].items()]
    values = [value for *_, points in curves for _, value in points]
    if not values:
        return None
    box = {"left": 56, "top": 16, "right": width - 130, "bottom": height - 48}
    ticks = _ticks(min(0.0, *values), max(values) or 1.0, about=4)
    total = sum(steps for _, steps, _ in curves)
    x = _scale(0, total, box["left"], box["right"])
    y = _scale(ticks[0], ticks[-1], box["bottom"], box["top"])
    slots = {task["name"]: j for j, task in enumerate(summary["tasks"])}
    series, rules, start = [], [], 0
    for i, (task, steps, points) in enumerate(curves):
        rules += [x(start)] if start else []
        marks: list[dict] = [
            {
                "x": x(start + step),
                "y": y(value),
                "learnt": False,
                "title": f"{clean(task)}, step {step}: {name} {value:.4g}",
            }
            for step, value in points
        ]
        path = _path([(mark["x"], mark["y"]) for mark in marks])
        series.append(_series(clean(task), slots.get(task, i)) | {"path": path, "faint": "", "points": marks})
        start += steps
    window = max(_window(steps) for _, steps, _ in curves)
    return {
        "kind": "losses",
        "width": width,
        "height": height,
        "box": box,
        "x_name": "training step, one task after the other",
        "y_name": name,
        "slanted": False,
        "x_ticks": [(x(step), number(step), "") for step in _ticks(0, total) if step <= total],
        "y_ticks": [(y(tick), number(tick, 6)) for tick in ticks],
        "series": _spread([one for one in series if one["points"]], box["top"] + 4, box["bottom"], by_place=False),
        "rules": rules,
        "note": f"Each point is the mean of up to {window} steps." if window > 1 else "",
    }


def _thinned(records: list[dict], key: str) -> list[tuple[int, float]]:
    """(last step, mean) of windows of steps, few enough to draw; steps without the value are left out."""
    window = _window(len(records))
    points = []
    for start in range(0, len(records), window):
        part = [record for record in records[start : start + window] if math.isfinite(record.get(key, math.nan))]
        if part:
            points.append((part[-1]["step"], sum(record[key] for record in part) / len(part)))
    return points


def _window(steps: int) -> int:
    return max(1, math.ceil(steps / POINTS_PER_LINE))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """From values to places on the drawing."""
    return lambda value: round(start + (end - start) * (value - low) / (high - low), 1)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover low to high.

    >>> _ticks(-36, 3)
    [-40.0, -30.0, -20.0, -10.0, 0.0, 10.0]
    """
    rough = ((high - low) or 1.0) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _path(places: list[tuple[float, float] | None]) -> str:
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


# ---- Markdown --------------------------------------------------------------------------------------


def render_markdown(summaries: list[dict]) -> str:
    """The report in short, for a pull request."""
    labels = words.run_labels(summaries)
    lines = [f"## forgetless: {_md(words.title(summaries))}", ""]
    for summary, label in zip(summaries, labels, strict=True):
        lines += [f"**{_md(label)}.** {_md(words.verdict(summary))}", ""]
        said = [sentence for sentence in words.sentences(summary) if sentence != words.verdict(summary)]
        lines += [*(f"- {_md(sentence)}" for sentence in said), ""] if said else []
    for text in _differences(summaries, labels):
        lines += [f"> **Compare with care:** {_md(text)}", ""]
    for summary, label in zip(summaries, labels, strict=True):
        for warning in summary["warnings"]:
            lines += [f"> **Warning ({_md(label)}):** {_md(clean(warning))}", ""]
        lines += [f"### Scores, {_md(label)}", "", *_markdown_matrix(summary), ""]
    lines += ["Bold: just after the task was learnt.", "", "### Metrics", ""]
    head = ["metric", *labels, "formula", "divisor"]
    lines += _table(head, [
        [line["name"], *(told["value"] or told["why"] for told in line["values"]), line["formula"], line["divisor"]]
        for line in _metrics(summaries)
    ])  # fmt: skip
    return "\n".join(lines) + "\n"


def _markdown_matrix(summary: dict) -> list[str]:
    tasks = summary["tasks"]
    majority = [percent(task["majority"]["share"]) if task["majority"] else "none" for task in tasks]
    rows = [["majority answer", *majority], ["base, untouched", *map(percent, summary["headline"]["base"])]]
    table = _table(["", *(clean(task["name"]) for task in tasks)], rows)
    for learned, scores in zip(summary["learned"], summary["headline"]["matrix"], strict=True):
        cells = [
            f"**{percent(score)}**" if task["name"] == learned and score is not None else percent(score)
            for task, score in zip(tasks, scores, strict=True)
        ]
        table.append(f"| {_md(row_label(summary, learned))} | " + " | ".join(cells) + " |")
    return table


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    told = ["| " + " | ".join(_md(cell) for cell in line) + " |" for line in [head, *rows]]
    return [told[0], "|---" * len(head) + "|", *told[1:]]


def _md(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, no links, no one called by name."""
    safe = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(text, quote=False))
    return safe.replace("@", "@\u200b").replace("://", ":\u200b//")


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's files are for their owner alone
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
