"""Many runs: in turn, or side by side on one machine; trials first, then what they choose for."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from forgetless.errors import ForgetlessError, RunError, Stopped
from forgetless.progress import console
from forgetless.sweeping.costs import Costs, costs_of
from forgetless.sweeping.folder import DONE, FAILED
from forgetless.sweeping.grid import Run
from forgetless.sweeping.record import write_record
from forgetless.sweeping.running import (
    BUSY,
    POLL_SECONDS,
    Plan,
    Terms,
    attempt,
    check_terms,
    open_plan,
    settled,
    using_threads,
)

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


@dataclass(frozen=True)
class Place:
    """Where runs are made."""

    execute: Execute
    at_once: int
    costs: Callable[[list[Run]], Costs]  # of runs there


def on_this_machine(plan: Plan, workers: int) -> Place:
    """One run after another in this process, or several in processes of their own, which share the threads."""
    if not (plan.begun or plan.sweep.threads):
        plan.terms = replace(plan.terms, threads=max(1, plan.terms.threads // workers))
    check_terms(plan, workers)
    return Place(in_turn(plan) if workers == 1 else side_by_side(plan, workers), workers, partial(costs_of, plan))


def in_turn(plan: Plan) -> Execute:
    """One run after another, in this process."""

    def execute(runs: list[Run]) -> Iterator[tuple[Run, str]]:
        with using_threads(plan.terms.threads):
            yield from ((run, attempt(plan, run)) for run in runs)

    return execute


def side_by_side(plan: Plan, workers: int) -> Execute:
    """`workers` runs at once, each in a process of its own. A process that is killed takes no other run with it."""
    spawn = multiprocessing.get_context("spawn")

    def execute(runs: list[Run]) -> Iterator[tuple[Run, str]]:
        waiting, beside = runs[::-1], dict[Connection, tuple[Run, SpawnProcess]]()
        try:
            while waiting or beside:
                while waiting and len(beside) < workers:
                    run, (said, says) = waiting.pop(), spawn.Pipe(duplex=False)
                    told = (says, plan.file, str(plan.folder.root), run.id, plan.terms)
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


def _attempt_alone(says: Connection, file: str, output_dir: str, id: str, terms: Terms) -> None:
    """A process of one run. Ctrl-C is for the process that began it, which then ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with says, suppress(Stopped):
        try:
            says.send(attempt_in_worker(open_plan(file, output_dir), id, terms))
        except ForgetlessError as error:
            says.send(error)


def attempt_in_worker(plan: Plan, id: str, terms: Terms) -> str:
    """`attempt` in a process that makes runs; what the run says goes into its log."""
    with using_threads(terms.threads):
        return attempt(replace(plan, terms=terms), plan.find(id), quiet=True)
