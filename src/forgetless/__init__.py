"""forgetless: what each fine-tune made a language model forget, and how to keep it."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forgetless.auditing.callback import ForgettingCallback
    from forgetless.auditing.run import audit
    from forgetless.config import AuditConfig, BlendConfig, InterpolateConfig, LearnConfig, MergeConfig
    from forgetless.geometry.blend import blend
    from forgetless.geometry.interpolate import interpolate
    from forgetless.geometry.merging import merge
    from forgetless.geometry.overlap import overlap
    from forgetless.learning.stream import learn
    from forgetless.runs.doctor import doctor

__version__ = version("forgetless")
__all__ = [
    "AuditConfig",
    "BlendConfig",
    "ForgettingCallback",
    "InterpolateConfig",
    "LearnConfig",
    "MergeConfig",
    "audit",
    "blend",
    "doctor",
    "interpolate",
    "learn",
    "merge",
    "overlap",
]

_PLACES = {
    "AuditConfig": "config",
    "BlendConfig": "config",
    "ForgettingCallback": "auditing.callback",
    "InterpolateConfig": "config",
    "LearnConfig": "config",
    "MergeConfig": "config",
    "audit": "auditing.run",
    "blend": "geometry.blend",
    "doctor": "runs.doctor",
    "interpolate": "geometry.interpolate",
    "learn": "learning.stream",
    "merge": "geometry.merging",
    "overlap": "geometry.overlap",
}


def __getattr__(name: str):
    """Imports torch and the rest only when they are needed."""
    if name not in _PLACES:
        raise AttributeError(f"module 'forgetless' has no attribute {name!r}")
    return getattr(import_module(f"forgetless.{_PLACES[name]}"), name)
