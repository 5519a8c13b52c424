"""Deletes a task's rows from a run folder: the replay memory of every task, and texts in predictions; with a record.

What the adapters learnt from the rows stays in their weights. Files are deleted as the file system deletes them:
their blocks on the disk are not overwritten.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetless import __version__
from forgetless.errors import RunError, UsageError, nearest
from forgetless.learning.again import log_command
from forgetless.report.files import write_report
from forgetless.report.summary import summarise, summary_record
from forgetless.runs.folder import (
    FORGOTTEN_ROWS,
    MANIFEST,
    RunFolder,
    complete,
    read_json,
    write_json,
    write_lines,
    write_whole,
)
from forgetless.runs.seal import write_sealed
from forgetless.runs.shapes import KEPT_ROW, LEARNED, PREDICTION, read, read_records, read_run

MEMORY, VALUES = "memory/rows.jsonl", "method.json"
SHORTEST = 12  # characters of a text that is looked for after deletion: shorter ones stand everywhere
REPAIR = "give the `forgetless learn` command of this run again first"


def forget_rows(root: Path, task: str) -> dict:
    """Deletes the rows of `task`; gives the record that is also in forgotten-rows.jsonl. Doing it again does no harm.

    Raises UsageError for what is no run or none of its tasks, RunError where files are damaged or where a text of the
    deleted rows is found afterwards.
    """
    run = RunFolder(root)
    if not run.config.exists():
        raise UsageError(f"{root}: no run.json; give a folder that `forgetless learn` wrote")
    told = read_run(root)
    names = [one["name"] for one in told["tasks"]]
    if task not in names:
        raise UsageError(f"{root}: has learnt no task {task!r}{nearest(task, names)}")
    with run.locked():
        _drop_leftovers(root)
        lessons = [run.task(i, lesson["name"]) for i, lesson in enumerate(told["lessons"], start=1)]
        number = _lesson_of(told, names.index(task))
        base, folders = run.task(0, "base"), [folder for folder in lessons if folder.exists()]
        _refuse_mixed(told, number, lessons[number])
        labels = set(next(one["options"] for one in told["tasks"] if one["name"] == task))
        texts = {text for folder in folders for record in _kept(folder, number) for text in _texts(record, labels)}
        plans = [plan for folder in lessons[number:] if (plan := _planned(folder, number, lessons[number]))]
        record: dict[str, Any] = {
            "task": task,
            "rows": {plan.folder.name: plan.rows for plan in plans if plan.rows},
            "seen": {plan.folder.name: list(plan.seen) for plan in plans if plan.seen},
            "version": __version__,
        }
        _append(run, record | {"status": "deleting"})
        for plan in plans:
            _rewrite_memory(run, plan, number)
        record["texts"] = sum(_rewrite_predictions(run, folder / "scores", told, task) for folder in (base, *folders))
        _rewrite_notes(run, told, task)
        _append(run, record | {"status": "deleted"})
        log_command(run, f"forget-rows {task}")
        summary = summarise(root)
        run.write(run.summary, summary_record(summary))
        write_report([summary], root)
        _look_for(root, texts)
    return record


def _lesson_of(told: dict, task: int) -> int:
    """The lesson, counted from 0, in which the task at this place of the stream is learnt."""
    return next(number for number, lesson in enumerate(told["lessons"]) if lesson["last_task"] >= task)


def _refuse_mixed(told: dict, number: int, folder: Path) -> None:
    """Kept rows are known by their lesson; of a lesson of several tasks they cannot be told apart."""
    ends = [-1, *(lesson["last_task"] for lesson in told["lessons"])]
    if ends[number + 1] - ends[number] > 1 and _kept(folder, number):
        raise RunError(
            f"{folder / MEMORY}: keeps rows of several tasks that were learnt together, and does not say which is "
            "whose; delete the run folder, and learn again without the task"
        )


@dataclass(frozen=True)
class _Plan:
    """What goes from a lesson's memory."""

    folder: Path
    rows: int  # kept ones of the task
    seen: tuple[int, int] | None  # rows that the memory says it has seen, before and after


def _planned(folder: Path, number: int, own: Path) -> _Plan | None:
    """None where the lesson's memory has nothing of the task: no row, and it does not count among those seen."""
    if not folder.exists() or not complete(folder) or not (folder / VALUES).exists():
        return None
    rows, values = len(_kept(folder, number)), read(folder / VALUES, dict)
    less = _without(values, number, _rows_learnt(own))
    seen = (_seen(values), _seen(less)) if less != values else None
    return _Plan(folder, rows, seen) if rows or seen else None  # type: ignore[arg-type]


def _kept(folder: Path, number: int) -> list[dict]:
    """The records of a task's rows in a lesson's memory."""
    file = folder / MEMORY
    if not file.exists() or not complete(folder):
        return []
    return [record for record in read_records(file, KEPT_ROW) if record["task"] == number]


def _rows_learnt(folder: Path) -> int:
    return read(folder / "learned.json", LEARNED)["rows"] if complete(folder) else 0


