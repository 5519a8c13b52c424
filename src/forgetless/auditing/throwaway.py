"""A few training steps on a model of any kind that leave nothing behind.

What is trained is a fresh low-rank pair beside each linear layer, y = layer(x) + s B A x, with B = 0 at first. The
layer may carry an adapter of any type, or none. No tensor of the model gets a gradient, and the pairs are hooks that
go when the block ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import clip_grad_norm_
from transformers.pytorch_utils import Conv1D

from forgetless.data.batches import Example, collate, split, weigh
from forgetless.data.streams import JUDGED_SEED
from forgetless.errors import RunError
from forgetless.learning.engine import Engine
from forgetless.learning.step import TrainSettings, plan
from forgetless.model.answers import logits_at, token_losses
from forgetless.model.base import transformer
from forgetless.progress import Steps
from forgetless.seeds import generator
from forgetless.subjects.models import Opened

Scores = list[float]  # one for each test row


@dataclass(frozen=True)
class Treatment:
    """What every model gets, and all that one needs to repeat it."""

    steps: int
    rows: int
    learning_rate: float = 1e-3  # of AdamW, constant
    batch_size: int = 8
    micro_batch_size: int = 4
    max_grad_norm: float = 1.0
    r: int = 8
    scale: float = 2.0
    seed: int = JUDGED_SEED  # of the rows that are drawn, their order, and A

    @property
    def checkpoints(self) -> list[int]:
        """The steps after which the test rows are scored: none, a quarter, half, all.

        >>> Treatment(steps=20, rows=40).checkpoints
        [0, 5, 10, 20]
        """
        return sorted({0, self.steps // 4, self.steps // 2, self.steps})


def treated(
    model: Opened, examples: list[Example], treatment: Treatment, engine: Engine, pad: int,
    score: Callable[[], Scores], progress: Steps,
) -> list[Scores]:  # fmt: skip
    """What `score()` gives at each checkpoint while throw-away pairs learn the examples; `pad` is a token."""
    with throw_away_pairs(model, treatment) as pairs:
        found = [score()]
        for step in _learnt(model, pairs, examples, treatment, engine, pad, progress):
            if step in treatment.checkpoints:
                found.append(score())
    return found


@contextmanager
def repaired(
    model: Opened, examples: list[Example], treatment: Treatment, engine: Engine, pad: int, progress: Steps
) -> Iterator[None]:
    """Computes with pairs that have learnt the examples inside the block."""
    with throw_away_pairs(model, treatment) as pairs:
        for _ in _learnt(model, pairs, examples, treatment, engine, pad, progress):
            pass
        yield


def _learnt(
    model: Opened, pairs: list[Tensor], examples: list[Example], treatment: Treatment, engine: Engine, pad: int,
    progress: Steps,
) -> Iterator[int]:  # fmt: skip
    """Takes the steps; gives the number of each when it is done."""
    order = TrainSettings(batch_size=treatment.batch_size, group_by_length=False)
    batches = plan(examples, order, "recovery", treatment.seed)
    optimizer = torch.optim.AdamW(pairs, lr=treatment.learning_rate, weight_decay=0.0)
    for step, batch in zip(range(1, treatment.steps + 1), batches, strict=False):
        loss = _gradient(model, pairs, batch, treatment, engine, pad)
        norm = float(clip_grad_norm_(pairs, treatment.max_grad_norm))
        if not 0 < norm < math.inf:
            raise RunError(f"step {step} on old rows: loss {loss}, gradient norm {norm}; look at the training rows")
        optimizer.step()
        optimizer.zero_grad()
        progress.advance(loss=loss)
        yield step


def _gradient(
    model: Opened, pairs: list[Tensor], batch: list[Example], treatment: Treatment, engine: Engine, pad: int
) -> float:
    """The pairs' gradient of the mean of -log p(answer token), which is returned. The model drops nothing out."""
    total = 0.0
    for chosen in split(weigh(batch, 1.0), treatment.micro_batch_size):
        part = collate(chosen, pad, engine.device)
        with engine.autocast():
            logits = logits_at(model, part.keep, input_ids=part.ids, attention_mask=part.mask)
            loss = (part.weights * token_losses(logits, part.targets)).sum()
        loss.backward(inputs=pairs)
        total += float(loss.detach())
    return total


@contextmanager
def throw_away_pairs(model: Opened, treatment: Treatment) -> Iterator[list[Tensor]]:
    """Computes with s B A x beside every linear layer of the decoder inside the block; gives the As and Bs.

    A (r, in) uniform in ±1/sqrt(in) and B (out, r) zero, as in `Adapters.reset`: equal in all models of one shape,
    whatever adapter they carry. RunError where the model has no linear layer.
    """
    layers = linear_layers(model)
    if not layers:
        raise RunError(f"{type(transformer(model)).__name__}: has no linear layer that a pair could be put beside")
    pairs, handles = [], []
    for i, (layer, width, out) in enumerate(layers):
        fresh = torch.rand((treatment.r, width), generator=generator("recovery", treatment.seed, i))
        A = ((2 * fresh - 1) / math.sqrt(width)).to(model.device).requires_grad_()
        B = torch.zeros((out, treatment.r), device=model.device, requires_grad=True)
        pairs += [A, B]
        handles.append(layer.register_forward_hook(_adding(A, B, treatment.scale)))
    try:
        yield pairs
    finally:
        for handle in handles:
            handle.remove()


def _adding(A: Tensor, B: Tensor, scale: float) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    def add(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return output + scale * linear(linear(inputs[0], A), B).to(output.dtype)

    return add


def linear_layers(model: Opened) -> list[tuple[nn.Module, int, int]]:
    """(layer, inputs, outputs) for every linear layer but the output embedding.

    Where an adapter is on it, the layer is the module that stands in its place, adapter included.
    """
    found: list[tuple[nn.Module, int, int]] = []
    passed = set(model.get_output_embeddings().modules())
    for module in transformer(model).modules():
        inner = _inner(module)
        if module in passed:
            continue
        if isinstance(inner, nn.Linear | Conv1D):
            width, out = (inner.nx, inner.nf) if isinstance(inner, Conv1D) else (inner.in_features, inner.out_features)
            found.append((module, width, out))
            passed.update(module.modules())
        elif inner is not module:  # an adapter on something else: the linear layers in it are its own
            passed.update({*module.modules()} - {*inner.modules()})
    return found


def _inner(module: nn.Module) -> nn.Module:
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module
