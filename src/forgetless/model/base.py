"""Load a base model: a packaged one, a local folder, or a name on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from forgetless.data.packages import PACKAGED_MODELS, packaged_model
from forgetless.errors import DownloadError, ForgetlessError, RunError, UsageError, nearest, short
from forgetless.model.attention import use_blocked_attention
from forgetless.model.encoder_decoder import decoder_start, model_class
from forgetless.model.identity import Identity, identify
from forgetless.model.loading import (
    FOUR_BIT,
    OWN_ATTENTION,
    check_bitsandbytes,
    check_on_cpu,
    four_bits,
    is_trusted,
    load_settings,
    needs_trust,
    stored_in_4bit,
)
from forgetless.model.prompted import Prompted
from forgetless.runs.folder import is_there


@dataclass
class Base:
    """A frozen language model with its tokenizer, where it came from, and who it is."""

    name: str
    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: Identity

    @property
    def context(self) -> int | None:
        """The longest sequence in tokens, where the configuration states one."""
        return context_of(self.model)

    @property
    def decoder_start(self) -> int | None:
        """The token with which an encoder-decoder's answers start; None for a decoder alone."""
        return decoder_start(self.model.config)


def context_of(model) -> int | None:
    """The longest sequence in tokens that a model's configuration states, if it states one."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def transformer(model) -> PreTrainedModel:
    """The transformers model inside a PEFT model or under virtual tokens, or the model itself."""
    if isinstance(model, Prompted):
        return model.base
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def load_base(
    name: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    in_shards: bool = False,
    load_in: str | None = None,
) -> Base:
    """Loads weights from safetensors only; sets a padding token if there is none (padding is always masked).

    `in_shards`: they stay in the CPU's memory, from where each process takes its part to the device. `load_in`: as in
    `LoadSettings`, whose other settings and default are those of the command under way.
    """
    folder = find_model(name)
    if not (folder / "config.json").exists():
        raise RunError(
            f"{folder}: no config.json, so this is no model folder; give the folder that save_pretrained wrote"
        )
    tokenizer = load_tokenizer(folder)
    identity = identify(folder, tokenizer.chat_template)
    transformers_logging.disable_progress_bar()  # loading takes seconds
    kind: Any = model_class(load_config(folder))
    how = _how(folder, dtype, device, load_in, in_shards)
    with _named_errors(folder):
        loaded: Any = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **how)
    model, told = loaded
    if missing := sorted(told["missing_keys"]):
        raise RunError(
            f"{folder}: the weights lack {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ", which would stay random; give the whole model"
        )
    model.requires_grad_(False)
    if "device_map" not in how:
        model.to("cpu" if in_shards else device)
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu:
        check_on_cpu(model, folder)
    if load_settings().attn_implementation == OWN_ATTENTION and (on_cpu or not in_shards):
        use_blocked_attention(model)
    return Base(name, folder, model.eval(), tokenizer, identity)


def _how(
    folder: Path, dtype: torch.dtype, device: torch.device | str, load_in: str | None, in_shards: bool
) -> dict[str, Any]:
    """How transformers loads the model: its own code, its attention, 4 bits."""
    how: dict[str, Any] = {"trust_remote_code": is_trusted(folder, find_model)}
    if load_settings().attn_implementation != OWN_ATTENTION:
        how["attn_implementation"] = load_settings().attn_implementation
    stored = stored_in_4bit(folder, load_config(folder))
    if not stored and (load_in or load_settings().load_in) != FOUR_BIT:
        return how
    if in_shards:
        raise UsageError(
            f"{folder}: a base in 4 bits is not cut into shards; it is a quarter as large, so start the processes "
            "without FSDP, and each holds all of it"
        )
    if stored:
        check_bitsandbytes(f"{folder}, which lies there in 4 bits,")
        return how | {"device_map": {"": device}}
    return how | {"device_map": {"": device}, "quantization_config": four_bits(dtype)}


def load_config(folder: Path) -> PreTrainedConfig:
    """What config.json says; no code of the folder's is run but what the user allowed."""
    trusted = is_trusted(folder, find_model)
    with _named_errors(folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trusted)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; it can end an answer and pad a row."""
    trusted = is_trusted(folder, find_model)
    with _named_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    if tokenizer.eos_token_id is None:
        raise RunError(f"{folder}: the tokenizer has no end-of-sequence token, so answers would never end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except ForgetlessError:
        raise
    except ImportError as error:  # an attention, or what a model's own code imports
        raise UsageError(f"{folder}: {short(str(error), 300)}") from error
    except Exception as error:  # transformers, tokenizers and safetensors share no class of errors
        if "trust_remote_code" in str(error):
            raise UsageError(needs_trust(folder)) from error
        raise RunError(
            f"{folder}: cannot be loaded as a language model with its tokenizer ({short(str(error), 300)}); "
            "give a folder with config.json, tokenizer files and whole *.safetensors of such a model"
        ) from error


def find_model(name: str) -> Path:
    """The local folder of a model, fetched if need be."""
    if name in PACKAGED_MODELS:
        return packaged_model(name)
    if is_there(folder := Path(name).expanduser(), Path.is_dir):
        return folder
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
        patterns += ["*.py"] if name in load_settings().trust_remote_code else []
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise DownloadError(
            f"model {name!r}: not in the local hub cache and could not be fetched "
            f"({type(error).__name__}). Check the name; behind a closed network copy the model's folder here "
            f"and give its path, or use a packaged model: {', '.join(PACKAGED_MODELS)}."
        ) from error
