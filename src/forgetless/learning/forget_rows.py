"""Deletes a task's rows from a run folder: the replay memory of every task, and texts in predictions; with a record.

What the adapters learnt from the rows stays in their weights. Files are deleted as the file system deletes them:
their blocks on the disk are not overwritten.
"""

from __future__ import annotations

import json
import shutil
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
    names = [lesson["name"] for lesson in told["lessons"]]
    if task not in names:
        raise UsageError(f"{root}: has learnt no task {task!r}{nearest(task, names)}")
    number = names.index(task)
    with run.locked():
        folders = [run.task(0, "base"), *(run.task(i, name) for i, name in enumerate(names, start=1))]
        folders = [folder for folder in folders if folder.exists()]
        _drop_leftovers(root)
        labels = set(next(one["options"] for one in told["tasks"] if one["name"] == task))
        texts = {text for folder in folders for record in _kept(folder, number) for text in _texts(record, labels)}
        counts = {folder.name: count for folder in folders if (count := len(_kept(folder, number)))}
        record: dict[str, Any] = {"task": task, "rows": counts, "version": __version__}
        _append(run, record | {"status": "deleting"})
        seen = next((_rows_seen(folder) for folder in folders if folder == run.task(number + 1, task)), 0)
        for folder in folders:
            if folder.name in counts:
                _rewrite_memory(run, folder, number, seen)
        record["texts"] = sum(_rewrite_predictions(run, folder / "scores", told, task) for folder in folders)
        _rewrite_notes(run, told, task)
        _append(run, record | {"status": "deleted"})
        log_command(run, f"forget-rows {task}")
        summary = summarise(root)
        run.write(run.summary, summary_record(summary))
        write_report([summary], root)
        _look_for(root, texts)
    return record


def _kept(folder: Path, number: int) -> list[dict]:
    """The records of a task's rows in a lesson's memory."""
    file = folder / "memory" / "rows.jsonl"
    if not file.exists() or not complete(folder):
        return []
    return [record for record in read_records(file, KEPT_ROW) if record["task"] == number]


def _rows_seen(folder: Path) -> int:
    return read(folder / "learned.json", LEARNED)["rows"] if complete(folder) else 0


def _rewrite_memory(run: RunFolder, folder: Path, number: int, seen: int) -> None:
    """The same folder without these rows; a reservoir has then seen as many fewer."""
    with run.publish(folder) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True, ignore=_own_manifest(folder))
        rows = temporary / "memory" / "rows.jsonl"
        write_lines(rows, [record for record in read_records(rows, KEPT_ROW) if record["task"] != number])
        write_json(temporary / "method.json", _less_seen(read_json(temporary / "method.json"), seen))


def _less_seen(values: dict, seen: int) -> dict:
    """A method's values, or those of the parts of a combined one, after `seen` rows fewer."""
    parts = {name: _less_seen(value, seen) for name, value in values.items() if isinstance(value, dict)}
    return values | parts | ({"seen": max(0, values["seen"] - seen)} if "seen" in values else {})


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
