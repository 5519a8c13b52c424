"""What `forgetless doctor` prints."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from forgetless.checkup.doctor import Diagnosis
from forgetless.checkup.findings import NOTE, OK, PROBLEM
from forgetless.report.words import clean

STYLES = {OK: "green", NOTE: "yellow", PROBLEM: "bold red"}


def print_diagnosis(found: Diagnosis, console: Console) -> None:
    """A line for each check, then how many problems there are."""
    console.print(Text(f"{found.kind} {found.path}".rstrip()), soft_wrap=True)
    wide = max((len(one.check) for one in found.findings), default=0)
    for one in found.findings:  # no cells that wrap: paths stay whole
        line = Text(f"{one.level:9}", style=STYLES[one.level]) + Text(f"{one.check:{wide}}  {clean(one.said)}")
        console.print(line, soft_wrap=True)
    count = {level: sum(one.level == level for one in found.findings) for level in STYLES}
    console.print(Text(f"{count[PROBLEM]} problems, {count[NOTE]} notes, {count[OK]} OK"))
