"""Runs of a sweep on a Ray cluster whose machines share the sweep's folder."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from forgetless.errors import UsageError
from forgetless.sweeping.grid import Run
from forgetless.sweeping.running import Plan
from forgetless.sweeping.workers import CRASHED, Execute, attempt_in_worker

LOCAL = "local"
RETRIES = 3  # of a run whose worker or machine was lost, by Ray itself


@contextmanager
def on_ray(plan: Plan, address: str, workers: int, threads: int | None = None) -> Iterator[Execute]:
    """Each run a Ray task, on the cluster at `address` ('auto', 'ray://HOST:PORT'), or with 'local' on one made here.

    A run whose worker is lost is tried again by Ray elsewhere. It goes on where it stopped: the dead process has let
    go of the run's lock, and what it had published is there.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise UsageError("--ray needs Ray: pip install 'forgetless[ray]'") from error
    each = threads or 1
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address == LOCAL:
            ray.init(num_cpus=workers * each, include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"--ray {address}: no cluster there ({' '.join(str(error).split())[:200]})") from error
    gpus = 1 if ray.cluster_resources().get("GPU") and plan.sweep.common.get("device") != "cpu" else 0
    task = ray.remote(num_cpus=each, num_gpus=gpus, max_retries=RETRIES)(attempt_on_ray)
    told = (plan.file, str(plan.folder.root), str(Path.cwd()), each)

    def execute(runs: list[Run]) -> Iterator[tuple[Run, str]]:
        waiting = {task.remote(*told, run.id): run for run in runs}
        while waiting:
            [ready], _ = ray.wait(list(waiting), num_returns=1)
            try:
                outcome = ray.get(ready)
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError):
                outcome = CRASHED
            yield waiting.pop(ready), outcome

    try:
        yield execute
    finally:
        ray.shutdown()


def attempt_on_ray(file: str, output_dir: str, folder: str, threads: int, id: str) -> str:
    """`attempt` in a Ray worker. Paths are as the user gave them, so they are looked up from the user's folder."""
    os.chdir(folder)
    torch.set_num_threads(threads)
    return attempt_in_worker(file, output_dir, id)
