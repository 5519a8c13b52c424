"""Python files of the user's, run only where an option names them."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from pathlib import Path
from types import ModuleType

from forgetless.errors import UsageError, nearest


def read_code(file: Path) -> bytes:
    """The file's bytes; UsageError with the nearest name in its folder where it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        there = os.listdir(file.parent) if file.parent.is_dir() else []
        scripts = [name for name in there if name.endswith(".py")]
        near = nearest(file.name, scripts) if scripts else ""
        raise UsageError(f"{file}: cannot be read ({error.strerror}){near}") from error


def digest(content: bytes) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(content).hexdigest()


@functools.cache
def run_file(file: str, sha256: str) -> ModuleType:
    """The file's bytes, run as a module of their own; nothing is taken from a compiled or an older copy.

    UsageError where it is not the file of this hash any more, or cannot be run.
    """
    content = read_code(Path(file))
    if digest(content) != sha256:
        raise UsageError(f"{file}: has changed since it was read; start again")
    module = ModuleType(f"own_{sha256[:16]}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(content, file, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise UsageError(f"{file}: cannot be run: {type(error).__name__}: {error}") from error
    return module
