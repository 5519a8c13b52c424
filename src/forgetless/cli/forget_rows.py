"""`forgetless forget-rows`."""

from __future__ import annotations

from pathlib import Path

from forgetless.cli.parsing import parsed, parser_for

EPILOG = "What the adapters learnt from the rows stays in their weights. The next task replays the others only."


def run(arguments: list[str]) -> int:
    from forgetless.learning.forget_rows import forget_rows
    from forgetless.progress import out
    from forgetless.runs.folder import FORGOTTEN_ROWS

    parser = parser_for("forget-rows", EPILOG)
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder that `forgetless learn` wrote")
    parser.add_argument(
        "task", metavar="TASK", help="the task whose kept rows, and answers to its test rows, are deleted"
    )
    told = parsed(parser, arguments)
    if told is None:
        return 0
    record = forget_rows(told.run, told.task)
    folders = ", ".join(f"{name} {count}" for name, count in record["rows"].items()) or "none were kept"
    out.print(f"rows of {told.task} deleted from the memory of: {folders}", markup=False, highlight=False)
    if record["texts"]:
        out.print(f"texts deleted from {record['texts']} records of predictions", markup=False, highlight=False)
    out.print(f"record: {told.run / FORGOTTEN_ROWS}", soft_wrap=True, markup=False, highlight=False)
    return 0
