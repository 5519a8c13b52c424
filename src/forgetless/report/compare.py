"""A comparison of runs in words, tables and figures: terminal, Markdown, CSV, LaTeX, BibTeX, SVG, PDF, and the page."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

from forgetless.report.audit import Table, print_tables
from forgetless.report.compare_figures import figures
from forgetless.report.compare_page import render_compare
from forgetless.report.compare_words import CAUTIONS, sentences, tables
from forgetless.report.figures import pdf, svg
from forgetless.report.markdown import escaped, pipe_table
from forgetless.report.papers import bibtex
from forgetless.runs.folder import json_text, make_folder, write_whole

LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
         "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "±": r"$\pm$", "²": "$^2$",
         "×": r"$\times$", "–": "--", "<": "$<$", ">": "$>$"}  # fmt: skip


def write_compare(record: dict, folder: Path) -> list[str]:
    """compare.html, .md, .csv, .tex, .bib, .json and the figures; their names."""
    make_folder(folder, "give another output_dir")
    texts = {
        "compare.html": render_compare(record),
        "compare.md": compare_markdown(record),
        "compare.csv": compare_csv(record),
        "compare.tex": compare_latex(record),
        "compare.bib": bibtex([one["method"]["paper"] for told in record["sets"] for one in told["configurations"]]),
        "compare.json": json_text(record),
    }
    drawn = [one for number, told in enumerate(record["sets"], start=1) for one in figures(told, number)]
    for name, drawing in drawn:
        texts[f"{name}.svg"] = svg(drawing)
        (folder / f"{name}.pdf").write_bytes(pdf(drawing))
    for name, text in texts.items():
        write_whole(folder / name, text)
    return [*texts, *(f"{name}.pdf" for name, _ in drawn)]


def print_compare(record: dict, console: Console) -> None:
    """Sentences, then the tables of each set."""
    for told in record["sets"]:
        for line in sentences(told, record):
            console.print(Text(f"- {line}"))
        print_tables(tables(told), console)


def compare_markdown(record: dict) -> str:
    """The same as Markdown."""
    parts = ["## Comparison of runs", ""]
    for told in record["sets"]:
        parts += [f"- {escaped(line)}" for line in [*sentences(told, record), *CAUTIONS]]
        for table in tables(told):
            parts += ["", f"#### {escaped(table.title)}", "", *pipe_table(table.head, table.rows), ""]
            parts += [escaped(note) for note in table.notes]
    return "\n".join(parts) + "\n"


def compare_csv(record: dict) -> str:
    """One line for each run's value: set, configuration, run, seed, order, figure, value."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["set", "configuration", "source", "bound", "ours", "run", "seed", "order", "figure", "value"])
    for number, told in enumerate(record["sets"], start=1):
        names = [f"score at the end: {task['name']}" for task in told["tasks"]]
        for one in told["configurations"]:
            chosen = [(f"chosen: {name}", choice) for name, choice in one["chosen"].items()]
            series = [*one["figures"].items(), *zip(names, one["tasks"], strict=True), *chosen]
            for name, spread in series:
                for run, value in zip(one["runs"], spread["values"], strict=True):
                    order = " > ".join(one["orders"][run["order"]])
                    lines.writerow([number, one["label"], one["source"], one["bound"], one["ours"], run["name"],
                                    run["seed"], order, name, "" if value is None else repr(value)])  # fmt: skip
    return out.getvalue()


def compare_latex(record: dict) -> str:
    """The tables for a document with \\usepackage{booktabs}."""
    parts = [r"% needs \usepackage{booktabs}"]
    parts += [_latex(table) for told in record["sets"] for table in tables(told)]
    return "\n".join(parts)


def _latex(table: Table) -> str:
    lines = [" & ".join(map(latex, row)) + r" \\" for row in [table.head, *table.rows]]
    return "\n".join(
        [
            r"\begin{table}\centering",
            rf"\caption{{{latex(table.title)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
            r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
        ]
    )  # fmt: skip


def latex(text: str) -> str:
    r"""Text that LaTeX shows as it is.

    >>> latex("50 % of a_b")
    '50 \\% of a\\_b'
    """
    return re.sub("|".join(map(re.escape, LATEX)), lambda found: LATEX[found[0]], text)
