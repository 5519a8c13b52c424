"""Points Σ_i w_i θ_i between a few models, the corners, set in place in one model that stays loaded.

product   ΔW = Σ w_i s_i B_i A_i = [w_1 s_1 B_1 ... w_n s_n B_n] [A_1; ...; A_n]    any layers, ranks and scales
factors   A = Σ w_i A_i,  B = Σ w_i B_i,  ΔW = s B A                                 equal layers, ranks and scales
weights   W = Σ w_i W_i                                                             whole weights

Between two adapters the first two differ, since the factors' product has mixed terms:

    B(λ) A(λ) = (1-λ)² B_0 A_0 + λ (1-λ) (B_0 A_1 + B_1 A_0) + λ² B_1 A_1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from forgetless.errors import UsageError
from forgetless.model.adapters import Pair, pairs_of
from forgetless.model.identity import open_tensors, tensor_files, weight_files
from forgetless.subjects.models import Subject
from forgetless.subjects.updates import inner, weighted

PRODUCT, FACTORS, WHOLE = "product", "factors", "weights"

Corner = Mapping[str, Pair]  # layer -> its pair; without layers: the base itself
Weights = tuple[float, ...]  # one for each corner, 1 in all


# ---------------------------------------------------------------- which points


def line(points: int) -> list[float]:
    """λ from 0 to 1.

    >>> line(5)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    return [i / (points - 1) for i in range(points)]


def on_line(t: float) -> Weights:
    """φ(λ) = (1 - λ) θ_a + λ θ_b."""
    return 1 - t, t


def on_curve(t: float) -> Weights:
    """φ(λ) = (1 - λ)² θ_a + 2 λ (1 - λ) θ_m + λ² θ_b, a quadratic Bézier curve. (Garipov et al. 2018)"""
    return (1 - t) ** 2, 2 * t * (1 - t), t**2


@dataclass(frozen=True)
class Plane:
    """The plane through three models.

    u = θ_2 - θ_1,  v = (θ_3 - θ_1) - c u,  c = <θ_3 - θ_1, u> / <u, u>      (Garipov et al. 2018)
    θ(x, y) = θ_1 + x u/‖u‖ + y v/‖v‖
    """

    u: float  # ‖u‖
    v: float  # ‖v‖
    c: float

    @classmethod
    def through(cls, gram: np.ndarray) -> Plane:
        """From <θ_i - θ_1, θ_j - θ_1>, i and j in (2, 3). UsageError where the three lie on one line."""
        (uu, uw), (_, ww) = gram.tolist()
        vv = ww - uw**2 / uu if uu > 0 else 0.0
        if uu <= 0 or vv <= 1e-10 * ww:
            raise UsageError("the three models lie on one line, or two are the same: there is no plane through them")
        return cls(math.sqrt(uu), math.sqrt(vv), uw / uu)

    @property
    def corners(self) -> list[tuple[float, float]]:
        """Where the three models lie."""
        return [(0.0, 0.0), (self.u, 0.0), (self.c * self.u, self.v)]

    def weights(self, x: float, y: float) -> Weights:
        along, up = x / self.u, y / self.v
        second = along - self.c * up
        return 1 - second - up, second, up

    def grid(self, points: int) -> tuple[list[float], list[float]]:
        """x and y of a grid that covers the three, with a fifth of their extent around them."""
        x, y = zip(*self.corners, strict=True)
        return _spread(x, points), _spread(y, points)


def _spread(values: Sequence[float], points: int) -> list[float]:
    margin = 0.2 * (max(values) - min(values))
    return np.linspace(min(values) - margin, max(values) + margin, points).tolist()


# ---------------------------------------------------------------- adapters at a point


def in_product(corners: Sequence[Corner], weights: Sequence[float]) -> dict[str, Pair]:
    """Pairs of scale 1 whose product is Σ w_i s_i B_i A_i; all ranks are kept, so that equal corners fit one model."""
    joined = {}
    for layer in _layers(corners):
        parts = [(corner[layer], w) for corner, w in zip(corners, weights, strict=True) if layer in corner]
        A = torch.cat([pair.A for pair, _ in parts])
        B = torch.cat([w * pair.scale * pair.B for pair, w in parts], dim=1)
        joined[layer] = Pair(A, B, 1.0)
    return joined


def in_factors(corners: Sequence[Corner], weights: Sequence[float]) -> dict[str, Pair]:
    """Pairs of scale 1 from Σ w_i A_i and s Σ w_i B_i."""
    summed = {}
    for layer in _layers(corners):
        pairs = [corner[layer] for corner in corners]
        A = torch.stack([w * pair.A for pair, w in zip(pairs, weights, strict=True)]).sum(0)
        B = torch.stack([w * pair.B for pair, w in zip(pairs, weights, strict=True)]).sum(0)
        summed[layer] = Pair(A, pairs[0].scale * B, 1.0)
    return summed


COMBINED: dict[str, Callable[[Sequence[Corner], Sequence[float]], dict[str, Pair]]] = {
    PRODUCT: in_product,
    FACTORS: in_factors,
}


