"""The report's files: the page, Markdown, and JSON, each written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from forgetless.report.markdown import render_markdown
from forgetless.report.page import render_html
from forgetless.report.record import render_json
from forgetless.runs.folder import make_folder, write_whole

ELSEWHERE = "give another --output_dir"


def write_report(summaries: list[dict], folder: Path) -> dict[str, Path]:
    """Writes report.html, report.md and report.json; several summaries are shown side by side."""
    folder = Path(folder)
    make_folder(folder, ELSEWHERE)
    texts = {
        "html": ("report.html", render_html(summaries)),
        "markdown": ("report.md", render_markdown(summaries)),
        "json": ("report.json", render_json(summaries)),
    }
    for name, text in texts.values():
        write_whole(folder / name, text)
    return {kind: folder / name for kind, (name, _) in texts.items()}
