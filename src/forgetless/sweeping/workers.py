"""Many runs: in turn, or side by side on one machine; trials first, then what they choose for."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from forgetless.errors import ForgetlessError, RunError, Stopped
from forgetless.progress import console
from forgetless.sweeping.folder import DONE, FAILED
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
                if outcome == CRASHED:
                    crashes[run.id] += 1
                    if crashes[run.id] >= MOST_CRASHES:
                        outcome = _give_up(plan, run)
                if outcome in (BUSY, CRASHED):
                    again.append(run)
                    continue
                record = write_record(plan)
                _say(plan, run, outcome, record)
            left = again
            if left:
                time.sleep(POLL_SECONDS)
    return write_record(plan)


def _give_up(plan: Plan, run: Run) -> str:
    """Notes that a run's processes end without a word, unless another process holds or has made it by now."""
    with plan.folder.held(run) as mine:
        if not mine:
            return BUSY
        if plan.folder.done(run):
            return DONE
        plan.folder.note(run, plan.folder.attempt(run) | {"status": FAILED, "kind": CRASHED, "error": ENDED})
        return FAILED


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
    """`workers` runs at once, each in a process of its own, among which the machine's threads are divided.

    A process that is killed takes no other run with it.
    """
    each, spawn = threads or max(1, torch.get_num_threads() // workers), multiprocessing.get_context("spawn")

    def execute(runs: list[Run]) -> Iterator[tuple[Run, str]]:
        waiting, beside = runs[::-1], dict[Connection, tuple[Run, SpawnProcess]]()
        try:
            while waiting or beside:
                while waiting and len(beside) < workers:
                    run, (said, says) = waiting.pop(), spawn.Pipe(duplex=False)
                    told = (says, each, plan.file, str(plan.folder.root), run.id)
                    process = spawn.Process(target=_attempt_alone, args=told, daemon=True)
                    process.start()
                    says.close()  # the process holds the other one: what it says ends with it
                    beside[said] = run, process
                ready = wait(list(beside))
                for said in [one for one in beside if one in ready]:
                    run, process = beside.pop(said)
                    outcome = _heard(said)
                    process.join()
                    if outcome == CRASHED and (code := process.exitcode or 0) > 0:  # a signal's is below 0
                        raise RunError(f"{run.id}: its process could not begin it (exit code {code}, its traceback is "
                                       "above); a script calls `sweep` under `if __name__ == '__main__':`")  # fmt: skip
                    yield run, outcome
        finally:
            for _, process in beside.values():
                process.terminate()
            for _, process in beside.values():
                process.join()

    return execute


def _heard(said: Connection) -> str:
    """The outcome that a process told, its error raised here, or that it ended without a word."""
    with said:
        try:
            outcome = said.recv()
        except EOFError:
            return CRASHED
    if isinstance(outcome, ForgetlessError):
        raise outcome
    return outcome


def _attempt_alone(says: Connection, threads: int, file: str, output_dir: str, id: str) -> None:
    """A process of one run. Ctrl-C is for the process that began it, which then ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    with says, suppress(Stopped):
        try:
            says.send(attempt_in_worker(file, output_dir, id))
        except ForgetlessError as error:
            says.send(error)


def attempt_in_worker(file: str, output_dir: str, id: str) -> str:
    """`attempt` in a process that has nothing yet; what the run says goes into its log."""
    plan = _plan(file, output_dir)
    return attempt(plan, plan.find(id), quiet=True)


@cache
def _plan(file: str, output_dir: str) -> Plan:
    return open_plan(file, output_dir)
