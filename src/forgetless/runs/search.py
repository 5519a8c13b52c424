"""Which run folders a path stands for."""

from __future__ import annotations

from pathlib import Path

from forgetless.errors import RunError

DEPTH = 4  # folders below the given one in which runs are looked for
RUN = "run.json"
SWEEP, CELLS = "sweep.json", "cells"


def run_folders(path: Path) -> list[Path]:
    """The folder itself where it is a run, else the runs below it in the order of their names."""
    return folders_with(path, RUN)


def folders_with(path: Path, name: str) -> list[Path]:
    """The folder itself if it holds a file of this name, else the nearest ones below it that do."""
    if not path.is_dir():
        raise RunError(f"{path}: no such folder")
    return _found(path, name, DEPTH)


def _found(folder: Path, name: str, depth: int) -> list[Path]:
    if (folder / SWEEP).is_file():  # trials chose options, on validation rows: they are no results
        folder = folder / CELLS
    if (folder / name).is_file():
        return [folder]
    if depth == 0 or not folder.is_dir():
        return []
    below = sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    return [found for one in below for found in _found(one, name, depth - 1)]
