"""Results that are kept in the user's cache under the sha256 of all that decides them. They may hold answers' texts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forgetless.data.packages import cache_dir
from forgetless.errors import RunError
from forgetless.progress import console
from forgetless.runs.folder import read_json, write_whole


def kept(decided_by: dict, compute: Callable[[], Any]) -> Any:
    """`compute()`, a JSON value, or what it gave before for the same `decided_by`. A damaged file is made again."""
    key = json.dumps(decided_by, sort_keys=True)
    file = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if file.exists():
        try:
            return read_json(file)
        except RunError as error:
            console.print(f"{error} It is computed again.", markup=False)
    value = compute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{file.parent}: cannot be written ({error.strerror}); set FORGETLESS_CACHE") from error
    write_whole(file, json.dumps(value, ensure_ascii=False))
    os.chmod(file, 0o600)
    return value


def cache_folder() -> Path:
    """Where a reference's scores, answers and hidden states lie."""
    return cache_dir() / "audit"
