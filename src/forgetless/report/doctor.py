"""What `forgetless doctor` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from forgetless.report.words import clean
from forgetless.runs.doctor import Diagnosis
from forgetless.runs.findings import NOTE, OK, PROBLEM

STYLES = {OK: "green", NOTE: "yellow", PROBLEM: "bold red"}


def print_diagnosis(found: Diagnosis, console: Console) -> None:
    """A line for each check, then how many problems there are."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for one in found.findings:
        table.add_row(Text(one.level, style=STYLES[one.level]), Text(one.check), Text(clean(one.said)))
    console.print(Text(f"{found.kind} {found.path}".rstrip()))
    console.print(table)
    count = {level: sum(one.level == level for one in found.findings) for level in STYLES}
    console.print(Text(f"{count[PROBLEM]} problems, {count[NOTE]} notes, {count[OK]} OK"))
