"""Runs of a sweep on a Ray cluster whose machines share the sweep's folder."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from forgetless.errors import UsageError
from forgetless.sweeping.costs import Costs, costs_of
from forgetless.sweeping.grid import Run
from forgetless.sweeping.running import Plan, Terms, open_plan, terms_here
from forgetless.sweeping.workers import CRASHED, Place, attempt_in_worker

LOCAL = "local"
RETRIES = 3  # of a run whose worker or machine was lost, by Ray itself


@contextmanager
def on_ray(plan: Plan, address: str, workers: int) -> Iterator[Place]:
    """Each run a Ray task, on the cluster at `address` ('auto', 'ray://HOST:PORT'), or with 'local' on one made here.

    A run whose worker is lost is tried again by Ray elsewhere. It goes on where it stopped: the dead process has let
    go of the run's lock, and what it had published is there. What a run costs is measured on the cluster too.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise UsageError("--ray needs Ray: pip install 'forgetless[ray]'") from error
    each = plan.terms.threads if plan.begun or plan.sweep.threads else 1
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address == LOCAL:
            ray.init(num_cpus=workers * each, include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"--ray {address}: no cluster there ({' '.join(str(error).split())[:200]})") from error
    has = ray.cluster_resources()
    device = plan.terms.device if plan.begun else plan.sweep.common.get("device")
    gpus = 1 if has.get("GPU") and device != "cpu" else 0
    task = ray.remote(num_cpus=each, num_gpus=gpus, max_retries=RETRIES)(_on_worker)
    told = (plan.file, str(plan.folder.root), str(Path.cwd()))

    def execute(runs: list[Run]) -> Iterator[tuple[Run, str]]:
        waiting = {task.remote(*told, attempt_in_worker, run.id, plan.terms): run for run in runs}
        while waiting:
            [ready], _ = ray.wait(list(waiting), num_returns=1)
            try:
                outcome = ray.get(ready)
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError):
                outcome = CRASHED
            yield waiting.pop(ready), outcome

    try:
        at_once = int(min(has.get("CPU", 0) // each, has.get("GPU", 0) // gpus if gpus else math.inf))
        if not at_once:
            raise UsageError(f"--ray {address}: a run takes {each} CPUs, the cluster has {has.get('CPU', 0):g}; give "
                             "fewer `threads:` in the sweep file, or a larger cluster")  # fmt: skip
        if not plan.begun:
            plan.terms = replace(ray.get(task.remote(*told, _terms)), threads=each)
        yield Place(execute, at_once, lambda runs: ray.get(task.remote(*told, _costs, runs, plan.terms)))
    finally:
        ray.shutdown()


def _on_worker(file: str, output_dir: str, folder: str, asked: Callable, *given: Any) -> Any:
    """What is asked of a sweep, in a Ray worker. Paths are as the user gave them: looked up from the user's folder."""
    os.chdir(folder)
    return asked(_plan(file, output_dir), *given)


@cache
def _plan(file: str, output_dir: str) -> Plan:
    return open_plan(file, output_dir)


def _terms(plan: Plan) -> Terms:
    return terms_here(plan.sweep)


def _costs(plan: Plan, runs: list[Run], terms: Terms) -> Costs:
    return costs_of(replace(plan, terms=terms), runs)
