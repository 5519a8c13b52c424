"""Deletes a task's rows from a run folder: the replay memory of every task, and texts in predictions; with a record.

What the adapters learnt from the rows stays in their weights. Files are deleted as the file system deletes them:
their blocks on the disk are not overwritten.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
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
LEFTOVERS = (".*.writing", ".*.previous", ".*.removing")
NO_TEXTS = {"memory", "adapter", "blended"}  # folders: other tasks' kept rows, weights, and numbers
DRAWN = ("report.html", "report.md", "report.json")  # anew, of summary.json, just before the search
OURS = ("run.json", "matrix.json", "summary.json", "times.jsonl", FORGOTTEN_ROWS)


def forget_rows(root: Path, task: str) -> dict:
    """Deletes the rows of `task`; gives the record that is also in forgotten-rows.jsonl. Doing it again does no harm.

    Raises UsageError for what is no run or none of its learnt tasks, RunError where files are damaged or where a text
    of the deleted rows is found afterwards.
    """
    run = RunFolder(root)
    if not run.config.exists():
        raise UsageError(f"{root}: no run.json; give a folder that `forgetless learn` wrote")
    with run.locked():
        told = read_run(root)  # not before the lock: a `learn` that ends meanwhile writes it anew
        names = [one["name"] for one in told["tasks"]]
        if task not in names:
            raise UsageError(f"{root}: has learnt no task {task!r}{nearest(task, names)}")
        _drop_leftovers(root)
        number = _lesson_of(told, names.index(task))
        lessons = [run.task(i, lesson["name"]) for i, lesson in enumerate(told["lessons"], start=1)]
        _refuse_unlearnt(root, task, lessons[number:])
        _refuse_mixed(told, number, lessons[number])
        return _deleted(run, told, task, number, lessons)


def _deleted(run: RunFolder, told: dict, task: str, number: int, lessons: list[Path]) -> dict:
    """Deletes what is kept of a task, which is learnt in the lesson of this number, and gives the record."""
    folders = [folder for folder in lessons if folder.exists()]
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
    scored = [folder / "scores" for folder in (run.task(0, "base"), *folders)]
    record["texts"] = sum(_rewrite_predictions(run, scores, told, task) for scores in scored)
    _rewrite_notes(run, told, task)
    _append(run, record | {"status": "deleted"})
    log_command(run, f"forget-rows {task}")
    summary = summarise(run.root)
    run.write(run.summary, summary_record(summary))
    write_report([summary], run.root)
    if texts:
        others = "\0".join(_of_others(told, task, number, folders, scored))
        _look_for(run.root, {text for text in texts if text not in others})
    return record


def _lesson_of(told: dict, task: int) -> int:
    """The lesson, counted from 0, in which the task at this place of the stream is learnt."""
    return next(number for number, lesson in enumerate(told["lessons"]) if lesson["last_task"] >= task)


def _refuse_unlearnt(root: Path, task: str, lessons: list[Path]) -> None:
    """`lessons`: the task's own and those after it. A task that is learnt later would bring its rows back."""
    if not any(complete(folder) for folder in lessons):
        raise UsageError(
            f"{root}: has not learnt {task!r} yet, so none of its training rows are kept here; leave it out of the "
            "stream, in another output_dir (predictions.jsonl of this one may hold answers to its test rows)"
        )


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
    return [record for record in _memory(folder) if record["task"] == number]


def _memory(folder: Path) -> list[dict]:
    file = folder / MEMORY
    return read_records(file, KEPT_ROW) if file.exists() and complete(folder) else []


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
    """What a stopped command left beside what it was writing may hold rows too. `locked` has put back what was whole;
    the rest is unfinished. A blend in this folder has a lock of its own.
    """
    for pattern in LEFTOVERS:
        for leftover in [*root.glob(pattern), *(root / "tasks").rglob(pattern), *(root / "checkpoints").rglob(pattern)]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _texts(record: dict, labels: set[str]) -> list[str]:
    """What must not be found again: labels stand in the configuration and in scores, and stay."""
    known = {label.strip() for label in (*labels, *record.get("options", ()))}
    turns = [turn["content"] for turn in record.get("messages", ())]
    texts = [*turns, *(record.get(key, "") for key in ("prompt", "answer", "text"))]
    return [text.strip() for text in texts if len(text.strip()) >= SHORTEST and text.strip() not in known]


def _of_others(told: dict, task: str, number: int, folders: list[Path], scored: list[Path]) -> set[str]:
    """Texts that other tasks have in this folder, and keep: in the configuration, as kept rows and in predictions."""
    records = [one for one in told["tasks"] if one["name"] != task]
    for folder in folders:
        records += [one for one in _memory(folder) if one["task"] != number]
    for scores in scored:
        if complete(scores):
            predictions = read_records(scores / "predictions.jsonl", PREDICTION)
            records += [one for one in predictions if one["task"] != task]
    return {text for text in _strings(records) if len(text) >= SHORTEST}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def _look_for(root: Path, texts: set[str]) -> None:
    """No file that could hold these texts does so any more."""
    forms = [form.encode() for text in texts for form in {text, _as_json(text, False), _as_json(text, True)}]
    for file in sorted(root.rglob("*")):
        if file.is_file() and not _passed_over(file.relative_to(root)):
            content = file.read_bytes()
            if any(form in content for form in forms):
                raise RunError(f"{file}: the rows are deleted from the memory, but {_found(root, file)}")


def _passed_over(file: Path) -> bool:
    return file.suffix == ".safetensors" or file.as_posix() in DRAWN or bool(NO_TEXTS & set(file.parent.parts))


def _found(root: Path, file: Path) -> str:
    """What to do about a file that holds a text; of one of the run itself nobody but its owner can know."""
    places = file.relative_to(root).parents
    if file.relative_to(root).as_posix() in OURS or any((root / place / MANIFEST).exists() for place in places):
        return (
            "this file, which forgetless wrote, has the words of one too: by chance, or because the method keeps texts "
            "there. Look at it; if they are the row's, learn again without the task, in another output_dir"
        )
    return "this file, which `forgetless learn` did not write, holds text of theirs; delete it"


def _as_json(text: str, ascii_only: bool) -> str:
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]
