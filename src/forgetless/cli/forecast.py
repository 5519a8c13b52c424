"""`forgetless forecast`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from forgetless.cli.parsing import parsed, parser_for

LAW = Path("law.json")  # that `fit` writes, and that is asked
EPILOG = """
  forgetless forecast fit runs/sweep --output law.json      points of runs or of a table (.csv, .json) to laws
  forgetless forecast --rank 64 --steps 5000                forgetting there, with an interval
  forgetless forecast law.json --rank 64 --max-kl 0.02      the most steps within a budget
  forgetless forecast law.json --steps 5000 --max-kl 0.02   the largest rank within it
"""


def run(arguments: list[str]) -> int:
    if arguments[:1] == ["fit"]:
        return _forecast_fit(arguments[1:])
    told = parsed(make_parser(), arguments)
    if told is None:
        return 0
    from forgetless.forecasting.asking import ask
    from forgetless.progress import out
    from forgetless.report.forecast import forecast_lines

    options = vars(told)
    as_json, law = options.pop("json"), options.pop("law")
    answer = ask(law, **options)
    if as_json:
        print(json.dumps(answer, indent=1))
        return 0
    for line in forecast_lines(answer):
        out.print(line, soft_wrap=True, highlight=False, markup=False)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = parser_for("forecast", EPILOG)
    parser.add_argument(
        "law", nargs="?", type=Path, default=LAW, metavar="LAW",
        help="a file that `forgetless forecast fit` wrote (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--rank", type=float, help="rank of the adapter, with the layers that the runs tuned")
    parser.add_argument("--parameters", type=float, help="tuned parameters, instead of a rank")
    parser.add_argument("--steps", type=float, help="optimizer steps")
    parser.add_argument(
        "--max_kl", "--max-kl", type=float, metavar="NATS",
        help="the inverse: the most steps (for a rank), or the largest rank (for steps), within this forgetting",
    )  # fmt: skip
    parser.add_argument("--confidence", type=float, default=0.95, help="of intervals and of the inverse (%(default)s)")
    parser.add_argument("--dataset", help="which law, where the file has several")
    parser.add_argument("--method", help="the same")
    parser.add_argument("--learning_rate", "--learning-rate", type=float, help="the same")
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


def _forecast_fit(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="forgetless forecast fit", exit_on_error=False, allow_abbrev=False,
        description="laws of forgetting from measured points; docs/forecast.md says what a run must record",
    )  # fmt: skip
    parser.add_argument(
        "points", nargs="+", metavar="POINTS", help="run folders or folders of them, output folders of trainers with "
        "ForgettingCallback, or tables (.csv, .json, .jsonl) with the columns parameters or rank, steps, loss, "
        "forgetting, base, and where they vary learning_rate, dataset, method, run or seed",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=LAW, help="the file to write (%(default)s)")
    parser.add_argument(
        "--law", help="the law to forecast with; default: the simplest of those that err least on held-out points"
    )
    parser.add_argument(
        "--from_step", "--from-step", type=float, default=0, metavar="N", help="leave out points of fewer steps"
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of starts and draws (%(default)s)")
    told = parsed(parser, arguments)
    if told is None:
        return 0
    from forgetless.forecasting.forecast import fit_laws, write_laws
    from forgetless.progress import out
    from forgetless.report.forecast import laws_markdown, print_laws
    from forgetless.runs.folder import write_whole

    record = fit_laws(told.points, law=told.law, from_step=told.from_step, confidence=told.confidence, seed=told.seed)
    write_laws(record, told.output)
    write_whole(told.output.with_suffix(".md"), laws_markdown(record))
    print_laws(record, out)
    out.print(f"\nlaw: {told.output}, {told.output.with_suffix('.md')}", soft_wrap=True, highlight=False, markup=False)
    return 0
