"""A sweep and the tasks of its stream -> the runs: fair by construction, each named by what decides it.

Runs are of two kinds. A *cell* is a point of the grid; its run is a result. A *trial* tries one candidate of what is to
be chosen, on the first tasks of an order and judged on their validation rows; it chooses and is no result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch

from forgetless.config import LearnConfig
from forgetless.errors import UsageError, nearest
from forgetless.methods.finding import code_of, label_of
from forgetless.model.identity import json_digest
from forgetless.seeds import generator
from forgetless.sweeping.definition import Entry, Sweep, method_options, trials, typed

OWN_ORDER = "o1"
TRIAL = {"score_on": "validation", "cells": "last", "forgetting_prompts": 0, "forgetting_text": "", "report_to": []}


@dataclass(frozen=True)
class Run:
    """One run: what `learn` is told, on these tasks in this order."""

    config: LearnConfig  # `stream` as the sweep file names it; without a folder
    order: str
    tasks: tuple[str, ...]
    candidates: tuple[Candidate, ...] = ()  # what is chosen among before this run; none: nothing is to be chosen
    kind: str = "cell"

    @cached_property
    def id(self) -> str:
        """Readable parts and a hash of all that decides the run: `replay-r8-lr0.001-o1-seed0-1f0a2b3c`."""
        config, free = self.config, {name for one in self.candidates for name in one.options}
        rate = [] if "learning_rate" in free else [f"lr{config.learning_rate:g}"]
        rank = [] if "r" in free else [f"r{config.r}"]
        steps = [f"s{config.max_steps}"] if config.max_steps > 0 else []
        parts = [label_of(config.method), *rank, *rate, *steps, self.order, f"seed{config.seed}", self.digest]
        return "-".join(re.sub(r"[^A-Za-z0-9._]", "_", part) for part in parts)

    @cached_property
    def options(self) -> dict[str, Any]:
        """What decides the run and is not the default: option of learn or method.OPTION -> value."""
        config, usual = self.config, LearnConfig(method=self.config.method)
        defaults, own = usual.decides(), usual.all_method_options()
        told = {name: value for name, value in config.decides().items() if value != defaults[name]}
        told.pop("method_options", None)
        return told | {f"method.{name}": v for name, v in config.method_options.items() if v != own[name]}

    @cached_property
    def digest(self) -> str:
        """Eight hexadecimal digits of sha256 of what decides the run; a default that is given changes nothing."""
        config = self.config
        told = self.options | {"method": config.method, "model": config.model, "stream": config.stream}
        told |= code_of(config.method) | {
            "tasks": self.tasks,
            "kind": self.kind,
            "among": [one.trial.digest for one in self.candidates],
        }
        return json_digest(told)[:8]


@dataclass(frozen=True)
class Candidate:
    """Values for what is to be chosen, and the trial that judges them."""

    options: Mapping[str, Any]  # option of learn or method.OPTION -> value
    trial: Run
    length: Mapping[str, Any] = field(default_factory=dict)  # what equal compute leaves it: steps or epochs


def runs_of(sweep: Sweep, tasks: Sequence[str], place: str = "sweep") -> tuple[list[Run], list[Run]]:
    """(trials, cells) of a sweep over a stream with these tasks; every value is checked on the way."""
    cells = [
        _cell(sweep, entry, point, order, names, place)
        for entry in sweep.entries
        for point in points(sweep.axes, entry)
        for order, names in orders_of(sweep, tasks, place).items()
    ]
    found = {one.trial.id: one.trial for cell in cells for one in cell.candidates}
    by_id = {cell.id: cell for cell in cells}
    if len(by_id) < len(cells):
        raise UsageError(f"{place}: the grid has the same run twice; two entries of it mean the same")
    return list(found.values()), cells


def points(axes: Mapping[str, Sequence], entry: Entry) -> Iterator[dict[str, Any]]:
    """The points of the grid for one method: an option that it does not have does not multiply its runs."""
    takes = method_options(entry.method)
    mine = [name for name in axes if not name.startswith("method.") or name in takes]
    for values in product(*(axes[name] for name in mine)):
        yield dict(zip(mine, values, strict=True))


def orders_of(sweep: Sweep, tasks: Sequence[str], place: str = "sweep") -> dict[str, tuple[str, ...]]:
    """Order's name -> task names: as given, or the stream's own and then distinct ones drawn by `order_seed`."""
    if not isinstance(sweep.orders, int):
        for name, order in sweep.orders.items():
            for task in order:
                if task not in tasks:
                    raise UsageError(f"{place}: order {name}: no task {task!r}{nearest(task, tasks)}")
            if sorted(order) != sorted(tasks):
                left = sorted(set(tasks) - set(order)) or sorted({one for one in order if order.count(one) > 1})
                raise UsageError(f"{place}: order {name}: each task stands in it once; wrong for {', '.join(left)}")
        return dict(sweep.orders)
    if sweep.orders > math.factorial(len(tasks)):
        raise UsageError(f"{place}: {sweep.orders} orders, but {len(tasks)} tasks have only "
                         f"{math.factorial(len(tasks))}")  # fmt: skip
    drawn = generator("orders", sweep.order_seed)
    found = [tuple(tasks)]
    while len(found) < sweep.orders:
        order = tuple(tasks[i] for i in torch.randperm(len(tasks), generator=drawn).tolist())
        found += [order] if order not in found else []
    return {f"o{i}": order for i, order in enumerate(found, start=1)}


def _cell(sweep: Sweep, entry: Entry, point: Mapping[str, Any], order: str, tasks: tuple[str, ...], place: str) -> Run:
    fixed = dict(sweep.common) | {f"method.{name}": value for name, value in entry.options.items()} | dict(point)
    seeds = sweep.axes.get("seed", [sweep.common.get("seed", 0)])
    seen = tasks[: sweep.seen]
    candidates = []
    for values in product(*entry.candidates.values()):
        chosen = dict(zip(entry.candidates, values, strict=True))
        trial = _fair(typed(entry.method, fixed | chosen | {"seed": seeds[0]} | TRIAL, place), sweep, len(tasks))
        parsed = {name: _value(trial, name) for name in chosen}
        begins = seen[0] if len(seen) == 1 else f"{seen[0]}_{len(seen)}"  # orders of one beginning share their trials
        candidates.append(Candidate(parsed, Run(trial, begins, seen, kind="trial"), _length(trial, sweep)))
    if len({one.trial.id for one in candidates}) < len(candidates):
        raise UsageError(f"{place}: {entry.method}: choose: two candidates mean the same")
    if len(candidates) == 1:  # nothing to choose
        fixed, candidates = fixed | dict(candidates[0].options), []
    return Run(_fair(typed(entry.method, fixed, place), sweep, len(tasks)), order, tasks, tuple(candidates))


def _value(config: LearnConfig, name: str) -> Any:
    own = name.removeprefix("method.")
    return config.method_options[own] if own != name else getattr(config, name)


def with_choice(config: LearnConfig, chosen: Candidate) -> LearnConfig:
    """The configuration with the candidate that was chosen."""
    options = {**chosen.options, **chosen.length}
    own = {name.removeprefix("method."): value for name, value in options.items() if name.startswith("method.")}
    rest = {name: value for name, value in options.items() if not name.startswith("method.")}
    return replace(config, **rest, method_options=config.method_options | own)


# ---------------------------------------------------------------------------------------- fairness


def _fair(config: LearnConfig, sweep: Sweep, tasks: int) -> LearnConfig:
    """Equal steps as they are; for equal compute one whose steps cost c times as much takes 1/c as many."""
    if sweep.fair == "steps":
        return config
    cost = cost_of(config, sweep.costs, tasks)
    if config.max_steps > 0:
        return replace(config, max_steps=max(1, round(config.max_steps / cost)))
    return replace(config, num_train_epochs=config.num_train_epochs / cost)


def _length(config: LearnConfig, sweep: Sweep) -> dict[str, Any]:
    """What `_fair` has set."""
    name = "max_steps" if config.max_steps > 0 else "num_train_epochs"
    return {name: getattr(config, name)} if sweep.fair == "compute" else {}


def cost_of(config: LearnConfig, costs: Mapping[str, float], tasks: int) -> float:
    """A step's compute, plain fine-tuning being 1: as the sweep says, or by the passes of the method with its options.

        c = mean over the tasks of (F + b B) / ((1 + b) n)

    of n new rows of a step F go forward and B come back, replayed ones and repetitions with them. With the base frozen
    a pass back costs what one forward does (b = 1; only activations have gradients), and with gradient checkpointing
    twice that. Products of adapters and penalties are not counted; where a method has such, the sweep must say c.
    """
    if config.method in costs:
        return costs[config.method]
    method, n, b = config.build_method(), config.batch_size, 2 if config.gradient_checkpointing else 1
    passes = [told for task in range(tasks) if (told := method.passes(n, task)) is not None]
    if len(passes) < tasks:
        raise UsageError(
            f"fair: compute: what does a step of {config.method} cost ({method.extra_compute})? Say it beside a plain "
            f"step's 1, as `costs: {{{config.method}: 1.1}}`; forgetless learn --method {config.method} --dry_run "
            "times a step"
        )
    return sum(F + b * B for F, B in passes) / (tasks * (1 + b) * n)


def notes_of(sweep: Sweep, tasks: Sequence[str]) -> list[str]:
    """How the comparison is fair and where it is not, in sentences for the record."""
    numbers = [trials(entry) for entry in sweep.entries]
    rows = "all runs learn from and are judged on the same rows"
    if sweep.fair == "steps":
        notes = [f"equal steps: {rows}; each method takes as many steps a task with as many new rows a step"]
    else:
        costs = ", ".join(f"{name} {told}" for name, told in _costs(sweep, len(tasks)).items())
        notes = [
            f"equal compute: {rows}; steps a task are divided by the cost of a method's step ({costs}), which is its "
            "passes through the model, averaged over the tasks, of a memory that holds as many rows as a step asks for"
        ]
    if max(numbers) == 1:
        return [*notes, "nothing is chosen: every option is fixed for all runs, so a method may be at its worse values"]
    told = (
        f"chosen on validation rows for each method, order and point of the grid, by {_how_many(sweep)}, with one seed"
    )
    if sweep.seen is None or sweep.seen >= len(tasks):
        sight = "WITH SIGHT OF ALL TASKS: the trials learn the whole stream, which one who learns task by task cannot"
    elif sweep.seen == 1:
        sight = "the trials see the first task of the order only"
    else:
        sight = f"the trials see the first {sweep.seen} tasks of the order and none of the later ones"
    return [*notes, told, sight]


def _costs(sweep: Sweep, tasks: int) -> dict[str, str]:
    """Method -> the cost of its step, or the least and the most of its points and candidates."""
    found: dict[str, list[float]] = {}
    for entry in sweep.entries:
        own = {f"method.{name}": value for name, value in entry.options.items()}
        for point in points(sweep.axes, entry):
            for values in product(*entry.candidates.values()):
                options = dict(sweep.common) | own | point | dict(zip(entry.candidates, values, strict=True))
                cost = cost_of(typed(entry.method, options, "sweep"), sweep.costs, tasks)
                found.setdefault(entry.method, []).append(cost)
    ends = {name: sorted({f"{cost:.3g}" for cost in costs}, key=float) for name, costs in found.items()}
    return {name: " to ".join(dict.fromkeys((told[0], told[-1]))) for name, told in ends.items()}


def _how_many(sweep: Sweep) -> str:
    """'3 trials each', or said loudly where they differ."""
    numbers = [trials(entry) for entry in sweep.entries]
    if len(set(numbers)) == 1:
        return f"{numbers[0]} trials each"
    told = (f"{entry.method} {number}" for entry, number in zip(sweep.entries, numbers, strict=True))
    return f"NUMBERS OF TRIALS THAT DIFFER ({', '.join(told)})"
