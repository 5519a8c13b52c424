"""The HTML page of a comparison."""

from __future__ import annotations

from markupsafe import Markup

from forgetless.report.compare_figures import figures
from forgetless.report.compare_words import CAUTIONS, sentences, tables
from forgetless.report.figures import svg
from forgetless.report.glossary import COMPARE_GLOSSARY
from forgetless.report.pieces import render
from forgetless.report.words import clean


def render_compare(record: dict) -> str:
    """The page as text."""
    return render(
        "compare_page.html.jinja",
        {
            "title": f"{record['runs']} runs compared",
            "sets": [_set(told, record, number) for number, told in enumerate(record["sets"], start=1)],
            "cautions": CAUTIONS,
            "glossary": COMPARE_GLOSSARY,
        },
    )


def _set(told: dict, record: dict, number: int) -> dict:
    drawn = [drawing for _, drawing in figures(told, number)]
    return {
        "number": number,
        "name": ", ".join(clean(one) for one in told["streams"]),
        "lines": sentences(told, record),
        # every text in a drawing is escaped by `svg`
        "figures": [{"title": one.title, "svg": Markup(svg(one, page=True))} for one in drawn],
        "tables": tables(told),
        "hollow": any(not one["ranked"] for one in told["configurations"]),
    }
