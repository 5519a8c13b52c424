"""What a fine-tune did to the weights: the size and shape of the update ΔW of each layer.

    Frobenius norm    ‖ΔW‖_F = (Σ σ_k²)^½, also relative to ‖W‖_F
    nuclear norm      ‖ΔW‖_* = Σ σ_k
    effective rank    exp(-Σ p_k ln p_k),  p_k = σ_k / ‖ΔW‖_*                       (Roy and Vetterli, EUSIPCO 2007)
    intruders         how many of the k leading left singular vectors y_j of W + ΔW have max_i |cos(x_i, y_j)| < ε
                      over all left singular vectors x_i of W                    (Shuttleworth et al., arXiv 2410.21228)

σ_k are the singular values of ΔW. k = 10 and ε = 0.5 are the defaults of the code released with arXiv 2410.21228
(reeceshuttle/intruder-dimensions), which takes the absolute value of the cosine; PEFT's intruder reduction
has the same.

Weights merged in half precision differ from the base by their rounding in every direction: its full-rank noise raises
nuclear norm and effective rank of a small update. Tensors are taken as stored, (rows, columns); those of more than two
dimensions are folded into rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from forgetless.errors import RunError, UsageError
from forgetless.model.identity import open_tensors, tensor_files, weight_files
from forgetless.progress import steps
from forgetless.subjects.models import Subject, dense, opened

LEADING, EPSILON = 10, 0.5  # k and ε


@dataclass(frozen=True)
class LayerUpdate:
    """The update of one tensor of the base."""

    layer: str
    shape: tuple[int, ...]
    norm: float
    base_norm: float
    nuclear_norm: float
    effective_rank: float  # 0 for no update, at most the smaller side
    intruders: int | None  # of `LEADING`; None for vectors

    @property
    def relative_norm(self) -> float | None:
        """‖ΔW‖_F / ‖W‖_F; None where the base is zero."""
        return self.norm / self.base_norm if self.base_norm else None

    @property
    def module(self) -> str:
        """The kind of module: 'q_proj' of 'model.layers.0.self_attn.q_proj.weight'."""
        parts = [part for part in self.layer.split(".") if part not in ("weight", "bias")]
        return parts[-1] + (".bias" if self.layer.endswith(".bias") else "")


@dataclass(frozen=True)
class ModuleSummary:
    """The updates of all layers of one kind of module."""

    module: str
    layers: int
    norm: float  # of all of them together
    relative_norm: float | None
    nuclear_norm: float  # sum
    effective_rank: float  # mean
    intruders: int | None  # sum


def weight_updates(subject: Subject, reference: Subject, device: torch.device | str = "cpu") -> list[LayerUpdate]:
    """The updated layers of a subject: of an adapter against its own base, of full weights against the reference's.

    An adapter is computed in fp32. Empty where an adapter changes no tensor of the base but adds to its inputs or
    its computation (prompts, Lily).
    """
    if subject.adapter is not None:
        for _, model in opened([dense(subject, "a summary of weights")], torch.float32, device):
            assert isinstance(model, PeftModel)
            return adapter_updates(model)
    if reference.adapter is not None:
        raise UsageError(
            f"{subject.name} has full weights and the reference {reference.name} is an adapter; weights are compared "
            "with full weights only, so give the base as reference"
        )
    before, after = (dense(one, "a summary of weights").base for one in (reference, subject))
    return full_updates(before, after, device)


def update_of(subject: Subject, reference: Subject) -> str:
    """What `weight_updates` compare the subject with: the reference's name, or 'its own base'."""
    same = reference.adapter is None and subject.identity.weights == reference.identity.weights
    return reference.name if same or subject.adapter is None else "its own base"


def by_module(updates: list[LayerUpdate]) -> list[ModuleSummary]:
    """One summary per kind of module, the largest relative update first."""
    kinds: dict[str, list[LayerUpdate]] = {}
    for update in updates:
        kinds.setdefault(update.module, []).append(update)
    summaries = [_summary(module, layers) for module, layers in kinds.items()]
    return sorted(summaries, key=lambda kind: (-(kind.relative_norm or 0.0), kind.module))


