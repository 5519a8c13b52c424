"""`forgetless interpolate`."""

from __future__ import annotations

import argparse

from forgetless.cli.parsing import add_loading_options, option_adder, parsed, parser_for

EPILOG = """
  forgetless interpolate runs/a/tasks/01-sst2/adapter runs/a/tasks/02-bbc/adapter --tasks demo --new bbc --in both
"""


def run(arguments: list[str]) -> int:
    told = parsed(make_parser(), arguments)
    if told is None:
        return 0
    from forgetless.config import InterpolateConfig
    from forgetless.geometry.interpolate import interpolate
    from forgetless.progress import out
    from forgetless.report.interpolation import print_interpolation

    record = interpolate(InterpolateConfig(**vars(told)))
    print_interpolation(record, out)
    files = f"{record['path']} (interpolate.html, interpolate.md, interpolate.json)"
    out.print(f"\ninterpolate: {files}", soft_wrap=True, highlight=False, markup=False)
    return 0


def make_parser() -> argparse.ArgumentParser:
    from forgetless.config import SPACES, InterpolateConfig, documentation
    from forgetless.learning.engine import DEVICES, PRECISIONS

    parser = parser_for("interpolate", EPILOG)
    told, add = documentation(InterpolateConfig), option_adder(parser, InterpolateConfig)

    parser.add_argument("before", metavar="A", help=told["before"])
    parser.add_argument("after", metavar="B", help=told["after"])
    for name in ("tasks", "new", "plane", "output_dir", "base_is"):
        add(name)
    add("within", "--in", choices=SPACES)
    for name in ("points", "grid", "limit"):
        add(name, type=int)
    add("curve", type=int, nargs="?", const=100, metavar="STEPS")
    for name in ("learning_rate", "confidence"):
        add(name, type=float)
    add("allow_pickle", action="store_true")
    add("precision", choices=PRECISIONS)
    add("device", choices=DEVICES)
    add_loading_options(add)
    return parser
