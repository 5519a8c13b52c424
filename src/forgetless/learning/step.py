"""Learn one task: the loop, top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import get_scheduler

from forgetless.data.batches import Example, collate, split
from forgetless.errors import DivergedError, UsageError
from forgetless.learning.checkpoint import Checkpoints
from forgetless.learning.engine import Engine
from forgetless.methods.base import Method
from forgetless.model.loading import check_bitsandbytes
from forgetless.seeds import generator, seed_for

ON_NAN = ("stop", "skip")
ADAMW, PAGED_ADAMW_8BIT = OPTIMIZERS = ("adamw", "paged_adamw_8bit")


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
    optim: str = "adamw"
    """adamw, or paged_adamw_8bit: its averages in 8 bits, in the CPU's memory while a GPU's is full (bitsandbytes)"""
    group_by_length: bool = True
    """batches of rows of similar length (drawn from windows of 8 batches): less padding"""
    on_nan: str = "stop"
    """a step whose loss or gradient is NaN or infinite: stop, or skip it (it moves no weight, and is told)"""
    max_skipped: int = 10
    """steps of a task that may be skipped; one more stops the run"""


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
    checkpoints: Checkpoints | None = None,
) -> None:
    """Trains `method`'s adapters on one task's examples. `log` gets a record per step.

    With `checkpoints` it goes on at the newest of them, and after each step they are saved where it is time.
    """
    method.prepare(examples)
    model, parameters = method.adapters.model, method.adapters.parameters()
    steps = count_steps(len(examples), settings, tasks)
    optimizer = optimizer_for(parameters, settings)
    warmup = math.ceil(settings.warmup_ratio * steps)
    schedule = get_scheduler(settings.lr_scheduler_type, optimizer, warmup, steps).lr_lambdas[0]  # a function of step
    done = checkpoints.restore(optimizer) if checkpoints else 0
    skipped = sum("skipped" in record for record in checkpoints.records) if checkpoints else 0
    model.train()
    # ------------------------------------------------------------------------------------------------
    for step, rows in islice(zip(range(steps), plan(examples, settings, seed, task), strict=False), done, None):
        rate = optimizer.param_groups[0]["lr"] = settings.learning_rate * schedule(step)
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
        tokens = sum(len(example.ids) for example in batch)
        record: dict = {"step": step + 1, "steps": steps, "learning_rate": rate, "tokens": tokens}
        norm = gradient_norm(parameters)
        if not (fault := not_finite(total, norm)) and method.has("after_backward"):
            method.after_backward()  # the whole gradient, before clipping
            norm = gradient_norm(parameters)  # of what it made of it
            fault = not_finite(total, norm)
        if fault:
            skipped += 1
            record["skipped"] = allowed_fault(f"task {task + 1}, step {step + 1}: {fault}", skipped, settings)
            optimizer.zero_grad()
            method.after_skip()
        else:
            clip_grads_with_norm_(parameters, settings.max_grad_norm or math.inf, norm)
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(optimizer)
            record["loss"] = float(total)
            if penalty is not None:
                record |= {"penalty": float(penalty.detach()), "penalty_share": share}
            record |= {"gradient_norm": float(norm)} | method.told()
        # --------------------------------------------------------------------------------------------
        log(record)
        if checkpoints:
            checkpoints.after_step(step + 1, optimizer)
    model.eval()


def gradient_norm(parameters: list[Tensor]) -> Tensor:
    """||g||₂ over all parameters."""
    return get_total_norm([p.grad for p in parameters if p.grad is not None])


def optimizer_for(parameters: list[Tensor], settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), paged and with averages in 8 bits where asked for (Dettmers et al. 2023)."""
    rates: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optim == ADAMW:
        return torch.optim.AdamW(parameters, **rates)
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit(parameters, **rates)


def check_optimizer(name: str, device: torch.device) -> None:
    """UsageError where the optimizer lacks its library, or the GPU whose memory it pages."""
    if name != PAGED_ADAMW_8BIT:
        return
    check_bitsandbytes(f"optim {name}")
    if device.type != "cuda":
        raise UsageError(f"optim {name}: pages the memory of a GPU, and this run is on {device.type}; use {ADAMW}")


def not_finite(loss: Tensor, norm: Tensor) -> str:
    """'loss nan, gradient norm nan' where either is no finite number, else nothing."""
    return "" if math.isfinite(float(loss) + float(norm)) else f"loss {float(loss)}, gradient norm {float(norm)}"


def allowed_fault(told: str, skipped: int, settings: TrainSettings) -> str:
    """What a step that is skipped tells; DivergedError where it may not be skipped."""
    kept = "The tasks before and this task's checkpoints are as they were."
    if settings.on_nan == "stop":
        raise DivergedError(
            f"{told}. {kept} Look at the rows of this step; then give the same command with --on_nan skip, which "
            "leaves such steps out, or a lower learning_rate and another output_dir."
        )
    if skipped > settings.max_skipped:
        raise DivergedError(
            f"{told}. {kept} max_skipped={settings.max_skipped} steps of this task were skipped already. The training "
            "has diverged: lower learning_rate, in another output_dir, or raise max_skipped."
        )
    return told
