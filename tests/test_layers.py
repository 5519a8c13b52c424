"""Arrows between packages point one way: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "forgetless"
EVERY = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"config"}
LAST = {"checkup", "comparing", "contract", "forecasting", "sweeping"} & EVERY  # nothing but the command stands on them
STANDS_ON = {
    "runs": set(),
    "data": {"runs"},
    "model": {"data", "runs"},
    "subjects": {"data", "model", "runs", "score"},
    "score": {"data", "learning", "model", "runs"},
    "forgetting": {"data", "model", "runs", "score", "subjects"},
    "methods": {"data", "forgetting", "learning", "model", "score"},
    "geometry": EVERY - LAST,
    "learning": EVERY - {"auditing"} - LAST,
    "auditing": EVERY - LAST,
    "contract": {"data", "learning", "methods", "model", "runs"},
    "forecasting": {"runs"},
    "comparing": {"geometry", "methods", "report", "runs", "score"},
}
NOT_ABOVE = {package: EVERY - below - {package} for package, below in STANDS_ON.items()}
"""Package -> what it must not import: each stands below these."""


def imported(file: Path) -> set[str]:
    """The packages of forgetless that a file imports anywhere."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{one.name}" for one in node.names)]
        elif isinstance(node, ast.Import):
            modules += [one.name for one in node.names]
    return {module.split(".")[1] for module in modules if module.startswith("forgetless.")}


@pytest.mark.parametrize("package", NOT_ABOVE)
def test_no_package_imports_one_above_it(package):
    files = sorted((PACKAGE / package).glob("*.py"))
    assert files
    for file in files:
        assert not imported(file) & NOT_ABOVE[package], file.name


def test_imports_are_seen():
    assert {"forgetting", "learning", "model"} <= imported(PACKAGE / "learning" / "borders.py")
    assert "auditing" in imported(PACKAGE / "__init__.py")
