"""The HTML page: what the template draws, and drawing it. No script, no network: all it needs is in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from forgetless.report import charts, contents, words
from forgetless.report.bounds import BOUNDS
from forgetless.report.glossary import GLOSSARY, OF_FIGURE, OF_MEASURE, OF_METRIC
from forgetless.report.pieces import COMPACT, LONGEST_TEXT, MOST_TEXTS, bar, cell, forest, heatmap, place, render, row
from forgetless.report.words import clean, number, percent, row_label, signed

MOST_ROWS = 200  # of a task's turned rows that are listed by number; report.json has them all


def render_html(summaries: list[dict]) -> str:
    """The page as text."""
    return render("page.html.jinja", view(summaries))


def view(summaries: list[dict]) -> dict:
    """What the template draws: texts, cells and coordinates."""
    labels = words.run_labels(summaries)
    wide = len(summaries) == 1 or max(len(s["tasks"]) for s in summaries) > COMPACT
    bounds, refused = contents.all_bounds(summaries)
    loss_top = charts.highest(summaries, "loss")
    runs = [_run(*told, i, wide, loss_top) for i, told in enumerate(zip(summaries, labels, bounds, strict=True))]
    return {
        "title": words.title(summaries),
        "runs": runs,
        "wide": wide,
        "cards": _cards(summaries, labels),
        "ends": _ends(summaries),
        "changes": _changes(summaries, labels),
        "small_charts": _small_charts(summaries, labels),
        "metrics": [line | {"anchor": OF_METRIC.get(line["key"], "")} for line in contents.metrics(summaries)],
        "differences": contents.differences(summaries) + refused,
        "glossary": GLOSSARY,
        "texts": any("texts" in summary for summary in summaries),
    }


def _run(summary: dict, label: str, bounds: list[dict], slot: int, wide: bool, loss_top: float) -> dict:
    """One run's part of every section."""
    width = 1080 if wide else 560
    told = summary["measures"].items()
    losses = charts.step_chart(summary, "loss", width, 250, loss_top)
    return {
        "label": label,
        "slot": slot % charts.COLOURS,
        "verdict": words.verdict(summary),
        "sentences": words.sentences(summary),
        "running": summary["status"] != "complete",
        "method": summary["method"],
        "model": summary["model"],
        "tasks": summary["tasks"],
        "matrix": _matrix(summary, summary["headline"], summary["intervals"], bounds),
        "scores": charts.score_chart(summary, width),
        "borders": {
            "chart": charts.border_chart(summary, width),
            "rows": contents.borders(summary),
            "said": words.border_sentence(summary) if summary.get("forgetting") else "",
        },
        "losses": losses,
        "figures": [_figure(summary, key) for key in contents.log_keys(summary)],
        "checks": [_barred(line) for line in contents.checks(summary)],
        "logged": [line | {"anchor": OF_FIGURE.get(line["key"], "")} for line in contents.logged(summary)],
        "lessons": list(summary["losses"]),
        "memory": contents.memory(summary),
        "warnings": summary["warnings"],
        "flips": [_flip(summary, task) for task in contents.flips(summary)],
        "text_notes": summary.get("texts", {}).get("notes", []),
        "measures": [_measure(summary, name, measure) for name, measure in told],
        "others": [_other(summary, name, other) for name, other in summary["views"].items()],
        "counts": [_heated(table) for table in contents.counts(summary)],
        "notes": contents.notes(summary),
        "facts": contents.facts(summary),
    }  # fmt: skip


