"""Results that are kept in the user's cache under the sha256 of all that decides them. They may hold answers' texts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forgetless.data.packages import cache_dir
from forgetless.errors import RunError
from forgetless.model.identity import json_digest
from forgetless.progress import console
from forgetless.runs.folder import FORMAT, make_folder
from forgetless.runs.seal import read_sealed, write_sealed


def kept(decided_by: dict, compute: Callable[[], Any], read: Callable[[Any], Any] = lambda value: value) -> Any:
    """`compute()`, a JSON value, or what it gave before for the same `decided_by`, as `read` takes it.

    A damaged file is made again.
    """
    file = cache_folder() / f"{json_digest(decided_by)[:32]}.json"
    if file.exists():
        try:
            return read(read_sealed(file)["value"])
        except (RunError, ValueError, KeyError, TypeError, AttributeError):
            console.print(f"{file}: damaged; it is computed again", markup=False)
    value = compute()
    make_folder(file.parent, "set FORGETLESS_CACHE")
    write_sealed(file, {"format": FORMAT, "value": value})
    os.chmod(file, 0o600)
    return read(value)


def cache_folder() -> Path:
    """Where a reference's scores, answers and hidden states lie."""
    return cache_dir() / "audit"
