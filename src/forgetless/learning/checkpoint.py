"""Checkpoints inside a task: all that its steps change, so that a task that was stopped goes on at its last saved step.

    checkpoints/02-amazon/step-000040/
      checkpoint.json          the border it follows, the optimizer's counters, the method's numbers
      trainable.safetensors    <layer>.A, <layer>.B
      optimizer.safetensors    <i>.exp_avg, <i>.exp_avg_sq of the i-th trainable tensor
      method.safetensors       the method's tensors that change within a task
      log.jsonl                the records of the steps so far
      times.json

Rows, replay draws, dropout and learning rate are functions of (seed, task, step), so nothing of them is saved. A task
that goes on is begun as it was the first time (the border's state, then `begin_task`), then the checkpoint overwrites.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from forgetless.errors import RunError, Stopped
from forgetless.learning.engine import Engine
from forgetless.learning.processes import summed
from forgetless.learning.signals import Signals
from forgetless.learning.spending import PASSES, Spending
from forgetless.methods.base import Method
from forgetless.model.adapters import named
from forgetless.model.identity import read_tensors
from forgetless.runs.folder import (
    FORMAT,
    MANIFEST,
    TIMES,
    RunFolder,
    complete,
    discard,
    newest_first,
    read_json,
    shaped,
    step_of,
    write_json,
    write_lines,
)
from forgetless.runs.shapes import CHECKPOINT, STEP, read, read_records

PARTS = ("trainable", "optimizer", "method")  # one safetensors file each
SAVE = 1  # what a process wishes after a step: 0 nothing, 1 a checkpoint, a signal's number a checkpoint and the end


@dataclass(frozen=True)
class SaveSettings:
    """How often the task that is being learnt is saved."""

    save_steps: int = 0
    """save a checkpoint inside a task every so many steps; 0: off"""
    save_minutes: float = 10.0
    """save one when the last is this many minutes old; 0: off"""
    save_total_limit: int = 2
    """checkpoints of a task that are kept, the newest ones; they go when the task is finished"""


class Checkpoints:
    """The checkpoints of one lesson: puts back the newest one that verifies, and saves new ones when it is time."""

    def __init__(
        self,
        run: RunFolder,
        number: int,
        name: str,
        method: Method,
        engine: Engine,
        settings: SaveSettings,
        *,
        follows: str = "",
        signals: Signals | None = None,
        spending: Spending | None = None,
        say: Callable[[str], None] = print,
    ):
        """Finds the newest checkpoint; `follows` is the `fingerprint` of the lesson before, which must be the same."""
        self.run, self.folder, self.method, self.engine = run, run.checkpoints(number, name), method, engine
        self.settings, self.follows, self.signals, self.say = settings, follows, signals or Signals(), say
        self.found = engine.agree(self._newest() if engine.is_main else None)
        self.records = read_records(self.found / "log.jsonl", STEP) if self.found else []
        self.spending = spending or Spending(engine.device)
        # what was spent before it was stopped counts once, not on every process
        self.before = _spent_before(self.found if engine.is_main else None, [*self.spending.clocks(), "peak_memory"])
        self.began = self.spending.clocks()
        self.spending.begin()
        self.saved_at = time.monotonic()

    def spent(self) -> dict[str, float]:
        """What the lesson cost (`Spending`), with what it did before it was stopped: times of this process, tokens of
        all, so all call it.
        """
        told = {name: self.before[name] + now - self.began[name] for name, now in self.spending.clocks().items()}
        tokens = summed(torch.tensor([told[name] for name in PASSES], dtype=torch.float64, device=self.engine.device))
        told |= dict(zip(PASSES, map(int, tokens.tolist()), strict=True))
        peak = self.spending.peak()
        return told | ({} if peak is None else {"peak_memory": max(peak, int(self.before["peak_memory"]))})

    # -------------------------------------------------------------------------------- putting back

    def restore(self, optimizer: Optimizer) -> int:
        """Puts back the trainable tensors, the optimizer and the method; returns how many steps are done."""
        if self.found is None:
            return 0
        with shaped(self.found, "remove it, and the one before it is used"):
            told = read(self.found / "checkpoint.json", CHECKPOINT)
            trainable, moments, loaded = (read_tensors(self.found / f"{part}.safetensors") for part in PARTS)
            with torch.no_grad():
                for name, tensor in named(self.method.adapters.pairs()).items():
                    if trainable[name].shape != tensor.shape:
                        raise ValueError(f"{name} is {tuple(trainable[name].shape)}, here {tuple(tensor.shape)}")
                    tensor.copy_(trainable[name])
            load_optimizer(optimizer, moments, told["optimizer_steps"])
            tensors = {name: tensor.to(self.engine.device) for name, tensor in loaded.items()}
            for name in self.method.within_task:
                value, now = unpacked(told["method"][name], tensors), getattr(self.method, name, None)
                if now is not None and value is not None and not _of_a_kind(value, now):
                    raise ValueError(f"{name} is no {type(now).__name__} as the method has it")
                setattr(self.method, name, value)
            return told["step"]

    def _newest(self) -> Path | None:
        """Says of every newer one why it is not used."""
        folders = newest_first(self.folder)
        for folder in folders:
            if not (why := self._unusable(folder)):
                self.say(f"{self.folder.name}: goes on after step {step_of(folder)} ({folder})")
                return folder
            self.say(f"note: a checkpoint is not used. {why}")
        if folders:
            self.say(f"note: {self.folder.name} is learnt from its start: none of its checkpoints can be used")
        return None

    def _unusable(self, folder: Path) -> str:
        try:
            if not complete(folder):
                return f"{folder / MANIFEST}: is missing"
            if read(folder / "checkpoint.json", CHECKPOINT)["follows"] != self.follows:
                return f"{folder}: the task before it has changed since"
        except RunError as error:
            return str(error)
        return ""

    # ------------------------------------------------------------------------------------- saving

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Saves when it is time. After a signal it saves and raises `Stopped`, on all processes at the same step."""
        wish = self.engine.most(self._wish(step))
        if wish:
            self.save(step, optimizer)
        if wish > SAVE:
            told = f"Step {step} of {self.folder.name} is saved: give the same command again to go on there."
            raise Stopped(wish, told)

    def _wish(self, step: int) -> int:
        if self.signals.received:
            return self.signals.received
        every, minutes = self.settings.save_steps, self.settings.save_minutes
        late = self.engine.is_main and minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes
        return SAVE if late or (every and step % every == 0) else 0

    def save(self, step: int, optimizer: Optimizer) -> None:
        """Publishes `step-<step>` and removes what is beyond the limit; NaN and Inf are refused."""
        folder = self.folder / f"step-{step:06d}"
        method: dict[str, Tensor] = {}
        values = {name: packed(getattr(self.method, name), name, method) for name in self.method.within_task}
        moments, counters = optimizer_state(optimizer)
        parts = dict(zip(PARTS, (self.method.adapters.snapshot(), moments, method), strict=True))
        for part, tensors in parts.items():
            refuse_nan(tensors, folder / f"{part}.safetensors")
        spent = self.spent()
        if self.engine.is_main:
            with self.run.publish(folder) as temporary:
                for part, tensors in parts.items():
                    save_tensors(tensors, temporary / f"{part}.safetensors")
                told = {"format": FORMAT, "step": step, "follows": self.follows}
                write_json(temporary / "checkpoint.json", told | {"optimizer_steps": counters, "method": values})
                write_lines(temporary / "log.jsonl", self.records)
                write_json(temporary / f"{TIMES}.json", spent)
            self._prune(folder)
        self.saved_at = time.monotonic()
        self.engine.wait()

    def _prune(self, newest: Path) -> None:
        """Keeps the newest ones; what claims a later step could not be used."""
        folders = newest_first(self.folder)
        kept = folders[folders.index(newest) :][: self.settings.save_total_limit]
        for folder in folders:
            if folder not in kept:
                discard(folder)


