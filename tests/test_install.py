"""What a user gets from the wheel: every data file, a command, and nothing heavy before it is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "forgetless"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "scipy", "numpy")


def files_of_the_package() -> set[str]:
    ours = (path for path in SOURCE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(SOURCE).as_posix() for path in ours}


def test_every_data_file_is_named_in_the_package_data():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["forgetless"]
    named = {path.relative_to(SOURCE).as_posix() for pattern in patterns for path in SOURCE.glob(pattern)}
    assert {file for file in files_of_the_package() if not file.endswith(".py")} == named


def test_nothing_heavy_is_imported_for_the_package_the_help_and_the_version():
    code = (
        "import sys, forgetless; from forgetless.cli import main; main(['--help']); main(['--version']); "
        f"print('heavy:', sorted(set({HEAVY}) & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.endswith("heavy: []\n")


def test_an_installed_torch_is_kept():
    """A floor, no pin and no upper bound: pip leaves any newer torch, of whatever CUDA, where it is."""
    [torch] = [one for one in PROJECT["project"]["dependencies"] if one.startswith("torch")]
    assert re.fullmatch(r"torch>=[\d.]+", torch)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_works_without_a_clone(tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "src", clone / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", str(clone), "--no-deps", "-w", str(tmp_path)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    with ZipFile(wheel) as files:
        inside = {name.removeprefix("forgetless/") for name in files.namelist() if name.startswith("forgetless/")}
    assert inside == files_of_the_package()

    place = tmp_path / "place"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(place), str(wheel)], check=True)
    for arguments, said in ((["--version"], PROJECT["project"]["version"]), (["methods"], "olora")):
        told = subprocess.run(
            [sys.executable, str(place / "bin" / "forgetless"), *arguments], capture_output=True, text=True,
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(place)},
        )  # fmt: skip
        assert told.returncode == 0 and said in told.stdout, told.stderr
