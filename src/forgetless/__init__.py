"""forgetless: what each fine-tune made a language model forget, and how to keep it."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forgetless.auditing.callback import ForgettingCallback
    from forgetless.auditing.run import audit
    from forgetless.config import AuditConfig, LearnConfig, MergeConfig
    from forgetless.geometry.merging import merge
    from forgetless.learning.stream import learn

__version__ = version("forgetless")
__all__ = ["AuditConfig", "ForgettingCallback", "LearnConfig", "MergeConfig", "audit", "learn", "merge"]

_PLACES = {
    "AuditConfig": "config",
    "ForgettingCallback": "auditing.callback",
    "LearnConfig": "config",
    "MergeConfig": "config",
    "audit": "auditing.run",
    "learn": "learning.stream",
    "merge": "geometry.merging",
}


def __getattr__(name: str):
    """Imports torch and the rest only when they are needed."""
    if name not in _PLACES:
        raise AttributeError(f"module 'forgetless' has no attribute {name!r}")
    return getattr(import_module(f"forgetless.{_PLACES[name]}"), name)
