"""The run folder: every file name in one place, written whole or not at all, with hashes.

    run.json                       configuration, stream, base identity, versions
    tasks/00-base/scores/          the untouched base
    tasks/01-bbc/adapter/          plain PEFT folder: what to deploy after this task
    tasks/01-bbc/method.*          what the method needs to go on
    tasks/01-bbc/memory/           kept rows for replay: HOLDS TRAINING ROWS
    tasks/01-bbc/log.jsonl         a record a step
    tasks/01-bbc/scores/           predictions.jsonl (per row), scores.json
    tasks/01-bbc/forgetting/       forgetting.json: predictions against the untouched base's own
    checkpoints/02-amazon/         steps of the task that is being learnt; gone when it is finished
    adapter/                       the last task's adapter
    matrix.json summary.json report.html report.md report.json

A folder is filled under a temporary name, flushed to disk, hashed into its manifest.json and renamed; a
folder without a manifest that verifies is not used. Times lie in files named `times*`, which hashes and
comparisons pass over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from forgetless.errors import RunError, short

FORMAT = 1
MANIFEST = "manifest.json"
FORGETTING = "forgetting"
TIMES = "times"


class RunFolder:
    """Paths of a run and the only ways to write there."""

    def __init__(self, root: Path, elsewhere: str = "give another output_dir"):
        self.root, self.elsewhere = root, elsewhere  # what to do where it cannot be written
        self.config = root / "run.json"
        self.matrix = root / "matrix.json"
        self.summary = root / "summary.json"
        self.adapter = root / "adapter"

    def task(self, number: int, name: str) -> Path:
        """`tasks/02-amazon`; number 0 is the untouched base."""
        return self.root / "tasks" / f"{number:02d}-{name}"

    def checkpoints(self, number: int, name: str) -> Path:
        """`checkpoints/02-amazon`: steps inside a task."""
        return self.root / "checkpoints" / f"{number:02d}-{name}"

    def drop_checkpoints(self, number: int, name: str) -> None:
        """Those of a finished task."""
        shutil.rmtree(self.checkpoints(number, name), ignore_errors=True)
        with suppress(OSError):  # another task's are there, or none ever were
            (self.root / "checkpoints").rmdir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second process out of the folder."""
        make_folder(self.root, self.elsewhere)
        lock = FileLock(self.root / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"{self.root}: another process is working in this run folder; wait for it, or {self.elsewhere}"
            ) from None
        except OSError as error:
            raise RunError(f"{self.root}: cannot be written ({error.strerror}); {self.elsewhere}") from error
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def publish(self, folder: Path) -> Iterator[Path]:
        """A temporary folder to fill; on leaving it becomes `folder`, whole, with a manifest."""
        make_folder(folder.parent, self.elsewhere)
        temporary = folder.with_name(f".{folder.name}.writing")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            write_json(temporary / MANIFEST, {"format": FORMAT, "files": _hashes(temporary)})
            for path in sorted(temporary.rglob("*")):
                _flush(path)
            _flush(temporary)
            previous = folder.with_name(f".{folder.name}.previous")
            shutil.rmtree(previous, ignore_errors=True)
            if folder.exists():
                folder.rename(previous)
            temporary.rename(folder)
            _flush(folder.parent)
            shutil.rmtree(previous, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{folder}: could not be written ({short(str(error))}); what was there before is "
                f"unchanged. Make room or {self.elsewhere}."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def write(self, file: Path, value: Any) -> None:
        """Writes one JSON file, whole or not at all."""
        write_whole(file, json_text(value))


def discard(folder: Path) -> None:
    """Removes a published folder so that no reader sees it half removed."""
    hidden = folder.with_name(f".{folder.name}.removing")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def make_folder(folder: Path, elsewhere: str) -> None:
    """The folder and those above it; `elsewhere` is the remedy that the error names."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}); {elsewhere}") from error


def complete(folder: Path) -> bool:
    """Whether `folder` was finished; damage since then is a named error."""
    if not (folder / MANIFEST).exists():
        return False
    listed = read_json(folder / MANIFEST)["files"]
    found = _hashes(folder)
    for name in sorted(listed.keys() | found.keys()):
        if listed.get(name) != found.get(name):
            what = "is missing" if name not in found else "is not listed" if name not in listed else "has changed"
            raise RunError(
                f"{folder / name}: {what} since the folder was written (its manifest says otherwise). "
                f"Restore it from a copy, or remove {folder} to do this part again."
            )
    return True


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunError(f"{file}:{error.lineno}: broken JSON ({error.msg}); restore it from a copy") from error


def json_text(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(file: Path, value: Any) -> None:
    file.write_text(json_text(value), encoding="utf-8")


def write_whole(file: Path, text: str) -> None:
    """Writes one file, whole or not at all."""
    temporary = file.with_name(f".{file.name}.writing")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        temporary.replace(file)
    except OSError as error:
        raise RunError(
            f"{file}: could not be written ({error.strerror}); what was there before is unchanged. "
            "Make room or give another output_dir."
        ) from error


def write_lines(file: Path, records: list[dict]) -> None:
    """JSONL."""
    lines = (json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False) for record in records)
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_lines(file: Path) -> list[dict]:
    # JSON leaves U+2028 and its like as they are, so lines end at "\n" only
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file below `folder`; nested published folders have manifests of their own."""
    nested = {path.parent for path in folder.rglob(MANIFEST)} - {folder}
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != MANIFEST
        and not path.name.startswith(TIMES)
        and not nested & set(path.parents)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
