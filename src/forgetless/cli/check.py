"""`forgetless check`."""

from __future__ import annotations

import json

from forgetless.cli.parsing import parsed, parser_for
from forgetless.errors import UsageError

EPILOG = """
  forgetless check ./mine.py:Mine          a class of yours; the file is run
  forgetless check olora replay+olora      built in, and several as one
  forgetless check --all                   every built-in method

exit codes: 0 the contract holds, 2 a clause fails, 1 an error
"""


def run(arguments: list[str]) -> int:
    parser = parser_for("check", EPILOG)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="as --method of learn takes it")
    parser.add_argument("--all", action="store_true", help="every built-in method")
    parser.add_argument("--json", action="store_true", help="for machines")
    told = parsed(parser, arguments)
    if told is None:
        return 0
    if bool(told.methods) == told.all:
        raise UsageError("check which methods? forgetless check ./mine.py:Mine, or --all for every built-in one")
    from forgetless.contract.check import as_json, check_all, failed, print_findings
    from forgetless.methods import METHODS
    from forgetless.progress import out

    found = check_all([*METHODS] if told.all else told.methods)
    if told.json:
        print(json.dumps(as_json(found), indent=1, ensure_ascii=False))
    else:
        print_findings(found, out)
    return 2 if any(map(failed, found.values())) else 0
