"""What a sweep would cost: runs that differ only in what costs nothing are measured once."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace

from forgetless.data.tasks import Stream
from forgetless.errors import UsageError
from forgetless.learning.dryrun import Estimate, estimate, minutes
from forgetless.learning.prepare import prepare
from forgetless.learning.step import TrainSettings
from forgetless.sweeping.grid import Run, with_choice
from forgetless.sweeping.running import Plan

FREE = {"seed", "learning_rate", "max_steps", "num_train_epochs", "lr_scheduler_type", "warmup_ratio", "weight_decay",
        "max_grad_norm", "lora_alpha", "report_to", "output_dir"}  # fmt: skip
"""Options that change neither a step's time nor a byte on disk; the number of steps is counted for each run."""


@dataclass(frozen=True)
class Costs:
    """Of all runs that are left."""

    seconds: float  # one run after another
    bytes: float


def costs_of(plan: Plan, runs: Iterable[Run]) -> Costs:
    """Measures one run of each kind (method and its options, rank, lengths, tasks) and adds up."""
    known: dict[tuple, Estimate] = {}
    seconds, disk = 0.0, 0.0
    for run in runs:
        config = with_choice(run.config, run.candidates[0]) if run.candidates else run.config
        decisive = sorted((name, repr(value)) for name, value in config.plain().items() if name not in FREE)
        key = (run.kind, *sorted(run.tasks), repr(decisive))
        if key not in known:
            tasks = {task.name: task for task in plan.stream.tasks}
            stream = Stream(plan.stream.name, tuple(tasks[name] for name in run.tasks))
            known[key] = estimate(prepare(replace(config, stream=stream, output_dir=str(plan.folder.run(run)))))
        seconds += known[key].seconds(config.part(TrainSettings))
        disk += known[key].disk
    return Costs(seconds, disk)


def check_limits(plan: Plan, costs: Costs, workers: int) -> None:
    """UsageError where the runs that are left do not fit the disk or the time stated."""
    root = next(folder for folder in (plan.folder.root.absolute(), *plan.folder.root.absolute().parents)
                if folder.exists())  # fmt: skip
    room, sweep = shutil.disk_usage(root).free, plan.sweep
    taken = sum(file.stat().st_size for file in plan.folder.root.rglob("*") if file.is_file())
    if sweep.max_disk is not None and taken + costs.bytes > sweep.max_disk:
        raise UsageError(
            f"{plan.file}: the grid needs about {size(taken + costs.bytes)}, max_disk is {size(sweep.max_disk)}; take "
            "fewer runs, lower ranks, or raise max_disk"
        )
    if costs.bytes > room:
        raise UsageError(f"{plan.file}: the runs left need about {size(costs.bytes)}, and {root} has {size(room)} free")
    if sweep.max_time is not None and costs.seconds / workers > sweep.max_time:
        raise UsageError(
            f"{plan.file}: the runs left take about {minutes(costs.seconds / workers)} with {workers} side by side, "
            f"max_time is {minutes(sweep.max_time)}; take fewer runs or steps, more workers, or raise max_time"
        )


def size(amount: float) -> str:
    """'3.2 GB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"
