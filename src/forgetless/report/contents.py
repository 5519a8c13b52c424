"""What every form of the report says: plain data that the page draws, Markdown lists and report.json keeps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable

from forgetless.report import words
from forgetless.report.bounds import bounds, judged_otherwise
from forgetless.report.words import clean, row_label
from forgetless.score.scorers import NO_OPTION

PLAIN = ("step", "steps", "loss", "learning_rate", "tokens", "gradient_norm")
"""What every method logs; all else is what the method did."""

COMPARED = (
    "seed", "score_on", "r", "lora_alpha", "lora_dropout", "target_modules", "learning_rate", "num_train_epochs",
    "max_steps", "batch_size", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm", "max_length",
)  # fmt: skip
"""Options that a fair comparison shares."""


def end_table(summaries: list[dict]) -> dict | None:
    """Several runs at their end, a row each, where they have the same tasks: task scores and their mean."""
    names = [task["name"] for task in summaries[0]["tasks"]]
    if len(summaries) < 2 or any({task["name"] for task in s["tasks"]} != set(names) for s in summaries):
        return None
    labels, rows = words.run_labels(summaries), []
    for label, summary in zip(labels, summaries, strict=True):
        order = {task["name"]: j for j, task in enumerate(summary["tasks"])}
        last = summary["headline"]["matrix"][-1] if summary["headline"]["matrix"] else [None] * len(names)
        ranges = summary["intervals"][-1] if summary["intervals"] else [None] * len(names)
        scores = [last[order[name]] for name in names]
        rows.append({
            "run": label,
            "scores": scores,
            "intervals": [ranges[order[name]] for name in names],
            "mean": mean(scores),
        })  # fmt: skip
    return {"tasks": names, "rows": rows}


def no_floor(summaries: list[dict]) -> str:
    """Why the untouched base and the majority answer of one run do not stand under all; empty where they do."""
    first = summaries[0]
    told: dict[str, Callable[[dict], bool]] = {
        "base": lambda s: s["model"]["identity"] == first["model"]["identity"],
        "precision": lambda s: s["model"]["precision"] == first["model"]["precision"],
        "test rows and measures": lambda s: not any(judged_otherwise(first, s, t["name"]) for t in first["tasks"]),
    }
    differ = [name for name, same in told.items() if not all(map(same, summaries))]
    if not differ:
        return ""
    return (
        f"The untouched base and the majority answer are left out here: the runs do not have the same "
        f"{', nor the same '.join(differ)}. Each run's own are in its table below."
    )


def mean(scores: list[float | None]) -> float | None:
    """None where a score is missing: a mean over other tasks would not be comparable."""
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) else None


def all_bounds(summaries: list[dict]) -> tuple[list[list[dict]], list[str]]:
    """Each run's bounds that hold, and in words those that do not."""
    labels = words.run_labels(summaries)
    found = [bounds(summaries, i) for i in range(len(summaries))]
    refused = [
        f"{one['run']} is not shown as a bound ({one['name'].partition(':')[0]}) in the table of {label}: {one['why']}."
        for label, ones in zip(labels, found, strict=True)
        for one in ones
        if one["why"]
    ]
    return [[one for one in ones if not one["why"]] for ones in found], refused


def differences(summaries: list[dict]) -> list[str]:
    """What makes the runs hard to compare."""
    labels, first = words.run_labels(summaries), summaries[0]
    told: dict[str, Callable[[dict], object]] = {
        "model": lambda s: s["model"]["identity"],
        "precision": lambda s: s["model"]["precision"],
        "tasks or their order": lambda s: [task["name"] for task in s["tasks"]],
        "number of training rows": lambda s: [task["train"] for task in s["tasks"]],
    }
    found = []
    for summary, label in zip(summaries[1:], labels[1:], strict=True):
        names = [name for name, of in told.items() if of(summary) != of(first)]
        shared = [task["name"] for task in summary["tasks"] if task["name"] in {one["name"] for one in first["tasks"]}]
        judged = ((task, judged_otherwise(summary, first, task)) for task in shared)
        names += [f"{what} in {clean(task)}" for task, what in judged if what]
        names += [f"option {key}" for key in COMPARED if summary["config"].get(key) != first["config"].get(key)]
        found += [f"{label} and {labels[0]} do not have the same {name}." for name in names]
    return found


def metrics(summaries: list[dict]) -> list[dict]:
    """A line per metric with each run's value or the reason why there is none."""
    lines = []
    for key in dict.fromkeys(key for summary in summaries for key in summary["metrics"]):
        found = [summary["metrics"].get(key) for summary in summaries]
        told = next(metric for metric in found if metric)
        lines.append({
            "key": key,
            "name": told["name"],
            "formula": told["formula"],
            "divisor": told["divisor"],
            "values": [_value_or_reason(key, metric) for metric in found],
        })  # fmt: skip
    return lines


def _value_or_reason(key: str, metric: dict | None) -> dict:
    if metric is None:
        return {"value": None, "why": "cannot compute: this run does not have it"}
    value = words.metric_value(key, metric["value"])
    return {"value": value, "why": None if value else words.reason(metric)}


def checks(summary: dict) -> list[dict]:
    """Every check, with what was found for each finished lesson (None: no such check there)."""
    names = dict.fromkeys(check["name"] for one in summary["acts"] for check in one["checks"])
    by_lesson = [{check["name"]: check for check in one["checks"]} for one in summary["acts"]]
    lines = []
    for name in names:
        found = [told.get(name) for told in by_lesson]
        lines.append({"name": name, "meaning": next(one["meaning"] for one in reversed(found) if one), "found": found})
    return lines


