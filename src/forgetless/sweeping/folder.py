"""The folder of a sweep: every file name in one place, and the states of its runs.

    sweep.json sweep.md            the plan, what was chosen, which run is done, running, failed or waiting
    cells/<id>/                    a run folder a point of the grid: the results
    trials/<id>/                   run folders that only choose
    base/<hash>/                   the untouched base's scores, made once and shared
    attempts/<id>.json             how a run was last tried; <id>.lock is held while it is; <id>.log: what it said

A run's state is read from these files and locks, never remembered: a process that is killed lets go of its lock, and
its run is taken over where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from forgetless.errors import RunError
from forgetless.runs.folder import make_folder
from forgetless.runs.seal import read_sealed, write_sealed
from forgetless.sweeping.grid import Run

FORMAT = 1
ELSEWHERE = "give another --output_dir"
AGAIN = "remove it, and the run is tried again"
DONE, RUNNING, FAILED, STOPPED, WAITING = "done", "running", "failed", "stopped", "waiting"


class SweepFolder:
    """Paths of a sweep and the only ways to write there."""

    def __init__(self, root: Path):
        self.root = root
        self.record, self.page = root / "sweep.json", root / "sweep.md"

    def run(self, run: Run) -> Path:
        """The run folder."""
        return self.root / f"{run.kind}s" / run.id

    def base(self, name: str) -> Path:
        """The run folder that holds only the untouched base's scores."""
        return self.root / "base" / name

    def attempt(self, run: Run) -> dict[str, Any]:
        """How the run was last tried: status, error, how often, threads; empty if it never was."""
        file = self._attempt(run, "json")
        return read_sealed(file, AGAIN) if file.exists() else {}

    def log(self, run: Run) -> Path:
        return self._attempt(run, "log")

    def note(self, run: Run, told: dict[str, Any]) -> None:
        """Writes how it was tried; for the holder of the run's lock."""
        write_sealed(self._attempt(run, "json"), {"format": FORMAT} | told)

    @contextmanager
    def held(self, run: Run) -> Iterator[bool]:
        """Whether this process may work on the run: inside the block no other does."""
        make_folder(self.root / "attempts", ELSEWHERE)
        lock = FileLock(self._attempt(run, "lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        except OSError as error:
            raise RunError(f"{self.root}: cannot be written ({error.strerror}); {ELSEWHERE}") from error
        try:
            yield True
        finally:
            lock.release()

    def is_held(self, run: Run) -> bool:
        """Whether some process works on the run now."""
        if not self._attempt(run, "lock").exists():
            return False
        with self.held(run) as free:
            return not free

    def done(self, run: Run) -> bool:
        """Whether the run was finished with the options that it has now."""
        told = self.attempt(run)
        return told.get("status") == DONE and told["config"] == plain(run) and (self.run(run) / "summary.json").exists()

    def state(self, run: Run) -> str:
        if self.done(run):
            return DONE
        if self.is_held(run):
            return RUNNING
        told = self.attempt(run)
        if told.get("status") == FAILED:
            return FAILED
        return STOPPED if told else WAITING

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Waits until no other process is in a block of this name."""
        make_folder(self.root / "attempts", ELSEWHERE)
        with FileLock(self.root / "attempts" / f"{name}.lock"):
            yield

    def _attempt(self, run: Run, kind: str) -> Path:
        return self.root / "attempts" / f"{run.id}.{kind}"


def plain(run: Run) -> dict[str, Any]:
    """All that `learn` is told of a run, as JSON."""
    return run.config.plain() | {"stream": run.config.stream, "tasks": list(run.tasks)}
