"""An adapter merged into its base, as whole weights in files cut like the base's.

    W' = round(W + ΔW)      in fp32 from what is stored, rounded once, to the precision in which the base stores W

by PEFT's own merge, so that any type of adapter that is part of the weights can be merged. A tensor that the adapter
does not change keeps its bytes.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from forgetless.errors import RunError, UsageError, short
from forgetless.model.base import load_config
from forgetless.model.identity import open_tensors, weight_files
from forgetless.model.loading import own_code
from forgetless.runs.folder import read_json
from forgetless.subjects.models import Opened, Subject, dense, opened

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
TOKENIZER = ("token", "vocab", "merges", "special_", "added_", "chat_template", "spiece")  # how its files begin


def write_merged(subject: Subject, folder: Path) -> dict[str, dict[str, float]]:
    """Whole weights beside the base's configuration and the model's tokenizer, which transformers alone loads.

    Gives for each tensor that changes the norm ‖ΔW‖ of its change, and the `error` ‖W' - (W + ΔW)‖ / ‖ΔW‖ of rounding.
    The base is in memory in fp32, on the CPU.
    """
    stored = dense(subject, "merging into them")
    [changes] = [_write(_merged(model, subject), subject, folder) for _, model in opened([stored], torch.float32)]
    return changes


def _write(merged: PreTrainedModel, subject: Subject, folder: Path) -> dict[str, dict[str, float]]:
    tied = _still_tied(merged, subject.base)
    copy_others(subject, folder)
    _write_config(merged, tied, subject.base, folder)
    return _write_weights(_named_as_stored(merged, tied), _name_of_output(merged), subject.base, folder)


def _merged(model: Opened, subject: Subject) -> PreTrainedModel:
    assert isinstance(model, PeftModel)
    kind, tuner = model.active_peft_config.peft_type, model.base_model
    if not isinstance(tuner, BaseTuner):
        raise UsageError(
            f"{subject.name}: {getattr(kind, 'value', kind)} adds virtual tokens or attention beside the weights, so "
            "there is nothing to merge into them; deploy it as an adapter"
        )
    _untie(model)
    try:
        with warnings.catch_warnings():  # of embeddings that are no longer one, which is written into config.json
            warnings.simplefilter("ignore")
            merged: Any = tuner.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
        raise UsageError(
            f"{subject.name}: PEFT cannot merge this adapter into the base ({short(str(error), 200)}); deploy it as an "
            "adapter"
        ) from error
    return merged


def _untie(model: PeftModel) -> None:
    """Gives the output embedding weights of its own where only one of both embeddings has an update."""
    base: Any = model.get_base_model()
    both = [base.get_input_embeddings(), base.get_output_embeddings()]
    updated = [isinstance(one, BaseTunerLayer) for one in both]
    inside, out = (one.get_base_layer() if own else one for one, own in zip(both, updated, strict=True))
    if any(updated) and out.weight is inside.weight:
        out.weight = nn.Parameter(out.weight.detach().clone(), requires_grad=False)


def _named_as_stored(model: PreTrainedModel, tied: bool) -> dict[str, Tensor]:
    """The weights by the names that they have in files; of embeddings that are one only the input's."""
    state = dict(model.state_dict())
    if tied:
        state.pop(_name_of_output(model))
    return revert_weight_conversion(model, state)


def _still_tied(model: PreTrainedModel, base: Path) -> bool:
    """Whether the base's embeddings are one, and equal after the merge."""
    tied = bool(load_config(base).get_text_config().tie_word_embeddings)
    inside, out = (one.get_parameter("weight") for one in (model.get_input_embeddings(), model.get_output_embeddings()))
    return tied and torch.equal(inside, out)


def _name_of_output(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


def _write_weights(state: dict[str, Tensor], output: str, base: Path, folder: Path) -> dict[str, dict[str, float]]:
    changes: dict[str, dict[str, float]] = {}
    files = weight_files(base)
    places: dict[str, str] = {}
    for file in files:
        tensors = {}
        for name, stored in _stored(file):
            tensors[name] = _rounded(state.pop(name, stored), stored, name, changes)
        if file is files[-1]:
            tensors |= _more(state, output, stored.dtype, base)
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
    if len(files) > 1:
        size = sum((folder / file.name).stat().st_size for file in files)
        told = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(told, indent=2) + "\n")
    return changes


def _stored(file: Path) -> Iterator[tuple[str, Tensor]]:
    with open_tensors(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118
            yield name, tensors.get_tensor(name)


def _rounded(merged: Tensor, stored: Tensor, name: str, changes: dict[str, dict[str, float]]) -> Tensor:
    """In the stored precision; notes what changed, where the shape is the same."""
    rounded = merged.to(stored.dtype).contiguous()
    if merged is not stored and merged.shape == stored.shape and stored.is_floating_point():
        change = (merged - stored.float()).norm().item()
        if change:
            changes[name] = {"norm": change, "error": (rounded.float() - merged).norm().item() / change}
    return rounded


def _more(state: Mapping[str, Tensor], output: str, dtype: torch.dtype, base: Path) -> dict[str, Tensor]:
    """Weights that the base has no place for: an output embedding that was the input's, and is no more."""
    strange = [name for name in state if name != output]
    if strange:
        raise RunError(
            f"{base}: its files have no place for {strange[0]} and {len(strange) - 1} more tensors of the merged "
            "model: they name their tensors otherwise than this model's class. Save the base anew with "
            "save_pretrained, and give BASE+ADAPTER"
        )
    return {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}


def _write_config(model: PreTrainedModel, tied: bool, base: Path, folder: Path) -> None:
    """The base's own, but for the size of the vocabulary and whether both embeddings are one."""
    told = read_json(base / CONFIG)
    text = told.get("text_config", told)
    if "vocab_size" in text:
        text["vocab_size"] = model.get_output_embeddings().get_parameter("weight").shape[0]
    if not tied and load_config(base).get_text_config().tie_word_embeddings:
        told["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    (folder / CONFIG).write_text(json.dumps(told, indent=2) + "\n")


def copy_others(subject: Subject, folder: Path) -> None:
    """Everything beside the weights: configuration, generation settings, own code, the tokenizer that the model has."""
    suffixes = (".json", ".txt", ".model", ".jinja", *([".py"] if own_code(subject.base) else []))
    for file in sorted(subject.base.iterdir()):
        if file.suffix in suffixes and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    if subject.adapter:
        copy_tokenizer(subject.adapter, folder)


def copy_tokenizer(adapter: Path, folder: Path) -> None:
    """The tokenizer that an adapter brings, if it does."""
    if (adapter / "tokenizer_config.json").is_file():
        for file in sorted(folder.iterdir()):
            if file.name.startswith(TOKENIZER):
                file.unlink()
        for file in sorted(adapter.iterdir()):
            if file.is_file() and file.name.startswith(TOKENIZER):
                shutil.copyfile(file, folder / file.name)
