"""Several updates of one base as one, layer by layer.

sum       ΔW = Σ w_i ΔW_i                                    exact, the ranks add up
slao      A = A_n,  B = B^(n),  B^(i) = B^(i-1) + (B_i - B^(i-1)) / √i,  B^(0) = 0, i in the order of learning
          (SLAO, arXiv:2512.23017: the merge alone; its adapters each start from the one before)
fisher    ΔW = Σ w_i (F_i + ε) ∘ ΔW_i / Σ w_i (F_i + ε)      (Matena and Raffel 2022, arXiv:2111.09832, eq. 4)
linear, ties, dare_linear, dare_ties         PEFT's operators on the factors √(w_i s_i) A_i and √(w_i s_i) B_i
ties_svd, dare_linear_svd, dare_ties_svd     the same on the products s_i B_i A_i

A layer that only some of the updates have is made of those that have it, as in PEFT; `fisher` counts the others as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, task_arithmetic, ties
from torch import Tensor

from forgetless.errors import UsageError
from forgetless.methods.slao import merged as slao_merge
from forgetless.model.adapters import Pair
from forgetless.subjects.updates import weighted

Layers = Mapping[str, Pair]
Operator = Callable[[list[Tensor], Tensor], Tensor]  # (one tensor an update, their weights) -> one

PRUNED = {"ties": ties, "dare_linear": dare_linear, "dare_ties": dare_ties}  # PEFT's, with a density
FISHER = "fisher"
FLOOR = (
    1e-6  # ε of `fisher`, in mean entries of the layer's Fisher information: where it is 0 everywhere, a mean is left
)


def usual_weights(method: str, count: int) -> list[float]:
    """1 each; of `linear` 1/n each."""
    return [1 / count if method == "linear" else 1.0] * count


def combined(
    updates: Sequence[Layers], method: str, weights: Sequence[float], density: float = 0.5, seed: int = 0
) -> dict[str, Pair]:
    """One update out of several by any method but `fisher`. DARE draws from `seed`."""
    if method == "sum":
        return weighted(updates, weights)
    if method == "slao":
        return slao(updates)
    name = method.removesuffix("_svd")
    operator: Operator = partial(PRUNED[name], density=density) if name in PRUNED else task_arithmetic
    by = _by_products if method.endswith("_svd") else _by_factors
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return by(updates, weights, operator)


def _by_factors(updates: Sequence[Layers], weights: Sequence[float], operator: Operator) -> dict[str, Pair]:
    merged = {}
    for layer, given in _by_layer(updates, weights).items():
        _check_ranks(layer, [pair for pair, _ in given])
        strengths = torch.tensor([w * pair.scale for pair, w in given])
        roots = strengths.abs().sqrt()
        A = operator([pair.A for pair, _ in given], roots * strengths.sign())
        B = operator([pair.B for pair, _ in given], roots)
        merged[layer] = Pair(A, B, 1.0)
    return merged


def _by_products(updates: Sequence[Layers], weights: Sequence[float], operator: Operator) -> dict[str, Pair]:
    return {
        layer: of_product(operator([product(pair) for pair, _ in given], torch.tensor([w for _, w in given])))
        for layer, given in _by_layer(updates, weights).items()
    }


def _by_layer(updates: Sequence[Layers], weights: Sequence[float]) -> dict[str, list[tuple[Pair, float]]]:
    found: dict[str, list[tuple[Pair, float]]] = {}
    for update, w in zip(updates, weights, strict=True):
        for layer, pair in update.items():
            found.setdefault(layer, []).append((pair, w))
    return found


def slao(updates: Sequence[Layers]) -> dict[str, Pair]:
    """The last A, and the B's averaged so that later ones count less and less; updates in the order of learning.

    The factors are averaged one by one, so they must be of one rank and speak of the same directions: adapters that
    were trained apart do not.
    """
    if any(update.keys() != updates[0].keys() for update in updates):
        raise UsageError("slao merges adapters of the same layers, and these differ in them; use sum or fisher")
    merged = {}
    for layer in updates[0]:
        pairs = [update[layer] for update in updates]
        _check_ranks(layer, pairs)
        B = torch.zeros_like(pairs[0].B)
        for i, pair in enumerate(pairs, start=1):
            B = slao_merge(B, pair.scale * pair.B, i)
        merged[layer] = Pair(pairs[-1].A, B, 1.0)
    return merged


def fisher_mean(
    updates: Sequence[Layers], fishers: Iterable[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Pair]:
    """The mean of the products in which each entry counts by its Fisher information; one update's F is held at once.

    `fishers`: for each update F (out, in) of every layer that any of them changes.
    """
    above: dict[str, Tensor] = {}
    below: dict[str, Tensor] = {}
    for update, F, w in zip(updates, fishers, weights, strict=True):
        for layer, information in F.items():
            counts = w * (information + FLOOR * information.mean() + torch.finfo(torch.float32).tiny)
            zero = torch.zeros_like(counts)
            below[layer] = below.get(layer, zero) + counts
            above[layer] = above.get(layer, zero) + (counts * product(update[layer]) if layer in update else zero)
    return {layer: of_product(above.pop(layer) / below.pop(layer)) for layer in list(above)}


def product(pair: Pair) -> Tensor:
    """s B A, (out, in)."""
    return pair.scale * (pair.B @ pair.A)


def of_product(product: Tensor) -> Pair:
    """A matrix (out, in) as a pair of full rank, exactly: one of its factors is the identity."""
    out, inside = product.shape
    return Pair(torch.eye(inside), product, 1.0) if inside <= out else Pair(product, torch.eye(out), 1.0)


def _check_ranks(layer: str, pairs: Sequence[Pair]) -> None:
    ranks = [pair.A.shape[0] for pair in pairs]
    if len(set(ranks)) > 1:
        raise UsageError(
            f"{layer}: the adapters have ranks {', '.join(map(str, ranks))}, and this method needs one rank, since it "
            "merges factor by factor; use sum, fisher or a method that ends with _svd, which merge the products"
        )
