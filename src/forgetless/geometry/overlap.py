"""How far the updates of several adapters lie over one another: entry by entry, by direction, by size.

With ΔW = s B A = U diag(σ) V^T, for two updates i and j of a layer with n = out x in entries:

    collision rate     CR = |{|ΔW_i| > τ_i} ∩ {|ΔW_j| > τ_j}| / n,  τ = k rms(ΔW),  rms = ‖ΔW‖_F / √n
    by chance          CR_ii CR_jj, what independent places give; CR_ii is the density
    inner product      <ΔW_i, ΔW_j> = Σ σ_i C ∘ D σ_j,    C = U_i^T U_j, D = V_i^T V_j
    output side        ‖ΔW_i^T ΔW_j‖_F = ‖diag(σ_i) C diag(σ_j)‖_F     0 where both write to orthogonal directions
    input side         ‖ΔW_i ΔW_j^T‖_F = ‖diag(σ_i) D diag(σ_j)‖_F     0 where both read from orthogonal directions
    by chance          ‖ΔW_i‖_F ‖ΔW_j‖_F / √out and / √in: the same updates turned at random (root mean square)
    principal angles   arccos of the singular values of C (column spaces) and of D (row spaces)
    shared directions  ‖C‖_F² / min(k_i, k_j), ‖D‖_F² / min(k_i, k_j)     (φ of Hu et al. 2021, arXiv 2106.09685)
    by chance          k_i k_j / out, k_i k_j / in, each over min(k_i, k_j): random directions of those ranks
    sparsity           ‖ΔW‖_1 / (√n ‖ΔW‖_F), from 1/√n (one entry) to 1 (all entries of one size)

Collisions, inner product and the two products are three things. Without a collision at τ = 0 the inner product is 0,
while ΔW_i^T ΔW_j and ΔW_i ΔW_j^T need not be; and dense updates, which collide everywhere, can have all three 0. None
of them measures what a model forgets.

The factors' own products, A_i A_j^T (input side; the penalty in O-LoRA's code, arXiv 2310.14152) and B_i^T B_j (output
side), depend on how a product is shared between its factors: (2 B)(A / 2) has others. In total, sums run over the
layers that any of the adapters changes; an adapter that leaves a layer alone has ΔW = 0 there. All but collisions,
densities and ‖ΔW‖_1 comes from the factors alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from forgetless.auditing.weights import effective_rank
from forgetless.errors import UsageError
from forgetless.geometry.collisions import count_collisions
from forgetless.model.adapters import Pair
from forgetless.model.identity import json_digest, weights_digest
from forgetless.progress import steps
from forgetless.subjects.layouts import short_names
from forgetless.subjects.models import AdapterFolder, find_adapters, same_model
from forgetless.subjects.updates import Decomposed, Update, compressed, decomposed, read_update, weighted

THRESHOLDS = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0)  # k, times the rms entry of an update in a layer
SHOWN_AT = 1.0  # the threshold that maps show: entries larger than is usual in their layer
NO_PRODUCT = "overlap compares LoRA adapters; peft's save_as_lora turns many other types into the nearest one"

Couple = tuple[int, int]


@dataclass(frozen=True)
class Size:
    """One adapter's update in a layer, or in all of them."""

    entries: int
    rank: int  # summed over layers
    layers: int
    norm: float
    l1: float
    nuclear_norm: float
    effective_ranks: float  # summed over layers
    above: np.ndarray  # (T,) entries that exceed each threshold

    @property
    def densities(self) -> list[float]:
        return (self.above / self.entries).tolist()

    @property
    def sparsity(self) -> float | None:
        """‖ΔW‖_1 / (√n ‖ΔW‖_F); None for no update."""
        return self.l1 / (math.sqrt(self.entries) * self.norm) if self.norm else None

    def as_json(self) -> dict:
        return {
            "rank": self.rank,
            "norm": self.norm,
            "l1": self.l1,
            "generalised_sparsity": self.sparsity,
            "nuclear_norm": self.nuclear_norm,
            "effective_rank": self.effective_ranks / self.layers if self.layers else 0.0,
            "densities": self.densities,
        }