def _summary(module: str, layers: list[LayerUpdate]) -> ModuleSummary:
    norm, base_norm = math.hypot(*(one.norm for one in layers)), math.hypot(*(one.base_norm for one in layers))
    counted = [one.intruders for one in layers if one.intruders is not None]
    return ModuleSummary(
        module=module,
        layers=len(layers),
        norm=norm,
        relative_norm=norm / base_norm if base_norm else None,
        nuclear_norm=sum(one.nuclear_norm for one in layers),
        effective_rank=sum(one.effective_rank for one in layers) / len(layers),
        intruders=sum(counted) if counted else None,
    )


# ---------------------------------------------------------------------------------------- one matrix


def effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of the normalised singular values; 0 where all are zero.

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])), 6)
    2.0
    """
    total = sigma.sum()
    return float(torch.special.entr(sigma / total).sum().exp()) if total > 0 else 0.0


def product_singular_values(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Singular values of scale B A without forming it; A (rank, in), B (out, rank) -> (at most rank,), fp64.

    With B = Q R and A^T = P S,  B A = Q (R S^T) P^T, whose singular values are those of R S^T.
    """
    R, S = torch.linalg.qr(B.double()).R, torch.linalg.qr(A.double().T).R
    return torch.linalg.svdvals(scale * R @ S.T)


def intruder_dimensions(W: Tensor, tuned: Tensor, leading: int = LEADING, epsilon: float = EPSILON) -> int:
    """How many leading left singular vectors of `tuned` (rows, columns) resemble none of W's."""
    X = torch.linalg.svd(W.float(), full_matrices=False).U
    Y = torch.linalg.svd(tuned.float(), full_matrices=False).U[:, :leading]
    return int(((Y.T @ X).abs().amax(dim=1) < epsilon).sum())


def _update(layer: str, W: Tensor, sigma: Tensor, tuned: Tensor) -> LayerUpdate:
    norm = float(sigma.square().sum().sqrt())
    is_matrix = W.ndim > 1
    return LayerUpdate(
        layer=layer,
        shape=tuple(W.shape),
        norm=norm,
        base_norm=float(torch.linalg.vector_norm(W.float())),
        nuclear_norm=float(sigma.sum()),
        effective_rank=effective_rank(sigma),
        intruders=(intruder_dimensions(_folded(W), _folded(tuned)) if norm else 0) if is_matrix else None,
    )


def _of_difference(layer: str, W: Tensor, tuned: Tensor) -> LayerUpdate:
    return _update(layer, W, torch.linalg.svdvals(_folded(tuned.float() - W.float())), tuned)


def _folded(tensor: Tensor) -> Tensor:
    """A matrix: a vector as one column, further dimensions folded into rows."""
    return tensor.unsqueeze(1) if tensor.ndim == 1 else tensor.reshape(-1, tensor.shape[-1])


# ---------------------------------------------------------------------------------------- adapters


def adapter_updates(model: PeftModel) -> list[LayerUpdate]:
    """The layers that a loaded adapter of any type changes, by their names in the base."""
    changed = (BaseTunerLayer, ModulesToSaveWrapper)
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, changed)]
    updates: list[LayerUpdate] = []
    with steps("weights", len(modules)) as progress, torch.no_grad():
        for name, module in modules:
            layer = name.removeprefix("base_model.model.").removesuffix(".token_adapter")
            updates += _of_module(layer, module)
            progress.advance()
    return updates


