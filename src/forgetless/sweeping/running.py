"""One run of a sweep: locked, tried, noted. Many at once are in workers.py and cluster.py."""

from __future__ import annotations

import os
import statistics
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from forgetless.config import LearnConfig
from forgetless.data.streams import load_stream
from forgetless.data.tasks import Stream
from forgetless.errors import DivergedError, ForgetlessError, RunError, UsageError, nearest
from forgetless.learning.cells import score_base
from forgetless.learning.engine import DEVICES, Engine
from forgetless.learning.prepare import prepare
from forgetless.learning.stream import learn
from forgetless.model.base import find_model
from forgetless.model.identity import json_digest, weight_files, weights_digest
from forgetless.model.loading import loaded_as_told
from forgetless.progress import console
from forgetless.report.summary import summarise
from forgetless.runs.folder import RunFolder, complete
from forgetless.runs.seal import read_sealed
from forgetless.score.scorers import Scorer
from forgetless.sweeping.definition import Sweep, read_sweep
from forgetless.sweeping.folder import DONE, FAILED, RUNNING, SweepFolder, plain
from forgetless.sweeping.grid import Candidate, Run, runs_of, with_choice

BUSY = "busy"  # another process holds the run
POLL_SECONDS = 1.0
AUTO = "auto"
DIVERGED = DivergedError.__name__


@dataclass(frozen=True)
class Terms:
    """What every run of a sweep is made with, wherever it runs: results depend on it, and no id does."""

    device: str
    precision: str
    threads: int

    @property
    def said(self) -> str:
        """Equal numbers of threads give equal bytes; others round differently."""
        threads = f" with {self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else ""
        return f"every run is made on {self.device} in {self.precision}{threads}, as the first start decided"


@dataclass
class Plan:
    """A sweep, its stream and its runs."""

    file: str
    sweep: Sweep
    stream: Stream
    trials: list[Run]
    cells: list[Run]
    folder: SweepFolder
    terms: Terms  # decided at the sweep's first start; before it those of this machine
    begun: bool

    def config(self, run: Run, taken: Candidate | None = None) -> LearnConfig:
        """What `learn` is told of a run, with the candidate that is taken."""
        tasks = {task.name: task for task in self.stream.tasks}
        stream = Stream(self.stream.name, tuple(tasks[name] for name in run.tasks))
        config = with_choice(run.config, taken) if taken else run.config
        return replace(config, stream=stream, output_dir=str(self.folder.run(run)), device=self.terms.device,
                       precision=self.terms.precision)  # fmt: skip

    def find(self, id: str) -> Run:
        known = {run.id: run for run in [*self.trials, *self.cells]}
        if id not in known:
            raise UsageError(f"{self.file}: no run {id!r}{nearest(id, known)}; `--list` prints them")
        return known[id]


def open_plan(file: str, output_dir: str = "") -> Plan:
    """Reads a sweep file and its stream, and checks both against each other and against what was begun."""
    sweep = read_sweep(file)
    stream = load_stream(sweep.common["stream"], on_bad_row=sweep.common.get("on_bad_row", "error"))
    trials, cells = runs_of(sweep, [task.name for task in stream.tasks], file)
    seen = {task for run in trials for task in run.tasks}
    if without := [task.name for task in stream.tasks if task.name in seen and not task.validation]:
        raise UsageError(f"{file}: choose: no validation rows in {', '.join(without)}; cut some from train in the "
                         "stream file (`validation: 10%`)")  # fmt: skip
    folder = SweepFolder(Path(output_dir or f"runs/sweep-{sweep.name}"))
    _check_continues(folder, stream)
    begun = begun_with(folder, sweep)
    return Plan(file, sweep, stream, trials, cells, folder, begun or terms_here(sweep), begun is not None)


def _check_continues(folder: SweepFolder, stream: Stream) -> None:
    """Refuses a stream whose rows have changed: the finished runs are not comparable with new ones."""
    stored = read_sealed(folder.record)["tasks"] if folder.record.exists() else {}
    for task in stream.tasks:
        if stored.get(task.name, task.fingerprint) != task.fingerprint:
            raise RunError(
                f"{folder.record}: the rows, options or scoring of task {task.name!r} have changed since this sweep "
                "was begun, so its runs are not comparable with new ones; restore them, or give another --output_dir"
            )


def terms_here(sweep: Sweep) -> Terms:
    """What the sweep's file leaves to the machine, as this machine has it."""
    engine = Engine(sweep.common.get("device", AUTO), sweep.common.get("precision", AUTO))
    device = engine.device.type if engine.device.type in DEVICES else AUTO
    precision = "bf16" if engine.dtype == torch.bfloat16 else "fp32"
    return Terms(device, precision, sweep.threads or torch.get_num_threads())


def begun_with(folder: SweepFolder, sweep: Sweep) -> Terms | None:
    """The terms of a sweep's first start; None before it. RunError where the file says others by now."""
    told = read_sealed(folder.record).get("terms") if folder.record.exists() else None
    if told is None:
        return None
    asked = {name: sweep.common.get(name, AUTO) for name in ("device", "precision")} | {
        "threads": sweep.threads or AUTO
    }
    for name, value in asked.items():
        if value not in (AUTO, told[name]):
            raise RunError(
                f"{folder.record}: this sweep was begun with {name} {told[name]} and its file now says {value}, with "
                f"which runs would differ from those that are there; give {told[name]}, or another --output_dir"
            )
    return Terms(**told)


