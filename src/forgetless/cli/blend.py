"""`forgetless blend`."""

from __future__ import annotations

import argparse

from forgetless.cli.parsing import add_loading_options, option_adder, parsed, parser_for

EPILOG = """
  forgetless blend smollm2-135m-instruct runs/may/adapter --tasks tasks.yaml --max-drop invoices=2pp --max-kl 0.05

tasks.yaml holds the old tasks (those with a budget) and the new one. exit codes: 0 a model was written; 3 none was,
since nothing could be certified or nothing certified learns more: keep the old model; 1 an error
"""


def run(arguments: list[str]) -> int:
    parser = make_parser()
    told = parsed(parser, arguments)
    if told is None:
        return 0
    from forgetless.config import BlendConfig
    from forgetless.geometry.borders import blend

    record = blend(BlendConfig(**vars(told)))
    print_blends(record.get("blends", [record]))
    return record["exit_code"]


def print_blends(records: list[dict]) -> None:
    from forgetless.progress import out
    from forgetless.report.blend import print_blend

    for record in records:
        print_blend(record, out)
        files = f"{record['path']} (blend.html, blend.md, blend.json)"
        out.print(f"\nblend: {files}\n", soft_wrap=True, highlight=False, markup=False)


def make_parser() -> argparse.ArgumentParser:
    from forgetless.config import TEMPLATES, BlendConfig, documentation
    from forgetless.learning.engine import DEVICES, PRECISIONS

    parser = parser_for("blend", EPILOG)
    told, add = documentation(BlendConfig), option_adder(parser, BlendConfig)

    for name in ("before", "after"):
        parser.add_argument(name, metavar=name.upper(), help=told[name])
    add("tasks")
    for name in ("new", "max_drop", "max_lost", "max_kl", "text", "probes"):
        add(name, nargs="+")
    add("score_on", choices=("test", "validation"))
    add("on_bad_row", choices=("error", "skip"))
    add("confidence", type=float)
    add("borders", type=int)
    add("points", type=int)
    add("limit", type=int)
    for name in ("whole_path", "allow_pickle"):
        add(name, action="store_true")
    add("output_dir")
    add("base_is")
    add("chat_template", choices=TEMPLATES)
    add("precision", choices=PRECISIONS)
    add("device", choices=DEVICES)
    add_loading_options(add)
    return parser
