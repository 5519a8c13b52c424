"""METHODS: every built-in method by its name."""

from forgetless.methods.base import HOOKS, Check, Lesson, Method, State
from forgetless.methods.ilora import ILoRA
from forgetless.methods.incremental import Incremental
from forgetless.methods.joint import Joint
from forgetless.methods.nlora import NLoRA
from forgetless.methods.olora import OLoRA
from forgetless.methods.per_task import PerTask
from forgetless.methods.replay import Replay
from forgetless.methods.sequential import Sequential

METHODS: dict[str, type[Method]] = {
    "sequential": Sequential,
    "incremental": Incremental,
    "per_task": PerTask,
    "joint": Joint,
    "replay": Replay,
    "olora": OLoRA,
    "nlora": NLoRA,
    "ilora": ILoRA,
}

__all__ = ["HOOKS", "METHODS", "Check", "Lesson", "Method", "State"]
