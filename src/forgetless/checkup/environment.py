"""Is this machine fit to learn and audit? Versions, precision, room, caches; nothing is loaded or fetched."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from forgetless.checkup.findings import Finding, note, ok, problem
from forgetless.data.packages import PACKAGED_MODELS, cache_dir
from forgetless.learning.engine import has_fast_bf16

TESTED = {
    "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "accelerate": "1.15.0", "datasets": "5.2.0",
    "safetensors": "0.8.0", "numpy": "2.4.6", "scipy": "1.17.1",
}  # fmt: skip
"""The versions that are tested together: those of constraints.txt (a test compares them)."""
ROOM = 5e9  # bytes: a packaged model, its cache and a few runs
MEMORY = 2e9  # bytes: the packaged model while it learns


def environment() -> Iterator[Finding]:
    """A line for each package, for precision, disk, memory and caches."""
    yield _python()
    for requirement in map(Requirement, requires("forgetless") or []):
        if not requirement.marker:  # the extras have one
            yield _package(requirement)
    yield _precision()
    yield _memory()
    for what, folder in (("this folder", Path.cwd()), ("cache", cache_dir())):
        yield _room(what, folder)
    yield _packaged()


def _python() -> Finding:
    return ok("python", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} processors")


def _package(requirement: Requirement) -> Finding:
    name = requirement.name
    try:
        found = version(name)
    except PackageNotFoundError:
        return problem(name, f"is not installed; pip install '{requirement}'")
    if not requirement.specifier.contains(found, prereleases=True):
        return problem(name, f"{found}, and {requirement.specifier} is needed; pip install '{requirement}'")
    if TESTED.get(name, found) != found:
        return note(name, f"{found}; tested with {TESTED[name]}: equal seeds may give other bytes")
    return ok(name, found)


def _precision() -> Finding:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if has_fast_bf16(device):
        return ok("precision", f"{place} has instructions for bf16")
    return note("precision", f"{place} has no instructions for bf16: models run in fp32, in twice the memory")


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    if free < MEMORY:
        return problem(
            "memory", f"{free / 1e9:.1f} GB free; close other programs: a small model needs {MEMORY / 1e9:g}"
        )
    return ok("memory", f"{free / 1e9:.1f} GB free")


def _room(what: str, folder: Path) -> Finding:
    here = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(here).free
    if not os.access(here, os.W_OK):
        remedy = "set FORGETLESS_CACHE" if what == "cache" else "work elsewhere, or give --output_dir"
        return problem(what, f"{here} cannot be written; {remedy}")
    said = f"{folder}: {free / 1e9:.1f} GB free"
    return ok(what, said) if free > ROOM else note(what, f"{said}; runs and a model want {ROOM / 1e9:g} GB")


def _packaged() -> Finding:
    here = [name for name in PACKAGED_MODELS if (cache_dir() / "models" / name).is_dir()]
    if here:
        return ok("packaged models", ", ".join(here))
    return note("packaged models", "none is here yet; the first command that names one fetches it")
