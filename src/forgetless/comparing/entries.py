"""What a comparison knows of a run: one plain record, read from a run folder, an imported matrix or an archive.

An entry holds scores, hashes of rows and settings: no weights and no row texts.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from struct import error as StructError

from forgetless.errors import DataError, RunError, UsageError, nearest
from forgetless.methods import METHODS, Method
from forgetless.methods.base import ABOUT
from forgetless.report.summary import summarise
from forgetless.runs.folder import (
    RunFolder,
    complete,
    finite_json,
    json_text,
    parse_json,
    read_json,
    read_lines,
)
from forgetless.runs.seal import check_sealed, read_sealed, sealed
from forgetless.runs.search import CELLS, SWEEP, run_folders
from forgetless.runs.shapes import NUMBER, SPENT, Maybe, misfit, numbers_in, read, read_run
from forgetless.score.metrics import metrics

FORMAT = 2
MEMBER = "entries.json"  # the one file of an archive
LARGEST = 512 * 2**20  # bytes of it, unpacked
FIGURES = ("average_accuracy", "learning_accuracy", "bwt", "forgetting", "fwt")
"""Metrics that are one number."""
APART = ("seed", "score_on", "method", "method_options")
"""Of what decides a run: what varies, what sets are told apart by, and what stands beside it in an entry."""
REQUIRED = ("method", "tasks", "matrix")
KNOWN = (*REQUIRED, "format", "stream", "model", "base", "majority", "test_rows", "seed", "paper", "settings", "cost")
COSTS = ("rows_kept", "trained", "deployed", "seconds", "cpu_seconds", "gpu_seconds", "memory", "tokens", "passes")
COST = dict.fromkeys(COSTS, Maybe(NUMBER)) | dict.fromkeys(("task_id", "label_set", "stock_peft"), Maybe(bool))
CELL = {"id": str, "status": str}
IMPORTED = {"method": str, "stream": Maybe(str), "model": Maybe(str), "paper": Maybe(str), "tasks": [str],
            "seed": Maybe(int), "test_rows": Maybe([Maybe(int)]), "settings": Maybe(dict),
            "cost": Maybe(COST)}  # fmt: skip


def read_entries(paths: Iterable[str | Path], *, overlap: bool = False) -> list[dict]:
    """Entries of run folders, folders of them, archives (.zip) and matrices of other code (.json), in their order.

    `overlap`: those of run folders also tell how far their tasks' updates lie over one another.
    """
    found = [entry for path in map(Path, paths) for entry in _entries_of(path, overlap)]
    if not found:
        raise RunError("no runs: give run folders of `forgetless learn`, a folder that holds some, or an archive")
    return _once(found)


def _once(entries: list[dict]) -> list[dict]:
    """A run that is given twice, as a folder and in an archive say, counts once; what one of the two lacks is kept."""
    kept: dict[str, dict] = {}
    for entry in entries:
        key = json_text({key: value for key, value in entry.items() if key not in ("name", "overlap")})
        kept[key] = entry | kept.get(key, {})
    return list(kept.values())


def _entries_of(path: Path, overlap: bool) -> list[dict]:
    if path.suffix == ".zip":
        return read_archive(path)
    if path.is_file():
        return read_matrices(path)
    found = {folder: entry_of(folder) for folder in run_folders(path)}
    for folder, entry in found.items():
        if overlap and entry["status"] == "complete":
            entry["overlap"] = _overlap(folder, increments=not entry["method"]["task_id"])
    for sweep in _sweeps(path, found):
        for cell in _not_done(sweep):
            folder = sweep / CELLS / cell["cell"]
            if folder not in found or found[folder]["status"] != "complete":
                found[folder] = cell
    return list(found.values())


def _sweeps(path: Path, folders: Iterable[Path]) -> list[Path]:
    """The sweeps whose cells lie below a path, not the one of which it is a cell."""
    roots = dict.fromkeys([path, *(folder.parent.parent for folder in folders if folder != path)])
    return [root for root in roots if (root / SWEEP).is_file()]


def _not_done(sweep: Path) -> list[dict]:
    """What stands for the cells of a sweep that are no results: a name and a state, and no scores."""
    told = read_sealed(sweep / SWEEP)
    if said := misfit(told, {"cells": [CELL]}):
        raise RunError(f"{sweep / SWEEP}: {said}; restore it from a copy")
    return [
        {"source": "sweep", "name": cell["id"], "sweep": sweep.name, "cell": cell["id"], "status": cell["status"]}
        for cell in told["cells"] if cell["status"] != "done"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------- run folders


def entry_of(folder: Path) -> dict:
    """The entry of a run folder, whose parts are checked against their hashes."""
    told, summary = read_run(folder), summarise(folder)
    about = _about(told["method"])
    lessons = [RunFolder(folder).task(i + 1, one["name"]) for i, one in enumerate(told["lessons"])]
    done = [one for one in lessons if complete(one)]
    final = {task["name"]: task["headline"] for task in told["tasks"]}
    border = next((one for one in reversed(summary.get("forgetting", [])) if "kl" in one), None)
    return {
        "source": "run",
        "name": folder.name,
        "stream": told["stream"],
        "status": told["status"],
        "method": {
            "name": told["method"]["name"],
            "options": told["method"]["options"],
            **about,
        },
        "model": told["model"]["name"],
        "base": told["base"]["weights"],
        "precision": told["precision"],
        "seed": told["config"]["seed"],
        "score_on": told["config"]["score_on"],
        "settings": _settings(told),
        "chosen": told.get("chosen") or {},
        "tasks": [
            {"name": task["name"], "test": task["test"], "headline": task["headline"]}
            | {"majority": task["majority"] and task["majority"]["share"]}
            for task in told["tasks"]
        ],
        "test_rows": summary["test_rows"],
        "learned": summary["learned"],
        "matrix": summary["headline"]["matrix"],
        "untouched": summary["headline"]["base"],
        "intervals": summary["intervals"][-1] if summary["intervals"] else [],
        "metrics": {key: summary["metrics"][key]["value"] for key in FIGURES},
        "kl": border["kl"] if border else None,
        "text": border["text"]["sha256"] if border else None,
        "rows": _rows(done[-1], final) if done else {},
        "cost": _cost(told, about, summary, done),
    }


def _about(method: dict) -> dict:
    """What run.json tells of the method; of a built-in one that an earlier version learnt with, what is told today."""
    kind = METHODS.get(method["name"], Method)
    return {key: method.get(key, getattr(kind, key)) for key in ABOUT}


def _settings(told: dict) -> dict:
    """All that decides a run, as it says itself, but the seed; with the adapters it began from and its rows."""
    decides = {key: value for key, value in told["decides"].items() if key not in APART}
    code = {f"code of {name}": digest[:8] for name, digest in decides.pop("method_code", {}).items()}
    adopted = {f"adopted {one['name']}": f"{one['kind']} {one['sha256'][:8]}" for one in told.get("adopted") or []}
    digests = {task["name"]: (task.get("digests") or {}).get("train") for task in told["tasks"]}
    return decides | code | adopted | {f"rows of {name}": digests[name] for name in sorted(digests)}


def _rows(folder: Path, headlines: dict[str, str]) -> dict[str, dict]:
    """Each task's test rows at the end: their keys, which are hashes, and their scores."""
    file, found = folder / "scores" / "predictions.jsonl", {name: ([], []) for name in headlines}  # type: ignore[var-annotated]
    for record in read_lines(file) if file.exists() else []:
        if record["view"] == "deployed":
            keys, scores = found[record["task"]]
            keys.append(record["key"])
            scores.append(float(record[headlines[record["task"]]]["score"]))
    return {name: {"keys": keys, "scores": scores} for name, (keys, scores) in found.items() if keys}


