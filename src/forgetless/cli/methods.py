"""`forgetless methods`."""

from __future__ import annotations

import json

from forgetless.cli.parsing import parsed, parser_for


def run(arguments: list[str]) -> int:
    from forgetless.methods import METHODS
    from forgetless.methods.finding import installed_methods
    from forgetless.progress import out

    parser = parser_for("methods")
    parser.add_argument("--json", action="store_true", help="for machines")
    told = parsed(parser, arguments)
    if told is None:
        return 0
    rows = {
        name: {
            "paper": f"arXiv {kind.paper}",
            "summary": kind.summary,
            "old rows": "yes" if kind.old_rows else "no",
            "task id at test": "yes" if kind.task_id else "no",
            "extra memory": kind.extra_memory,
            "extra compute": kind.extra_compute,
            "stock PEFT": "yes" if kind.stock_peft else "no",
        }
        for name, kind in METHODS.items()
    }
    if told.json:
        print(json.dumps(rows, indent=1))
        return 0
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 1, 0))
    for name, row in rows.items():
        summary, paper = row.pop("summary"), row.pop("paper")
        needs = "; ".join(f"{key}: {value}" for key, value in row.items())
        table.add_row(f"[bold]{name}", f"{summary}\n[dim]{paper}; {needs}")
    out.print(table)
    for entry in installed_methods():
        out.print(f"{entry.name}: installed, {entry.value}", markup=False)
    out.print("Pages: docs/methods/<method>.md. Options: forgetless learn --method <method> --help")
    return 0