def _rewrite_memory(run: RunFolder, plan: _Plan, number: int) -> None:
    """The same folder without these rows; a reservoir has then seen as many fewer."""
    with run.publish(plan.folder) as temporary:
        shutil.copytree(plan.folder, temporary, dirs_exist_ok=True, ignore=_own_manifest(plan.folder))
        if plan.rows:
            kept = read_records(temporary / MEMORY, KEPT_ROW)
            write_lines(temporary / MEMORY, [record for record in kept if record["task"] != number])
        if plan.seen:
            values = read_json(temporary / VALUES)
            write_json(temporary / VALUES, _without(values, number, plan.seen[0] - plan.seen[1]))


def _without(values: dict, number: int, rows: int) -> dict:
    """A method's values, or those of the parts of a combined one, when the rows of a task count as never seen; as they
    were where they do so already.
    """
    parts = {name: _without(value, number, rows) for name, value in values.items() if isinstance(value, dict)}
    if not isinstance(values.get("seen"), int) or not rows or str(number) in values.get("forgotten", {}):
        return values | ({} if "seen" in values else parts)
    forgotten = values.get("forgotten", {}) | {str(number): rows}
    seen, replaced = max(0, values["seen"] - rows), values.get("replaced", 0)
    return values | {"seen": seen, "forgotten": forgotten, "replaced": replaced}


def _seen(values: dict) -> int | None:
    """The rows seen of a method, or of the one part of a combined one that counts them."""
    if isinstance(values.get("seen"), int):
        return values["seen"]
    inner = (_seen(value) for value in values.values() if isinstance(value, dict))
    return next((one for one in inner if one is not None), None)


def _own_manifest(folder: Path):
    return lambda place, names: [MANIFEST] if Path(place) == folder else []


def _rewrite_predictions(run: RunFolder, scores: Path, told: dict, task: str) -> int:
    """Empties right and given answers of the task's test rows, labels aside; gives the number of records changed."""
    if not complete(scores):
        return 0
    labels = {"", *next((one["options"] for one in told["tasks"] if one["name"] == task), [])}
    before = read_records(scores / "predictions.jsonl", PREDICTION)
    after = [_without_texts(record, labels) if record["task"] == task else record for record in before]
    changed = sum(old != new for old, new in zip(before, after, strict=True))
    if changed:
        with run.publish(scores) as temporary:
            shutil.copytree(scores, temporary, dirs_exist_ok=True, ignore=_own_manifest(scores))
            write_lines(temporary / "predictions.jsonl", after)
    return changed


def _without_texts(record: dict, labels: set[str]) -> dict:
    def kept(key: str, value):
        if isinstance(value, dict) and "score" in value:
            return {name: kept(name, inner) for name, inner in value.items()}
        return "" if key in ("gold", "answer", "found") and isinstance(value, str) and value not in labels else value

    return {key: kept(key, value) for key, value in record.items()}


def _rewrite_notes(run: RunFolder, told: dict, task: str) -> None:
    """Notes on the task's data may quote the first row that they count."""
    for one in told["tasks"]:
        if one["name"] == task:
            one["notes"] = [note.partition("; first: ")[0] for note in one["notes"]]
    write_sealed(run.config, told)


def _append(run: RunFolder, record: dict) -> None:
    file = run.root / FORGOTTEN_ROWS
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    write_whole(file, before + json.dumps(record, sort_keys=True, ensure_ascii=False) + "\n")


def _drop_leftovers(root: Path) -> None:
    """What a stopped command left behind beside a whole folder may hold rows too."""
    for leftover in [*root.rglob(".*.writing"), *root.rglob(".*.previous")]:
        whole = leftover.with_name(leftover.name[1:].rpartition(".")[0])
        if not whole.exists():
            raise RunError(f"{leftover}: a command was stopped while it wrote here; {REPAIR}")
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _texts(record: dict, labels: set[str]) -> list[str]:
    """What must not be found again: labels stand in the configuration and in scores, and stay."""
    known = {label.strip() for label in (*labels, *record.get("options", ()))}
    turns = [turn["content"] for turn in record.get("messages", ())]
    texts = [*turns, *(record.get(key, "") for key in ("prompt", "answer", "text"))]
    return [text.strip() for text in texts if len(text.strip()) >= SHORTEST and text.strip() not in known]


def _look_for(root: Path, texts: set[str]) -> None:
    """No file of the folder holds these texts any more, other tasks' kept rows aside."""
    forms = [form.encode() for text in texts for form in {text, _as_json(text, False), _as_json(text, True)}]
    for file in sorted(root.rglob("*")):
        if file.is_file() and file.suffix != ".safetensors" and file.parent.name != "memory":
            content = file.read_bytes()
            if any(form in content for form in forms):
                raise RunError(
                    f"{file}: the rows are deleted from the memory, but this file, which `forgetless learn` did not "
                    "write, holds text of theirs; delete it"
                )


def _as_json(text: str, ascii_only: bool) -> str:
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]
