"""report.json: every number of the page under keys that stay; docs/report.md lists them.

Only keys named here are written, so nothing that a run folder holds gets in by itself.
"""

from __future__ import annotations

import json

from forgetless.report import contents, words

FORMAT = 1
CHECK = ("name", "value", "ok", "meaning")
FLIP = ("row", "key", "before", "now")
TASK = ("name", "fingerprint", "train", "validation", "test", "options", "headline", "majority")
CHANGE = ("task", "learned", "now", "change", "low", "high", "p", "lost", "gained", "n")

BORDER = (
    "after", "kl", "low", "high", "cross_entropy", "entropy", "agree", "per_document", "text", "not_measured",
)  # fmt: skip


def render_json(summaries: list[dict]) -> str:
    """The record as text; `<` is escaped, so that it may stand inside a page."""
    text = json.dumps(record(summaries), indent=1, ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c") + "\n"


def record(summaries: list[dict]) -> dict:
    """Everything that the page shows, as plain data."""
    bounds, refused = contents.all_bounds(summaries)
    labels = words.run_labels(summaries)
    return {
        "format": FORMAT,
        "title": words.title(summaries),
        "runs": [_run(*told) for told in zip(summaries, labels, bounds, strict=True)],
        "side_by_side": contents.end_table(summaries),
        "compare_with_care": contents.differences(summaries) + refused,
    }


def _run(summary: dict, label: str, bounds: list[dict]) -> dict:
    told = {
        "label": label,
        **{key: summary[key] for key in ("name", "folder", "status", "method", "model")},
        "verdict": words.verdict(summary),
        "sentences": words.sentences(summary),
        "tasks": [{key: task.get(key) for key in TASK} for task in summary["tasks"]],
        "notes": [list(note) for note in contents.notes(summary)],
        "learned": summary["learned"],
        "matrix": summary["headline"]["matrix"],
        "intervals": summary["intervals"],
        "bounds": [
            *_below(summary),
            *({"name": one["name"], "run": one["run"], "scores": one["scores"]} for one in bounds),
        ],
        "measures": {
            name: {key: one[key] for key in ("meaning", "base", "matrix")} for name, one in summary["measures"].items()
        },
        "views": {
            name: {"matrix": one["headline"]["matrix"], "forgotten": _changes(one["forgotten"])}
            for name, one in summary["views"].items()
        },
        "forgotten": _changes(summary["forgotten"]),
        "forgetting": [{key: one[key] for key in BORDER if key in one} for one in summary.get("forgetting", [])],
        "flips": [_flips(one) for one in contents.flips(summary)],
        "metrics": summary["metrics"],
        "label_counts": {key: summary["counts"][key] for key in ("gold", "after")},
        "steps": {task: _steps(records) for task, records in summary["losses"].items()},
        "method_did": {"checks": [_checks(one) for one in summary["acts"]], "logged": contents.logged(summary)},
        **{key: summary[key] for key in ("warnings", "test_rows", "config", "versions")},
    }
    return told | {key: summary[key] for key in ("adopted", "history", "forgotten_rows", "texts") if key in summary}


def _below(summary: dict) -> list[dict]:
    majority = [task["majority"] and task["majority"]["share"] for task in summary["tasks"]]
    return [
        {"name": "majority answer", "run": None, "scores": majority},
        {"name": "untouched base", "run": None, "scores": summary["headline"]["base"]},
    ]


def _changes(entries: list[dict]) -> list[dict]:
    return [{key: entry[key] for key in CHANGE} for entry in entries]


def _flips(task: dict) -> dict:
    sides = {
        one["side"]: {"rows": [{key: row[key] for key in FLIP} for row in one["rows"]], "turns": one["turns"]}
        for one in task["sides"]
    }
    return {key: task[key] for key in ("task", "n", "whole")} | sides


def _checks(one: dict) -> dict:
    return {"task": one["task"], "checks": [{key: check[key] for key in CHECK} for check in one["checks"]]}


def _steps(records: list[dict]) -> list[dict]:
    """The log's figures; whatever else a record holds stays out."""
    return [{key: value for key, value in record.items() if contents.is_number(value)} for record in records]
