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
    forgotten-rows.jsonl           whose rows were deleted from memory/, if any were
    matrix.json summary.json report.html report.md report.json

A folder is filled under a temporary name, flushed to disk, hashed into its manifest.json and renamed; a
folder without a manifest that verifies is not used. run.json carries its own hash. Times lie in files named `times*`,
which hashes and comparisons pass over.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from struct import error as StructError
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from forgetless.errors import RunError, short

FORMAT = 1
MANIFEST = "manifest.json"
FORGETTING = "forgetting"
FORGOTTEN_ROWS = "forgotten-rows.jsonl"
TIMES = "times"
PREVIOUS = ".previous"
PUT_BACK = "give the same `forgetless learn` or `forget-rows` command again, which puts it back"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}(?<!\.)")  # of a task: it becomes a folder's


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

    def finished(self, lessons: Sequence[str]) -> list[Path]:
        """The folders of the finished lessons, all verified; RunError where one before a finished one is missing."""
        folders = [self.task(number, name) for number, name in enumerate(lessons, start=1)]
        whole = [complete(folder) for folder in folders]
        count = whole.index(False) if False in whole else len(whole)
        if True in whole[count:]:
            later = folders[whole.index(True, count)]
            raise RunError(
                f"{folders[count]}: is missing, and {later.name} was learnt after it. Restore it from a copy, or "
                f"remove {later} and what follows to learn them again."
            )
        return folders[:count]

    def checkpoints(self, number: int, name: str) -> Path:
        """`checkpoints/02-amazon`: steps inside a task."""
        return self.root / "checkpoints" / f"{number:02d}-{name}"

    def steps_saved(self, number: int, name: str) -> int:
        """The step of the newest whole checkpoint inside a task; 0 where there is none."""
        newest = next(filter(_is_whole, newest_first(self.checkpoints(number, name))), None)
        return step_of(newest) if newest else 0

    def drop_checkpoints(self, number: int, name: str) -> None:
        """Those of a finished task."""
        if self.checkpoints(number, name).exists():
            discard(self.checkpoints(number, name))
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
            self._put_back()
            yield
        finally:
            lock.release()

    def put_back(self) -> None:
        """What `locked` does first, for who looks before it works; a process that is at work here has done so."""
        with suppress(Timeout, OSError):
            if self.away():
                with FileLock(self.root / ".lock", timeout=0):
                    self._put_back()

    def away(self) -> list[Path]:
        """Folders that a command which was killed between the two renames of `publish` has left under another name."""
        found = (_published(previous) for previous in sorted(self.root.rglob(f".*{PREVIOUS}")))
        return [folder for folder in found if not folder.exists()]

    def _put_back(self) -> None:
        for folder in self.away():
            with _writable(folder):
                _previous(folder).rename(folder)
                _flush(folder.parent)

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
            previous = _previous(folder)
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
            with suppress(OSError):  # between the two renames
                if not folder.exists() and _previous(folder).exists():
                    _previous(folder).rename(folder)
            shutil.rmtree(temporary, ignore_errors=True)

    def write(self, file: Path, value: Any) -> None:
        """Writes one JSON file, whole or not at all."""
        write_json_whole(file, value)


