"""`forgetless streams`."""

from __future__ import annotations

import json

from forgetless.cli.parsing import parsed, parser_for


def run(arguments: list[str]) -> int:
    parser = parser_for("streams")
    parser.add_argument("name", nargs="?", help="one stream in full: every task, file and hash; files here are checked")
    parser.add_argument("--json", action="store_true", help="for machines")
    told = parsed(parser, arguments)
    if told is None:
        return 0
    from forgetless.data.listing import as_text, describe_stream, list_as_text, list_streams
    from forgetless.progress import out

    found = describe_stream(told.name) if told.name else list_streams()
    if told.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print((as_text if told.name else list_as_text)(found, min(out.width, 120)))
    return 0
