"""JSON files that carry the sha256 of all else that they say, so that damage shows without another file.

A flipped bit, a cut or an edit no longer fits the hash. It guards against accidents: who changes a file on purpose can
hash it again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from forgetless.errors import RunError
from forgetless.runs.folder import FORMAT, check_format, finite_json, json_text, read_json, write_whole

SHA256 = "sha256"


def canonical(value: Any) -> bytes:
    """The one way in which a value is written as JSON.

    >>> canonical({"b": 0.1, "a": [1, None]})
    b'{"a":[1,null],"b":0.1}'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def own_hash(told: dict) -> str:
    """sha256 of everything but the hash itself."""
    return hashlib.sha256(canonical({key: one for key, one in told.items() if key != SHA256})).hexdigest()


def sealed(told: dict) -> dict:
    """The record with its own hash."""
    return told | {SHA256: own_hash(told)}


def write_sealed(file: Path, told: dict) -> None:
    """Writes the record with its own hash, whole or not at all."""
    write_whole(file, json_text(sealed(finite_json(file, told))))


def read_sealed(file: Path, remedy: str = "restore it from a copy", reads: int = FORMAT) -> dict:
    """What `sealed` gave, without the hash; RunError for a file that is cut, changed or of another format."""
    return check_sealed(read_json(file), file, remedy, reads)


def check_sealed(told: Any, file: Path, remedy: str = "restore it from a copy", reads: int = FORMAT) -> dict:
    """The value that was read in a file, if it is what `sealed` gave; without the hash."""
    if not isinstance(told, dict):
        raise RunError(f"{file}: holds no object; {remedy}")
    check_format(told, file, reads)
    if told.get(SHA256) != own_hash(told):
        raise RunError(f"{file}: has changed since it was written (its sha256 says otherwise); {remedy}")
    return {key: one for key, one in told.items() if key != SHA256}