@dataclass(frozen=True)
class Meeting:
    """Two adapters' updates in a layer; sums, so that those of all layers add up."""

    collisions: np.ndarray  # (T,) entries in which both exceed the threshold
    by_chance: np.ndarray  # (T,) how many independent places give
    inner: float
    output_side: float  # ‖ΔW_i^T ΔW_j‖_F²
    input_side: float  # ‖ΔW_i ΔW_j^T‖_F²
    sizes: np.ndarray  # ‖ΔW_i‖_F² ‖ΔW_j‖_F², which neither exceeds; over out; over in
    factors: np.ndarray  # Σ|A_i A_j^T|, Σ(A_i A_j^T)², Σ|B_i^T B_j|, Σ(B_i^T B_j)²
    shared: np.ndarray  # ‖C‖_F², ‖D‖_F², what random directions give for each, min(k_i, k_j)
    angles: tuple[list[float], list[float]]  # between column spaces, between row spaces; degrees, rising

    def __add__(self, other: Meeting) -> Meeting:
        return Meeting(
            self.collisions + other.collisions,
            self.by_chance + other.by_chance,
            self.inner + other.inner,
            self.output_side + other.output_side,
            self.input_side + other.input_side,
            self.sizes + other.sizes,
            self.factors + other.factors,
            self.shared + other.shared,
            ([], []),
        )

    def as_json(self, entries: int, norms: float) -> dict:
        """`entries`: those that rates are shares of; `norms`: ‖ΔW_i‖_F ‖ΔW_j‖_F."""
        columns, rows, random_columns, random_rows, directions = self.shared.tolist()
        most, turned, turned_inputs = self.sizes.tolist()
        told: dict = {
            "collision_rate": (self.collisions / entries).tolist(),
            "by_chance": (self.by_chance / entries).tolist(),
            "inner_product": self.inner,
            "cosine": _share(self.inner, norms),
            "output_side": _side(self.output_side, most, by_chance=turned),
            "input_side": _side(self.input_side, most, by_chance=turned_inputs),
            "factors": dict(zip(("A_abs", "A_squares", "B_abs", "B_squares"), self.factors.tolist(), strict=True)),
            "column_spaces": {"shared": _share(columns, directions), "by_chance": _share(random_columns, directions)},
            "row_spaces": {"shared": _share(rows, directions), "by_chance": _share(random_rows, directions)},
        }
        for space, angles in zip(("column_spaces", "row_spaces"), self.angles, strict=True):
            if angles:
                told[space]["angles"] = angles
        return told


def _share(part: float, whole: float) -> float | None:
    """None of nothing: two updates of which one is zero have no angle."""
    return part / whole if whole else None


def _side(square: float, most: float, by_chance: float) -> dict:
    """A product's norm, and relative to the largest that updates of these norms can have; the arguments are squares."""
    relative, chance = (math.sqrt(part / most) if most else None for part in (square, by_chance))
    return {"norm": math.sqrt(square), "square": square, "relative": relative, "by_chance": chance}


@dataclass(frozen=True)
class LayerOverlap:
    """The adapters that change a layer, and every two of them, by their numbers."""

    layer: str
    shape: tuple[int, int]  # out, in
    sizes: Mapping[int, Size]
    meetings: Mapping[Couple, Meeting]

    @property
    def entries(self) -> int:
        return self.shape[0] * self.shape[1]


# ---------------------------------------------------------------------------------------- from names to a record


def overlap(
    models: Sequence[str | Path],
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    base_is: str | None = None,
    increments: bool = False,
    allow_pickle: bool = False,
) -> dict:
    """How far LoRA adapters of any trainer lie over one another, by layer, by pair and in total; what overlap.json has.

    `models`: adapter folders, trainers' output folders, hub names, or run folders, which stand for all their tasks.
    Their base need not be here. `thresholds`: multiples of the rms entry of an update in a layer. `base_is`: all are
    on this base, whatever their configurations call it. `increments`: of each adapter only what it adds to the one
    before it. `allow_pickle`: `.bin` files are read, tensors only. Raises UsageError where there is nothing to compare.
    """
    levels = _checked(thresholds)
    found = [one for model in models for one in find_adapters(str(model), allow_pickle=allow_pickle)]
    _check(found, base_is)
    updates = [read_update(one.folder, one.name, NO_PRODUCT) for one in found]
    if increments:
        updates = [updates[0], *(increment(before, after) for before, after in pairwise(updates))]
    layers = compare_updates(updates, levels)
    told = {"base": base_is or next((one.base for one in found if one.base), ""), "increments": increments}
    record = told | {"notes": _notes(found, base_is, increments)} | as_record(updates, layers, levels)
    for one, adapter in zip(record["adapters"], found, strict=True):
        one["sha256"] = weights_digest([adapter.folder / SAFETENSORS_WEIGHTS_NAME])
    return record


