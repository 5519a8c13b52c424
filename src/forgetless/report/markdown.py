"""The report as Markdown, for a pull request or a notebook: the same figures without the drawings."""

from __future__ import annotations

import html
import re

from forgetless.report import contents, words
from forgetless.report.words import clean, number, percent, row_label

MOST_TURNS = 8  # kinds of turned answers of a task that are told
MOST_ROWS = 30  # of a task's turned rows that are listed by number


def render_markdown(summaries: list[dict]) -> str:
    labels = words.run_labels(summaries)
    bounds, refused = contents.all_bounds(summaries)
    runs = list(zip(summaries, labels, strict=True))
    lines = [f"# forgetless: {escaped(words.title(summaries))}", ""]
    for summary, label in runs:
        lines += _in_words(summary, label)
    for text in contents.differences(summaries) + refused:
        lines += [f"> **Compare with care:** {escaped(text)}", ""]
    for summary, label in runs:
        for warning in summary["warnings"]:
            lines += [f"> **Warning ({escaped(label)}):** {escaped(clean(warning))}", ""]
    lines += _side_by_side(summaries)
    for (summary, label), rows in zip(runs, bounds, strict=True):
        lines += [f"## Scores, {escaped(label)}", "", *_matrix(summary, summary["headline"], rows), ""]
    lines += ["Bold: just after the task was learnt. Intervals of 95 %: report.html and report.json.", ""]
    lines += _changes(runs) + _metrics(summaries, labels)
    for summary, label in runs:
        lines += _borders(summary, label)
    for summary, label in runs:
        lines += _flips(summary, label) + _method(summary, label)
    for summary, label in runs:
        lines += _details(summary, label)
    lines += ["Every word is explained in report.html and in docs/glossary.md."]
    return "\n".join(lines) + "\n"


def _in_words(summary: dict, label: str) -> list[str]:
    said = [sentence for sentence in words.sentences(summary) if sentence != words.verdict(summary)]
    lines = [f"**{escaped(label)}.** {escaped(words.verdict(summary))}", ""]
    return [*lines, *(f"- {escaped(sentence)}" for sentence in said), *([""] if said else [])]


def _side_by_side(summaries: list[dict]) -> list[str]:
    told = contents.end_table(summaries)
    if told is None:
        return []
    rows = [[row["run"], *map(percent, [*row["scores"], row["mean"]])] for row in told["rows"]]
    return ["## Side by side, at the end", "", *pipe_table(["run", *map(clean, told["tasks"]), "mean"], rows), ""]


def _matrix(summary: dict, scores: dict, bounds: list[dict] | None = None) -> list[str]:
    """With `bounds`, maybe none, the majority answer heads the table."""
    tasks = summary["tasks"]
    majority = [percent(task["majority"]["share"]) if task["majority"] else "none" for task in tasks]
    rows = [["majority answer", *majority]] if bounds is not None else []
    rows += [["untouched base", *map(percent, scores["base"])]]
    table = pipe_table(["", *(clean(task["name"]) for task in tasks)], rows)
    for learned, line in zip(summary["learned"], scores["matrix"], strict=True):
        cells = [
            f"**{percent(score)}**" if task["name"] == learned and score is not None else percent(score)
            for task, score in zip(tasks, line, strict=True)
        ]
        table.append(f"| {escaped(row_label(summary, learned))} | " + " | ".join(cells) + " |")
    return table + [_line([one["name"], *map(percent, one["scores"])]) for one in bounds or []]


def _changes(runs: list[tuple[dict, str]]) -> list[str]:
    rows = [
        [
            label,
            clean(entry["task"]),
            percent(entry["learned"]),
            percent(entry["now"]),
            f"{number(100 * entry['change'])} points",
            f"{number(100 * entry['low'])} to {number(100 * entry['high'])}",
            *(str(entry[key]) for key in ("lost", "gained", "n")),
            words.p_value(entry["p"]),
        ]
        for summary, label in runs
        for entry in summary["forgotten"]
    ]
    head = ["run", "task", "just learnt", "now", "change", "95 % interval", "lost", "gained", "rows", "p"]
    return ["## What later learning changed", "", *pipe_table(head, rows), ""] if rows else []


def _metrics(summaries: list[dict], labels: list[str]) -> list[str]:
    rows = [
        [line["name"], *(told["value"] or told["why"] for told in line["values"]), line["formula"], line["divisor"]]
        for line in contents.metrics(summaries)
    ]
    return ["## Metrics", "", *pipe_table(["metric", *labels, "formula", "divisor"], rows), ""]


def _borders(summary: dict, label: str) -> list[str]:
    rows = [list(row.values()) for row in contents.borders(summary)]
    head = ["", "KL, nats/token", "95 % interval", "a document", "cross-entropy", "base's entropy", "agreement"]
    heading = f"## Predictions against the untouched base, {escaped(label)}"
    return [heading, "", *pipe_table(head, rows), ""] if rows else []