def check_factors(corners: Mapping[str, Corner]) -> None:
    """UsageError where the factors of the adapters (by name) cannot be added up."""
    (first, one), *others = corners.items()
    for name, other in others:
        if one.keys() != other.keys() or not one:
            layer = min(one.keys() ^ other.keys(), default="every layer")
            raise UsageError(f"in factors: {layer} is changed by one of {first} and {name} only; use --in product")
        for layer, pair in one.items():
            mine, theirs = _shape(pair), _shape(other[layer])
            if mine != theirs:
                raise UsageError(
                    f"in factors: {layer}: A, B and scale are {mine} in {first} and {theirs} in {name}; only equal "
                    "ones have points between their factors; use --in product"
                )


def _shape(pair: Pair) -> tuple:
    return tuple(pair.A.shape), tuple(pair.B.shape), round(pair.scale, 6)


def _layers(corners: Sequence[Corner]) -> list[str]:
    return list(dict.fromkeys(layer for corner in corners for layer in corner))


# ---------------------------------------------------------------- in place


class Placed(Protocol):
    """A loaded model that can be brought to any point."""

    def put(self, weights: Sequence[float]) -> None: ...


@dataclass(frozen=True)
class PlacedAdapter:
    """An adapter on its base, with the ranks that a combination of these corners has."""

    model: PeftModel
    corners: Sequence[Corner]
    within: str  # PRODUCT or FACTORS

    def put(self, weights: Sequence[float]) -> None:
        fill(self.model, COMBINED[self.within](self.corners, weights))


def fill(model: PeftModel, pairs: Mapping[str, Pair]) -> None:
    """Overwrites the adapter of a model with pairs of scale 1."""
    mine = pairs_of(model)
    assert mine.keys() == pairs.keys() and all(pair.scale == 1.0 for pair in mine.values())
    with torch.no_grad():
        for layer, pair in pairs.items():
            mine[layer].A.copy_(pair.A)
            mine[layer].B.copy_(pair.B)
    torch.clear_autocast_cache()  # autocast keeps bf16 copies by tensor, not by content


@dataclass(frozen=True)
class PlacedWeights:
    """Whole weights; all corners are in memory, beside the model. Sums in fp32, rounded to the model's precision."""

    model: torch.nn.Module
    corners: Sequence[Mapping[str, Tensor]]  # state dictionaries

    def put(self, weights: Sequence[float]) -> None:
        for name, tensor in self.model.state_dict().items():
            parts = [(corner[name], w) for corner, w in zip(self.corners, weights, strict=True) if w]
            if len(parts) == 1 or not tensor.is_floating_point():
                tensor.copy_(parts[0][0])
            else:
                tensor.copy_(torch.stack([w * part.float() for part, w in parts]).sum(0))
        torch.clear_autocast_cache()


# ---------------------------------------------------------------- distances


@dataclass(frozen=True)
class Distances:
    """<θ_i - θ_1, θ_j - θ_1> of the corners after the first, and ‖θ_1‖."""

    gram: np.ndarray  # (corners - 1, corners - 1)
    norm: float

    def as_json(self) -> dict[str, float | None]:
        """‖θ_2 - θ_1‖, and as a share of ‖θ_1‖ where that is not 0."""
        absolute = math.sqrt(max(0.0, float(self.gram[0, 0])))
        return {"absolute": absolute, "relative": absolute / self.norm if self.norm else None}


def distances(corners: Sequence[Corner], within: str) -> Distances:
    """Of adapters: Frobenius products of the updates ΔW, or of all entries of A and B, in fp64."""
    first, *others = corners
    dot = _product_dot if within == PRODUCT else _factors_dot
    moves = [_minus(other, first, within) for other in others]
    gram = np.array([[dot(one, other) for other in moves] for one in moves])
    return Distances(gram, math.sqrt(max(0.0, dot(first, first))))


def _minus(one: Corner, other: Corner, within: str) -> Corner:
    if within == PRODUCT:
        return weighted([one, other], [1.0, -1.0])
    return {layer: Pair(pair.A - other[layer].A, pair.B - other[layer].B, pair.scale) for layer, pair in one.items()}


def _product_dot(one: Corner, other: Corner) -> float:
    return sum(inner(one[layer], other[layer]) for layer in one.keys() & other.keys())


def _factors_dot(one: Corner, other: Corner) -> float:
    return sum(
        float((getattr(one[layer], side).double() * getattr(other[layer], side).double()).sum())
        for layer in one
        for side in "AB"
    )


def weight_distances(subjects: Sequence[Subject]) -> Distances:
    """Of whole weights, tensor by tensor, in fp64."""
    gram, square = np.zeros((len(subjects) - 1,) * 2), 0.0
    for first, *others in _aligned(subjects):
        moves = [(other - first).flatten() for other in others]
        gram += np.array([[float(one @ other) for other in moves] for one in moves])
        square += float(first.flatten() @ first.flatten())
    return Distances(gram, math.sqrt(square))


def _aligned(subjects: Sequence[Subject]) -> Iterator[list[Tensor]]:
    """Every tensor of the first model with those of the same name."""
    places = [tensor_files(weight_files(one.base)) for one in subjects]
    for name in places[0]:
        found = []
        for place in places:
            with open_tensors(place[name]) as tensors:
                found.append(tensors.get_tensor(name))
        if found[0].is_floating_point():
            yield [tensor.double() for tensor in found]
