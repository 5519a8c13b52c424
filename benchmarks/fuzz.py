"""Damaged files by the thousand: every format that forgetless reads, and what comes of each.

    python benchmarks/fuzz.py --inputs 12000 --seed 0
    python benchmarks/fuzz.py --seconds 60 --seed 1

Each input is a function of the seed, the format and a number. It must give what the intact file gives, an error that
names the file, or, where no hash covers it, something else that is valid. Whatever else happens is a failure and is
printed with what makes it again: `--seed`, `--format` and `--first`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import conftest
from formats import Format, examine, formats

from forgetless.errors import UsageError, nearest

SLOW = 5.0  # seconds for one input


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, help="how many, shared out among the formats")
    parser.add_argument("--seconds", type=float, help="or for how long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each format")
    parser.add_argument("--format", help="this one only")
    told = parser.parse_args()
    if not (told.inputs or told.seconds):
        parser.error("say how many --inputs, or for how many --seconds")
    with tempfile.TemporaryDirectory() as folder:
        chosen = _chosen(_examples(Path(folder)), told.format)
        sys.exit(fuzz(chosen, told.inputs, told.seconds, told.seed, told.first))


def fuzz(chosen: list[Format], inputs: int | None, seconds: float | None, seed: int, first: int) -> int:
    """Takes turns among the formats, prints a table, and gives the number of failures (at most 1)."""
    intact = {one.name: one.read(one.folder, one.files[0]) for one in chosen}
    found: dict[str, Counter[str]] = {one.name: Counter() for one in chosen}
    began, failures = time.monotonic(), 0
    for turn in range(sys.maxsize):
        one, number = chosen[turn % len(chosen)], first + turn // len(chosen)
        if turn == inputs or (seconds and time.monotonic() - began > seconds):
            break
        begun = time.monotonic()
        try:
            came, _ = examine(one, number, seed, intact[one.name])
        except Exception:  # whatever it is, it is what we look for
            came, failures = "FAILURE", failures + 1
            print(f"--seed {seed} --format {one.name!r} --first {number} --inputs 1", traceback.format_exc(), sep="\n")
        found[one.name][came] += 1
        found[one.name]["slow"] += time.monotonic() - begun > SLOW
    _print(found, time.monotonic() - began)
    return min(failures, 1)


def _examples(folder: Path) -> list[Format]:
    """Intact files of every format, of a run on a tiny random model."""
    made = SimpleNamespace(mktemp=lambda name: (folder / name).mkdir() or folder / name)
    return formats(folder, conftest.tiny.__wrapped__(made))


def _chosen(known: list[Format], name: str | None) -> list[Format]:
    names = [one.name for one in known]
    if name and name not in names:
        raise UsageError(f"format: no {name!r}{nearest(name, names)}")
    return [one for one in known if name in (None, one.name)]


def _print(found: dict[str, Counter[str]], seconds: float) -> None:
    columns = ("error", "equal", "other", "slow", "FAILURE")
    print(f"| format | inputs | {' | '.join(columns)} |\n|---{'|---' * (len(columns) + 1)}|")
    for name, counts in found.items():
        total = sum(counts[key] for key in columns if key != "slow")
        print(f"| {name} | {total} | {' | '.join(str(counts[key]) for key in columns)} |")
    everything = sum(counts[key] for counts in found.values() for key in columns if key != "slow")
    print(f"{everything} inputs in {seconds:.0f} s")


if __name__ == "__main__":
    main()
