"""METHODS: every built-in method by its name."""

from forgetless.methods.agem import AGEM
from forgetless.methods.base import ADAPTER, HOOKS, ROWS, Check, Lesson, Method, State
from forgetless.methods.clora import CLoRA
from forgetless.methods.corda import CorDA
from forgetless.methods.duallora_reconstructed import DualLoRAReconstructed
from forgetless.methods.ewc import EWC
from forgetless.methods.gem import GEM
from forgetless.methods.general_replay import GeneralReplay
from forgetless.methods.hiddenkey import HiddenKey
from forgetless.methods.hyplora import HypLoRA
from forgetless.methods.ilora import ILoRA
from forgetless.methods.incremental import Incremental
from forgetless.methods.inflora import InfLoRA
from forgetless.methods.joint import Joint
from forgetless.methods.l2p import L2P
from forgetless.methods.lfpt5 import LFPT5
from forgetless.methods.loranull import LoRANull
from forgetless.methods.lori import LoRI
from forgetless.methods.lwf import LwF
from forgetless.methods.mbpa import MbPA
from forgetless.methods.mtllora import MTLLoRA
from forgetless.methods.nlora import NLoRA
from forgetless.methods.ogd import OGD
from forgetless.methods.olora import OLoRA
from forgetless.methods.oplora import OPLoRA
from forgetless.methods.osf import OSF
from forgetless.methods.per_task import PerTask
from forgetless.methods.progressive_prompts import ProgressivePrompts
from forgetless.methods.prompt_tuning import PromptTuning
from forgetless.methods.raclora import RACLoRA
from forgetless.methods.recall import Recall
from forgetless.methods.replay import Replay
from forgetless.methods.sdlora import SDLoRA
from forgetless.methods.sequential import Sequential
from forgetless.methods.sherl import SHERL
from forgetless.methods.slao import SLAO

METHODS: dict[str, type[Method]] = {
    "sequential": Sequential,
    "incremental": Incremental,
    "per_task": PerTask,
    "joint": Joint,
    "replay": Replay,
    "olora": OLoRA,
    "nlora": NLoRA,
    "ilora": ILoRA,
    "ewc": EWC,
    "lwf": LwF,
    "gem": GEM,
    "agem": AGEM,
    "ogd": OGD,
    "general_replay": GeneralReplay,
    "sdlora": SDLoRA,
    "inflora": InfLoRA,
    "raclora": RACLoRA,
    "clora": CLoRA,
    "oplora": OPLoRA,
    "osf": OSF,
    "corda": CorDA,
    "loranull": LoRANull,
    "lori": LoRI,
    "slao": SLAO,
    "hiddenkey": HiddenKey,
    "mtllora": MTLLoRA,
    "hyplora": HypLoRA,
    "duallora_reconstructed": DualLoRAReconstructed,
    "prompt_tuning": PromptTuning,
    "progressive_prompts": ProgressivePrompts,
    "l2p": L2P,
    "mbpa": MbPA,
    "lfpt5": LFPT5,
    "sherl": SHERL,
    "recall": Recall,
}

__all__ = ["ADAPTER", "HOOKS", "METHODS", "ROWS", "Check", "Lesson", "Method", "State"]