def _cost(told: dict, about: dict, summary: dict, lessons: list[Path]) -> dict:
    """What the run cost and needs; None where it was not recorded."""
    checks = {check["name"]: check["value"] for one in summary["acts"][-1:] for check in one["checks"]}
    times = [read(folder / "times.json", SPENT) for folder in lessons if (folder / "times.json").exists()]
    times = times if len(times) == len(lessons) else []
    logs = [record for steps in summary["losses"].values() for record in steps]
    adapters = [folder / "adapter" for folder in (lessons if about["task_id"] else lessons[-1:])]
    peaks = [one["peak_memory"] for one in times if one.get("peak_memory")]
    return {
        "rows_kept": checks.get("kept rows", 0),
        "task_id": about["task_id"],
        "label_set": any(task["headline"] == "likelihood" for task in told["tasks"]),
        "trained": told["model"]["trainable"],
        "deployed": sum(numbers_in(file) for folder in adapters for file in folder.glob("*.safetensors")) or None,
        "seconds": _sum(times, "seconds"),
        "cpu_seconds": _sum(times, "cpu_seconds"),
        "gpu_seconds": _sum(times, "gpu_seconds"),
        "memory": max(peaks) if peaks else None,
        "tokens": sum(record["tokens"] for record in logs) if logs else None,
        "passes": _passes(times, told["config"].get("gradient_checkpointing", False)),
        "extra_compute": about["extra_compute"],
        "stock_peft": told["method"]["stock_peft"],
        "method": told["method"]["name"],
    }


