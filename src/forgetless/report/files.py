"""The report's files: the page, Markdown, and JSON, each written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from forgetless.errors import RunError
from forgetless.report.markdown import render_markdown
from forgetless.report.page import render_html
from forgetless.report.record import render_json
from forgetless.runs.folder import make_folder

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
        _write(folder / name, text)
    return {kind: folder / name for kind, (name, _) in texts.items()}


def _write(file: Path, text: str) -> None:
    try:
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                out.write(text)
            os.chmod(temporary, 0o644)  # mkstemp's files are for their owner alone
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise RunError(
            f"{file}: could not be written ({error}); what was there before is unchanged. Make room, or {ELSEWHERE}"
        ) from error
