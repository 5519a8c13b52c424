"""The matrices in the terminal, side by side where it is wide enough, then what was forgotten, in words."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from forgetless.report.words import NOT_SCORED, clean, percent, row_label, run_labels, sentences

LONGEST_NAME = 16  # of a task, in a table; the sentences below give it whole
GAP = 3


def print_matrices(summaries: list[dict], console: Console) -> None:
    """Prints each run's matrix, what each forgot in words, and the warnings."""
    labels = run_labels(summaries)
    tables = [_tables(summary, label, console.width) for summary, label in zip(summaries, labels, strict=True)]
    for row in _rows_of_tables(tables, console):
        console.print(row)
        console.print()
    console.print(Text("Bold: just after the task was learnt. Red: a loss that the test rows show.", style="dim"))
    for summary, label in zip(summaries, labels, strict=True):
        console.print()
        console.print(Text(f"What {label} forgot", style="bold"))
        for sentence in sentences(summary):
            console.print(_bullet(sentence))
    for summary, label in zip(summaries, labels, strict=True):
        for warning in summary["warnings"]:
            console.print(Text(f"warning ({label}): {clean(warning)}", style="yellow"))


def _bullet(sentence: str) -> Table:
    """Wrapped lines start under the first one's words."""
    grid = Table.grid(padding=(0, 1))
    grid.add_row(Text("-"), Text(sentence))
    return grid


def _rows_of_tables(tables: list[list[Table]], console: Console) -> list[Table]:
    """All runs' tables on one line where they fit, else one below the other."""
    firsts = [parts[0] for parts in tables]
    wide = sum(console.measure(table, options=console.options.update(width=10_000)).maximum for table in firsts)
    if all(len(parts) == 1 for parts in tables) and wide + GAP * (len(tables) - 1) <= console.width:
        grid = Table.grid(padding=(0, GAP, 0, 0))
        grid.add_row(*firsts)
        return [grid]
    return [table for parts in tables for table in parts]


def _tables(summary: dict, label: str, width: int) -> list[Table]:
    """A run's matrix; one with more tasks than fit is cut into several tables."""
    rows = _rows(summary)
    first = max(len(name) for name, _ in rows) + 5
    tasks = range(len(summary["tasks"]))
    wide = max(len(NOT_SCORED), *(min(LONGEST_NAME, len(clean(task["name"]))) for task in summary["tasks"])) + 3
    fit = max(1, (width - first) // wide)
    parts = [list(tasks)[start : start + fit] for start in range(0, len(tasks), fit)]
    return [_table(summary, label if i == 0 else f"{label}, continued", rows, part) for i, part in enumerate(parts)]


def _table(summary: dict, label: str, rows: list[tuple[str, list[Text]]], part: list[int]) -> Table:
    table = Table(title=Text(f"{label}: scores", style="bold"), title_justify="left")
    table.add_column("", no_wrap=True)
    for j in part:
        name = _short(clean(summary["tasks"][j]["name"]))
        table.add_column(Text(name), justify="right", no_wrap=True)
    for i, (name, cells) in enumerate(rows):
        table.add_row(Text(name), *(cells[j] for j in part), end_section=i == 1)
    return table


def _rows(summary: dict) -> list[tuple[str, list[Text]]]:
    tasks = summary["tasks"]
    majority = [_cell(task["majority"]["share"] if task["majority"] else None, none="-") for task in tasks]
    rows = [("majority answer", majority), ("base, untouched", [_cell(one) for one in summary["headline"]["base"]])]
    lost = {entry["task"] for entry in summary["forgotten"] if entry["high"] < 0}
    last = len(summary["learned"]) - 1
    for i, (learned, scores) in enumerate(zip(summary["learned"], summary["headline"]["matrix"], strict=True)):
        cells = []
        for task, score in zip(tasks, scores, strict=True):
            style = "bold" if task["name"] == learned else "red" if i == last and task["name"] in lost else ""
            cells.append(_cell(score, style))
        rows.append((_short(row_label(summary, learned), LONGEST_NAME + 6), cells))
    return rows


def _cell(score: float | None, style: str = "", none: str = NOT_SCORED) -> Text:
    return Text(none, style="dim") if score is None else Text(percent(score), style=style)


def _short(name: str, longest: int = LONGEST_NAME) -> str:
    return name if len(name) <= longest else name[: longest - 2] + ".."