def _overlap(folder: Path, increments: bool) -> dict[str, float] | None:
    """How often two tasks change the same entries, and Σ_{i<j} ‖ΔW_i^T ΔW_j‖_F²; None without two LoRA adapters.

    `increments`: a task's adapter holds the earlier ones' updates, and ΔW is what it adds.
    """
    from peft.utils import CONFIG_NAME  # PEFT is slow to load, and nothing else here needs it

    from forgetless.geometry.overlap import SHOWN_AT, overlap

    if not all((adapter / CONFIG_NAME).is_file() for adapter in folder.glob("tasks/*/adapter")):
        return None
    try:
        told = overlap([folder], [SHOWN_AT], increments=increments)
    except UsageError:
        return None
    summed = sum(one["output_side_squares"] for one in told["with_earlier"])
    return {"collision_rate": told["average_collision_rate"][0], "overlap": summed}


def _sum(times: list[dict], key: str) -> float | None:
    found = [one[key] for one in times if one.get(key) is not None]
    return sum(found) if found and len(found) == len(times) else None


def _passes(times: list[dict], again: bool) -> float | None:
    """Token passes: forwards + backwards, with the base frozen of equal cost. `again`: a backward pass computes the
    activations once more (gradient checkpointing)."""
    forward, backward = (_sum(times, f"{kind}_tokens") for kind in ("forward", "backward"))
    return None if forward is None or backward is None else forward + backward * (2 if again else 1)


# ------------------------------------------------------------------------------------------- other code


def read_matrices(file: Path) -> list[dict]:
    """Entries of matrices that other code measured (docs/compare.md has the form)."""
    if file.suffix != ".json":
        raise DataError(f"{file}: give a run folder, an archive (.zip) or a matrix (.json)")
    told = read_json(file)
    return [_imported(one, f"{file}: run {number}", file.stem)
            for number, one in enumerate(told if isinstance(told, list) else [told], start=1)]  # fmt: skip