def borders(summary: dict) -> list[dict]:
    """Predictions against the untouched base's after each lesson, as the columns of a table; empty: not measured."""
    return [
        {
            "name": row_label(summary, one["after"]),
            "kl": words.nats(one["kl"]),
            "between": words.between(one),
            "per_document": words.nats(one["per_document"]),
            "cross_entropy": words.nats(one["cross_entropy"]),
            "entropy": words.nats(one["entropy"]),
            "agree": words.percent(one["agree"]),
        }
        for one in summary.get("forgetting", [])
        if "kl" in one
    ]


def logged(summary: dict) -> list[dict]:
    """What the method logged at its steps: for each lesson the mean over its steps and the last value."""
    lines = []
    for key in ["loss", *log_keys(summary), "gradient_norm"]:
        found = []
        for records in summary["losses"].values():
            values = [record[key] for record in records if is_number(record.get(key))]
            found.append({"mean": sum(values) / len(values), "last": values[-1]} if values else None)
        if any(found):
            lines.append({"key": key, "found": found})
    return lines


def log_keys(summary: dict) -> list[str]:
    """The method's own figures in the log, in their order."""
    records = [record for steps in summary["losses"].values() for record in steps]
    keys = dict.fromkeys(key for record in records for key, value in record.items() if is_number(value))
    return [key for key in keys if key not in PLAIN]


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def memory(summary: dict) -> str:
    """What was kept of the data, in words."""
    found = {check["name"]: check["value"] for one in summary["acts"][-1:] for check in one["checks"]}
    if "kept rows" not in found:
        return "No rows of earlier tasks were kept for replay."
    replayed = sum(c["value"] for one in summary["acts"] for c in one["checks"] if c["name"] == "replayed rows")
    last = f"{len(summary['learned']):02d}-{summary['learned'][-1]}"
    deleted = sum(one["rows"].get(last, 0) for one in summary.get("forgotten_rows", []))
    kept = words.figure(found["kept rows"] - deleted)
    return f"{kept} rows of the tasks so far are kept; old rows were replayed {words.figure(replayed)} times in all."


def flips(summary: dict) -> list[dict]:
    """For each earlier task the rows that turned, and what became of their answers, the commonest first."""
    told = []
    for task in summary["flips"]:
        sides = []
        for side in ("lost", "gained"):
            rows = task[side]
            turns = Counter((row["before"], row["now"]) for row in rows if row["before"] is not None)
            sides.append({
                "side": side,
                "heading": flip_heading(side, task["whole"]),
                "rows": rows,
                "turns": [
                    {"before": before, "now": now, "rows": many} for (before, now), many in turns.most_common()
                ],
            })  # fmt: skip
        told.append({"task": task["task"], "n": task["n"], "whole": task["whole"], "sides": sides})
    return told


def flip_heading(side: str, whole: bool) -> str:
    if not whole:
        return "score lower now" if side == "lost" else "score higher now"
    return "right when just learnt, wrong now" if side == "lost" else "wrong when just learnt, right now"


def counts(summary: dict) -> list[dict]:
    """For each task, how often each label was the answer, a line per row of the matrix, the right answers first."""
    after, gold, tables = summary["counts"]["after"], summary["counts"]["gold"], []
    for j, task in enumerate(summary["tasks"]):
        columns = [row[j] for row in after]
        labels = list(dict.fromkeys([*task["options"], *(label for one in columns for label in one or {})]))
        if not any(columns) or not labels:
            continue
        lines = [("right answers", gold[j])] if gold[j] else []
        lines += [(row_label(summary, name), one) for name, one in zip(summary["learned"], columns, strict=True)]
        tables.append({
            "task": task["name"],
            "n": task["test"],
            "labels": labels,
            "lines": [(name, [one.get(label, 0) for label in labels] if one else None) for name, one in lines],
        })  # fmt: skip
    return tables


def facts(summary: dict) -> dict[str, list[tuple[str, str]]]:
    """Configuration, model, method and versions, nested settings as dotted names."""
    return {
        "configuration": flat(summary["config"]),
        "model and method": flat({"model": summary["model"], "method": summary["method"]}),
        "versions": flat(summary["versions"]),
    }


def notes(summary: dict) -> list[tuple[str, str]]:
    """What was noted on each task's data. Notes may quote the first row that they count: that part stays out."""
    return [
        (task["name"], note.removeprefix(f"{task['name']}: ").partition("; first: ")[0])
        for task in summary["tasks"]
        for note in task["notes"]
    ]


def flat(value: object) -> list[tuple[str, str]]:
    """Settings by dotted name."""
    return list(_flat(value))


def _flat(value: object, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{i}]")
    else:
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        yield name, words.figure(text) if text not in ("", {}) else "none"


def shown_prompt(prompt: str | list[dict] | None) -> str:
    """A prompt on one line, a chat's turns after one another."""
    if prompt is None:
        return "(the prompt is not known)"
    return clean(prompt if isinstance(prompt, str) else " ".join(f"{one['role']}: {one['content']}" for one in prompt))


def shown(text: object) -> str:
    """An answer as it is shown: a label, or that it was none."""
    return "no label of the task" if text == NO_OPTION else clean(text)
