"""`forgetless doctor`."""

from __future__ import annotations

import json

from forgetless.cli.parsing import parsed, parser_for

EPILOG = """
  forgetless doctor                                                     this environment
  forgetless doctor runs/may                                            a run folder
  forgetless doctor runs/may/tasks/01-letters/adapter --base ./llama    an adapter of any trainer; does the base fit?
  forgetless doctor ./merged --json                                     full weights, for machines

exit codes: 0 no problem (notes are none), 2 a problem, 1 a usage error
"""


def run(arguments: list[str]) -> int:
    parser = parser_for("doctor", EPILOG)
    parser.add_argument("path", nargs="?", default="", help="a run folder, a part of one, an adapter or full weights; "
                        "default: this environment")  # fmt: skip
    parser.add_argument(
        "--base", metavar="MODEL", help="does the adapter or run fit this base, and what does it change?"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    told = parsed(parser, arguments)
    if told is None:
        return 0
    from forgetless.checkup.doctor import doctor
    from forgetless.progress import out
    from forgetless.report.doctor import print_diagnosis

    found = doctor(told.path, told.base)
    if told.json:
        print(json.dumps(found.as_json(), indent=1, ensure_ascii=False))
    else:
        print_diagnosis(found, out)
    return found.exit_code