def usual_folder(record: dict) -> Path:
    """Named by what is compared: the same adapters again, the same folder."""
    first, *others = names = [one["name"] for one in record["adapters"]]
    digest = json_digest([[one["sha256"] for one in record["adapters"]], record["increments"]])
    name = re.sub(r"[^\w.-]+", "-", short_names(names)[first])
    return Path(f"runs/overlap-{name}-and-{len(others)}-more-{digest[:6]}")


def _checked(thresholds: Sequence[float]) -> list[float]:
    levels = sorted(set(map(float, thresholds)))
    if not levels or not all(level >= 0 and math.isfinite(level) for level in levels):
        raise UsageError(f"thresholds {list(thresholds)}: multiples of the rms entry, 0 or more, at least one")
    return levels


def _check(found: Sequence[AdapterFolder], base_is: str | None) -> None:
    if len(found) < 2:
        names = ", ".join(one.name for one in found) or "none"
        raise UsageError(f"overlap: {names} given; two adapters or more are needed, or a run with two finished tasks")
    folders = [one.folder.resolve() for one in found]
    for one, folder in zip(found, folders, strict=True):
        if folders.count(folder) > 1:
            raise UsageError(f"{one.name}: {folder} is given twice; give each adapter once")
    named = [one for one in found if one.base]
    for other in named[1:]:
        if not base_is and not same_model(named[0].base, other.base):
            raise UsageError(
                f"{named[0].name} was trained on {named[0].base!r}, {other.name} on {other.base!r}: entries of "
                "different models have nothing to do with one another. If both are one model (another name, a 4-bit "
                f"twin), say base_is={named[0].base!r} (--base-is {named[0].base})."
            )


def _notes(found: Sequence[AdapterFolder], base_is: str | None, increments: bool) -> list[str]:
    notes = list(dict.fromkeys(note for one in found for note in one.notes))
    if base_is and (other := sorted({one.base for one in found} - {base_is, ""})):
        notes.append(f"adapters on {', '.join(other)} are taken for adapters on {base_is} as declared, not verified")
    homes = [home for one in found if (home := one.folder.absolute().parents[1]).name == "tasks"]
    if not increments and len(homes) > len(set(homes)):
        notes.append(
            "the adapter after a task of a run holds what earlier tasks added too, unless each task has its own; "
            "--increments compares what each task added"
        )
    return notes


def increment(before: Update, after: Update) -> Update:
    """What an adapter adds to the one before it: ΔW_after - ΔW_before of each layer.

    Where the earlier factors are still the first ones of the later adapter, as in incremental fine-tuning, the rest
    of them is it, to the bit; otherwise the difference is factored anew.
    """
    layers = {}
    for layer, summed in weighted([after.layers, before.layers], [1.0, -1.0]).items():
        old, new = before.layers.get(layer), after.layers.get(layer)
        if old is not None and new is not None:
            _check_shape(layer, before.name, old, after.name, new)
        rest = _rest(old, new) if old is not None and new is not None else None
        layers[layer] = rest or (compressed(summed, summed.A.shape[0]) if old is not None else summed)
    return replace(after, layers=layers)


def _rest(old: Pair, new: Pair) -> Pair | None:
    """The later pair without the earlier one, where it begins with it."""
    rank = old.A.shape[0]
    if not torch.equal(old.A, new.A[:rank]) or not torch.allclose(
        old.scale * old.B, new.scale * new.B[:, :rank], rtol=1e-6, atol=0.0
    ):
        return None
    if rank == new.A.shape[0]:  # nothing was added
        return Pair(new.A, torch.zeros_like(new.B), new.scale)
    return Pair(new.A[rank:], new.B[:, rank:], new.scale)


# ---------------------------------------------------------------------------------------- layer by layer


