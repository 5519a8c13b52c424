"""The options of `learn`: dataclass fields = YAML keys = command-line flags = documentation."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from forgetless.data.tasks import Stream
from forgetless.errors import UsageError, nearest
from forgetless.learning.engine import PRECISIONS
from forgetless.learning.step import TrainSettings
from forgetless.methods import METHODS, Method
from forgetless.model.adapters import LoraSettings

CELLS = ("all", "seen", "last")


@dataclass(frozen=True)
class LearnConfig(TrainSettings, LoraSettings):
    """Learn a stream of tasks, one after another, and score every task after each."""

    stream: Any = ""
    """a stream: a YAML file, or a named one such as 'demo'"""
    method: str = "sequential"
    """how to learn: `forgetless methods` lists them; options as --method.NAME VALUE"""
    method_options: dict = field(default_factory=dict)
    """the method's own options (from a method file's constructor)"""
    model: str = "smollm2-135m-instruct"
    """a packaged model, a folder, or a hub name"""
    output_dir: str = ""
    """the run folder; default runs/<stream>-<method>-seed<seed>"""
    cells: str = "all"
    """which cells of the matrix are scored: all, seen (tasks learnt so far), last (after the last task only)"""
    seed: int = 0
    """orders, initial weights, dropout and replay draws; data are cut by their own seed"""
    device: str = "auto"
    """auto, cpu, cuda"""
    precision: str = "auto"
    """auto (bf16 where the machine has instructions for it), bf16, fp32"""
    score_batch_tokens: int = 4096
    """tokens scored at once"""
    on_bad_row: str = "error"
    """error: stop at the first row that cannot be used; skip: leave it out and count it"""
    report_to: list[str] = field(default_factory=list)
    """trackers: tensorboard, wandb, trackio, ..."""
    dry_run: bool = False
    """print the plan and train nothing"""

    def check(self) -> None:
        """Values that the types do not rule out."""
        if not self.stream:
            raise UsageError("no stream given; try --stream demo, or a YAML file with a list of tasks")
        _one_of("method", self.method, METHODS)
        _one_of("cells", self.cells, CELLS)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("on_bad_row", self.on_bad_row, ("error", "skip"))
        for name in (
            "r",
            "batch_size",
            "micro_batch_size",
            "learning_rate",
            "num_train_epochs",
            "max_length",
            "lora_alpha",
            "score_batch_tokens",
        ):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} must be above 0, not {getattr(self, name)}")

    def build_method(self) -> Method:
        try:
            return METHODS[self.method](**self.method_options)
        except TypeError as error:
            raise UsageError(
                f"method {self.method}: {str(error).split('__init__() ')[-1]}; see docs/methods/{self.method}.md"
            ) from error

    def part(self, kind: type):
        """The fields of one of the settings classes."""
        return kind(**{one.name: getattr(self, one.name) for one in fields(kind)})

    def plain(self) -> dict:
        """The options as JSON, without where the run lies; a stream given as an object by its name."""
        told = {one.name: getattr(self, one.name) for one in fields(self)}
        stream = self.stream.name if isinstance(self.stream, Stream) else self.stream
        return {name: value for name, value in told.items() if name not in ("output_dir", "dry_run")} | {
            "stream": stream
        }

    def decides(self) -> dict:
        """The options that may not change when a run is continued. Precision, device and the split may: another
        machine goes on with what it has, and the numbers then agree up to rounding (dropout draws anew).
        """
        free = {
            "report_to",
            "micro_batch_size",
            "gradient_checkpointing",
            "cells",
            "device",
            "precision",
            "score_batch_tokens",
            "stream",
            "model",
            "on_bad_row",
        }
        return {name: value for name, value in self.plain().items() if name not in free}


def _one_of(option: str, value: str, known) -> None:
    if value not in known:
        raise UsageError(f"{option}: no {value!r}{nearest(value, known)}")
