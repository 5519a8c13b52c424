"""A task that is stopped goes on inside itself, with the bytes of one that was never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_learn import config, contents
from test_methods import build

from forgetless.data.tasks import Stream
from forgetless.errors import RunError, Stopped
from forgetless.learning.checkpoint import Checkpoints, SaveSettings, packed, refuse_nan, unpacked
from forgetless.learning.engine import Engine
from forgetless.learning.signals import Signals
from forgetless.learning.state import load_state, save_state
from forgetless.learning.step import TrainSettings, learn_task
from forgetless.learning.stream import learn
from forgetless.methods import METHODS, ILoRA, Method
from forgetless.runs.folder import RunFolder, read_json, read_lines

SETTINGS = TrainSettings(
    learning_rate=2e-2, max_steps=3, batch_size=4, micro_batch_size=3, lr_scheduler_type="cosine", warmup_ratio=0.4
)
EVERY_STEP = SaveSettings(save_steps=1, save_total_limit=3)


def learn_last(method: Method, stream: Stream, root: Path, *, saving=EVERY_STEP, settings=SETTINGS, **more) -> Method:
    """Learns the last lesson (the first ones without checkpoints); goes on where `root` has a checkpoint of it."""
    lessons, border = method.lessons(stream), root / "border"
    for number, lesson in enumerate(lessons[:-1]):
        if border.exists():
            method.resume(method.adapters.load(border / "adapter"), load_state(border), number)
            continue
        method.begin_task(number)
        examples = [method.encoder(row) for row in lesson.rows]
        learn_task(method, examples, settings, Engine("cpu", "fp32"), seed=0, task=number, log=lambda record: None)
        method.end_task(number, lesson.rows)
        method.adapters.save(border / "adapter", method.export())
        save_state(border, method.state())
    number, lesson = len(lessons) - 1, lessons[-1]
    checkpoints = Checkpoints(RunFolder(root), number + 1, lesson.name, method, Engine("cpu"), saving, **more)
    method.begin_task(number)
    examples, log = [method.encoder(row) for row in lesson.rows], checkpoints.records.append
    learn_task(
        method, examples, settings, Engine("cpu", "fp32"), seed=0, task=number, log=log, checkpoints=checkpoints
    )
    method.end_task(number, lesson.rows)
    return method


def checkpoints_in(root: Path) -> list[Path]:
    return sorted((root / "checkpoints").glob("*/step-*"))


def interrupted(method: Method, whole: Path, root: Path, stream: Stream, step: int = 2) -> Method:
    """What a run that was killed after `step` has left, gone on with in `root`."""
    shutil.copytree(whole, root)
    for folder in checkpoints_in(root)[step:]:
        shutil.rmtree(folder)
    return learn_last(method, stream, root)


def attributes(method: Method) -> dict:
    """All that a method holds; tensors as bytes."""
    kept = {name: value for name, value in vars(method).items() if name not in ("adapters", "encoder")}
    return {name: plain(value) for name, value in kept.items()} | plain(method.adapters.snapshot())


def plain(value):
    if isinstance(value, torch.Tensor):
        return value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", METHODS)
def test_resumed_inside_a_task_equals_uninterrupted(name, tiny, two, tmp_path):
    """Adapters, optimizer, the method's state and log, to the byte, over micro-batches; all its attributes too."""
    whole = learn_last(build(name, tiny), two, tmp_path / "whole")
    parts = interrupted(build(name, tiny), tmp_path / "whole", tmp_path / "parts", two)
    assert attributes(parts) == attributes(whole)
    assert [check.as_json() for check in parts.checks()] == [check.as_json() for check in whole.checks()]
    last = checkpoints_in(tmp_path / "parts")[2]
    assert contents(last) == contents(checkpoints_in(tmp_path / "whole")[2])
    assert len(read_lines(last / "log.jsonl")) == 3


@pytest.mark.parametrize("forgotten", ILoRA.within_task)
def test_a_method_that_forgets_an_attribute_is_found(forgotten, tiny, two, tmp_path, monkeypatch):
    monkeypatch.setattr(ILoRA, "within_task", tuple(name for name in ILoRA.within_task if name != forgotten))
    whole = learn_last(build("ilora", tiny), two, tmp_path / "whole")
    parts = interrupted(build("ilora", tiny), tmp_path / "whole", tmp_path / "parts", two)
    assert attributes(parts) != attributes(whole)
