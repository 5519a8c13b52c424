"""Every audit of a folder, a line when it begins and one when it ends, in a file that is only appended to: who tries
until it passes is seen.

A line holds the sha256 of the line before it and its own, so that a line that was taken out or changed shows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from forgetless.auditing.evidence import exit_code
from forgetless.auditing.verdict import ERROR_EXIT_CODE
from forgetless.errors import RunError
from forgetless.runs.folder import parse_json
from forgetless.runs.seal import canonical

BEGUN, ENDED = "begun", "ended"


def begin(file: Path, weights: Mapping[str, str], policy: str | None, time: str) -> tuple[int, list[dict]]:
    """Adds that an audit has begun; gives the line's number and the audits of one of these models that began before.

    `weights`: sha256 by role, the models' roles beginning with "model"; `time` as in 2026-05-04T12:30:00Z. Each of the
    earlier ones has its `outcome`: None where it was stopped without a word.
    """
    mine = subjects(weights)
    with _locked(file):
        lines = read_history(file)
        number = _add(file, lines, {"time": time, "event": BEGUN, "subjects": mine, "policy": policy})
    outcomes = {line["begun"]: line["outcome"] for line in lines if line["event"] == ENDED}
    earlier = [line for line in lines if line["event"] == BEGUN and set(line["subjects"]) & set(mine)]
    return number, [line | {"outcome": outcomes.get(line["number"])} for line in earlier]


def end(file: Path, begun: int, evidence: dict | None, time: str) -> None:
    """Adds how the audit that began with line `begun` ended; without evidence by an error."""
    told = {"outcome": "error", "exit_code": ERROR_EXIT_CODE, "evidence": None}
    if evidence is not None:
        told = {"outcome": evidence["outcome"], "exit_code": exit_code(evidence), "evidence": evidence["sha256"]}
    with _locked(file):
        _add(file, read_history(file), {"time": time, "event": ENDED, "begun": begun, **told})


def subjects(weights: Mapping[str, str]) -> list[str]:
    """What is audited, one hash a model: equal for equal weights against equal roles, whatever the budgets and rows."""
    roles = {role: one for role, one in weights.items() if not role.startswith("model")}
    models = [one for role, one in weights.items() if role.startswith("model")]
    return [hashlib.sha256(canonical(roles | {"model": model})).hexdigest() for model in models]


def read_history(file: Path) -> list[dict]:
    """All lines; RunError with the line where the chain is broken."""
    if not file.exists():
        return []
    lines, previous = [], None
    content = file.read_text(encoding="utf-8", errors="replace")  # what is no UTF-8 does not fit its hash
    for number, text in enumerate(content.removesuffix("\n").split("\n"), start=1):
        line = _line(file, number, text)
        if line.get("number") != number or line.get("previous") != previous or line.get("sha256") != _hash(line):
            raise RunError(
                f"{file}:{number}: this line, or one before it, was changed or taken out after it was written; "
                "restore the file from a copy, or keep it aside and begin a new one"
            )
        previous = line["sha256"]
        lines.append(line)
    return lines


def _line(file: Path, number: int, text: str) -> dict[str, Any]:
    line = parse_json(text, file, number)
    if not isinstance(line, dict):
        raise RunError(f"{file}:{number}: no attempt; restore the file from a copy")
    return line


def _hash(line: dict) -> str:
    return hashlib.sha256(canonical({key: one for key, one in line.items() if key != "sha256"})).hexdigest()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f".{file.name}.lock")):
            yield
    except OSError as error:
        raise RunError(f"{file}: the attempt could not be added ({error.strerror}); make the file writable") from error


def _add(file: Path, lines: list[dict], told: dict) -> int:
    line = {"number": len(lines) + 1, "previous": lines[-1]["sha256"] if lines else None, **told}
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, canonical(line | {"sha256": _hash(line)}) + b"\n")
        os.fsync(handle)
    finally:
        os.close(handle)
    return line["number"]
