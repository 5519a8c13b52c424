"""The run folder: every file name in one place, written whole or not at all, with hashes.

    run.json                       configuration, stream, base identity, versions
    tasks/00-base/scores/          the untouched base
    tasks/01-bbc/adapter/          plain PEFT folder: what to deploy after this task
    tasks/01-bbc/method.*          what the method needs to go on
    tasks/01-bbc/memory/           kept rows for replay: HOLDS TRAINING ROWS
    tasks/01-bbc/log.jsonl         a record a step
    tasks/01-bbc/scores/           predictions.jsonl (per row), scores.json
    tasks/01-bbc/forgetting/       forgetting.json: predictions against the untouched base's own
    adapter/                       the last task's adapter
    forgotten-rows.jsonl           whose rows were deleted from memory/, if any were
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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from forgetless.errors import RunError, short

FORMAT = 1
MANIFEST = "manifest.json"
FORGETTING = "forgetting"
FORGOTTEN_ROWS = "forgotten-rows.jsonl"
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


def read_run(file: Path) -> dict:
    """A run.json of the format that this version reads."""
    told = read_json(file)
    found = told.get("format") if isinstance(told, dict) else None
    if found != FORMAT:
        writer = (told.get("versions") or {}).get("forgetless", "another") if isinstance(told, dict) else "another"
        raise RunError(
            f"{file}: a run folder of format {found}, written by forgetless version {writer}; this version reads "
            f"format {FORMAT}. Go on with that version, or learn into another output_dir."
        )
    return told


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
