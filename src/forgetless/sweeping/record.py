"""sweep.json and sweep.md: the plan, what was chosen and why, and the state of every run."""

from __future__ import annotations

from dataclasses import asdict

from forgetless import __version__
from forgetless.errors import RunError
from forgetless.model.identity import json_digest
from forgetless.report.contents import mean
from forgetless.report.summary import summarise
from forgetless.report.sweep import sweep_markdown
from forgetless.runs.folder import make_folder, write_whole
from forgetless.runs.seal import write_sealed
from forgetless.sweeping.folder import DONE, ELSEWHERE, FAILED, FORMAT
from forgetless.sweeping.grid import Run, notes_of, orders_of
from forgetless.sweeping.running import DIVERGED, Plan, begun_with, judged


def write_record(plan: Plan) -> dict:
    """The record as it is now, written whole; several processes of one sweep may do so.

    The first of them decides the terms of all.
    """
    folder = plan.folder
    make_folder(folder.root, ELSEWHERE)
    with folder.alone("record"):
        plan.terms, plan.begun = begun_with(folder, plan.sweep) or plan.terms, True
        record = as_json(plan)
        write_sealed(folder.record, {key: value for key, value in record.items() if key != "path"})
        write_whole(folder.page, sweep_markdown(record))
    return record


def as_json(plan: Plan) -> dict:
    sweep, names = plan.sweep, [task.name for task in plan.stream.tasks]
    definition = asdict(sweep)
    cells = [_cell(plan, run) for run in plan.cells]
    here = {run.id for run in plan.cells}
    found = plan.folder.root / "cells"
    return {
        "format": FORMAT,
        "version": __version__,
        "name": sweep.name,
        "path": str(plan.folder.root),
        "status": "complete" if all(cell["status"] == DONE for cell in cells) else "incomplete",
        "counts": {
            state: sum(cell["status"] == state for cell in cells) for state in {cell["status"] for cell in cells}
        },
        "stream": plan.stream.name,
        "tasks": {task.name: task.fingerprint for task in plan.stream.tasks},
        "orders": {name: list(order) for name, order in orders_of(sweep, names).items()},
        "fair": sweep.fair,
        "terms": asdict(plan.terms),
        "notes": [*notes_of(sweep, names), plan.terms.said],
        "definition": definition,
        "sha256": json_digest(definition),
        "trials": [_trial(plan, run) for run in plan.trials],
        "cells": cells,
        "others": sorted(path.name for path in found.iterdir() if path.name not in here) if found.exists() else [],
    }


def _run(plan: Plan, run: Run) -> dict:
    told = plan.folder.attempt(run)
    state = plan.folder.state(run)
    return {
        "id": run.id,
        "status": state,
        "method": run.config.method,
        "order": run.order,
        "seed": run.config.seed,
        "options": run.options,
        "folder": str(plan.folder.run(run).relative_to(plan.folder.root)),
        "threads": told.get("threads"),
    } | ({"error": told["error"], "diverged": told["kind"] == DIVERGED} if state == FAILED else {})


def _trial(plan: Plan, run: Run) -> dict:
    means = _means(plan, run)
    return _run(plan, run) | {"tasks": list(run.tasks), "score": means.pop("average", None)} | means


def _cell(plan: Plan, run: Run) -> dict:
    told = _run(plan, run)
    if run.candidates:
        told["among"] = [{"trial": one.trial.id, "options": dict(one.options)} for one in run.candidates]
        told["chosen"] = plan.folder.attempt(run).get("chosen")
        told["tied"] = _tied(plan, run)
    if told["status"] == DONE:
        summary = summarise(plan.folder.run(run))
        told |= _means(plan, run) | {"warnings": summary["warnings"]}
        told["metrics"] = {name: metric["value"] for name, metric in summary["metrics"].items()}
    return told


def _means(plan: Plan, run: Run) -> dict[str, float | None]:
    """Means over the tasks of a run's last scores, and of what the majority answer and the untouched base reach there;
    empty for one that is not done."""
    if not plan.folder.done(run):
        return {}
    summary = summarise(plan.folder.run(run))
    majority = [task["majority"] and task["majority"]["share"] for task in summary["tasks"]]
    scores = {
        "average": summary["headline"]["matrix"][-1],
        "majority": majority,
        "untouched": summary["headline"]["base"],
    }
    return {name: mean(row) for name, row in scores.items()}


def _tied(plan: Plan, run: Run) -> bool:
    """Whether several candidates were best, so that the first of them was taken for no better reason."""
    try:
        scores = [one.score for one in judged(plan.folder, run) if one.score is not None]
    except RunError:
        return False
    return scores.count(max(scores, default=0.0)) > 1
