"""Does forgetless go beside another trainer without changing a version that the trainer chose?

    pip install build uv && python -m build --wheel && python benchmarks/resolves.py dist/*.whl [NAME ...] [--write]

For each neighbour, what a fresh environment gets from `pip install NAME` is resolved first: the newest release that the
index can complete, and with it one version of everything. Then the wheel is resolved with all of these versions held
fast. Nothing is installed; only metadata is read. Exit code 1 where one does not go together.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from packaging.requirements import Requirement
from pages import DOCS, write_block

BESIDE = ("trl", "axolotl", "unsloth", "llamafactory", "ms-swift", "lm-eval", "vllm")
SHOWN = ("torch", "transformers", "peft", "datasets")


@dataclass(frozen=True)
class Neighbour:
    """What an environment with one other package holds, and what hinders forgetless in it."""

    name: str
    versions: dict[str, str]  # empty where it cannot be resolved by itself
    hindered: str  # in the resolver's words; empty: nothing
    excluded: tuple[str, ...] = ()  # their versions that our requirements exclude
    newest: str = ""  # on the index, whether or not it can be completed

    @property
    def row(self) -> str:
        shown = " | ".join(self.versions.get(name, "-") for name in SHOWN)
        beside = "**no**: " + ("; ".join(self.excluded) or self.hindered) if self.hindered else "yes"
        version = self.versions.get(self.name, "")
        older = f" ({self.newest} cannot be completed)" if version and self.newest not in ("", version) else ""
        return f"| {self.name} {version}{older} | {shown} | {beside} |"


def resolve(
    *wanted: str, held: dict[str, str] | None = None, python: str, alone: bool = False
) -> tuple[dict[str, str], str]:
    """Name -> version of all that would be installed (`alone`: without what it needs), or no versions and why."""
    with TemporaryDirectory() as folder:
        constraints = Path(folder) / "held.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in (held or {}).items()))
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
        command += ["--no-deps"] if alone else []
        told = subprocess.run(
            [*command, "--python-version", python, "--constraints", str(constraints), "-"],
            input="\n".join(wanted), capture_output=True, text=True,
        )  # fmt: skip
    if told.returncode:
        return {}, _first_cause(told.stderr)
    return dict(re.findall(r"^([\w.-]+)==(\S+)", told.stdout, re.M)), ""


def _first_cause(message: str) -> str:
    """The resolver's first reason, without what it concludes from it."""
    text = " ".join(message.split())
    cause = re.search(r"Because (.+?),? we can conclude", text)
    return cause[1] if cause else text[:200]


def beside(name: str, wheel: Path, python: str) -> Neighbour:
    """The neighbour alone, then with the wheel."""
    alone, why_not = resolve(name, python=python)
    if not alone:
        return Neighbour(name, {}, why_not)
    _, hindered = resolve(name, f"forgetless @ {wheel.resolve().as_uri()}", held=alone, python=python)
    excluded = tuple(
        f"{one.name} {alone[one.name]}, not {one.specifier}"
        for one in requirements(wheel)
        if one.name in alone and not one.specifier.contains(alone[one.name], prereleases=True)
    )
    newest = resolve(name, python=python, alone=True)[0].get(name, "")
    return Neighbour(name, alone, hindered, excluded, newest)


def requirements(wheel: Path) -> list[Requirement]:
    """What the wheel needs without extras."""
    with ZipFile(wheel) as files:
        [metadata] = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        told = Parser().parsestr(files.read(metadata).decode())
    found = [Requirement(line) for line in told.get_all("Requires-Dist", [])]
    return [one for one in found if not one.marker or one.marker.evaluate({"extra": ""})]


def table(found: list[Neighbour]) -> str:
    head = f"| neighbour | {' | '.join(SHOWN)} | forgetless beside it |"
    return "\n".join([head, "|---" * (len(SHOWN) + 2) + "|", *(one.row for one in found)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("names", nargs="*", default=BESIDE)
    parser.add_argument("--python", default="3.11", help="the environments' Python")
    parser.add_argument("--write", action="store_true", help="put the table into docs/install.md")
    told = parser.parse_args()
    found = [beside(name, told.wheel, told.python) for name in told.names]
    print(table(found))
    if told.write:
        write_block(DOCS / "install.md", "resolves", table(found))
    return int(any(one.hindered for one in found))


if __name__ == "__main__":
    sys.exit(main())
