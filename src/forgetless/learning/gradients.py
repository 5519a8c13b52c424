"""Gradients that a method takes besides the step's own: on memory, or row by row. The same on every process.

A gradient is one flat fp32 vector (parameters,) in the order of `Adapters.parameters()`. It is taken without dropout
and in the precision of the base; the step's own gradient in `.grad` is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from forgetless.data.batches import Encoder, Part, collate, split, weigh
from forgetless.data.tasks import Row
from forgetless.learning.processes import gathered, rank_and_count, summed
from forgetless.learning.sharding import in_shards
from forgetless.model.adapters import Adapters
from forgetless.model.answers import logits_at, token_losses

Value = Callable[[int, Tensor, Tensor], Tensor]  # the row's number, logits (answers, vocabulary), targets -> scalar


def mean_gradient(adapters: Adapters, encoder: Encoder, rows: Sequence[Row], size: int) -> Tensor:
    """∂/∂θ of the mean of -log p over the rows' answer tokens; `size` rows go through the model at once.

    The processes share the rows; where each holds a part of the base, all of them take all rows.
    """
    rank, count = (0, 1) if (alike := in_shards(adapters)) else rank_and_count()
    parameters = adapters.parameters()
    total = torch.zeros(sum(parameter.numel() for parameter in parameters), device=parameters[0].device)
    examples = weigh([encoder(row) for row in rows], 1.0)
    for chosen in split(examples[rank::count], size):
        part = _part(adapters, encoder, chosen)
        with evaluating(adapters.model):
            loss = (part.weights * token_losses(_logits(adapters, part), part.targets)).sum()
        total += _derivative(loss, parameters)
    return total if alike else summed(total)


def each_gradient(adapters: Adapters, encoder: Encoder, rows: Sequence[Row], value: Value) -> Iterator[Tensor]:
    """∂ value / ∂θ of each row by itself, in the rows' order. The processes take a row each at a time."""
    rank, count = rank_and_count()
    for start in range(0, len(rows), count):
        several = rows[start : start + count]
        mine = min(rank, len(several) - 1)  # where there are fewer rows than processes the last is done again
        part = _part(adapters, encoder, [encoder(several[mine])])
        with evaluating(adapters.model):
            found = value(start + mine, _logits(adapters, part).float(), part.targets)
        yield from gathered(_derivative(found, adapters.parameters()))[: len(several)]


@contextmanager
def evaluating(model) -> Iterator[None]:
    """No dropout, and products in the precision of the base, inside the block."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.autocast(model.device.type, dtype=model.dtype, enabled=model.dtype != torch.float32):
            yield
    finally:
        if training:
            model.train()


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all entries, in the tensors' order; differentiable."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def shaped(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flat`: views of the vector in the shapes of `like`."""
    pieces = vector.split([tensor.numel() for tensor in like])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, like, strict=True)]


def step_gradient(parameters: Sequence[Tensor]) -> Tensor:
    """The step's own gradient, as one vector."""
    return flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])


def set_step_gradient(parameters: Sequence[Tensor], vector: Tensor) -> None:
    for parameter, gradient in zip(parameters, shaped(vector, parameters), strict=True):
        parameter.grad = gradient


def _part(adapters: Adapters, encoder: Encoder, examples: list) -> Part:
    return collate(examples, encoder.tokenizer.pad_token_id, adapters.device)


def _logits(adapters: Adapters, part: Part) -> Tensor:
    return logits_at(adapters.model, part.keep, input_ids=part.ids, attention_mask=part.mask)


def _derivative(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return flat(torch.autograd.grad(value, parameters, materialize_grads=True))
