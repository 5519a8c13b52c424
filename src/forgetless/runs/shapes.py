"""What each file of a run folder holds, so that a file of another shape is a named error where it is read.

The manifest finds every damage; this finds what a hash cannot: files that were made or changed by something else.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetless.errors import RunError, short
from forgetless.runs.folder import NAME, RunFolder, read_json, read_lines, shaped
from forgetless.runs.seal import read_sealed

NUMBER = (int, float)
LARGEST = 2**63  # whole numbers beyond it are no tensor's and may be no float
KINDS = {
    str: "text", int: "a whole number", NUMBER: "a number", bool: "true or false", dict: "an object", list: "a list",
    NAME: "a name that can be a folder's",
}  # fmt: skip


@dataclass(frozen=True)
class Each:
    """An object whose every value has this shape."""

    of: Any


@dataclass(frozen=True)
class Maybe:
    """This shape, or null; as a value of an object, the key may be missing too."""

    of: Any


RUN = {
    "status": str,
    "stream": str,
    "config": {"on_bad_row": str},
    "decides": dict,
    "method": {"name": str, "options": dict, "summary": str, "stock_peft": bool, "deployed": str,
               "paper": Maybe(str), "task_id": Maybe(bool), "bound": Maybe(bool), "ours": Maybe(bool),
               "old_rows": Maybe(bool), "extra_memory": Maybe(str), "extra_compute": Maybe(str)},
    "base": {"weights": str, "tokenizer": str, "chat_template": str, "settings": Maybe(dict)},
    "model": {"name": str, "parameters": int, "trainable": int},
    "precision": str,
    "tasks": [{
        "name": NAME, "fingerprint": Maybe(str), "digests": Maybe(Each(str)), "gone": Maybe(str), "train": int,
        "validation": int, "test": int, "options": [str], "scorers": list, "headline": str, "max_new_tokens": int,
        "majority": Maybe({"label": str, "share": NUMBER}), "notes": [str],
    }],
    "lessons": [{"name": NAME, "last_task": int}],
    "versions": Each(str),
    "history": Maybe([{"from": int, "step": Maybe(int), "versions": Each(str)}]),
    "adopted": Maybe([{"name": NAME, "kind": str, "sha256": str}]),
    "chosen": Maybe(Each({"among": list, "tasks_seen": int})),
}  # fmt: skip
LEARNED = {"lesson": str, "rows": int, "steps": int,
           "checks": [{"name": str, "value": NUMBER, "ok": bool, "meaning": str}]}  # fmt: skip
SPENT = {"seconds": NUMBER} | dict.fromkeys(
    ("cpu_seconds", "gpu_seconds", "forward_tokens", "backward_tokens", "peak_memory"), Maybe(NUMBER)
)
STEP = {"step": int, "loss": Maybe(NUMBER), "forgetting/kl": Maybe(NUMBER), "validation_loss": Maybe(NUMBER)}
SCORES = Each(Each({"n": int, "scores": Each(Maybe(NUMBER)), "counts": Maybe(Each(int))}))
LABELS = [str]
PREDICTION = {"view": str, "task": str, "row": int, "key": str, "gold": str}
MEANS = {"cross_entropy": NUMBER, "entropy": NUMBER, "kl": NUMBER, "agree": NUMBER}
FORGOTTEN = {"asked": str, "not_measured": Maybe(str), "interval": Maybe([NUMBER]), "per_token": Maybe(MEANS),
             "per_document": Maybe(MEANS),
             "text": Maybe({"name": str, "source": str, "documents": int, "tokens": int})}  # fmt: skip
FORGOTTEN_TASK = {"status": str, "task": str, "rows": Each(int), "texts": Maybe(int)}
CHECKPOINT = {"format": int, "step": int, "follows": str, "optimizer_steps": Each(NUMBER), "method": dict}
KEPT_ROW = {"task": int, "source": str, "domain": Maybe(str), "prompt": Maybe(str), "answer": Maybe(str),
            "text": Maybe(str), "options": Maybe([str]),
            "messages": Maybe([{"role": str, "content": str}])}  # fmt: skip


def read_run(root: Path) -> dict:
    """run.json: RunError where it is damaged, of another format, or no record of a run."""
    file = RunFolder(root).config
    told = read_sealed(file, f"restore it from a copy, or begin again in another folder than {root}")
    _checked(told, RUN, file)
    for kind in ("tasks", "lessons"):
        names = [one["name"] for one in told[kind]]
        if not names or len(set(names)) < len(names):
            raise RunError(f"{file}: {kind} without a name of their own; restore it from a copy")
    if wrong := [one for one in told["lessons"] if not 0 <= one["last_task"] < len(told["tasks"])]:
        raise RunError(f"{file}: lesson {wrong[0]['name']} ends with a task that is not there; restore it from a copy")
    return told


def read(file: Path, shape: Any) -> Any:
    """A JSON file of this shape."""
    return _checked(read_json(file), shape, file)


def read_records(file: Path, shape: Any) -> list[dict]:
    """A JSONL file whose every record has this shape."""
    records = read_lines(file)
    for number, record in enumerate(records):
        _checked(record, shape, file, f"record {number + 1}")
    return records


def numbers_in(file: Path) -> int:
    """How many numbers the tensors of a safetensors file hold, from its head alone; RunError where it has none."""
    with shaped(file), file.open("rb") as raw:
        [length] = struct.unpack("<Q", raw.read(8))
        head = json.loads(raw.read(min(length, file.stat().st_size)))
        return sum(math.prod(one["shape"]) for name, one in head.items() if name != "__metadata__")


def _checked(value: Any, shape: Any, file: Path, place: str = "") -> Any:
    if said := misfit(value, shape, place):
        raise RunError(f"{file}: {said}; it was changed, or made by something else. Restore it from a copy")
    return value


def misfit(value: Any, shape: Any, place: str = "") -> str:
    """Where and how a JSON value is not of a shape; empty where it is.

    >>> misfit({"tasks": [{"name": 3}]}, {"tasks": [{"name": str}]})
    'tasks[0].name: expected text, found 3'
    """
    if isinstance(shape, Maybe):
        return "" if value is None else misfit(value, shape.of, place)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return _said(place, dict, value)
        missing = [key for key, of in shape.items() if key not in value and not isinstance(of, Maybe)]
        if missing:
            return f"{place or 'the object'} has no {missing[0]!r}"
        told = ((value.get(key), of, f"{place}.{key}".lstrip(".")) for key, of in shape.items())
        return next((said for one in told if (said := misfit(*one))), "")
    if isinstance(shape, Each):
        if not isinstance(value, dict):
            return _said(place, dict, value)
        told = ((one, shape.of, f"{place}.{key}".lstrip(".")) for key, one in value.items())
        return next((said for one in told if (said := misfit(*one))), "")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _said(place, list, value)
        told = ((one, shape[0], f"{place}[{i}]") for i, one in enumerate(value))
        return next((said for one in told if (said := misfit(*one))), "")
    if isinstance(shape, re.Pattern):
        return "" if isinstance(value, str) and shape.fullmatch(value) else _said(place, shape, value)
    right = isinstance(value, shape) and (shape is bool or not isinstance(value, bool))
    if isinstance(value, int) and abs(value) >= LARGEST:
        right = False
    return "" if right else _said(place, shape, value)


def _said(place: str, shape: Any, value: Any) -> str:
    return f"{place or 'all of it'}: expected {KINDS[shape]}, found {short(repr(value))}"
