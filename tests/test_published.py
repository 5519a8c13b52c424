"""The published settings in examples/published: each is a configuration that `learn` takes, and is in the docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from forgetless.cli.learn import parse_learn
from forgetless.data.catalogue import STREAMS

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "examples/published").glob("*.yaml"))
PAGE = (ROOT / "docs/published.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_published_setting_is_a_configuration_and_in_the_docs(file):
    assert file.read_text(encoding="utf-8").startswith(f"# forgetless learn --config examples/published/{file.name}\n")
    config = parse_learn(["--config", str(file)])
    config.build_method()
    assert config.stream in STREAMS
    assert config.method == file.stem.split("-")[0] and config.method_options["as_released"] is True
    assert f"examples/published/{file.name}" in PAGE


def test_every_row_has_a_tolerance_and_says_whether_it_matched():
    """Of a table of results: matched and not matched have a value of ours, not run a reason."""
    found = 0
    for table in PAGE.split("\n\n"):
        lines = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"
        ]
        if not lines or "ours" not in lines[0]:
            continue
        head, _, *rows = lines
        for row in rows:
            told = dict(zip(head, row, strict=True))
            assert told["published"] and told["how sure"] and told["their hardware"], row
            verdict = told[""].partition(",")[0].partition(";")[0]
            assert verdict in ("matched", "not matched", "not run"), row
            assert (told["ours"] == "none") is (verdict == "not run"), row
            assert verdict != "not run" or "," in told[""], "not run, because of what?"
            assert told["tolerance"][0].isdigit() or (told["tolerance"], verdict) == ("none can be set", "not run"), row
            found += 1
    assert found >= len(FILES)
