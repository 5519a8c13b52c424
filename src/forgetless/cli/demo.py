"""`forgetless demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetless.cli import VERBS
from forgetless.cli.parsing import parsed


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="forgetless demo", description=VERBS["demo"], exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--output_dir", "--output-dir", default="runs/demo", help="both runs and the report (%(default)s)"
    )
    parser.add_argument("--train_rows", "--train-rows", type=int, default=150, help="rows a task (%(default)s)")
    parser.add_argument("--test_rows", "--test-rows", type=int, default=100, help="rows a task (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    told = parsed(parser, arguments)
    if told is None:
        return 0
    from forgetless.demo import demo

    demo(Path(told.output_dir), told.train_rows, told.test_rows, told.seed)
    return 0
