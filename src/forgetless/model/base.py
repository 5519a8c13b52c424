"""Load a base model: a packaged one, a local folder, or a name on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from forgetless.data.packages import PACKAGED_MODELS, packaged_model
from forgetless.errors import DownloadError, RunError, UsageError, nearest, short
from forgetless.model.attention import use_blocked_attention
from forgetless.model.identity import Identity, identify
from forgetless.model.prompted import Prompted


@dataclass
class Base:
    """A frozen causal language model with its tokenizer, where it came from, and who it is."""

    name: str
    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: Identity

    @property
    def context(self) -> int | None:
        """The longest sequence in tokens, where the configuration states one."""
        return context_of(self.model)


def context_of(model) -> int | None:
    """The longest sequence in tokens that a model's configuration states, if it states one."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def transformer(model) -> PreTrainedModel:
    """The transformers model inside a PEFT model or under virtual tokens, or the model itself."""
    if isinstance(model, Prompted):
        return model.base
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def load_base(name: str, dtype: torch.dtype, device: torch.device | str = "cpu", *, in_shards: bool = False) -> Base:
    """Loads weights from safetensors only; sets a padding token if there is none (padding is always masked).

    `in_shards`: they stay in the CPU's memory, from where each process takes its part to the device.
    """
    folder = find_model(name)
    if not (folder / "config.json").exists():
        raise RunError(
            f"{folder}: no config.json, so this is no model folder; give the folder that save_pretrained wrote"
        )
    tokenizer = load_tokenizer(folder)
    identity = identify(folder, tokenizer.chat_template)
    transformers_logging.disable_progress_bar()  # loading takes seconds
    with _named_errors(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    model, told = loaded
    if missing := sorted(told["missing_keys"]):
        raise RunError(
            f"{folder}: the weights lack {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ", which would stay random; give the whole model"
        )
    if torch.device(device).type == "cpu":
        use_blocked_attention(model)
    model.requires_grad_(False)
    model.to("cpu" if in_shards else device)
    return Base(name, folder, model.eval(), tokenizer, identity)


def load_config(folder: Path) -> PreTrainedConfig:
    """What config.json says; no code of the folder's is run."""
    with _named_errors(folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; it can end an answer and pad a row."""
    with _named_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise RunError(f"{folder}: the tokenizer has no end-of-sequence token, so answers would never end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise RunError(
            f"{folder}: cannot be loaded as a causal language model with its tokenizer ({short(str(error), 300)}); "
            "give a folder with config.json, tokenizer files and whole *.safetensors of such a model"
        ) from error


def _is_folder(name: str) -> bool:
    try:
        return Path(name).expanduser().is_dir()
    except OSError:  # a name longer than a path may be
        return False


def find_model(name: str) -> Path:
    """The local folder of a model, fetched if need be."""
    if name in PACKAGED_MODELS:
        return packaged_model(name)
    if _is_folder(name):
        return Path(name).expanduser()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"model {name!r}: no such folder")
    if "/" not in name:
        raise UsageError(
            f"model {name!r} is neither a packaged model, a folder, nor a hub name "
            f"('owner/name'){nearest(name, PACKAGED_MODELS)}"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise DownloadError(
            f"model {name!r}: not in the local hub cache and could not be fetched "
            f"({type(error).__name__}). Check the name; behind a closed network copy the model's folder here "
            f"and give its path, or use a packaged model: {', '.join(PACKAGED_MODELS)}."
        ) from error
