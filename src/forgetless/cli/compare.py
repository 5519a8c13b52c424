"""`forgetless compare`."""

from __future__ import annotations

from pathlib import Path

from forgetless.cli.parsing import parsed, parser_for

EPILOG = """
  forgetless compare runs/sweep                                     every run below a folder
  forgetless compare runs/a runs/b other.json --archive all.zip     with a matrix of other code; kept as one file
  forgetless compare all.zip --output_dir again                     drawn again from that file
"""
COMPARE_FORMS = ("json", "csv", "latex", "markdown")


def run(arguments: list[str]) -> int:
    parser = parser_for("compare", EPILOG)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders, folders that hold some, matrices of other code (.json, "
        "docs/compare.md), archives (.zip); they are only read",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", "--output-dir", "--output", type=Path, default=Path("runs/compare"), metavar="DIR",
        help="where to write the page, tables (.md .csv .tex), figures (.svg .pdf) and .bib (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--archive", type=Path, metavar="FILE.zip", help="also keep all that is compared in one file, without weights "
        "and row texts",
    )  # fmt: skip
    parser.add_argument(
        "--rank_ours", "--rank-ours", action="store_true", help="rank methods of this project among the others; they "
        "stand after them otherwise",
    )  # fmt: skip
    parser.add_argument(
        "--overlap", action="store_true", help="also how far the updates of a run's tasks lie over one another: their "
        "collision rate and overlap, from the adapters",
    )  # fmt: skip
    forms = parser.add_mutually_exclusive_group()
    for name in COMPARE_FORMS:
        forms.add_argument(f"--{name}", action="store_true", help="print this form and write nothing")
    told = parsed(parser, arguments)
    if told is None:
        return 0
    from forgetless.comparing.comparison import compare
    from forgetless.progress import out
    from forgetless.report import compare as forms_of
    from forgetless.runs.folder import json_text

    record = compare(told.runs, told.archive, rank_ours=told.rank_ours, overlap=told.overlap)
    for name in COMPARE_FORMS:
        if getattr(told, name):
            print(json_text(record) if name == "json" else getattr(forms_of, f"compare_{name}")(record), end="")
            return 0
    names = forms_of.write_compare(record, told.output_dir)
    forms_of.print_compare(record, out)
    out.print(f"\ncompare: {told.output_dir} ({', '.join(names)})", soft_wrap=True, highlight=False, markup=False)
    return 0