def compare_updates(updates: Sequence[Update], thresholds: Sequence[float]) -> list[LayerOverlap]:
    """Every layer that any of the updates changes, those of one kind after one another; on torch's number of threads.

    Raises UsageError where no two of them change a layer together, or a layer has different shapes.
    """
    names = sorted({layer for update in updates for layer in update.layers}, key=_natural)
    given = {name: {i: one.layers[name] for i, one in enumerate(updates) if name in one.layers} for name in names}
    for name, pairs in given.items():
        first, *others = pairs
        for other in others:
            _check_shape(name, updates[first].name, pairs[first], updates[other].name, pairs[other])
    if all(len(pairs) < 2 for pairs in given.values()):
        told = "; ".join(f"{one.name} changes {_kinds(one.layers)}" for one in updates)
        raise UsageError(f"overlap: no two adapters change a layer together: {told}. Give adapters on the same modules")
    layers = []
    with steps("overlap", len(names)) as progress, ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for layer in pool.map(lambda name: compare_layer(name, given[name], thresholds), names):
            layers.append(layer)
            progress.advance()
    return layers


def compare_layer(layer: str, pairs: Mapping[int, Pair], thresholds: Sequence[float]) -> LayerOverlap:
    """One layer of the adapters that change it."""
    numbers, shape = list(pairs), _shape(next(iter(pairs.values())))
    entries = shape[0] * shape[1]
    parts = {i: _without_rounding(decomposed(pair), max(shape)) for i, pair in pairs.items()}
    norms = {i: float(part.sigma.norm()) for i, part in parts.items()}
    rms = np.array([norms[i] / math.sqrt(entries) for i in numbers])
    counts = count_collisions([pairs[i] for i in numbers], np.outer(thresholds, rms))
    sizes = {
        i: Size(
            entries=entries,
            rank=len(parts[i].sigma),
            layers=1,
            norm=norms[i],
            l1=float(counts.l1[at]),
            nuclear_norm=float(parts[i].sigma.sum()),
            effective_ranks=effective_rank(parts[i].sigma),
            above=counts.collisions[:, at, at],
        )
        for at, i in enumerate(numbers)
    }
    meetings = {}
    for (a, i), (b, j) in combinations(enumerate(numbers), 2):
        chance = sizes[i].above * sizes[j].above / entries
        meetings[i, j] = _meeting(parts[i], parts[j], pairs[i], pairs[j], counts.collisions[:, a, b], chance)
    return LayerOverlap(layer, shape, sizes, meetings)


def _meeting(
    one: Decomposed, other: Decomposed, pair: Pair, second: Pair, collisions: np.ndarray, by_chance: np.ndarray
) -> Meeting:
    C, D = one.U.T @ other.U, one.V.T @ other.V  # (k_i, k_j)
    weights = one.sigma[:, None] * other.sigma
    fewest = min(C.shape)
    chance = [C.numel() / len(one.U), C.numel() / len(one.V)]
    A, B = pair.A.double() @ second.A.double().T, pair.B.double().T @ second.B.double()
    return Meeting(
        collisions=collisions,
        by_chance=by_chance,
        inner=float((weights * C * D).sum()),
        output_side=float((weights * C).square().sum()),
        input_side=float((weights * D).square().sum()),
        sizes=float(one.sigma.square().sum() * other.sigma.square().sum()) / np.array([1, len(one.U), len(one.V)]),
        factors=np.array([float(each) for M in (A, B) for each in (M.abs().sum(), M.square().sum())]),
        shared=np.array([float(C.square().sum()), float(D.square().sum()), *chance, fewest]),
        angles=(_angles(C), _angles(D)),
    )


def _without_rounding(part: Decomposed, side: int) -> Decomposed:
    """The directions of the update alone: singular values that rounding can have made are left out."""
    kept = part.sigma > part.sigma.amax() * side * torch.finfo(part.sigma.dtype).eps
    return Decomposed(part.U[:, kept], part.sigma[kept], part.V[:, kept])


def _angles(cosines: Tensor) -> list[float]:
    """Principal angles in degrees, the smallest first; (k_i, k_j) -> min(k_i, k_j)."""
    return torch.rad2deg(torch.linalg.svdvals(cosines).clamp(max=1.0).acos()).tolist() if cosines.numel() else []


def _shape(pair: Pair) -> tuple[int, int]:
    return pair.B.shape[0], pair.A.shape[1]


