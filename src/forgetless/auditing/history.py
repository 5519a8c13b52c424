"""Every attempt of an audit, one line each, in a file that is only appended to: who tries until it passes is seen.

A line holds the sha256 of the line before it and its own, so that a line that was taken out or changed shows.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from forgetless.auditing.evidence import canonical, exit_code
from forgetless.auditing.verdict import ERROR_EXIT_CODE
from forgetless.errors import RunError


def attempt(evidence: dict, time: str) -> dict:
    """What the history keeps of an audit that came to its end; `time` as in 2026-05-04T12:30:00Z."""
    told = {"time": time, "outcome": evidence["outcome"], "exit_code": exit_code(evidence)}
    return told | {
        "subject": subject(evidence["weights"]),
        "policy": evidence["policy"],
        "evidence": evidence["sha256"],
    }


def failed_attempt(weights: dict[str, str] | None, policy: str | None, time: str) -> dict:
    """What it keeps of one that ended with an error, with what was known by then."""
    told = {"time": time, "outcome": "error", "exit_code": ERROR_EXIT_CODE}
    return told | {"subject": subject(weights) if weights else None, "policy": policy, "evidence": None}


def subject(weights: dict[str, str]) -> str:
    """What is audited: equal for equal weights in equal roles, whatever the budgets and rows."""
    return hashlib.sha256(canonical(weights)).hexdigest()


def append(file: Path, told: dict) -> list[dict]:
    """Adds an attempt to the history, and gives the earlier ones on the same weights."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f".{file.name}.lock")):
            lines = read_history(file)
            line = {"number": len(lines) + 1, "previous": lines[-1]["sha256"] if lines else None, **told}
            _add(file, canonical(line | {"sha256": _hash(line)}) + b"\n")
    except OSError as error:
        raise RunError(f"{file}: the attempt could not be added ({error.strerror}); make the file writable") from error
    return [one for one in lines if told["subject"] is not None and one["subject"] == told["subject"]]


def read_history(file: Path) -> list[dict]:
    """All attempts; RunError with the line where the chain is broken."""
    if not file.exists():
        return []
    lines, previous = [], None
    for number, text in enumerate(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
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
    try:
        line = json.loads(text)
    except ValueError as error:
        raise RunError(f"{file}:{number}: no JSON ({error}); the line was cut or changed, restore it") from error
    if not isinstance(line, dict):
        raise RunError(f"{file}:{number}: no attempt; restore the file from a copy")
    return line


def _hash(line: dict) -> str:
    return hashlib.sha256(canonical({key: one for key, one in line.items() if key != "sha256"})).hexdigest()


def _add(file: Path, content: bytes) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)
