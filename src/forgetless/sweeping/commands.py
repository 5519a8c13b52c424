"""What `forgetless sweep` does: the whole grid, one run of it, its list, its costs."""

from __future__ import annotations

import os
import shlex
from contextlib import AbstractContextManager, nullcontext

from forgetless.errors import RunError, UsageError
from forgetless.learning.dryrun import minutes
from forgetless.sweeping.cluster import on_ray
from forgetless.sweeping.costs import check_limits, costs_of, size
from forgetless.sweeping.folder import DONE
from forgetless.sweeping.grid import Run, notes_of
from forgetless.sweeping.record import write_record
from forgetless.sweeping.running import Plan, check_terms, open_plan, settle, settled, using_threads
from forgetless.sweeping.workers import Place, on_this_machine, run_sweep


def sweep(file: str, output_dir: str = "", *, workers: int = 1, ray: str | None = None) -> dict:
    """Makes every run of a sweep file that is not done, and gives the record that is also in sweep.json.

    Runs that fail are in it with their error, and the others are made all the same. `ray`: the address of a cluster.
    """
    _check_alone()
    plan = open_plan(file, output_dir)
    with _place(plan, workers, ray) as place:
        if left := _left(plan):
            check_limits(plan, place.costs(left), place.at_once)
        return run_sweep(plan, place.execute)


def _place(plan: Plan, workers: int, ray: str | None) -> AbstractContextManager[Place]:
    return on_ray(plan, ray, workers) if ray else nullcontext(on_this_machine(plan, workers))


def one(file: str, output_dir: str, id: str) -> None:
    """Makes one run, and the trials that it needs where nobody has; RunError where it fails."""
    _check_alone()
    plan = open_plan(file, output_dir)
    run = plan.find(id)
    check_terms(plan)
    _check_stated(plan, [one for one in (*(other.trial for other in run.candidates), run)
                         if not settled(plan.folder, one)])  # fmt: skip
    write_record(plan)
    with using_threads(plan.terms.threads):
        outcome = settle(plan, run)
    write_record(plan)
    if outcome != DONE:
        raise RunError(f"{id}: {plan.folder.attempt(run)['error']}")


def listed(file: str, output_dir: str = "", workers: int = 1) -> list[str]:
    """A command for each run that is not done, trials first. They may run in any order, anywhere, at once.

    `workers`: how many of them will, for a limit of time.
    """
    plan = open_plan(file, output_dir)
    command = ["forgetless", "sweep", file, "--output_dir", str(plan.folder.root), "--cell"]
    left = _left(plan)
    _check_stated(plan, left, workers)
    return [shlex.join([*command, run.id]) for run in left]


def _check_stated(plan: Plan, runs: list[Run], at_once: int = 1) -> None:
    """Refuses runs beyond a stated limit. Without one nothing is measured: there is a command a run, and a list."""
    if runs and (plan.sweep.max_disk is not None or plan.sweep.max_time is not None):
        check_limits(plan, costs_of(plan, runs), at_once)


def planned(file: str, output_dir: str = "", *, workers: int = 1, ray: str | None = None) -> str:
    """The plan in words: how it is fair, the runs, what is left to do and what that costs where it will be made."""
    plan = open_plan(file, output_dir)
    left = _left(plan)
    with _place(plan, workers, ray) as place:
        costs, at_once = place.costs(left), place.at_once
    lines = [f"{len(plan.cells)} runs, {len(plan.trials)} trials before them -> {plan.folder.root}"]
    lines += [
        f"- {note}" for note in (*notes_of(plan.sweep, [task.name for task in plan.stream.tasks]), plan.terms.said)
    ]
    lines += [f"  {run.kind:5} {run.id}  {' '.join(run.tasks)}" for run in left]
    beside = f", at best {minutes(costs.lasts(at_once))} with {at_once} at once" if at_once > 1 else ""
    lines += [
        f"{len(left)} left: about {minutes(costs.seconds)} one after another{beside}; {size(costs.bytes)} of disk"
    ]
    check_limits(plan, costs, at_once)
    return "\n".join(lines)


def _left(plan: Plan) -> list[Run]:
    return [run for run in [*plan.trials, *plan.cells] if not settled(plan.folder, run)]


def _check_alone() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(
            "a sweep is started once, not by a launcher of several processes; for one big run: accelerate launch ... "
            "-m forgetless learn ..."
        )
