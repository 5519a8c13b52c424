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