def _of_module(name: str, module: BaseTunerLayer | ModulesToSaveWrapper) -> Iterator[LayerUpdate]:
    if isinstance(module, ModulesToSaveWrapper):
        tuned = module.modules_to_save[_active(module)]
        for part, W in module.original_module.named_parameters():
            yield _of_difference(f"{name}.{part}", W, tuned.get_parameter(part))
    elif _is_plain_lora(module):
        adapter = _active(module)
        W = module.get_base_layer().get_parameter("weight")
        A, B = (side[adapter].get_parameter("weight") for side in (module.lora_A, module.lora_B))
        scale = module.scaling[adapter]
        whole = torch.addmm(W.float(), B.float(), A.float(), alpha=scale)
        yield _update(f"{name}.weight", W, product_singular_values(A, B, scale), whole)
    else:
        yield from _of_merge(name, module)


def _active(module: BaseTunerLayer | ModulesToSaveWrapper) -> str:
    (adapter,) = list(module.active_adapters)
    return adapter


def _is_plain_lora(module: BaseTunerLayer) -> TypeGuard[Linear]:
    """scale B A on the weight of a linear layer and nothing else (no DoRA, bias, or transposed weight)."""
    return (
        type(module) is Linear
        and isinstance(module.get_base_layer(), nn.Linear)
        and not module.lora_variant
        and module.lora_B[_active(module)].bias is None
    )


def _of_merge(name: str, module: BaseTunerLayer) -> Iterator[LayerUpdate]:
    """Any other type: what merging it does to each tensor of its layer."""
    before = {part: W.clone() for part, W in module.get_base_layer().named_parameters()}
    with _merged(module) as merged:
        after = {part: W.clone() for part, W in merged.get_base_layer().named_parameters()} if merged else {}
    for part, tuned in after.items():
        if part in before and not torch.equal(before[part], tuned):
            yield _of_difference(f"{name}.{part}", before[part], tuned)


@contextmanager
def _merged(module: BaseTunerLayer) -> Iterator[BaseTunerLayer | None]:
    """The layer merged inside the block, afterwards as before to the bit; None where the type has no merged form."""
    kept = {part: W.clone() for part, W in module.get_base_layer().named_parameters()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that unmerging rounds: the copy does not
            module.merge()
    except (NotImplementedError, ValueError):
        yield None
        return
    try:
        yield module
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.unmerge()
        for part, W in module.get_base_layer().named_parameters():
            W.copy_(kept[part])


# ---------------------------------------------------------------------------------------- full weights


def full_updates(base: Path, tuned: Path, device: torch.device | str = "cpu") -> list[LayerUpdate]:
    """Every tensor of two folders of full weights, read one pair at a time.

    Embeddings of different length are compared on their shared rows; an output embedding that one model has tied is
    compared with the other's.
    """
    ours, theirs = tensor_files(weight_files(base)), tensor_files(weight_files(tuned))
    updates = []
    with steps("weights", len(theirs)) as progress:
        for name in sorted(theirs):
            W = _read(ours, _counterpart(name, ours, base), device)
            other = _read(theirs, name, device)
            updates.append(_of_difference(name, *_shared_rows(name, W, other)))
            progress.advance()
    return updates


def _counterpart(name: str, ours: dict[str, Path], base: Path) -> str:
    if name in ours:
        return name
    if name.endswith("lm_head.weight") and (tied := [mine for mine in ours if mine.endswith("embed_tokens.weight")]):
        return tied[0]
    raise RunError(f"{base}: has no tensor {name}; the models are of different architectures")


def _shared_rows(name: str, W: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
    if W.shape == tuned.shape:
        return W, tuned
    if W.ndim != 2 or W.shape[1:] != tuned.shape[1:] or not name.endswith(("embed_tokens.weight", "lm_head.weight")):
        raise RunError(
            f"{name}: has the shape {tuple(tuned.shape)}, not {tuple(W.shape)}; the models are of different sizes"
        )
    rows = min(len(W), len(tuned))
    return W[:rows], tuned[:rows]


def _read(files: dict[str, Path], name: str, device: torch.device | str) -> Tensor:
    with open_tensors(files[name]) as tensors:
        return tensors.get_tensor(name).to(device)
