"""`forgetless demo`."""

from __future__ import annotations

from pathlib import Path

from forgetless.cli.parsing import parsed, parser_for


def run(arguments: list[str]) -> int:
    parser = parser_for("demo")
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
