"""Installed versions, for the records."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each; without names, of what decides a model's numbers."""
    return {name: _version(name) for name in packages or ("forgetless", "torch", "transformers", "peft")}


_version = cache(version)
