"""forgetless: what each fine-tune made a language model forget, and how to keep it."""

from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forgetless.auditing.run import audit
    from forgetless.config import AuditConfig, LearnConfig
    from forgetless.learning.stream import learn

__version__ = version("forgetless")
__all__ = ["AuditConfig", "LearnConfig", "audit", "learn"]


def __getattr__(name: str):
    """Imports torch and the rest only when they are needed."""
    if name == "learn":
        from forgetless.learning.stream import learn

        return learn
    if name == "audit":
        from forgetless.auditing.run import audit

        return audit
    if name in ("AuditConfig", "LearnConfig"):
        from forgetless import config

        return getattr(config, name)
    raise AttributeError(f"module 'forgetless' has no attribute {name!r}")