def _check_shape(layer: str, name: str, pair: Pair, other: str, second: Pair) -> None:
    if _shape(pair) != _shape(second):
        raise UsageError(
            f"{layer}: {name} changes {_shape(pair)}, {other} {_shape(second)} entries; adapters of one base are needed"
        )


def _natural(layer: str) -> tuple:
    """Layers of one kind in the order of their numbers: q_proj of layer 2 before that of layer 10."""
    return layer.rsplit(".", 1)[-1], [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", layer)]


def _kinds(layers: Iterable[str]) -> str:
    return ", ".join(sorted({layer.rsplit(".", 1)[-1] for layer in layers}))


# ---------------------------------------------------------------------------------------- in total


def as_record(updates: Sequence[Update], layers: Sequence[LayerOverlap], thresholds: Sequence[float]) -> dict:
    """What overlap.json has: adapters, pairs and layers in one form; the rates are lists along the thresholds."""
    entries = sum(layer.entries for layer in layers)
    sizes = [_summed(layers, i, len(thresholds)) for i in range(len(updates))]
    couples = list(combinations(range(len(updates)), 2))
    totals = {couple: _met(layers, couple, len(thresholds)) for couple in couples}
    pairs = [
        {"pair": list(couple), "layers": sum(couple in layer.meetings for layer in layers)}
        | totals[couple].as_json(entries, sizes[couple[0]].norm * sizes[couple[1]].norm)
        for couple in couples
    ]
    return {
        "format": 1,
        "thresholds": list(thresholds),
        "threshold_unit": "times the rms entry of an update in a layer",
        "shown_at": _shown(thresholds),
        "entries": entries,
        "adapters": [
            {"name": one.name, "layers": size.layers} | size.as_json() for one, size in zip(updates, sizes, strict=True)
        ],
        "pairs": pairs,
        "average_collision_rate": np.mean([one["collision_rate"] for one in pairs], axis=0).tolist(),
        "average_by_chance": np.mean([one["by_chance"] for one in pairs], axis=0).tolist(),
        "with_earlier": [_with_earlier(totals, j) for j in range(1, len(updates))],
        "layers": [_layer_json(layer) for layer in layers],
    }


def _summed(layers: Sequence[LayerOverlap], i: int, levels: int) -> Size:
    own = [layer.sizes[i] for layer in layers if i in layer.sizes]
    return Size(
        entries=sum(layer.entries for layer in layers),
        rank=sum(one.rank for one in own),
        layers=len(own),
        norm=math.hypot(*(one.norm for one in own)),
        l1=sum(one.l1 for one in own),
        nuclear_norm=sum(one.nuclear_norm for one in own),
        effective_ranks=sum(one.effective_ranks for one in own),
        above=sum((one.above for one in own), np.zeros(levels, np.int64)),
    )


def _met(layers: Sequence[LayerOverlap], couple: Couple, levels: int) -> Meeting:
    nothing = Meeting(
        np.zeros(levels), np.zeros(levels), 0.0, 0.0, 0.0, np.zeros(3), np.zeros(4), np.zeros(5), ([], [])
    )
    return sum((layer.meetings[couple] for layer in layers if couple in layer.meetings), nothing)


def _with_earlier(totals: Mapping[Couple, Meeting], j: int) -> dict:
    """An adapter against all that were given before it: Σ_{i<j} ‖A_i A_j^T‖_F² and Σ_{i<j} ‖ΔW_i^T ΔW_j‖_F²."""
    earlier = [totals[i, j] for i in range(j)]
    return {
        "adapter": j,
        "A_squares": sum(float(one.factors[1]) for one in earlier),
        "output_side_squares": sum(one.output_side for one in earlier),
    }


def _layer_json(layer: LayerOverlap) -> dict:
    sizes = layer.sizes
    return {
        "layer": layer.layer,
        "shape": list(layer.shape),
        "adapters": [{"adapter": i} | size.as_json() for i, size in sizes.items()],
        "pairs": [
            {"pair": [i, j]} | meeting.as_json(layer.entries, sizes[i].norm * sizes[j].norm)
            for (i, j), meeting in layer.meetings.items()
        ],
    }


def _shown(thresholds: Sequence[float]) -> float:
    return SHOWN_AT if SHOWN_AT in thresholds else thresholds[-1]
