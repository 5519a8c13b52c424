"""Learn one task: the loop, top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import get_scheduler

from forgetless.data.batches import Example, collate, split
from forgetless.errors import DivergedError
from forgetless.learning.engine import Engine
from forgetless.methods.base import Method
from forgetless.seeds import generator, seed_for


@dataclass(frozen=True)
class TrainSettings:
    """How each task is trained; the optimizer and the schedule begin anew with each task."""

    learning_rate: float = 1e-3
    """peak learning rate of AdamW; it decides how much is learnt and forgotten, so choose it on validation rows"""
    num_train_epochs: float = 1.0
    """passes over a task's rows"""
    max_steps: int = -1
    """optimizer steps a task; -1: as many as the epochs need"""
    batch_size: int = 8
    """rows of a step, over all processes"""
    micro_batch_size: int = 8
    """rows that go through the model at once: smaller saves memory, larger keeps a GPU busier; the step is the same"""
    lr_scheduler_type: str = "linear"
    """linear, cosine, constant, constant_with_warmup, ..."""
    warmup_ratio: float = 0.0
    """share of the steps over which the learning rate rises from 0"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay"""
    max_grad_norm: float = 1.0
    """the gradient is clipped to this norm; 0: not clipped"""
    max_length: int = 512
    """tokens of a row; a longer prompt loses its beginning, and is counted"""
    gradient_checkpointing: bool = False
    """compute activations again in the backward pass instead of keeping them"""
    group_by_length: bool = True
    """batches of rows of similar length (drawn from windows of 8 batches): less padding"""


def count_steps(rows: int, settings: TrainSettings, tasks: int = 1) -> int:
    """Optimizer steps of a lesson: the epochs of its rows, or `max_steps` for each task in it."""
    if settings.max_steps > 0:
        return settings.max_steps * tasks
    return max(1, math.ceil(settings.num_train_epochs * math.ceil(rows / settings.batch_size)))


def plan(examples: list[Example], settings: TrainSettings, *seed: int | str) -> Iterator[list[Example]]:
    """The rows of each step, without end: a function of (seed, epoch), not of what was drawn before."""
    size, epoch = settings.batch_size, 0
    while True:
        order = torch.randperm(len(examples), generator=generator("order", *seed, epoch)).tolist()
        batches = []
        window = 8 * size if settings.group_by_length else size
        for start in range(0, len(order), window):
            rows = order[start : start + window]
            if settings.group_by_length:
                rows.sort(key=lambda row: len(examples[row].ids))
            batches += [rows[i : i + size] for i in range(0, len(rows), size)]
        if settings.group_by_length:  # do not go from short to long within each window
            shuffled = torch.randperm(len(batches), generator=generator("batches", *seed, epoch)).tolist()
            batches = [batches[i] for i in shuffled]
        for batch in batches:
            yield [examples[row] for row in batch]
        epoch += 1


def learn_task(
    method: Method,
    examples: list[Example],
    settings: TrainSettings,
    engine: Engine,
    *,
    seed: int,
    task: int,
    tasks: int = 1,
    log: Callable[[dict], None],
) -> None:
    """Trains `method`'s adapters on one task's examples. `log` gets a record per step."""
    method.prepare(examples)
    model, parameters = method.adapters.model, method.adapters.parameters()
    steps = count_steps(len(examples), settings, tasks)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    warmup = math.ceil(settings.warmup_ratio * steps)
    schedule = get_scheduler(settings.lr_scheduler_type, optimizer, warmup, steps)
    model.train()
    # ------------------------------------------------------------------------------------------------
    for step, rows in zip(range(steps), plan(examples, settings, seed, task), strict=False):
        batch = method.batch(rows, step)  # the whole step at once: replay joins here, weights are fixed
        total = torch.zeros((), device=engine.device)
        size = min(settings.micro_batch_size, math.ceil(len(batch) / engine.processes))  # work for every process
        for i, chosen in enumerate(engine.parts(split(batch, size))):
            torch.manual_seed(seed_for("dropout", seed, task, step, engine.rank, i))
            part = collate(chosen, method.encoder.tokenizer.pad_token_id, engine.device)
            with engine.autocast():
                loss = method.loss(part)  # a weighted sum: any split adds up to the same
            engine.backward(loss)
            total += loss.detach()
        total = engine.sum_gradients(parameters, total)
        penalty = method.penalty()  # once a step, the same on every process
        if penalty is not None:
            share = engine.add_gradient(penalty, parameters)
        method.after_backward()  # the whole gradient, before clipping
        norm = clip_grad_norm_(parameters, settings.max_grad_norm or math.inf)
        if not math.isfinite(float(total) + float(norm)):
            raise DivergedError(
                f"task {task + 1}, step {step + 1}: loss {float(total)}, gradient norm {float(norm)}. "
                "Nothing of this task was saved. Lower learning_rate, or look at the rows of this step."
            )
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(optimizer)
        # --------------------------------------------------------------------------------------------
        record = {"step": step + 1, "loss": float(total), "learning_rate": schedule.get_last_lr()[0]}
        schedule.step()
        if penalty is not None:
            record |= {"penalty": float(penalty.detach()), "penalty_share": share}
        record |= {"gradient_norm": float(norm)} | method.told()
        log(record | {"tokens": sum(len(example.ids) for example in batch), "steps": steps})
    model.eval()
