"""Tables of a page that a benchmark writes stand between `<!-- NAME -->` and `<!-- /NAME -->`."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def write_block(page: Path, name: str, text: str) -> None:
    """Puts `text` in the place of what stands between the page's two marks."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page}: has no {begin.strip()} ... {end.strip()}")
    page.write_text(f"{before}{begin}{text.rstrip()}\n{end}{after}")
