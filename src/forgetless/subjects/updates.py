"""The update ΔW = s B A that an adapter adds to each layer, kept as factors; read from anybody's PEFT folder.

Σ_i w_i s_i B_i A_i = [w_1 s_1 B_1 ... w_n s_n B_n] [A_1; ...; A_n]          exactly, the ranks add up
<ΔW_i, ΔW_j> = s_i s_j Σ_kl (B_i^T B_j ∘ A_i A_j^T)_kl                        no product is formed
B = Q R, A^T = P S:  B A = Q (R S^T) P^T                                      the singular values of R S^T
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from forgetless.errors import RunError, UsageError
from forgetless.model.adapters import Pair, inner
from forgetless.model.identity import open_tensors
from forgetless.runs.shapes import read
from forgetless.subjects.models import ADAPTER, CHANGE_THE_BASE, refuse_own_kind

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight")
_NOT_A_PRODUCT = {
    "use_dora": "DoRA scales whole weights",
    "bias": "it trains biases",
    "modules_to_save": "it brings whole modules",
    "trainable_token_indices": "it brings embeddings of single tokens",
    "layer_replication": "it repeats layers",
    "alora_invocation_tokens": "it acts after certain tokens only",
    "lora_bias": "B has a bias",
    "target_parameters": "it changes parameters that are no linear layers",
    "use_qalora": "its input is pooled",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes each token",
    "kasa_config": "it takes weight out of the base, and has a diagonal between its factors",
    "monteclora_config": "its factors are drawn anew",
}
_STILL_A_PRODUCT = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("megatron_config", "megatron_core", "ensure_weight_tying", "qalora_group_size"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # starts, looked at below
    "velora_config",  # another backward pass
}
"""Settings of PEFT that leave an update s B A, whatever they are."""


@dataclass(frozen=True)
class Update:
    """A LoRA adapter: a pair for each layer it changes, by the layer's name in the base."""

    name: str
    base: str  # as its configuration names it
    layers: Mapping[str, Pair]


MERGED_FIRST = "merge it into full weights (`forgetless merge ADAPTER --output_dir DIR`) and give these"


def read_update(folder: Path, name: str | None = None, remedy: str = MERGED_FIRST) -> Update:
    """The pairs of a plain LoRA folder of any trainer: ranks and alphas may differ from layer to layer, rsLoRA too.

    Raises UsageError, which ends with the `remedy`, for what is no such product, RunError for files that are no
    adapter.
    """
    told = read(folder / CONFIG_NAME, ADAPTER)
    refuse_own_kind(folder / CONFIG_NAME, told)
    if told.get("peft_type") != "LORA":
        raise UsageError(f"{folder}: is no LoRA adapter (peft_type {told.get('peft_type')}); {remedy}")
    if told.get("lora_alpha") is None:
        raise RunError(f"{folder / CONFIG_NAME}: has no lora_alpha, which scales the update; restore it from a copy")
    for key, value in told.items():
        if value and value != "none" and key not in _STILL_A_PRODUCT:
            why = _NOT_A_PRODUCT.get(key, "a setting that is not known here")
            raise UsageError(
                f"{folder / CONFIG_NAME}: {key}={value!r}: {why}, so its update may be more than a product of two "
                f"factors; {remedy}"
            )
    if str(start := told.get("init_lora_weights")).startswith(CHANGE_THE_BASE):
        raise UsageError(
            f"{folder / CONFIG_NAME}: init_lora_weights={start!r} took weight out of the base at its start, so its "
            f"update is more than these factors; {remedy}"
        )
    sides: dict[str, dict[str, Tensor]] = {}
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    with open_tensors(weights) as tensors:
        for key in sorted(tensors.keys()):
            found = _FACTOR.fullmatch(key)
            if not found:
                raise UsageError(f"{weights}: {key} is no factor of a linear layer; {remedy}")
            sides.setdefault(found["layer"], {})[found["side"]] = tensors.get_tensor(key).float()
    layers = {layer: _pair(pair, layer, told, weights) for layer, pair in sides.items()}
    if not layers:
        raise RunError(f"{weights}: holds no tensors; restore it from a copy")
    return Update(name or str(folder), told.get("base_model_name_or_path") or "", layers)


