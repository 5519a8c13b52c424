"""`forgetless merge`."""

from __future__ import annotations

import argparse

from forgetless.cli.parsing import add_loading_options, option_adder, parsed, parser_for

EPILOG = """
  forgetless merge ./may --output_dir may-full                     one adapter into its base, as whole weights
  forgetless merge invoices letters --output_dir both              two into one: their exact sum
  forgetless merge invoices letters --rank 16 --tasks tasks.yaml --output_dir both-16
  forgetless merge invoices letters --method ties --density 0.2 --weights 1 0.5 --output_dir both-ties
"""


def run(arguments: list[str]) -> int:
    told = parsed(make_parser(), arguments)
    if told is None:
        return 0
    from forgetless.config import MergeConfig
    from forgetless.geometry.merging import MARKDOWN, RECORD, merge
    from forgetless.progress import out
    from forgetless.report.merge import print_merge

    record = merge(MergeConfig(**vars(told)))
    print_merge(record, out)
    out.print(f"\nmerged: {record['path']} ({RECORD}, {MARKDOWN})", soft_wrap=True, highlight=False, markup=False)
    return 0


def make_parser() -> argparse.ArgumentParser:
    from forgetless.config import MERGES, MergeConfig, documentation
    from forgetless.learning.engine import DEVICES, PRECISIONS

    parser = parser_for("merge", EPILOG)
    told, add = documentation(MergeConfig), option_adder(parser, MergeConfig)

    parser.add_argument("models", nargs="+", metavar="ADAPTER", help=told["models"])
    add("output_dir", metavar="DIR")
    add("method", choices=MERGES, metavar="METHOD")
    add("weights", nargs="+", type=float, metavar="W")
    for name in ("rank", "limit"):
        add(name, type=int)
    add("density", type=float)
    add("seed", type=int)
    for name in ("rows", "text"):
        add(name, nargs="+", metavar="FILE")
    for name in ("tasks", "base_is"):
        add(name)
    for name in ("kl_by_layer", "allow_pickle"):
        add(name, action="store_true")
    add("precision", choices=PRECISIONS)
    add("device", choices=DEVICES)
    add_loading_options(add)
    return parser
