"""A curve of low loss between two adapters: the middle point of a quadratic Bézier curve, trained.

    min_{θ_m} E_{λ ~ U(0, 1)} L((1 - λ)² θ_a + 2 λ (1 - λ) θ_m + λ² θ_b)      (Garipov et al. 2018, arXiv 1802.10026)

It begins at θ_m = (θ_a + θ_b) / 2, where the curve is the straight line. Each step draws one λ. The ends are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from forgetless.data.batches import Example, collate, split, weigh
from forgetless.data.streams import JUDGED_SEED
from forgetless.errors import RunError
from forgetless.geometry.points import COMBINED, FACTORS, Corner, fill, on_curve
from forgetless.learning.engine import Engine
from forgetless.learning.step import TrainSettings, plan
from forgetless.model.adapters import Pair, pairs_of
from forgetless.model.answers import logits_at, token_losses
from forgetless.seeds import generator


@dataclass(frozen=True)
class CurveSettings:
    """How the middle point is trained: AdamW with a constant learning rate."""

    steps: int
    learning_rate: float = 1e-3
    batch_size: int = 8
    micro_batch_size: int = 4
    max_grad_norm: float = 1.0
    seed: int = JUDGED_SEED  # of the rows' order and of λ


def straight_middle(a: Corner, b: Corner, within: str) -> dict[str, Pair]:
    """θ_m of the straight line: in factors of the ends' rank and scale, in the product of both ranks together."""
    middle = COMBINED[within]([a, b], [0.5, 0.5])
    if within == FACTORS:
        return {layer: as_factors(pair, a[layer].scale) for layer, pair in middle.items()}
    return middle


def as_factors(pair: Pair, scale: float) -> Pair:
    """The same product with another scale, which B makes up for."""
    return Pair(pair.A, pair.B * (pair.scale / scale), scale)


def trained_middle(
    model: PeftModel, a: Corner, b: Corner, within: str, examples: Sequence[Example], settings: CurveSettings,
    engine: Engine, pad: int, log: Callable[[float], None],
) -> dict[str, Pair]:  # fmt: skip
    """The middle point after training on the examples; `model` has an adapter of the three points' ranks on its base.

    The model computes with the combined pairs; their gradients go through the combination to the middle's A and B.
    """
    device = model.device
    a, b = (_on(corner, device) for corner in (a, b))
    start = _on(straight_middle(a, b, within), device)
    middle = {
        layer: Pair(pair.A.clone().requires_grad_(), pair.B.clone().requires_grad_(), pair.scale)
        for layer, pair in start.items()
    }
    trained = _tensors(middle)
    placed = [one.requires_grad_() for one in _tensors(pairs_of(model))]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    draw = generator("curve", settings.seed)
    order = TrainSettings(batch_size=settings.batch_size, group_by_length=False)
    batches = plan(list(examples), order, "curve", settings.seed)
    try:
        for step, batch in zip(range(1, settings.steps + 1), batches, strict=False):
            t = float(torch.rand((), generator=draw))
            combined = COMBINED[within]([a, middle, b], on_curve(t))
            fill(model, combined)
            loss = _backward(model, batch, settings.micro_batch_size, engine, pad)
            layers = pairs_of(model)
            torch.autograd.backward(
                [tensor for layer in layers for tensor in combined[layer][:2]], [one.grad for one in placed]
            )
            norm = float(torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm))
            if not math.isfinite(loss + norm):
                raise RunError(f"curve, step {step}: loss {loss}, gradient norm {norm}; lower learning_rate")
            optimizer.step()
            optimizer.zero_grad()
            for one in placed:
                one.grad = None
            log(loss)
    finally:
        for one in placed:
            one.requires_grad_(False)
    return {layer: Pair(pair.A.detach().cpu(), pair.B.detach().cpu(), pair.scale) for layer, pair in middle.items()}


def _backward(model: PeftModel, batch: list[Example], size: int, engine: Engine, pad: int) -> float:
    """The gradient of the mean of -log p(answer token), which is returned, in the model's pairs."""
    total = 0.0
    for chosen in split(weigh(batch, 1.0), size):
        part = collate(chosen, pad, engine.device)
        with engine.autocast():
            logits = logits_at(model, part.keep, input_ids=part.ids, attention_mask=part.mask)
            loss = (part.weights * token_losses(logits, part.targets)).sum()
        loss.backward()
        total += float(loss.detach())
    return total


def _tensors(pairs: Corner) -> list[Tensor]:
    return [tensor for pair in pairs.values() for tensor in (pair.A, pair.B)]


def _on(corner: Corner, device: torch.device) -> dict[str, Pair]:
    return {layer: Pair(pair.A.to(device), pair.B.to(device), pair.scale) for layer, pair in corner.items()}