def _flips(summary: dict, label: str) -> list[str]:
    lines = [f"## Rows that turned, {escaped(label)}", ""]
    for task in contents.flips(summary):
        for side in task["sides"]:
            many = len(side["rows"])
            lines.append(
                f"- {escaped(clean(task['task']))}: {many} of {task['n']} rows {side['heading']}.{_numbers(side)}"
            )
            lines += [f"  - {escaped(_turn(turn))}" for turn in side["turns"][:MOST_TURNS]]
            rest = sum(turn["rows"] for turn in side["turns"][MOST_TURNS:])
            lines += [f"  - {rest} rows in other ways"] if rest else []
            lines += _texts(summary, task["task"], side)
    lines += [f"- {escaped(clean(note))}" for note in summary.get("texts", {}).get("notes", [])]
    return [*lines, ""] if len(lines) > 2 else []


def _turn(turn: dict) -> str:
    rows = f"{turn['rows']} row{'s' if turn['rows'] != 1 else ''}"
    return f"{rows}: {contents.shown(turn['before'])} → {contents.shown(turn['now'])}"


def _numbers(side: dict) -> str:
    numbers = [str(row["row"] + 1) for row in side["rows"]]
    more = f" and {len(numbers) - MOST_ROWS} more" if len(numbers) > MOST_ROWS else ""
    return f" Numbers: {', '.join(numbers[:MOST_ROWS])}{more}." if numbers else ""


def _texts(summary: dict, task: str, side: dict) -> list[str]:
    """Prompts and answers of the listed rows, where they were asked for."""
    texts, lines = summary.get("texts", {}).get("rows", {}).get(task, {}), []
    for row in side["rows"][:MOST_ROWS]:
        if told := texts.get(str(row["row"])):
            answers = ", ".join(f"{key}: {_answer(told[key])}" for key in ("gold", "before", "now"))
            lines.append(f"  - row {row['row'] + 1}: {escaped(contents.shown_prompt(told['prompt']))}")
            lines.append(f"    ({escaped(answers)})")
    return lines


def _answer(text: str | None) -> str:
    return "(none)" if text is None else clean(text) or "(empty)"


def _method(summary: dict, label: str) -> list[str]:
    lines = [f"## What {escaped(label)} did", "", escaped(contents.memory(summary)), ""]
    tasks = [clean(one["task"]) for one in summary["acts"]]
    rows = [
        [clean(line["name"]), *(_checked(check) for check in line["found"]), clean(line["meaning"])]
        for line in contents.checks(summary)
    ]
    lines += [*pipe_table(["check", *tasks, "meaning"], rows), ""] if rows else []
    rows = [
        [line["key"].replace("_", " "), *(_mean_and_last(told) for told in line["found"])]
        for line in contents.logged(summary)
    ]
    head = ["mean over steps, last step", *map(clean, summary["losses"])]
    return lines + ([*pipe_table(head, rows), ""] if rows else [])


def _mean_and_last(told: dict | None) -> str:
    return f"{words.figure(told['mean'])}, {words.figure(told['last'])}" if told else "none"


def _checked(check: dict | None) -> str:
    if check is None:
        return "no such check"
    return words.figure(check["value"]) + ("" if check["ok"] else " (did nothing)")


def _details(summary: dict, label: str) -> list[str]:
    lines = [f"## Details, {escaped(label)}", ""]
    for name, measure in summary["measures"].items():
        heading = words.MEASURES.get(name, clean(name))
        lines += [f"### {escaped(heading)}", "", escaped(measure["meaning"]) + ".", "", *_matrix(summary, measure), ""]
    for name, other in summary["views"].items():
        lines += [f"### Another view: {escaped(clean(name))}", "", *_matrix(summary, other["headline"]), ""]
    for table in contents.counts(summary):
        rows = [
            [name, *(map(str, found) if found else ["not scored"] * len(table["labels"]))]
            for name, found in table["lines"]
        ]
        head = ["", *map(clean, table["labels"])]
        lines += [f"### Predicted labels, {escaped(clean(table['task']))}", "", *pipe_table(head, rows), ""]
    if noted := contents.notes(summary):
        lines += [
            "### Notes on the data",
            "",
            *(f"- {escaped(clean(t))}: {escaped(clean(note))}" for t, note in noted),
            "",
        ]
    for heading, settings in contents.facts(summary).items():
        told = pipe_table(["", ""], [[clean(name), value] for name, value in settings])
        lines += [f"### {heading.capitalize()}", "", *told, ""]
    return lines


def pipe_table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [_line(head), "|---" * len(head) + "|", *map(_line, rows)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, no links, no one called by name."""
    safe = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(text, quote=False))
    return safe.replace("@", "@\u200b").replace("://", ":\u200b//")
