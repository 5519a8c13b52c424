"""`forgetless doctor [PATH]`: is it whole, whose is it, and is it of use? Each check is a line of a table.

No path: this environment. A run folder: its records, every finished part, checkpoints and adapters. Any other folder
that a manifest.json lists: its files. Otherwise a model: an adapter or full weights of any trainer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock, Timeout

from forgetless import __version__
from forgetless.checkup.environment import environment
from forgetless.checkup.findings import PROBLEM, Finding, checked, note, ok, problem
from forgetless.checkup.models import effect, finite, model_findings, pickles
from forgetless.errors import RunError, UsageError
from forgetless.model.base import find_model, load_tokenizer
from forgetless.model.identity import changed_settings, identify, others
from forgetless.report.summary import matrix_record, summarise, summary_record
from forgetless.runs.folder import MANIFEST, PUT_BACK, RunFolder, complete, json_text, read_json, replaced
from forgetless.runs.shapes import read_run
from forgetless.subjects.layouts import ADAPTER_CONFIG, locate

EXIT_CODES = {False: 0, True: 2}  # is there a problem?
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Diagnosis:
    """What was looked at, as what, and the lines of the table."""

    path: str  # empty: the environment
    kind: str  # "environment", "run folder", "published folder" or "model"
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """0 where there is no problem, 2 where there is one."""
        return EXIT_CODES[any(one.level == PROBLEM for one in self.findings)]

    def as_json(self) -> dict:
        found = [one.as_json() for one in self.findings]
        return {"path": self.path, "kind": self.kind, "findings": found, "exit_code": self.exit_code}


def doctor(path: str | Path = "", base: str | None = None) -> Diagnosis:
    """Checks an environment (no path), a run folder, a part of one, or a model; `base`: the model it should be on.

    Damage is a finding. Raises UsageError where there is nothing at the path, or no base to be compared with.
    """
    if not path:
        if base:
            raise UsageError("base: nothing to compare it with; give the path of an adapter, a model or a run")
        return Diagnosis("", "environment", tuple(environment()))
    if base is not None:
        locate(find_model(base))  # a name that stands for nothing is no finding about the path
    folder = find_model(str(path))
    kind, found = _findings(folder, base)
    return Diagnosis(str(path), kind, tuple(found))


def _findings(folder: Path, base: str | None) -> tuple[str, Iterable[Finding]]:
    if RunFolder(folder).config.exists() or (folder / "tasks").is_dir():
        return "run folder", _run(folder, base)
    if not _is_model(folder) and not (folder / MANIFEST).is_file():
        locate(folder)  # a folder without any model is no finding either
    if _is_model(folder) or not (folder / MANIFEST).is_file():
        return "model", model_findings(folder, base)
    return "published folder", _published(folder)


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ADAPTER_CONFIG, "config.json"))


# ---------------------------------------------------------------------------------------- run folders


def _run(root: Path, base: str | None) -> Iterator[Finding]:
    """The record first; where it does not hold, the parts are still looked at."""
    told = None
    try:
        told = read_run(root)
        yield ok("record", f"{told['method']['name']} on {told['stream']}, {told['status']}")
    except RunError as error:
        yield problem("record", str(error))
    yield _work(root)
    parts = list(_parts(root))
    yield from parts
    yield from _checkpoints(root)
    yield pickles(root)
    yield checked("numbers", lambda: finite(sorted(root.rglob("*.safetensors"))))
    if told is None:
        return
    if all(one.level != PROBLEM for one in parts):
        yield checked("tasks", lambda: _tasks(root, told))
        yield checked("summary", lambda: _summary(root, told))
    yield from _adapters(root, told)
    yield from _versions(told["versions"])
    yield checked("base", lambda: _base(root, told, base))


def _work(root: Path) -> Finding:
    """Whether a process is at work here, and what one left behind when it was killed."""
    left = sorted(path for kind in ("writing", "previous", "removing") for path in root.rglob(f".*.{kind}"))
    lock = root / ".lock"
    if lock.exists():
        try:
            with FileLock(lock, timeout=0):
                pass
        except Timeout:
            return note("at work", "another process is writing here now; look again when it is done")
        except OSError:
            pass  # a folder that cannot be written has no process at work in it
    if away := RunFolder(root).away():
        return problem("at work", f"{replaced(away[0])}; {PUT_BACK}")
    if left:
        return note("at work", f"{left[0]}: left by a process that was stopped; the next command removes it")
    return ok("at work", "nobody")


def _parts(root: Path) -> Iterator[Finding]:
    """A line for each published folder; one for all that hold."""
    folders = [path.parent for path in sorted(root.rglob(MANIFEST)) if not _hidden(path, root)]
    places = [path for kind in ("tasks/*", "adapter", f"{CHECKPOINTS}/*/step-*") for path in sorted(root.glob(kind))]
    bare = [folder for folder in places if folder.is_dir() and folder not in folders]
    broken = [
        one for folder in (*folders, *bare) if (one := checked("hashes", partial(_whole, folder))).level == PROBLEM
    ]
    yield from broken
    if not broken:
        yield ok("hashes", f"{len(folders)} parts are as they were written")


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _whole(folder: Path) -> Finding:
    complete(folder)
    return ok("hashes", f"{folder} is as it was written")


def _checkpoints(root: Path) -> Iterator[Finding]:
    """Each task's newest checkpoint inside it: what an interrupted task goes on from."""
    for task in sorted(path for path in (root / CHECKPOINTS).glob("*") if path.is_dir()):
        number, _, name = task.name.partition("-")
        if number.isdecimal() and (step := RunFolder(root).steps_saved(int(number), name)):
            yield note("checkpoint", f"{task.name}: the newest whole one is of step {step}; `learn` goes on from there")


