"""A sweep's state in short: what is fair, which runs are done, what was chosen, what failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from forgetless.report.compare_words import FLOORS
from forgetless.report.markdown import escaped, pipe_table
from forgetless.report.words import clean, percent

DONE, FAILED = "done", "failed"


def sweep_markdown(record: Mapping) -> str:
    """Fairness, results so far, trials, and what failed."""
    lines = [f"# Sweep {escaped(record['name'])}", "", headline(record), ""]
    lines += [*(f"- {escaped(note)}" for note in record["notes"]), ""]
    lines += ["## Orders", "", *pipe_table(["order", "tasks"], _orders(record)), ""]
    head = ["run", "method", "order", "seed", "options", "chosen", "state", "mean of the last scores", *dict(FLOORS)]
    lines += ["## Runs", "", *pipe_table(head, [_cell(cell) for cell in record["cells"]]), ""]
    lines += ["Means with intervals, paired tests and costs: `forgetless compare` on the folders in `cells/`.", ""]
    if record["trials"]:
        head = ["trial", "method", "tasks seen", "options", "state", "mean validation score", *dict(FLOORS)]
        lines += ["## Trials", "", *pipe_table(head, [_trial(trial) for trial in record["trials"]]), ""]
        lines += ["They choose and are no results. Between equal scores the first candidate is taken.", ""]
    if failed := _failed(record):
        lines += ["## Failed", "", *(f"- `{run['id']}`: {escaped(clean(run['error']))}" for run in failed), ""]
    if record["others"]:
        others = ", ".join(f"`{name}`" for name in record["others"])
        lines += [f"In `cells/`, and no part of this sweep as its file is now: {others}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def print_sweep(record: Mapping, console: Console) -> None:
    """How far it is, on what terms, and what failed."""
    console.print(headline(record), style="bold", markup=False)
    for note in record["notes"]:
        console.print(f"- {clean(note)}", markup=False)
    for run in _failed(record):
        console.print(f"failed: {run['id']}: {clean(run['error'])}", markup=False, style="red", soft_wrap=True)


def headline(record: Mapping) -> str:
    """'24 runs: 20 done, 3 waiting, 1 failed; 6 trials'."""
    states = ", ".join(f"{number} {state}" for state, number in sorted(record["counts"].items()))
    trials = f"; {len(record['trials'])} trials before them" if record["trials"] else ""
    return f"{len(record['cells'])} runs: {states}{trials}"


def _orders(record: Mapping) -> list[list[str]]:
    return [[name, " → ".join(map(clean, tasks))] for name, tasks in record["orders"].items()]


def _cell(cell: Mapping) -> list[str]:
    chosen = options_text(cell["chosen"]) if cell.get("chosen") else ""
    tied = " (tied)" if chosen and cell["tied"] else ""
    return [cell["id"], cell["method"], cell["order"], str(cell["seed"]), options_text(cell["options"]), chosen + tied,
            cell["status"], percent(cell["average"]) if cell["status"] == DONE else "", *_floors(cell)]  # fmt: skip


def _trial(trial: Mapping) -> list[str]:
    score = percent(trial["score"]) if trial["status"] == DONE else "diverged" if trial.get("diverged") else ""
    tasks = " → ".join(map(clean, trial["tasks"]))
    return [
        trial["id"],
        trial["method"],
        tasks,
        options_text(trial["options"]),
        trial["status"],
        score,
        *_floors(trial),
    ]


def _floors(run: Mapping) -> list[str]:
    """What a model without learning reaches on the same rows."""
    return [percent(run[key]) if run["status"] == DONE else "" for _, key in FLOORS]


def _failed(record: Mapping) -> list[Mapping]:
    return [run for run in [*record["trials"], *record["cells"]] if run["status"] == FAILED]


def options_text(options: Mapping[str, Any]) -> str:
    """'learning_rate 0.001, method.memory 10%'."""
    return ", ".join(f"{name} {value}" for name, value in options.items() if name != "seed")