def newest_first(task: Path) -> list[Path]:
    """The checkpoints `step-000040` in a task's folder of them, whole or not."""
    return sorted((one for one in task.glob("step-*") if one.name[5:].isdecimal()), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _previous(folder: Path) -> Path:
    """Where a published folder is while its successor takes its name."""
    return folder.with_name(f".{folder.name}{PREVIOUS}")


def _published(previous: Path) -> Path:
    return previous.with_name(previous.name.removeprefix(".").removesuffix(PREVIOUS))


def replaced(folder: Path) -> str:
    """What is to be said of a folder that is away."""
    whole = _previous(folder).name
    return f"{folder}: a command is replacing this folder, or was stopped while it did; it is whole in {whole}"


def discard(folder: Path) -> None:
    """Removes a published folder so that no reader sees it half removed."""
    hidden = folder.with_name(f".{folder.name}.removing")
    shutil.rmtree(hidden, ignore_errors=True)
    with _writable(folder):
        folder.rename(hidden)
        _flush(folder.parent)
    shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{folder}: cannot be renamed or removed ({error.strerror}); make it writable") from error


def is_there(path: Path, kind: Callable[[Path], bool] = Path.exists) -> bool:
    """Whether the path exists, as what `kind` asks for; what no path can be called does not."""
    try:
        return kind(path)
    except OSError:  # a name longer than a path may be
        return False


def make_folder(folder: Path, elsewhere: str) -> None:
    """The folder and those above it; `elsewhere` is the remedy that the error names."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in new:  # a folder's name is kept by the one above it
            _flush(place.parent)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}); {elsewhere}") from error


def complete(folder: Path) -> bool:
    """Whether `folder` was finished; damage since then is a named error."""
    remedy = f"Restore it from a copy, or remove {folder} to do this part again."
    if not (folder / MANIFEST).exists():
        if not folder.exists() and _previous(folder).exists():
            raise RunError(f"{replaced(folder)}; {PUT_BACK}")
        if folder.is_dir() and (found := _hashes(folder)):  # folders get their name when they are whole
            raise RunError(f"{folder / MANIFEST}: is missing beside {min(found)}. {remedy}")
        return False
    if damage := damaged(folder):
        raise RunError(f"{damage}. {remedy}")
    return True


def _is_whole(folder: Path) -> bool:
    try:
        return complete(folder)
    except RunError:
        return False


def damaged(folder: Path) -> str:
    """What differs from the folder's manifest, with its path; empty if nothing does."""
    listed, found = read_manifest(folder), _hashes(folder)
    for name in sorted(listed.keys() | found.keys()):
        if listed.get(name) != found.get(name):
            what = "is missing" if name not in found else "is not listed" if name not in listed else "has changed"
            return f"{folder / name}: {what} since the folder was written (its manifest says otherwise)"
    return ""


def check_published(folder: Path) -> None:
    """RunError where a model that a run or a blend published has changed since; other folders pass.

    Only listed files count, and the README may be edited: the model is used, not the run.
    """
    for place in (folder, folder.parent):
        if not (place / MANIFEST).is_file() or not {"format", "files"} & set(_keys(read_json(place / MANIFEST))):
            continue  # other tools have a manifest.json too
        for name, digest in read_manifest(place).items():
            file = place / name
            if folder not in file.parents or file.name == "README.md":
                continue
            there = is_there(file, Path.is_file)
            if not there or _sha256(file) != digest:
                what = "has changed" if there else "is missing"
                raise RunError(
                    f"{file}: {what} since it was written ({place / MANIFEST} says otherwise). Restore it from a copy; "
                    f"if the change was meant, remove {place / MANIFEST}."
                )


def _keys(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def read_manifest(folder: Path) -> dict[str, str]:
    """{file: sha256} of a published folder; RunError where the manifest is damaged or names what lies elsewhere."""
    file, remedy = folder / MANIFEST, "restore it from a copy"
    told = read_json(file)
    files = told.get("files") if isinstance(told, dict) else None
    if not isinstance(files, dict):
        raise RunError(f"{file}: lists no files; {remedy}")
    check_format(told, file)
    for name, digest in files.items():
        if name.startswith("/") or {"..", "."} & set(name.split("/")) or "\\" in name or "\0" in name:
            raise RunError(f"{file}: names {name!r}, which is not a file of this folder; {remedy}")
        if not isinstance(digest, str):
            raise RunError(f"{file}: no sha256 of {name!r}; {remedy}")
    return files


def check_format(told: dict, file: Path, reads: int = FORMAT) -> None:
    """RunError for a file that another version of forgetless wrote in another form."""
    found = told.get("format")
    if isinstance(found, int) and found > reads:
        raise RunError(f"{file}: format {found} is of a newer forgetless, this one reads {reads}; update forgetless")
    if found != reads:
        raise RunError(
            f"{file}: format {found!r} instead of {reads}: damaged, or of an older forgetless; restore it from a copy, "
            "or go on with the version that wrote it"
        )


def read_json(file: Path) -> Any:
    """A JSON value. RunError for a file that cannot be read or is no JSON; NaN and infinities are none."""
    return parse_json(read_text(file), file)


def read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise RunError(f"{file}: not UTF-8 (byte {error.start + 1}); restore it from a copy") from error
    except (OSError, ValueError) as error:  # a NUL in a path is a ValueError
        why = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"{file}: cannot be read ({why}); restore it from a copy, or give another path") from error


def parse_json(text: str, file: Path, line: int = 1) -> Any:
    """The JSON value of a text that stands in `file` at this line."""
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        where, why = line + error.lineno - 1, error.msg
    except UnicodeEncodeError:
        where, why = line, "half of a surrogate pair is no text"
    except (ValueError, RecursionError) as error:  # digits without end, NaN; nesting without end
        where, why = line, short(str(error))
    raise RunError(f"{file}:{where}: broken JSON ({why}); restore it from a copy")


@contextmanager
def shaped(file: Path, remedy: str = "restore it from a copy") -> Iterator[None]:
    """Taking apart a file that no hash covers: what fails for its shape is a RunError that names it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, StructError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {short(str(error))}"
        raise RunError(f"{file}: is not of the shape that is read here ({told}); {remedy}") from error


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def json_text(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def finite_json(file: Path, value: Any) -> Any:
    """The value, if all its numbers are finite; RunError with the file and the place of the first that is not."""
    if place := not_finite(value):
        name = re.sub(r"(?<=/)\.([^/]+)\.writing(?=/)", r"\1", file.as_posix())  # what it is on its way to
        raise RunError(
            f"{name}: not written, {place} is NaN or infinite; what was saved before is unchanged. Whatever made this "
            "number divides by 0 or has diverged: mend it, or leave it out"
        )
    return value


def not_finite(value: Any, place: str = "") -> str:
    """Where in a JSON value a number is NaN or infinite; empty where none is.

    >>> not_finite({"checks": [{"value": float("nan")}]})
    'checks[0].value'
    """
    if isinstance(value, float):
        return "" if math.isfinite(value) else place or "the value"
    if isinstance(value, dict):
        return next((at for key, one in value.items() if (at := not_finite(one, f"{place}.{key}".lstrip(".")))), "")
    if isinstance(value, list | tuple):
        return next((at for i, one in enumerate(value) if (at := not_finite(one, f"{place}[{i}]"))), "")
    return ""


def write_json(file: Path, value: Any) -> None:
    file.write_text(json_text(finite_json(file, value)), encoding="utf-8")


def write_json_whole(file: Path, value: Any) -> None:
    """Writes one JSON file, whole or not at all."""
    write_whole(file, json_text(finite_json(file, value)))


def write_whole(file: Path, text: str) -> None:
    """Writes one file, whole or not at all."""
    temporary = file.with_name(f".{file.name}.writing")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        temporary.replace(file)
        _flush(file.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(
            f"{file}: could not be written ({error.strerror}); what was there before is unchanged. "
            "Make room or give another output_dir."
        ) from error


def write_lines(file: Path, records: list[dict]) -> None:
    """JSONL."""
    finite_json(file, records)
    lines = (json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False) for record in records)
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_lines(file: Path) -> list[dict]:
    """JSONL; RunError with the line that is none."""
    # JSON leaves U+2028 and its like as they are, so lines end at "\n" only
    lines = enumerate(read_text(file).split("\n"), start=1)
    records = [(number, parse_json(line, file, number)) for number, line in lines if line]
    for number, record in records:
        if not isinstance(record, dict):
            raise RunError(f"{file}:{number}: no object; restore it from a copy")
    return [record for _, record in records]


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file below `folder`; nested published folders have manifests of their own."""
    nested = {path.parent for path in folder.rglob(MANIFEST)} - {folder}
    return {
        path.relative_to(folder).as_posix(): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != MANIFEST
        and not path.name.startswith(TIMES)
        and not nested & set(path.parents)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise RunError(
            f"{file}: cannot be read ({error.strerror}); make it readable, or restore it from a copy"
        ) from error


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
