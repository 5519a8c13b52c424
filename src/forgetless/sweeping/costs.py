"""What a sweep would cost: runs that differ only in what costs nothing are measured once."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from forgetless.config import LearnConfig
from forgetless.errors import UsageError
from forgetless.learning.dryrun import Estimate, estimate, minutes
from forgetless.learning.prepare import prepare
from forgetless.learning.step import TrainSettings
from forgetless.model.loading import loaded_as_told
from forgetless.progress import steps
from forgetless.sweeping.grid import Run
from forgetless.sweeping.running import Plan, using_threads

FREE = {"seed", "learning_rate", "max_steps", "num_train_epochs", "lr_scheduler_type", "warmup_ratio", "weight_decay",
        "max_grad_norm", "lora_alpha", "report_to", "output_dir"}  # fmt: skip
"""Options that change neither a step's time nor a byte on disk; the number of steps is counted for each run."""


@dataclass(frozen=True)
class Costs:
    """Of all runs that are left."""

    seconds: float  # one run after another
    longest: float  # seconds of one run
    bytes: float

    def lasts(self, at_once: int) -> float:
        """Seconds with so many runs at once, at best."""
        return max(self.seconds / at_once, self.longest)


def costs_of(plan: Plan, runs: Sequence[Run]) -> Costs:
    """Measures one run of each kind (method and its options, rank, lengths, tasks) and adds up.

    Of a run whose options are yet to be chosen the dearest candidate counts.
    """
    kinds: dict[str, Estimate] = {}
    wanted = {run.id: [plan.config(run, one) for one in run.candidates] or [plan.config(run)] for run in runs}
    first = {_kind(run, config): config for run in runs for config in wanted[run.id]}
    with steps("measuring what runs need", len(first)) as progress, using_threads(plan.terms.threads):
        for kind, config in first.items():
            kinds[kind] = _measured(config)
            progress.advance()
    gc.collect()  # the models that were measured
    torch.cuda.empty_cache()
    seconds, disk = [], 0.0
    for run in runs:
        told = [(kinds[_kind(run, config)], config) for config in wanted[run.id]]
        seconds.append(max(kind.seconds(config.part(TrainSettings)) for kind, config in told))
        disk += max(kind.disk for kind, _ in told)
    return Costs(sum(seconds), max(seconds, default=0.0), disk)


@loaded_as_told
def _measured(config: LearnConfig) -> Estimate:
    return estimate(prepare(config))


def _kind(run: Run, config: LearnConfig) -> str:
    decisive = sorted((name, repr(value)) for name, value in config.plain().items() if name not in FREE)
    return repr((run.kind, sorted(run.tasks), decisive))


def check_limits(plan: Plan, costs: Costs, at_once: int) -> None:
    """UsageError where the runs that are left do not fit the disk or the time stated, or the disk that is free."""
    root = next(folder for folder in (plan.folder.root.absolute(), *plan.folder.root.absolute().parents)
                if folder.exists())  # fmt: skip
    room, sweep = shutil.disk_usage(root).free, plan.sweep
    if sweep.max_disk is not None and (needed := _taken(plan.folder.root) + costs.bytes) > sweep.max_disk:
        raise UsageError(
            f"{plan.file}: the grid needs about {size(needed)}, max_disk is {size(sweep.max_disk)}; take "
            "fewer runs, lower ranks, or raise max_disk"
        )
    if costs.bytes > room:
        raise UsageError(
            f"{plan.file}: the runs left need about {size(costs.bytes)}, and {root} has {size(room)} free; take fewer "
            "runs or lower ranks, make room, or give another --output_dir"
        )
    if sweep.max_time is not None and costs.lasts(at_once) > sweep.max_time:
        raise UsageError(
            f"{plan.file}: the runs left take about {minutes(costs.lasts(at_once))} with {at_once} side by side, "
            f"max_time is {minutes(sweep.max_time)}; take fewer runs or steps, more workers, or raise max_time"
        )


def _taken(folder: Path) -> int:
    """Bytes of all files below a folder, in which others may be at work: what is gone by now counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(place) / name).stat().st_size
    return total


def size(amount: float) -> str:
    """'3.2 GB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"