def fingerprint(folder: Path | None) -> str:
    """Names the content of a published folder; empty where there is none."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() if folder else ""


def refuse_nan(tensors: dict[str, Tensor], place: Path) -> None:
    """RunError where a tensor that is to be saved holds NaN or Inf."""
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.is_floating_point() and not math.isfinite(largest(tensor)):
            raise RunError(
                f"{place}: not written, {name} holds NaN or Inf; what was saved before is unchanged. The training has "
                "diverged: lower learning_rate, in another output_dir."
            )


def largest(tensor: Tensor) -> float:
    """max|x|; NaN where the tensor holds one. One pass, without a copy."""
    return float(torch.linalg.vector_norm(tensor.detach(), math.inf))


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes tensors as safetensors; equal tensors give equal bytes."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


# ------------------------------------------------------------------------- without pickle: tensors and JSON


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The moments `<i>.<name>` and the step counter of each trainable tensor i that has been stepped."""
    everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {i: optimizer.state[one] for i, one in enumerate(everything) if optimizer.state.get(one)}
    moments = {f"{i}.{key}": value for i, state in states.items() for key, value in state.items() if key != "step"}
    return moments, {str(i): float(state["step"]) for i, state in states.items()}


def load_optimizer(optimizer: Optimizer, moments: dict[str, Tensor], counters: dict[str, float]) -> None:
    """Puts back what `optimizer_state` gave."""
    in_tensors = isinstance(optimizer, torch.optim.AdamW)  # bitsandbytes counts steps in plain numbers
    states: dict[int, dict[str, Any]] = {
        int(i): {"step": torch.tensor(step) if in_tensors else int(step)} for i, step in counters.items()
    }
    for name, tensor in moments.items():
        i, key = name.split(".", 1)
        states[int(i)][key] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A method's attribute as JSON; its tensors go into `tensors` by their place in it."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, packed(one, f"{name}.{key}", tensors)] for key, one in value.items()]}
    if isinstance(value, list):
        return [packed(one, f"{name}.{i}", tensors) for i, one in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"within_task: {name} is a {type(value).__name__}, not a number, text, tensor, list or dict")


def unpacked(told: Any, tensors: dict[str, Tensor]) -> Any:
    """What `packed` was given."""
    if isinstance(told, list):
        return [unpacked(one, tensors) for one in told]
    if isinstance(told, dict) and "tensor" in told:
        return tensors[told["tensor"]]
    if isinstance(told, dict):
        return {key: unpacked(one, tensors) for key, one in told["dict"]}
    return told


def _of_a_kind(value: Any, now: Any) -> bool:
    """Whether a saved attribute can stand where the method has `now`; a dict's values have their kinds too."""
    if not (isinstance(now, dict) and isinstance(value, dict)):
        return _kind(value) == _kind(now)
    return not now or {_kind(one) for one in value.values()} <= {_kind(one) for one in now.values()}


def _kind(value: Any) -> Any:
    """A count may have become a mean, and a tensor may be a parameter."""
    return next((kind for kind in (Tensor, int | float) if isinstance(value, kind)), type(value))


def _spent_before(folder: Path | None, names: list[str]) -> dict[str, float]:
    """What a checkpoint says of costs, which no hash covers and nothing depends on: 0 where it cannot be read."""
    try:
        told = read_json(folder / f"{TIMES}.json") if folder else {}
        return {name: float(told.get(name, 0)) for name in names}
    except (RunError, AttributeError, TypeError, ValueError):
        return dict.fromkeys(names, 0.0)
