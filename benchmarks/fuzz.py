"""Damaged files by the thousand: every format that forgetless reads, and what comes of each.

    python benchmarks/fuzz.py --inputs 12000 --seed 0
    python benchmarks/fuzz.py --seconds 60 --seed 1

Each input is a function of the seed, the format and a number. It must give what the intact file gives, an error that
names the file, or, where no hash covers it, something else that is valid. Whatever else happens is a failure and is
printed with what makes it again: `--seed`, `--format` and `--first`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import conftest
from formats import Format, examine
from more_formats import every_format

from forgetless.errors import UsageError, nearest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, help="how many in all; each format gets the same time")
    parser.add_argument("--seconds", type=float, help="or for how long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each format")
    parser.add_argument("--format", help="this one only")
    told = parser.parse_args()
    if not (told.inputs or told.seconds):
        parser.error("say how many --inputs, or for how many --seconds")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FORGETLESS_CACHE"] = f"{folder}/cache"
        chosen = _chosen(_examples(Path(folder)), told.format)
        sys.exit(fuzz(chosen, told.inputs, told.seconds, told.seed, told.first))


def fuzz(chosen: list[Format], inputs: int | None, seconds: float | None, seed: int, first: int) -> int:
    """Gives every format the same time, prints a table, and gives 1 if anything failed, else 0."""
    intact = {one.name: one.read(one.folder, one.files[0]) for one in chosen}
    found: dict[str, Counter[str]] = {one.name: Counter() for one in chosen}
    spent = dict.fromkeys(found, 0.0)
    began = time.monotonic()
    for done in range(sys.maxsize):
        if done == inputs or (seconds and time.monotonic() - began > seconds):
            break
        one = min(chosen, key=lambda one: spent[one.name])
        number, begun = first + found[one.name]["inputs"], time.monotonic()
        try:
            came, _ = examine(one, number, seed, intact[one.name])
        except Exception:  # whatever it is, it is what we look for
            came = "FAILURE"
            print(f"--seed {seed} --format {one.name!r} --first {number} --inputs 1", traceback.format_exc(), sep="\n")
        spent[one.name] += time.monotonic() - begun
        found[one.name].update((came, "inputs"))
    _print(found, time.monotonic() - began)
    return int(any(counts["FAILURE"] for counts in found.values()))


def _examples(folder: Path) -> list[Format]:
    """Intact files of every format, of a run on a tiny random model."""
    made = SimpleNamespace(mktemp=lambda name: (folder / name).mkdir() or folder / name)
    return every_format(folder, conftest.tiny.__wrapped__(made))


def _chosen(known: list[Format], name: str | None) -> list[Format]:
    names = [one.name for one in known]
    if name and name not in names:
        raise UsageError(f"format: no {name!r}{nearest(name, names)}")
    return [one for one in known if name in (None, one.name)]


def _print(found: dict[str, Counter[str]], seconds: float) -> None:
    columns = ("inputs", "error", "equal", "other", "FAILURE")
    print(f"| format | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    total: Counter[str] = sum(found.values(), Counter())
    for name, counts in [*found.items(), ("all", total)]:
        print(f"| {name} | {' | '.join(str(counts[key]) for key in columns)} |")
    print(f"{total['inputs']} inputs in {seconds:.0f} s")


if __name__ == "__main__":
    main()
