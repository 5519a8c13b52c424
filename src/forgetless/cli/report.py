"""`forgetless report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetless.cli.parsing import parsed, parser_for
from forgetless.errors import UsageError


def run(arguments: list[str]) -> int:
    from forgetless.progress import out
    from forgetless.report.files import write_report
    from forgetless.report.record import render_json
    from forgetless.report.summary import summarise
    from forgetless.report.texts import with_texts

    parser = parser_for("report")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN",
        help="run folders, several are drawn side by side; or the folder of an audit",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", "--output-dir", type=Path, help="where to write; default: the first run's folder"
    )
    parser.add_argument(
        "--show_text",
        "--show-text",
        action="store_true",
        help="write prompts and answers of the rows that turned into the report's files, which lie in the first run's "
        "folder unless --output_dir names another",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON and write no file")
    told = parsed(parser, arguments)
    if told is None:
        return 0
    if any((folder / "audit.json").exists() for folder in told.runs):
        return _audit_report(told)
    for folder in told.runs:
        if not (folder / "run.json").exists():
            raise UsageError(
                f"{folder}: no run.json or audit.json; give a folder that `forgetless learn` or `audit` wrote"
            )
    summaries = [summarise(folder) for folder in told.runs]
    if told.show_text:
        summaries = [with_texts(one, folder) for one, folder in zip(summaries, told.runs, strict=True)]
    if told.json:
        print(render_json(summaries), end="")
        return 0
    for file in write_report(summaries, told.output_dir or told.runs[0]).values():
        out.print(str(file), soft_wrap=True, highlight=False)
    return 0


def _audit_report(told: argparse.Namespace) -> int:
    """The page of an audit's folder, drawn again."""
    from forgetless.progress import out
    from forgetless.report.audit_page import redraw

    if len(told.runs) > 1 or told.json:
        raise UsageError("an audit is drawn by itself: give its folder alone, without --json (audit.json is in it)")
    out.print(str(redraw(told.runs[0], told.output_dir, told.show_text)), soft_wrap=True, highlight=False)
    return 0
