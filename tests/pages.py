"""HTML pages: parsed, and opened in a browser where there is one."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """The tags, attributes and text of a page; complains about tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def ids(self) -> set[str]:
        return {attributes["id"] for _, attributes in self.tags if "id" in attributes}


def self_contained(page: Page, text: str) -> None:
    """No script, no resource from elsewhere, every link to a place on the page, every drawing and table described."""
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "img", "iframe", "object", "embed", "base"} & set(tags)
    for tag, attributes in page.tags:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith(("#", "data:,")), (tag, attributes)
        assert not [key for key in attributes if key.startswith("on")]
    assert "url(" not in text and "@import" not in text
    assert {a["href"][1:] for t, a in page.tags if t == "a"} <= page.ids()
    assert "None" not in page.text and "nan" not in page.text
    assert tags.count("desc") == tags.count("svg")
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")


def opened_in_browser(file: Path, folder: Path) -> Page:
    """The page as chromium has it, drawn without a complaint; skips the test where there is no chromium."""
    browser = shutil.which("chromium")
    if not browser:
        pytest.skip("chromium is not on PATH: the page was parsed but not opened in a browser")
    picture = folder / "page.png"
    found = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}", "--dump-dom",
            "--hide-scrollbars", "--window-size=1280,5000", f"--screenshot={picture}", file.as_uri(),
        ],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    assert "CONSOLE" not in found.stderr and "Uncaught" not in found.stderr, found.stderr[-2000:]
    assert picture.stat().st_size > 50_000, "a page in one colour is smaller"
    page = Page(found.stdout)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    return page