def _figure(summary: dict, key: str) -> dict:
    """A figure that the method logs, drawn over the steps."""
    return {
        "name": key.replace("_", " ").capitalize(),
        "anchor": OF_FIGURE.get(key, ""),
        "chart": charts.step_chart(summary, key, 520, 190),
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
        ("Average score at the end", "average", lambda s: _metric(s, "average_accuracy")),
        ("Score when just learnt", "learning", lambda s: _metric(s, "learning_accuracy")),
        ("Change since, on average", "backward", lambda s: _metric(s, "bwt")),
        ("Largest loss", "change", _largest_loss),
        ("Weights trained", "adapter", _trained),
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


# ---- matrices --------------------------------------------------------------------------------------


def _matrix(summary: dict, scores: dict, intervals: list | None = None, bounds: list[dict] | None = None) -> dict:
    """Rows of cells for the heat map; with `bounds` (maybe none of other runs) the majority answer heads it."""
    tasks = summary["tasks"]
    rows = []
    if bounds is not None:
        rows.append(row("majority answer", "majority", [_majority_cell(task) for task in tasks]))
    rows.append(row("untouched base", "base", [cell(one) for one in scores["base"]]))
    for i, (learned, line) in enumerate(zip(summary["learned"], scores["matrix"], strict=True)):
        ranges = intervals[i] if intervals else [None] * len(tasks)
        cells = [
            _score_cell(score, interval, just_learnt=task["name"] == learned, later=_later(summary, i, task["name"]))
            for task, score, interval in zip(tasks, line, ranges, strict=True)
        ]
        rows.append(row(row_label(summary, learned), "", cells, first=i == 0))
    for i, bound in enumerate(bounds or []):
        rows.append(row(bound["name"], bound["anchor"], [cell(one) for one in bound["scores"]], first=i == 0))
    return heatmap(tasks, rows)


def _score_cell(
    score: float | None, interval: list | None = None, just_learnt: bool = False, later: bool = False
) -> dict:
    """A score with its interval."""
    between = f"{number(100 * interval[0])} to {number(100 * interval[1])}" if interval else ""
    told = [percent(score)]
    told += [f"95 % interval {between}"] if between else []
    told += ["just learnt"] if just_learnt else ["not learnt yet"] if later else []
    return cell(score, between, told, just_learnt, later)


def _majority_cell(task: dict) -> dict:
    majority = task["majority"]
    if not majority:
        return cell(None, told=["free answers: there is no commonest one to count"])
    told = f'always "{clean(majority["label"])}": {percent(majority["share"])}'
    return cell(majority["share"], told=[told])


def _later(summary: dict, row: int, task: str) -> bool:
    """Is the task not yet learnt in this row?"""
    return not words.at_once(summary) and task not in summary["learned"][: row + 1]


def _measure(summary: dict, name: str, told: dict) -> dict:
    return {
        "heading": words.MEASURES.get(name, clean(name).replace("_", " ").capitalize()),
        "anchor": OF_MEASURE.get(name, "score"),
        "meaning": told["meaning"],
        "headline": all(task["headline"] == name for task in summary["tasks"]),
        "matrix": _matrix(summary, told),
    }


def _ends(summaries: list[dict]) -> dict | None:
    """Every run's last row under one another, with what all are read against."""
    told = contents.end_table(summaries)
    if told is None:
        return None
    first, note, rows = summaries[0], contents.no_floor(summaries), []
    if not note:
        base = first["headline"]["base"]
        majority = [task["majority"] and task["majority"]["share"] for task in first["tasks"]]
        rows = [
            row("majority answer", "majority", [*map(_majority_cell, first["tasks"]), cell(contents.mean(majority))]),
            row("untouched base", "base", [*map(cell, base), cell(contents.mean(base))]),
        ]
    for i, (line, summary) in enumerate(zip(told["rows"], summaries, strict=True)):
        anchor = BOUNDS.get(summary["method"]["name"], ("", ""))[1]
        cells = [_score_cell(*pair) for pair in zip(line["scores"], line["intervals"], strict=True)]
        rows.append(row(line["run"], anchor, [*cells, cell(line["mean"])], first=not note and i == 0))
    columns = [*first["tasks"], {"name": "mean", "test": sum(task["test"] for task in first["tasks"])}]
    return heatmap(columns, rows, more=1) | {"note": note}


# ---- what turned, what the method did --------------------------------------------------------------


def _flip(summary: dict, task: dict) -> dict:
    """A task's turned rows with their numbers in short, and their texts where they were asked for."""
    texts = summary.get("texts", {}).get("rows", {}).get(task["task"], {})
    sides = []
    for side in task["sides"]:
        numbers = [row["row"] + 1 for row in side["rows"]]
        sides.append(side | {
            "many": len(numbers),
            "numbers": ", ".join(map(str, numbers[:MOST_ROWS])),
            "more": max(0, len(numbers) - MOST_ROWS),
            "texts": [_text(row["row"], texts[str(row["row"])]) for row in side["rows"][:MOST_TEXTS] if texts],
            "more_texts": max(0, len(numbers) - MOST_TEXTS) if texts else 0,
        })  # fmt: skip
    return task | {"sides": sides}


def _text(row: int, told: dict) -> dict:
    """The texts of one row; what is not known is said."""
    prompt = contents.shown_prompt(told["prompt"])
    return {
        "row": row + 1,
        "source": clean(told["source"] or ""),
        "prompt": prompt if len(prompt) <= LONGEST_TEXT else prompt[:LONGEST_TEXT] + " …",
        **{key: "(none)" if told[key] is None else clean(told[key]) or "(empty)" for key in ("gold", "before", "now")},
    }


def _barred(line: dict) -> dict:
    """A check's line with each value's share of the line's largest, for the bars."""
    largest = max((abs(one["value"]) for one in line["found"] if one), default=0) or 1
    found = [one and one | {"share": round(100 * (abs(one["value"]) / largest))} for one in line["found"]]
    return line | {"found": found, "anchor": OF_FIGURE.get(line["name"], "check")}


def _heated(table: dict) -> dict:
    """Label counts with each count's share of its row."""
    lines = []
    for name, found in table["lines"]:
        total = sum(found or []) or 1
        lines.append((name, found and [{"many": many, "heat": round(100 * many / total)} for many in found]))
    return table | {"lines": lines}


def _small_charts(summaries: list[dict], labels: list[str]) -> list[dict]:
    """Panels of a small chart per task, where one chart would hold too many lines."""
    if max(len(summary["tasks"]) for summary in summaries) <= COMPACT:
        return []
    runs = [(label, i % charts.COLOURS, s) for i, (label, s) in enumerate(zip(labels, summaries, strict=True))]
    if len({frozenset(task["name"] for task in summary["tasks"]) for summary in summaries}) == 1:
        return [{"runs": runs, "charts": charts.task_charts(runs)}]
    return [{"runs": [run], "charts": charts.task_charts([run])} for run in runs]


def _changes(summaries: list[dict], labels: list[str]) -> dict | None:
    """Each earlier task's change with its interval, all runs under one another on one scale."""
    entries = [(i, entry) for i, summary in enumerate(summaries) for entry in summary["forgotten"]]
    if not entries:
        return None
    whos = labels if len(summaries) > 1 else None
    groups = [
        {
            "name": clean(task),
            "lines": [
                partial(_change, entry, whos[i] if whos else clean(task), i % charts.COLOURS)
                for i, entry in entries
                if entry["task"] == task
            ],
        }
        for task in dict.fromkeys(entry["task"] for _, entry in entries)
    ]
    values = [100 * entry[side] for _, entry in entries for side in ("low", "high")]
    return forest(groups, values, "points", signed)


def _change(entry: dict, who: str, slot: int, ticks: list[float]) -> dict:
    low, high = 100 * entry["low"], 100 * entry["high"]
    text, between = signed(100 * entry["change"]), f"{signed(low)} to {signed(high)}"
    return {
        "who": who,
        "slot": slot,
        "bars": [bar("range", low, high, ticks)],
        "at": place(100 * entry["change"], ticks),
        "stops": [],
        "shown": high < 0 or low > 0,
        "text": text,
        "between": between,
        "found": "",
        "title": f"{clean(entry['task'])}: {text} points (95 % interval {between})",
        "desc": f"{entry['lost']} lost, {entry['gained']} gained of {entry['n']} rows.",
        "p": words.p_value(entry["p"]),
        **{key: entry[key] for key in ("lost", "gained", "n", "learned", "now")},
    }