def _imported(told: object, place: str, name: str) -> dict:
    if not isinstance(told, dict):
        raise DataError(f"{place}: a run is an object with {', '.join(REQUIRED)}")
    for key in REQUIRED:
        if key not in told:
            raise DataError(f"{place}: no {key!r}{nearest(key, told)}")
    for key in told:
        if key not in KNOWN:
            raise DataError(f"{place}: unknown key {key!r}{nearest(key, KNOWN)}")
    tasks = told["tasks"]
    if not isinstance(tasks, list) or not tasks or len(set(map(str, tasks))) != len(tasks):
        raise DataError(f"{place}: tasks must be a list of different names, in the order in which they were learnt")
    if said := misfit(told, IMPORTED):
        raise DataError(f"{place}: {said}")
    cost = told.get("cost") or {}
    for key, value in cost.items():
        if key not in COST:
            raise DataError(f"{place}: cost: unknown key {key!r}{nearest(key, COST)}")
        if value is not None and not value >= 0:
            raise DataError(f"{place}: cost: {key} is {value}; it must be 0 or above")
    many = len(tasks)
    if not isinstance(told["matrix"], list) or len(told["matrix"]) not in (1, many):
        raise DataError(f"{place}: the matrix needs a row after each of the {many} tasks, or one row for a joint run")
    matrix = [_scores(row, many, f"{place}: matrix row {i}") for i, row in enumerate(told["matrix"], start=1)]
    untouched, majority = (
        _scores(told.get(key) or [None] * many, many, f"{place}: {key}") for key in ("base", "majority")
    )
    rows = told.get("test_rows") or [None] * many
    if not isinstance(rows, list) or len(rows) != many:
        raise DataError(f"{place}: test_rows must be {many} numbers, one a task")
    padded = matrix if len(matrix) == many else [[None] * many] * (many - 1) + matrix
    found = metrics(padded, untouched, None)
    return {
        "source": "imported",
        "name": name,
        "stream": told.get("stream") or name,
        "status": "complete",
        "method": {"name": told["method"], "options": {}, "paper": told.get("paper") or "", "bound": False,
                   "ours": False},
        "chosen": {},
        "model": told.get("model") or "not told",
        "base": None,
        "precision": None,
        "seed": told.get("seed"),
        "score_on": "test",
        "settings": told.get("settings") or {},
        "tasks": [
            {"name": task, "test": n, "headline": "not known", "majority": share}
            for task, n, share in zip(tasks, rows, majority, strict=True)
        ],
        "test_rows": {},
        "learned": tasks if len(matrix) == many else ["joint"],
        "matrix": matrix,
        "untouched": untouched,
        "intervals": [None] * many,
        "metrics": {key: found[key].value for key in FIGURES},
        "kl": None,
        "text": None,
        "rows": {},
        "cost": dict.fromkeys(COST) | {"extra_compute": "not told", "method": told["method"]} | cost,
    }  # fmt: skip


def _scores(row: object, many: int, place: str) -> list[float | None]:
    if not isinstance(row, list) or len(row) != many:
        raise DataError(f"{place}: {many} scores are needed, one a task; null for one that was not measured")
    for value in row:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value <= 1):
            raise DataError(f"{place}: {value!r} is no share from 0 to 1; divide percentages by 100")
    return [None if value is None else float(value) for value in row]


# ------------------------------------------------------------------------------------------- archives


def write_archive(entries: list[dict], file: Path) -> None:
    """One file from which the whole comparison is drawn again: no weights, no row texts."""
    when = (1980, 1, 1, 0, 0, 0)  # the same entries, the same bytes
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        text = json_text(sealed(finite_json(file, {"format": FORMAT, "entries": entries})))
        archive.writestr(zipfile.ZipInfo(MEMBER, when), text, zipfile.ZIP_DEFLATED)


def read_archive(file: Path) -> list[dict]:
    """The entries of an archive. Nothing is unpacked to the disk; any other content is refused."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if names != [MEMBER]:
                raise RunError(f"{file}: holds {names[:3]}, not {MEMBER} alone; `compare --archive` wrote no such file")
            if archive.getinfo(MEMBER).file_size > LARGEST:
                raise RunError(f"{file}: {MEMBER} has more than {LARGEST:,} bytes")
            text = archive.read(MEMBER).decode("utf-8")
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error, StructError) as error:
        raise RunError(f"{file}: no archive that can be read ({error}); restore it from a copy") from error
    told = check_sealed(parse_json(text, file), file, reads=FORMAT)
    return told["entries"]
