"""How models are loaded: in 4 bits or as they are stored, with which attention, and whose own code may run.

A command's settings hold for every model that is loaded inside it (`loaded_as_told`), so that no way of opening a model
passes by what the user allowed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig

from forgetless.errors import UsageError, nearest

AS_STORED, FOUR_BIT = LOADINGS = ("as_stored", "4bit")
OWN_ATTENTION = "auto"
CALLED_4BIT = re.compile(r"-(unsloth-)?bnb-4bit$")
BLOCK = 64  # weights that share a scale in 4 bits
INSTALL = "pip install 'forgetless[qlora]'"


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """How models are loaded."""

    load_in: str = AS_STORED
    """as_stored, or 4bit: linear layers in nf4 with double quantisation, computed in `precision` (needs bitsandbytes);
    a model that was saved in 4 bits is loaded so in any case"""
    attn_implementation: str = OWN_ATTENTION
    """auto (torch's fused one, on CPU this library's own; what rows begin with in common is computed once), or one that
    transformers knows, for padded rows: sdpa, eager, flash_attention_2, ..."""
    trust_remote_code: Sequence[str] = ()
    """models, each by name or folder, whose own Python code may run; no other model's does"""


_current: ContextVar[LoadSettings] = ContextVar("loading", default=LoadSettings())  # noqa: B039  # frozen


def load_settings() -> LoadSettings:
    """Those of the command under way."""
    return _current.get()


@contextmanager
def loading(settings: LoadSettings) -> Iterator[None]:
    """Models are loaded by these settings inside the block. UsageError for a way to load that does not exist."""
    if settings.load_in not in LOADINGS:
        raise UsageError(f"load_in: no {settings.load_in!r}{nearest(settings.load_in, LOADINGS)}")
    if isinstance(settings.trust_remote_code, str):
        raise UsageError(f"trust_remote_code is a list of models: [{settings.trust_remote_code}]")
    before = _current.set(settings)
    try:
        yield
    finally:
        _current.reset(before)


Command = TypeVar("Command", bound=Callable[..., Any])


def loaded_as_told(command: Command) -> Command:
    """A function whose first argument is its configuration, which says how its models are loaded."""

    @wraps(command)
    def inside(config: LoadSettings, *args: Any, **more: Any) -> Any:
        with loading(config):
            return command(config, *args, **more)

    return inside  # type: ignore[return-value]  # the same arguments and result


# ------------------------------------------------------------------------------------------- in 4 bits


def stored_in_4bit(folder: Path, config: PreTrainedConfig) -> bool:
    """Whether the weights lie there in bitsandbytes' 4 bits. UsageError for any other quantisation."""
    stored = config.to_dict().get("quantization_config")
    if not stored:
        return False
    if stored.get("quant_method") == "bitsandbytes" and stored.get("load_in_4bit"):
        return True
    kind = "8 bits" if stored.get("load_in_8bit") else stored.get("quant_method")
    raise UsageError(
        f"{folder}: its weights are quantised ({kind}), and only dense ones and bitsandbytes' 4 bits are loaded; give "
        f"the dense model{dense_twin(folder)}. For an adapter trained on it say base_is (--base-is)."
    )


def dense_twin(folder: Path) -> str:
    """', perhaps ...': the name without what Unsloth writes behind those of 4-bit models, if it is there."""
    name = CALLED_4BIT.sub("", str(folder))
    return f", perhaps {name!r}" if name != str(folder) else ""


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation (Dettmers et al. 2023, section 3), products in `dtype`; UsageError without the
    library."""
    check_bitsandbytes("a base in 4 bits")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def check_bitsandbytes(what: str) -> None:
    """UsageError where the library for `what` is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"{what} needs bitsandbytes: {INSTALL}")


def check_on_cpu(model: nn.Module, folder: Path) -> None:
    """Keeps 4-bit weights on the CPU as they are: a pass without gradients would lay them out anew for a product of its
    own rounding, and what is scored would not be what is trained. UsageError for layers that come back wrong there
    (bitsandbytes 0.50 reads the scales of rows that end within a block of 64 at the wrong place).
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        if module.get_parameter("weight").quant_state.shape[1] % BLOCK:
            raise UsageError(
                f"{folder}: {name} has {module.in_features} inputs, no multiple of {BLOCK}, and bitsandbytes computes "
                "such layers wrong on a CPU; load it as it is stored, or on a GPU"
            )


# ------------------------------------------------------------------------------------- code of its own


def own_code(folder: Path) -> dict[str, Any]:
    """What config.json and tokenizer_config.json call for of the model's own code: {} for most models."""
    from forgetless.runs.folder import read_json

    files = [folder / name for name in ("config.json", "tokenizer_config.json")]
    told = [read_json(file).get("auto_map") for file in files if file.is_file()]
    return {name: place for one in told if isinstance(one, dict) for name, place in one.items()}


def code_digest(folder: Path) -> str:
    """sha256 of the Python files of a model's folder, names included."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def is_trusted(folder: Path, find: Callable[[str], Path]) -> bool:
    """Whether the folder's code is that of a model whose code may run, wherever it lies. `find`: a model's folder.

    UsageError where the code would be fetched from elsewhere, which nobody has named.
    """
    if not load_settings().trust_remote_code or not (wanted := own_code(folder)):
        return False
    allowed = {code_digest(find(name)) for name in load_settings().trust_remote_code}
    if code_digest(folder) not in allowed:
        return False
    for place in wanted.values():
        for one in [place] if isinstance(place, str) else filter(None, place):
            if "--" in one:
                raise UsageError(
                    f"{folder}: its code is that of another model, {one.split('--')[0]!r}, and only a folder's own "
                    "runs; copy those Python files into the folder, and name them without it in auto_map"
                )
    return True


def needs_trust(folder: Path) -> str:
    """What is said of a model that cannot be loaded without its own code."""
    named = ", ".join(f"{name}: {place}" for name, place in own_code(folder).items())
    return (
        f"{folder}: is made of Python code of its own ({named or 'auto_map'}), which is not run unless you allow it. "
        f"Read it first; then allow this model's, and no other's: --trust_remote_code {folder}"
    )
