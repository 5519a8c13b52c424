"""`forgetless overlap`."""

from __future__ import annotations

from pathlib import Path

from forgetless.cli.parsing import parsed, parser_for
from forgetless.errors import UsageError

EPILOG = """
  forgetless overlap ./invoices ./tickets someone/adapter-on-the-hub
  forgetless overlap runs/olora --increments
"""


def run(arguments: list[str]) -> int:
    parser = parser_for("overlap", EPILOG)
    parser.add_argument(
        "models", nargs="*", metavar="ADAPTER", help="two LoRA adapters or more: folders with adapters, output folders "
        "of trainers, hub names, run folders (each of its tasks); their base need not be here",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", "--output-dir", type=Path, help="where to write; default runs/overlap-<first>-and-N-more-<hash>"
    )
    parser.add_argument(
        "--thresholds", nargs="+", type=float, metavar="K", help="an entry counts where it is larger than K times the "
        "rms entry of its update in its layer; default 0 0.01 0.1 0.5 1 2; maps show 1, or else the largest",
    )  # fmt: skip
    parser.add_argument("--base_is", "--base-is", help="all adapters are on this base, whatever they call it")
    parser.add_argument(
        "--increments", action="store_true", help="of each adapter only what it adds to the one before it: for a run, "
        "whose later adapters hold what earlier tasks added",
    )  # fmt: skip
    parser.add_argument("--allow_pickle", "--allow-pickle", action="store_true", help="read .bin files, tensors only")
    told = parsed(parser, arguments)
    if told is None:
        return 0
    if not told.models:
        raise UsageError("overlap: which adapters? see forgetless overlap --help")
    from forgetless.geometry.overlap import THRESHOLDS, overlap, usual_folder
    from forgetless.progress import out
    from forgetless.report.overlap import print_overlap, write_overlap

    record = overlap(
        told.models, told.thresholds or THRESHOLDS, base_is=told.base_is, increments=told.increments,
        allow_pickle=told.allow_pickle,
    )  # fmt: skip
    folder = told.output_dir or usual_folder(record)
    write_overlap(record, folder)
    print_overlap(record, out)
    files = f"{folder} (overlap.html, overlap.md, overlap.json)"
    out.print(f"\noverlap: {files}", soft_wrap=True, highlight=False, markup=False)
    return 0
