"""`forgetless sweep`."""

from __future__ import annotations

import argparse

from forgetless.cli.parsing import parsed, parser_for
from forgetless.errors import UsageError

EPILOG = """
  forgetless sweep grid.yaml --dry-run               runs, hours and disk; nothing is trained
  forgetless sweep grid.yaml --workers 2             two runs side by side; given again it goes on
  forgetless sweep grid.yaml --list > commands       a command a run, for a job queue or an array of jobs
  forgetless sweep grid.yaml --ray auto              on a Ray cluster whose machines share the folder

docs/sweep.md has the file's form. exit codes: 0 every run is done; 1 some failed, or an error
"""


def run(arguments: list[str]) -> int:
    told = parsed(make_parser(), arguments)
    if told is None:
        return 0
    from forgetless.progress import out
    from forgetless.report.sweep import print_sweep
    from forgetless.sweeping import commands

    modes = ("list", "cell", "dry_run", "ray")
    if len([name for name in modes if getattr(told, name)]) > 1 and not (told.dry_run and told.ray):
        raise UsageError("give one of --list, --cell, --dry-run and --ray")
    if told.workers < 1:
        raise UsageError(f"workers must be 1 or above, not {told.workers}")
    if told.list:
        print("\n".join(commands.listed(told.file, told.output_dir, told.workers)))
        return 0
    if told.dry_run:
        words = commands.planned(told.file, told.output_dir, workers=told.workers, ray=told.ray)
        out.print(words, markup=False, soft_wrap=True)
        return 0
    if told.cell:
        commands.one(told.file, told.output_dir, told.cell)
        return 0
    record = commands.sweep(told.file, told.output_dir, workers=told.workers, ray=told.ray)
    print_sweep(record, out)
    out.print(f"\nsweep: {record['path']} (sweep.md, sweep.json, cells/)", soft_wrap=True, markup=False)
    return 0 if record["status"] == "complete" else 1


def make_parser() -> argparse.ArgumentParser:
    parser = parser_for("sweep", EPILOG)
    parser.add_argument("file", metavar="SWEEP.yaml", help="what is common, what varies, what is chosen, the limits")
    parser.add_argument(
        "--output_dir", "--output-dir", "--output", default="", metavar="DIR",
        help="the sweep's folder; default runs/sweep-<the file's name, without sweep- before it>",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="runs at once on this machine (%(default)s)"
    )
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="time a few steps, train nothing")
    parser.add_argument("--list", action="store_true", help="print a command for each run that is not done")
    parser.add_argument("--cell", metavar="ID", help="make this run and the trials that it needs, and no other")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="a Ray cluster: auto, ray://HOST:PORT, or local for --workers runs at once here",
    )
    return parser
