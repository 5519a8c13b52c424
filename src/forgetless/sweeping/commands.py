"""What `forgetless sweep` does: the whole grid, one run of it, its list, its costs."""

from __future__ import annotations

import os
import shlex

from forgetless.errors import RunError, UsageError
from forgetless.learning.dryrun import minutes
from forgetless.sweeping.cluster import on_ray
from forgetless.sweeping.costs import check_limits, costs_of, size
from forgetless.sweeping.folder import DONE
from forgetless.sweeping.grid import Run, notes_of
from forgetless.sweeping.record import write_record
from forgetless.sweeping.running import Plan, open_plan, settle, settled
from forgetless.sweeping.workers import in_turn, run_sweep, side_by_side, use_threads


def sweep(file: str, output_dir: str = "", *, workers: int = 1, ray: str | None = None) -> dict:
    """Makes every run of a sweep file that is not done, and gives the record that is also in sweep.json.

    Runs that fail are in it with their error, and the others are made all the same. `ray`: the address of a cluster.
    """
    _check_alone()
    plan = open_plan(file, output_dir)
    if plan.sweep.max_disk is not None or plan.sweep.max_time is not None:
        check_limits(plan, costs_of(plan, _left(plan)), workers)
    threads = plan.sweep.threads
    if ray:
        with on_ray(plan, ray, workers, threads) as execute:
            return run_sweep(plan, execute)
    return run_sweep(plan, in_turn(plan, threads) if workers == 1 else side_by_side(plan, workers, threads))


def one(file: str, output_dir: str, id: str) -> None:
    """Makes one run, and the trials that it needs where nobody has; RunError where it fails."""
    _check_alone()
    plan = open_plan(file, output_dir)
    run = plan.find(id)
    use_threads(plan.sweep.threads)
    write_record(plan)
    outcome = settle(plan, run)
    write_record(plan)
    if outcome != DONE:
        raise RunError(f"{id}: {plan.folder.attempt(run)['error']}")


def listed(file: str, output_dir: str = "") -> list[str]:
    """A command for each run that is not done, trials first. They may run in any order, anywhere, at once."""
    plan = open_plan(file, output_dir)
    command = ["forgetless", "sweep", file, "--output_dir", str(plan.folder.root), "--cell"]
    return [shlex.join([*command, run.id]) for run in _left(plan)]


def planned(file: str, output_dir: str = "", workers: int = 1) -> str:
    """The plan in words: how it is fair, the runs, what is left to do and what that costs on this machine."""
    plan = open_plan(file, output_dir)
    left = _left(plan)
    lines = [f"{len(plan.cells)} runs, {len(plan.trials)} trials before them -> {plan.folder.root}"]
    lines += [f"- {note}" for note in notes_of(plan.sweep, [task.name for task in plan.stream.tasks])]
    lines += [f"  {run.kind:5} {run.id}  {' '.join(run.tasks)}" for run in left]
    costs = costs_of(plan, left)
    beside = f", at best {minutes(costs.seconds / workers)} with {workers} at once" if workers > 1 else ""
    lines += [
        f"{len(left)} left: about {minutes(costs.seconds)} one after another{beside}; {size(costs.bytes)} of disk"
    ]
    check_limits(plan, costs, workers)
    return "\n".join(lines)


def _left(plan: Plan) -> list[Run]:
    return [run for run in [*plan.trials, *plan.cells] if not settled(plan.folder, run)]


def _check_alone() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(
            "a sweep is started once, not by a launcher of several processes; for one big run: accelerate launch ... "
            "-m forgetless learn ..."
        )