@contextmanager
def using_threads(number: int) -> Iterator[None]:
    """torch has so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_terms(plan: Plan, at_once: int = 1) -> None:
    """RunError where this machine has not the device that the sweep was begun on; too few CPUs are only said."""
    terms = plan.terms
    if terms.device == "cuda" and not torch.cuda.is_available():
        raise RunError(
            f"{plan.folder.record}: this sweep was begun on a GPU, and this machine offers none; go on where there is "
            "one, or give another --output_dir"
        )
    if terms.device == "cpu" and terms.threads * at_once > (cpus := os.cpu_count() or 1):
        console.print(
            f"{at_once} at once with {terms.threads} threads each, as this sweep was begun, are slow on {cpus} CPUs",
            markup=False, soft_wrap=True,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------- what is chosen


@dataclass(frozen=True)
class Judged:
    """A candidate and the mean of its trial's validation scores; None where training diverged."""

    candidate: Candidate
    score: float | None


def judged(folder: SweepFolder, run: Run) -> list[Judged]:
    """The candidates of a run with their scores; RunError where a trial has not ended with one."""
    found = []
    for candidate in run.candidates:
        trial, told = candidate.trial, folder.attempt(candidate.trial)
        if folder.done(trial):
            matrix = summarise(folder.run(trial))["headline"]["matrix"]
            found.append(Judged(candidate, statistics.mean(matrix[-1])))
        elif told.get("kind") == DIVERGED:
            found.append(Judged(candidate, None))
        else:
            raise RunError(f"its options cannot be chosen: trial {trial.id} {told.get('error') or 'has not been made'}")
    return found


def choose(candidates: list[Judged]) -> Candidate:
    """The one with the best score, the first of equals; one that diverged is below all."""
    finite = [one for one in candidates if one.score is not None]
    if not finite:
        raise RunError("its options cannot be chosen: every trial diverged; give lower learning rates")
    return max(finite, key=lambda one: one.score or 0.0).candidate


# ---------------------------------------------------------------------------------------- one run


def attempt(plan: Plan, run: Run, *, quiet: bool = False) -> str:
    """Makes a run, or goes on with it: done, failed, or busy where another process holds it."""
    folder = plan.folder
    with folder.held(run) as mine:
        if not mine:
            return BUSY
        before = folder.attempt(run)
        if folder.done(run):
            return DONE
        told: dict[str, Any] = {"config": plain(run), "attempts": before.get("attempts", 0) + 1}
        told |= {"threads": torch.get_num_threads(), "pid": os.getpid(), "status": RUNNING}
        folder.note(run, told)
        began = time.monotonic()
        with _saying(folder.log(run)) if quiet else nullcontext():
            told |= _tried(plan, run)
        folder.note(run, told | {"seconds": round(time.monotonic() - began, 1)})
        return told["status"]


def settle(plan: Plan, run: Run) -> str:
    """Makes a run and before it the trials that it needs; waits for those that other processes hold."""
    for candidate in run.candidates:
        if not settled(plan.folder, candidate.trial):
            settle(plan, candidate.trial)
    while (outcome := attempt(plan, run)) == BUSY:
        time.sleep(POLL_SECONDS)
    return outcome


def settled(folder: SweepFolder, run: Run) -> bool:
    """Whether trying again is of no use: it is done, or it diverged, as it would again."""
    told = folder.attempt(run)
    return folder.done(run) or (told.get("kind") == DIVERGED and told["config"] == plain(run))


def _tried(plan: Plan, run: Run) -> dict[str, Any]:
    """The outcome as it is noted. A run that fails must not end the others, so every error is noted as its own."""
    try:
        taken = choose(judged(plan.folder, run)) if run.candidates else Candidate({}, run)
        learn(plan.config(run, taken), _known_base(plan, run), _told(run, taken))
        return {"status": DONE, "chosen": dict(taken.options)}
    except ForgetlessError as error:
        return {"status": FAILED, "kind": type(error).__name__, "error": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"status": FAILED, "kind": type(error).__name__, "error": f"{type(error).__name__}: {error}"}


def _told(run: Run, taken: Candidate) -> dict[str, dict]:
    """Each option that was chosen, with what it was chosen among; steps too, where candidates differ in them."""
    found = {}
    for name, value in {**taken.length, **taken.options}.items():
        among = list(dict.fromkeys({**one.options, **one.length}[name] for one in run.candidates))
        if name in taken.options or len(among) > 1:
            seen = len(taken.trial.tasks)
            found[name.removeprefix("method.")] = {"value": value, "among": among, "tasks_seen": seen}
    return found


def _known_base(plan: Plan, run: Run) -> Path | None:
    """The folder with the untouched base's scores on the stream, made by the first run that needs them."""
    if run.config.cells == "last":
        return None
    config = plan.config(run)
    named = {name: getattr(config, name) for name in ("model", "load_in", "max_length", "precision", "device",
                                                      "score_on", "score_batch_tokens")}  # fmt: skip
    root = plan.folder.base(json_digest([named, plan.stream.name, _weights_of(config.model)])[:8])
    with plan.folder.alone(f"base-{root.name}"):
        if not complete(RunFolder(root).task(0, "base") / "scores"):
            plainly = replace(config, method="sequential", method_options={}, stream=plan.stream, output_dir=str(root))
            _score_base(plainly)
    return root


@loaded_as_told
def _score_base(config: LearnConfig) -> None:
    session = prepare(config)
    model, options = session.adapters.model, session.stream.options
    score_base(session, Scorer(model, session.encoder, session.engine, options, config.score_batch_tokens))


def _weights_of(model: str) -> str:
    """sha256 of the base's weights: they may have changed under the same name."""
    return weights_digest(weight_files(find_model(model)))


@contextmanager
def _saying(file: Path) -> Iterator[None]:
    """What is printed inside the block goes into a file."""
    with file.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        yield
