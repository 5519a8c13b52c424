"""Bounds: what one adapter per task, joint training and the naive sequence reached, in the other runs' tables."""

from __future__ import annotations

from forgetless.report import words

BOUNDS = {
    "sequential": ("naive sequence", "sequence"),
    "per_task": ("one adapter per task", "per-task"),
    "joint": ("joint training", "joint"),
}
"""Method whose run bounds the others -> the row's name, glossary anchor. In the order of the rows."""


def bounds(summaries: list[dict], i: int) -> list[dict]:
    """The rows that the other runs give to run i's table: scores at their end, or why they are no bound for it."""
    labels, found = words.run_labels(summaries), []
    for method, (name, anchor) in BOUNDS.items():
        runs = [j for j, other in enumerate(summaries) if j != i and other["method"]["name"] == method]
        for j in runs:
            why = why_not(summaries[i], summaries[j])
            found.append(
                {
                    "run": labels[j],
                    "name": name if len(runs) == 1 else f"{name}: {labels[j]}",
                    "anchor": anchor,
                    "scores": None if why else _final(summaries[i], summaries[j]),
                    "why": why,
                }
            )
    return found


def why_not(summary: dict, other: dict) -> str | None:
    """Why another run does not bound this one; None where it does."""
    names, others = ([task["name"] for task in one["tasks"]] for one in (summary, other))
    if other["status"] != "complete":
        return "it is not finished"
    if summary["model"]["identity"] != other["model"]["identity"]:
        return "it began from another base"
    if set(names) != set(others):
        return "it has other tasks"
    if other["method"]["name"] == "sequential" and names != others:
        return "it has another order of tasks"
    differ = [f"{words.clean(name)} ({what})" for name in names if (what := judged_otherwise(summary, other, name))]
    return f"it was judged otherwise: {', '.join(differ)}" if differ else None


def judged_otherwise(summary: dict, other: dict, name: str) -> str:
    """What differs in how two runs judged a task, in words; empty where it is the same."""
    mine, others = (_judged_by(one, name) for one in (summary, other))
    # a run of an earlier version does not tell how long its answers might be
    return ", ".join(what for what in mine if mine[what] != others[what] and None not in (mine[what], others[what]))


def _judged_by(summary: dict, name: str) -> dict[str, object]:
    task = next(task for task in summary["tasks"] if task["name"] == name)
    return {
        "headline measure": task["headline"],
        "scorers": task["scorers"],
        "options": task["options"],
        "longest answer": task.get("max_new_tokens"),
        "test rows": [task["test"], summary["test_rows"].get(name)],
    }


def _final(summary: dict, other: dict) -> list[float | None]:
    """The other run's last row, in the order of this run's tasks."""
    last = dict(zip((task["name"] for task in other["tasks"]), other["headline"]["matrix"][-1], strict=True))
    return [last[task["name"]] for task in summary["tasks"]]
