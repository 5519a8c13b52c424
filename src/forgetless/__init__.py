"""forgetless: what each fine-tune made a language model forget, and how to keep it."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forgetless.auditing.callback import ForgettingCallback
    from forgetless.auditing.run import audit
    from forgetless.checkup.doctor import doctor
    from forgetless.comparing.comparison import compare
    from forgetless.config import AuditConfig, BlendConfig, InterpolateConfig, LearnConfig, MergeConfig
    from forgetless.forecasting.forecast import fit_laws
    from forgetless.geometry.borders import blend
    from forgetless.geometry.interpolate import interpolate
    from forgetless.geometry.merging import merge
    from forgetless.geometry.overlap import overlap
    from forgetless.learning.stream import learn
    from forgetless.learning.trainer import MethodCallback
    from forgetless.sweeping.commands import sweep

__version__ = version("forgetless")
__all__ = [
    "AuditConfig",
    "BlendConfig",
    "ForgettingCallback",
    "InterpolateConfig",
    "LearnConfig",
    "MergeConfig",
    "MethodCallback",
    "audit",
    "blend",
    "compare",
    "doctor",
    "fit_laws",
    "interpolate",
    "learn",
    "merge",
    "overlap",
    "sweep",
]

_PLACES = {
    "AuditConfig": "config",
    "BlendConfig": "config",
    "ForgettingCallback": "auditing.callback",
    "InterpolateConfig": "config",
    "LearnConfig": "config",
    "MergeConfig": "config",
    "MethodCallback": "learning.trainer",
    "audit": "auditing.run",
    "blend": "geometry.borders",
    "compare": "comparing.comparison",
    "fit_laws": "forecasting.forecast",
    "doctor": "checkup.doctor",
    "interpolate": "geometry.interpolate",
    "learn": "learning.stream",
    "merge": "geometry.merging",
    "overlap": "geometry.overlap",
    "sweep": "sweeping.commands",
}


def __getattr__(name: str):
    """Imports torch and the rest only when they are needed."""
    if name not in _PLACES:
        raise AttributeError(f"module 'forgetless' has no attribute {name!r}")
    return getattr(import_module(f"forgetless.{_PLACES[name]}"), name)
