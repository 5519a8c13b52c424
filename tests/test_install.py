"""What a user gets from the wheel: every data file, a command, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib.metadata import packages_distributions
from itertools import chain
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


def imported() -> dict[str, str]:
    """Every package that a file of ours imports, and such a file."""
    found = {}
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {one.name.partition(".")[0]: file.name for one in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found[node.module.partition(".")[0]] = file.name
    return {name: file for name, file in found.items() if name not in {*sys.stdlib_module_names, "forgetless"}}


def test_what_is_imported_is_declared():
    """In the dependencies, or in an extra."""
    declared = [*PROJECT["project"]["dependencies"], *chain(*PROJECT["project"]["optional-dependencies"].values())]
    names = {re.split(r"[\[<>=;]", one)[0].lower().replace("_", "-") for one in declared}
    distributions = packages_distributions()
    for module, file in imported().items():
        by = {one.lower().replace("_", "-") for one in distributions.get(module, [module])}
        assert by & names, f"{file} imports {module}, which is of {', '.join(by)}: no dependency"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    clone = tmp_path_factory.mktemp("wheel") / "clone"
    shutil.copytree(ROOT / "src", clone / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", str(clone), "--no-deps", "-w", str(clone.parent)], check=True)
    return next(clone.parent.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_package(wheel):
    with ZipFile(wheel) as files:
        inside = {name.removeprefix("forgetless/") for name in files.namelist() if name.startswith("forgetless/")}
    assert inside == files_of_the_package()


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(wheel, tiny, tmp_path):
    """With the torch that is there, which stays, what it declares and nothing else, and no clone."""
    venv.create(tmp_path / "tool", with_pip=False)
    python, command = tmp_path / "tool" / "bin" / "python", tmp_path / "tool" / "bin" / "forgetless"
    here, there = (Path(sysconfig.get_path("purelib", vars=one)) for one in ({}, {"base": str(tmp_path / "tool")}))
    for part in ("torch", "torchgen", "functorch", *(one.name for one in here.glob("torch-*.dist-info"))):
        (there / part).symlink_to(here / part)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-compile", "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    assert (there / "torch").is_symlink()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What colour has the sky?", "completion": " blue"}\n' * 4)
    (tmp_path / "tasks.yaml").write_text("- {name: sky, train: rows.jsonl, test: rows.jsonl, scorers: [next_token]}\n")
    (tmp_path / "words.txt").write_text("The sky is blue.\n\nThe whale is large.\n")
    small = f"--model {tiny} --device cpu --precision fp32 --max_length 64 --max_steps 2 --forgetting_prompts 2"
    for line, said in (
        ("--version", PROJECT["project"]["version"]),
        (f"learn --stream tasks.yaml --output_dir run {small}", "score 01-sky"),
        (f"audit {tiny} run --tasks tasks.yaml --text words.txt --output_dir audit", "sky"),
    ):
        told = subprocess.run([str(command), *line.split()], capture_output=True, text=True, cwd=tmp_path)
        assert told.returncode == 0 and said in told.stdout + told.stderr, told.stderr