def _tasks(root: Path, told: dict) -> Finding:
    names = [lesson["name"] for lesson in told["lessons"]]
    done = RunFolder(root).finished(names)
    if done and not RunFolder(root).adapter.exists():
        return problem("tasks", f"{root / 'adapter'}: is missing; give the `learn` command again, which writes it anew")
    if len(done) < len(names):
        return note("tasks", f"{len(done)} of {len(names)} are finished; the same command learns the others")
    return ok("tasks", f"all {len(names)} are finished")


def _summary(root: Path, told: dict) -> Finding:
    """summary.json and matrix.json are what the parts say."""
    run, now = RunFolder(root), json.loads(json_text(summarise(root)))
    for file in (run.summary, run.matrix):
        if not file.exists():
            return note("summary", f"{file.name} is not there yet; it is written after the first task")
        written = read_json(file)
        known = summary_record(now) if file == run.summary else matrix_record(now)
        if written != known:
            if told["versions"].get("forgetless") != __version__:
                return note("summary", f"{file}: another version of forgetless wrote it; `learn` writes it anew")
            return problem("summary", f"{file}: is not what the parts of the run say; give the `learn` command again, "
                           "which writes it")  # fmt: skip
    return ok("summary", "agrees with the rows' scores")


def _adapters(root: Path, told: dict) -> Iterator[Finding]:
    for number, lesson in enumerate(told["lessons"], start=1):
        folder = RunFolder(root).task(number, lesson["name"]) / "adapter"
        if (folder / ADAPTER_CONFIG).is_file():
            found = checked("effect", partial(effect, folder))
            yield Finding(found.check, found.level, f"{folder.parent.name}: {found.said}")


def _versions(wrote: dict[str, str]) -> Iterator[Finding]:
    differ = []
    for name, then in wrote.items():
        try:
            now = version(name) if name != "python" else then
        except PackageNotFoundError:
            now = "none"
        if now != then:
            differ.append(f"{name} {then}, here {now}")
    if differ:
        yield note("versions", f"written with {'; '.join(differ)}: going on gives the same up to rounding")
    else:
        yield ok("versions", "written with those that are here")


def _base(root: Path, told: dict, base: str | None) -> Finding:
    name, stored = told["model"]["name"], told["base"]
    if base is None:
        sha256 = f"weights of sha256 {stored['weights'][:12]}..."
        return note("base", f"{name}, {sha256}; --base MODEL looks whether it is the same")
    folder = locate(find_model(base)).folder
    if differ := others(stored, identify(folder, load_tokenizer(folder).chat_template)):
        return problem(
            "base", f"{root}: was learnt on {name}, which has another {' and another '.join(differ)} than {base}; give "
            "the model the run began with",
        )  # fmt: skip
    if changed := changed_settings(stored.get("settings") or {}, folder):
        return problem(
            "base", f"{root}: was learnt on {name}, whose config.json has {changed} in {base}; give the model the run "
            "began with",
        )  # fmt: skip
    return ok("base", f"{base} has the weights, the tokenizer, the chat template and the settings of the run's base")


# ---------------------------------------------------------------------------------------- a part of a run


def _published(folder: Path) -> Iterator[Finding]:
    """A task's folder, a checkpoint inside a task, or any other that has a manifest."""
    yield checked("hashes", lambda: _whole(folder))
    yield pickles(folder)
    yield checked("numbers", lambda: finite(sorted(folder.rglob("*.safetensors"))))
