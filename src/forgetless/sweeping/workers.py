"""Many runs: in turn, or side by side on one machine; trials first, then what they choose for."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache

import torch

from forgetless.errors import RunError
from forgetless.progress import console
from forgetless.sweeping.folder import DONE, FAILED, RUNNING
from forgetless.sweeping.grid import Run
from forgetless.sweeping.record import write_record
from forgetless.sweeping.running import BUSY, POLL_SECONDS, Plan, attempt, open_plan, settled

CRASHED = "crashed"  # its process ended without a word
MOST_CRASHES = 3
ENDED = f"the process that ran it ended {MOST_CRASHES} times without an error; is there enough memory?"
Execute = Callable[[list[Run]], Iterator[tuple[Run, str]]]
"""Runs -> each with its outcome, as they end."""


def run_sweep(plan: Plan, execute: Execute) -> dict:
    """Makes all runs that are not done and gives the record, which is also in sweep.json."""
    record = write_record(plan)
    for runs in (plan.trials, plan.cells):
        left, crashes = [run for run in runs if not settled(plan.folder, run)], Counter[str]()
        while left:
            again = []
            for run, outcome in execute(left):
                if outcome in (BUSY, CRASHED):
                    again.append(run)
                    continue
                record = write_record(plan)
                _say(plan, run, outcome, record)
            crashed = [run for run in again if plan.folder.state(run) != DONE and _broke(plan, run)]
            crashes.update(run.id for run in crashed)
            for run in crashed:
                if crashes[run.id] == MOST_CRASHES:
                    plan.folder.note(
                        run, plan.folder.attempt(run) | {"status": FAILED, "kind": CRASHED, "error": ENDED}
                    )
            left = [run for run in again if crashes[run.id] < MOST_CRASHES]
            if left:
                time.sleep(POLL_SECONDS)
    return write_record(plan)


def _broke(plan: Plan, run: Run) -> bool:
    """Whether a process of this run ended in the middle of it."""
    return plan.folder.attempt(run).get("status") == RUNNING and not plan.folder.is_held(run)


def _say(plan: Plan, run: Run, outcome: str, record: dict) -> None:
    runs = [*record["trials"], *record["cells"]]
    ended = sum(one["status"] == DONE for one in runs)
    error = f": {plan.folder.attempt(run)['error']}" if outcome == FAILED else ""
    console.print(f"{ended} of {len(runs)} runs done; {outcome}: {run.id}{error}", markup=False, soft_wrap=True)


# ---------------------------------------------------------------------------------------- on one machine


def in_turn(plan: Plan, threads: int | None = None) -> Execute:
    """One run after another, in this process."""
    use_threads(threads)
    return lambda runs: ((run, attempt(plan, run)) for run in runs)


def use_threads(threads: int | None) -> None:
    """So many in this process; None: as many as it has."""
    if threads:
        torch.set_num_threads(threads)


def side_by_side(plan: Plan, workers: int, threads: int | None = None) -> Execute:
    """`workers` runs at once in processes of their own, among which the machine's threads are divided."""
    each = threads or max(1, torch.get_num_threads() // workers)

    def execute(runs: list[Run]) -> Iterator[tuple[Run, str]]:
        began = time.monotonic()
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(runs)), spawn, torch.set_num_threads, (each,)) as pool:
            futures = {pool.submit(attempt_in_worker, plan.file, str(plan.folder.root), run.id): run for run in runs}
            broken = 0
            for future in as_completed(futures):
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    outcome, broken = CRASHED, broken + 1
                yield futures[future], outcome
        if broken == len(runs) and not any(_broke(plan, run) for run in runs):
            raise RunError(f"worker processes end before they begin a run ({time.monotonic() - began:.0f} s)")

    return execute


def attempt_in_worker(file: str, output_dir: str, id: str) -> str:
    """`attempt` in a process that has nothing yet; what the run says goes into its log."""
    plan = _plan(file, output_dir)
    return attempt(plan, plan.find(id), quiet=True)


@cache
def _plan(file: str, output_dir: str) -> Plan:
    return open_plan(file, output_dir)