def _pair(sides: dict[str, Tensor], layer: str, told: dict, file: Path) -> Pair:
    flat = all(tensor.ndim == 2 for tensor in sides.values())
    if sides.keys() != {"A", "B"} or not flat or sides["A"].shape[0] != sides["B"].shape[1]:
        shapes = {side: tuple(tensor.shape) for side, tensor in sides.items()}
        raise RunError(f"{file}: the factors of {layer} are {shapes}, no A (rank, in) and B (out, rank)")
    rank = sides["A"].shape[0]
    alphas = told.get("alpha_pattern") or {}
    alpha = float(alphas.get(get_pattern_key(list(alphas), layer)) or told["lora_alpha"])
    return Pair(sides["A"], sides["B"], alpha / (math.sqrt(rank) if told.get("use_rslora") else rank))


# ------------------------------------------------------------------------------------------- arithmetic


def weighted(
    updates: Sequence[Mapping[str, Pair]], weights: Sequence[float], all_ranks: bool = False
) -> dict[str, Pair]:
    """Σ w_i ΔW_i of each layer that any of them changes, as pairs of scale 1; what weighs nothing adds no rank.

    A layer that all weigh nothing in keeps a zero pair of the first update's rank, so that the layers stay the same.
    `all_ranks`: every rank is kept, so that the shapes are the same for all weights.
    """
    summed = {}
    for layer in dict.fromkeys(layer for update in updates for layer in update):
        given = [(update[layer], w) for update, w in zip(updates, weights, strict=True) if layer in update]
        parts = given if all_ranks else [(pair, w) for pair, w in given if w] or given[:1]
        A = torch.cat([pair.A for pair, _ in parts])
        B = torch.cat([w * pair.scale * pair.B for pair, w in parts], dim=1)
        summed[layer] = Pair(A, B, 1.0)
    return summed


def norm(pair: Pair) -> float:
    """‖ΔW‖_F."""
    return math.sqrt(max(0.0, inner(pair, pair)))


def difference(a: Pair, b: Pair) -> float:
    """‖ΔW_a - ΔW_b‖_F; of nearly equal products exact only up to √(fp64's rounding) of their norm."""
    return math.sqrt(max(0.0, inner(a, a) - 2 * inner(a, b) + inner(b, b)))


class Decomposed(NamedTuple):
    """ΔW = U diag(σ) V^T in fp64, k singular values of at most the rank."""

    U: Tensor  # (out, k)
    sigma: Tensor  # (k,)
    V: Tensor  # (in, k)


def decomposed(pair: Pair) -> Decomposed:
    """The singular value decomposition of a product, which is not formed."""
    Q, R = torch.linalg.qr(pair.B.double())
    P, S = torch.linalg.qr(pair.A.double().T)
    U, sigma, V = torch.linalg.svd(pair.scale * R @ S.T, full_matrices=False)
    return Decomposed(Q @ U, sigma, P @ V.T)


def compressed(pair: Pair, rank: int) -> Pair:
    """The nearest update of a rank (Eckart and Young, 1936), its singular values shared between both factors."""
    U, sigma, V = decomposed(pair)
    root = sigma[:rank].sqrt()
    return Pair((V[:, :rank] * root).T.float(), (U[:, :rank] * root).float(), 1.0)


# ---------------------------------------------------------------------------------------------- folders


def write_update(layers: Mapping[str, Pair], folder: Path, base: str, task_type: str = "CAUSAL_LM") -> None:
    """A plain PEFT adapter folder with these products, each pair's scale put into B; equal tensors, equal bytes.

    `base`, `task_type`: what PEFT is told of the model that the adapter goes onto.
    """
    ranks = {layer: pair.A.shape[0] for layer, pair in layers.items()}
    rank = max(ranks.values())
    other = {re.escape(layer): own for layer, own in ranks.items() if own != rank}
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=sorted(layers), rank_pattern=other,
        alpha_pattern=other, task_type=task_type,
    )  # fmt: skip
    told = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    told |= {"inference_mode": True, "base_model_name_or_path": base}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
    tensors = {}
    for layer, pair in layers.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = pair.A.float().contiguous()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = (pair.scale * pair.B.float()).contiguous()
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
