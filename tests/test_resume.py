"""A task that is stopped goes on inside itself, with the bytes of one that was never stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
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
from forgetless.methods.finding import find_method
from forgetless.runs.folder import RunFolder, complete, read_json, read_lines, write_json, write_json_whole
from forgetless.runs.seal import write_sealed

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
        examples, one = [method.encoder(row) for row in lesson.rows], replace(settings, max_steps=1)
        learn_task(method, examples, one, Engine("cpu", "fp32"), seed=0, task=number, log=lambda record: None)
        method.end_task(number, lesson.rows)
        method.adapters.save(border / "adapter", method.export())
        save_state(border, method.state())
    number, lesson = len(lessons) - 1, lessons[-1]
    checkpoints = Checkpoints(RunFolder(root), number + 1, lesson.name, method, Engine("cpu"), saving, **more)
    method.begin_task(number)
    examples, log = [method.encoder(row) for row in lesson.rows], checkpoints.records.append
    learn_task(method, examples, settings, Engine("cpu", "fp32"), seed=0, task=number, log=log, checkpoints=checkpoints)
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


@pytest.mark.parametrize("name", ["ilora", "lori", "sdlora", "mtllora"])
def test_resumed_inside_a_task_equals_uninterrupted(name, tiny, two, tmp_path):
    """Adapters, optimizer, the method's state and log, to the byte, over micro-batches; all its attributes too.

    All methods: the contract's clause `resumes inside a task`.
    """
    whole = learn_last(build(name, tiny), two, tmp_path / "whole")
    parts = interrupted(build(name, tiny), tmp_path / "whole", tmp_path / "parts", two)
    assert attributes(parts) == attributes(whole)
    assert [check.as_json() for check in parts.checks()] == [check.as_json() for check in whole.checks()]
    last = checkpoints_in(tmp_path / "parts")[2]
    assert contents(last) == contents(checkpoints_in(tmp_path / "whole")[2])
    assert len(read_lines(last / "log.jsonl")) == 3


def test_a_method_that_forgets_an_attribute_is_found(tiny, two, tmp_path, monkeypatch):
    monkeypatch.setattr(ILoRA, "within_task", tuple(name for name in ILoRA.within_task if name != "consistency"))
    whole = learn_last(build("ilora", tiny), two, tmp_path / "whole")
    parts = interrupted(build("ilora", tiny), tmp_path / "whole", tmp_path / "parts", two)
    assert attributes(parts) != attributes(whole)


def test_values_of_every_kind_come_back():
    value = {1: [torch.tensor([1, 2]), 0.1, None], "name": {"deep": torch.ones(2, dtype=torch.bfloat16)}, "on": True}
    tensors: dict[str, torch.Tensor] = {}
    told = json.loads(json.dumps(packed(value, "state", tensors)))
    found = unpacked(told, tensors)
    assert found.keys() == value.keys() and found["on"] is True and found[1][1:] == [0.1, None]
    assert torch.equal(found[1][0], value[1][0]) and found["name"]["deep"].dtype == torch.bfloat16
    with pytest.raises(TypeError, match="counts is a set"):
        packed({1, 2}, "counts", {})


def test_times_that_cannot_be_read_stop_nothing(tiny, two, tmp_path):
    whole = learn_last(build("sequential", tiny), two, tmp_path / "whole")
    for folder in checkpoints_in(tmp_path / "whole"):
        (folder / "times.json").write_text("[")
    assert attributes(
        interrupted(build("sequential", tiny), tmp_path / "whole", tmp_path / "parts", two)
    ) == attributes(whole)


# ------------------------------------------------------------------------------ which checkpoint is used


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


@pytest.fixture(scope="module")
def ran(tiny, two, tmp_path_factory) -> Path:
    """A folder with three checkpoints of the second task."""
    root = tmp_path_factory.mktemp("ran") / "whole"
    learn_last(build("sequential", tiny), two, root)
    return root


def opened(ran: Path, root: Path, change=lambda root: None, **more) -> tuple[Checkpoints, str]:
    """What is found in a copy of `ran` after a change, and what is said of it."""
    shutil.copytree(ran, root)
    change(root)
    said: list[str] = []
    more = {"saving": EVERY_STEP, "follows": ""} | more
    found = Checkpoints(
        RunFolder(root), 2, "sizes", None, Engine("cpu"), more["saving"], follows=more["follows"], say=said.append
    )
    return found, "\n".join(said)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: flipped(folder / "optimizer.safetensors"), r"optimizer\.safetensors: has changed"),
        (lambda folder: cut(folder / "trainable.safetensors"), r"trainable\.safetensors: has changed"),
        (lambda folder: (folder / "log.jsonl").unlink(), r"log\.jsonl: is missing"),
        (lambda folder: (folder / "stray").write_text(""), "stray: is not listed"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json: is missing"),
        (lambda folder: cut(folder / "manifest.json"), r"manifest\.json:\d+: broken JSON"),
    ],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(damage, told, ran, tmp_path):
    found, said = opened(ran, tmp_path / "run", lambda root: damage(checkpoints_in(root)[2]))
    assert len(found.records) == 2 and "goes on after step 2" in said
    assert re.search(f"not used.*step-000003.*{told}", said)


def test_without_a_usable_checkpoint_the_task_begins_anew(ran, tmp_path):
    def damage(root: Path) -> None:
        for folder in checkpoints_in(root):
            flipped(folder / "trainable.safetensors")

    found, said = opened(ran, tmp_path / "run", damage)
    assert found.records == [] and "learnt from its start" in said and said.count("not used") == 3
    found, said = opened(ran, tmp_path / "other", follows="of another border")
    assert found.records == [] and "the task before it has changed since" in said


def test_only_the_newest_are_kept_and_what_lies_ahead_goes(ran, tiny, two, tmp_path):
    """Step 3 is damaged, so step 2 is used; its successor replaces the damaged one."""
    shutil.copytree(ran, tmp_path / "run")
    flipped(checkpoints_in(tmp_path / "run")[2] / "trainable.safetensors")
    two_of = SaveSettings(save_steps=1, save_total_limit=2)
    learn_last(build("sequential", tiny), two, tmp_path / "run", saving=two_of, say=lambda text: None)
    assert [folder.name for folder in checkpoints_in(tmp_path / "run")] == ["step-000002", "step-000003"]
    assert contents(checkpoints_in(tmp_path / "run")[1]) == contents(checkpoints_in(ran)[2])
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".step")]


def test_saved_by_minutes(ran, tmp_path, monkeypatch):
    found, _ = opened(ran, tmp_path / "run", saving=SaveSettings(save_minutes=2.0))
    assert found._wish(4) == 0
    found.saved_at -= 121
    assert found._wish(4) == 1
    off, _ = opened(ran, tmp_path / "off", saving=SaveSettings(save_minutes=0))
    off.saved_at -= 1e6
    assert off._wish(4) == 0


def test_a_full_disk_leaves_the_checkpoint_before(ran, tiny, two, tmp_path, monkeypatch):
    import forgetless.learning.checkpoint as module

    def full(*_):
        raise OSError(28, "No space left on device")

    shutil.copytree(ran, tmp_path / "run")
    shutil.rmtree(checkpoints_in(tmp_path / "run")[2])
    monkeypatch.setattr(module, "write_lines", full)
    with pytest.raises(RunError, match=r"step-000003: could not be written \(.*No space left.*unchanged"):
        learn_last(build("sequential", tiny), two, tmp_path / "run", say=lambda text: None)
    assert [folder.name for folder in checkpoints_in(tmp_path / "run")] == ["step-000001", "step-000002"]


# ------------------------------------------------------------------------------------- NaN and Inf


@pytest.fixture
def one(colours) -> Stream:
    return Stream("one", (colours,))


def poisoned(monkeypatch, *steps: int) -> None:
    """The loss of these calls (one a step without micro-batches) is NaN."""
    real, calls = Method.loss, iter(range(1, 100))
    monkeypatch.setattr(
        Method, "loss", lambda self, part: real(self, part) * (float("nan") if next(calls) in steps else 1.0)
    )


ONE_PART = {"max_steps": 3, "micro_batch_size": 4, "cells": "last"}


def test_a_nan_step_is_skipped_and_told(tiny, one, tmp_path, monkeypatch):
    """It moves no weight, stands in the log, and the report warns of it."""
    poisoned(monkeypatch, 2)
    summary = learn(config(tiny, one, tmp_path / "run", on_nan="skip", **ONE_PART))
    records = read_lines(tmp_path / "run" / "tasks" / "01-colours" / "log.jsonl")
    assert records[1]["skipped"].startswith("task 1, step 2: loss nan, gradient norm nan") and "loss" not in records[1]
    assert [record["step"] for record in records] == [1, 2, 3] and "loss" in records[2]
    assert any("colours: 1 of 3 steps were skipped" in warning for warning in summary["warnings"])
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def test_a_nan_that_the_method_makes_of_a_gradient_is_skipped_too(tiny, one, tmp_path, monkeypatch):
    from forgetless.methods.gem import GEM

    steps = []

    def projected(method) -> None:
        steps.append(1)
        if len(steps) == 2:
            method.adapters.parameters()[0].grad.fill_(float("nan"))

    monkeypatch.setattr(GEM, "after_backward", projected)
    learn(config(tiny, one, tmp_path / "run", method="gem", on_nan="skip", **ONE_PART))
    records = read_lines(tmp_path / "run" / "tasks" / "01-colours" / "log.jsonl")
    assert ["skipped" in record for record in records] == [False, True, False]
    assert records[1]["skipped"].endswith("gradient norm nan")


def test_stopped_by_nan_and_gone_on_with_skip(tiny, one, tmp_path, monkeypatch):
    """The checkpoints stay; another policy, the same command: on from there. Too many are an error."""
    poisoned(monkeypatch, 3, 4, 5)
    told = config(tiny, one, tmp_path / "run", save_steps=1, **ONE_PART)
    with pytest.raises(RunError, match=r"task 1, step 3: loss nan.*checkpoints are as they were.*--on_nan skip"):
        learn(told)
    assert [folder.name for folder in checkpoints_in(tmp_path / "run")] == ["step-000001", "step-000002"]
    with pytest.raises(RunError, match=r"task 1, step 3.*max_skipped=0"):
        learn(replace(told, on_nan="skip", max_skipped=0))
    assert learn(replace(told, on_nan="skip"))["status"] == "complete"
    assert [("skipped" in one) for one in read_lines(tmp_path / "run" / "tasks" / "01-colours" / "log.jsonl")] == [
        False, False, True
    ]  # fmt: skip


def test_a_skipped_step_leaves_nothing_in_the_methods_figures(tiny, one, tmp_path, monkeypatch):
    """HiddenKey's divergence of the two passes is NaN in the second step; the third one's is its own."""
    from forgetless.methods import hiddenkey

    real, calls = hiddenkey.between, iter(range(1, 100))
    poison = lambda *passes: real(*passes) * (float("nan") if next(calls) == 2 else 1.0)  # noqa: E731
    monkeypatch.setattr(hiddenkey, "between", poison)
    learn(config(tiny, one, tmp_path / "run", method="hiddenkey", method_options={"kl": 0.5}, on_nan="skip",
                 save_steps=1, **ONE_PART))  # fmt: skip
    folder = tmp_path / "run" / "tasks" / "01-colours"
    divergence = [record.get("divergence") for record in read_lines(folder / "log.jsonl")]
    assert divergence[1] is None and divergence[0] > 0 and divergence[2] > 0
    summed = next(one["value"] for one in read_json(folder / "learned.json")["checks"] if "divergence" in one["name"])
    assert summed == pytest.approx(divergence[0] + divergence[2])


def test_every_part_of_a_combined_method_hears_of_a_skipped_step(tiny):
    method = find_method("replay+mtllora")()
    method.last.tasks = [0, 1]  # as its loss leaves them
    method.after_skip()
    assert method.last.tasks is None


def test_a_figure_that_is_no_number_is_named_with_its_file(tiny, one, tmp_path, monkeypatch):
    told = config(tiny, one, tmp_path / "run", **ONE_PART)
    monkeypatch.setattr(Method, "told", lambda self: {"ratio": float("inf")})
    with pytest.raises(RunError, match=r"tasks/01-colours/log\.jsonl: not written, \[0\]\.ratio is NaN or infinite"):
        learn(told)
    with pytest.raises(RunError, match=r"checkpoints/01-colours/step-000001/log\.jsonl: not written.*unchanged"):
        learn(replace(told, save_steps=1))
    monkeypatch.undo()
    assert learn(told)["status"] == "complete"
    for write in (write_json, write_json_whole, write_sealed):
        with pytest.raises(RunError, match=r"x\.json: not written, a\[1\]\.b is NaN or infinite.*leave it out"):
            write(tmp_path / "x.json", {"a": [0.5, {"b": float("nan")}]})
    assert not (tmp_path / "x.json").exists()


def test_nan_in_weights_is_not_saved(tmp_path):
    refuse_nan({"fine": torch.ones(2), "empty": torch.ones(0, 2), "rows": torch.tensor([1])}, tmp_path)
    for bad in (float("inf"), float("nan")):
        with pytest.raises(RunError, match=r"method\.safetensors: not written, slow holds NaN or Inf.*unchanged"):
            refuse_nan({"slow": torch.tensor([1.0, bad])}, tmp_path / "method.safetensors")


# ---------------------------------------------------------------------------------------- signals


@pytest.fixture
def interruptible():
    """A command that a shell started in the background ignores SIGINT, and tests may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_saves_the_running_step_and_the_same_command_goes_on(tiny, one, tmp_path, monkeypatch, capfd):
    """SIGTERM in the first step, SIGINT in the second: each saves; the third command gives the uninterrupted bytes."""
    from forgetless.cli import main

    real, sent = Method.batch, []

    def told_to_stop(self, examples, step):
        if step == len(sent) < 2:
            sent.append((signal.SIGTERM, signal.SIGINT)[len(sent)])
            os.kill(os.getpid(), sent[-1])
        return real(self, examples, step)

    told = config(tiny, one, tmp_path / "whole", max_steps=3, cells="last")
    learn(told)
    parts, codes = replace(told, output_dir=str(tmp_path / "parts")), []
    monkeypatch.setattr(Method, "batch", told_to_stop)
    monkeypatch.setattr("forgetless.cli.learn.parse_learn", lambda arguments: parts)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for _ in range(3):
        codes.append(main(["learn"]))
    assert codes == [143, 130, 0]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    said = capfd.readouterr().err
    assert "Step 1 of 01-colours is saved: give the same command again" in said
    assert "01-colours: goes on after step 2" in said
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert not (tmp_path / "parts" / "checkpoints").exists()


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_stops_at_once_and_elsewhere_the_first_does():
    with pytest.raises(Stopped, match="same command"), Signals() as signals, signals.held():
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")
    with pytest.raises(Stopped) as stopped, Signals():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")
    assert stopped.value.number == signal.SIGTERM and isinstance(stopped.value, KeyboardInterrupt)
    with pytest.raises(Stopped), Signals() as signals, signals.held():
        os.kill(os.getpid(), signal.SIGTERM)  # and the block ends before anyone asks


@pytest.mark.usefixtures("interruptible")
def test_sigterm_before_anything_is_learnt_says_so_too(tiny, tmp_path, monkeypatch, capsys):
    """While the model is loaded, and in a command that has nothing to save."""
    from forgetless.cli import main

    def told_to_stop(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": " b"}\n' * 20)
    (tmp_path / "stream.yaml").write_text("tasks: [{name: a, train: rows.jsonl, test: rows.jsonl}]")
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("forgetless.learning.prepare.load_base", told_to_stop)
    asked = ["--stream", str(tmp_path / "stream.yaml"), "--model", tiny, "--output_dir", str(tmp_path / "run")]
    assert main(["learn", *asked]) == 143
    assert "stopped. Finished tasks are kept: the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr("forgetless.cli.methods.run", told_to_stop)
    assert main(["methods"]) == 143 and capsys.readouterr().err == "stopped.\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_at_the_end_of_a_task_waits_until_it_is_saved(tiny, one, tmp_path, monkeypatch, capfd):
    """It comes after the last step, while the method makes what it keeps: nothing of the task is learnt again."""
    from forgetless.cli import main

    told = config(tiny, one, tmp_path / "whole", max_steps=3, cells="last")
    learn(told)
    parts = replace(told, output_dir=str(tmp_path / "parts"))
    monkeypatch.setattr("forgetless.cli.learn.parse_learn", lambda arguments: parts)
    monkeypatch.setattr(Method, "end_task", lambda self, task, rows: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["learn"]) == 143
    assert "01-colours is finished and saved: give the same command again" in " ".join(capfd.readouterr().err.split())
    assert complete(tmp_path / "parts" / "tasks" / "01-colours")
    assert main(["learn"]) == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------------------- the whole command


def test_saving_options_decide_nothing(tiny, two, tmp_path):
    told = config(tiny, two, tmp_path / "run")
    saved = replace(told, save_steps=1, save_minutes=1.0, save_total_limit=5, on_nan="skip", max_skipped=1)
    assert told.decides() == saved.decides()


def test_a_border_measured_by_a_later_command_is_the_same(tiny, one, tmp_path):
    """Stopped between a task and its measuring: LoRA's dropout is off although this process has trained nothing."""
    told = config(tiny, one, tmp_path / "run", max_steps=2, cells="last", lora_dropout=0.5, forgetting_prompts=1)
    learn(told)
    before = contents(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tasks" / "01-colours" / "forgetting")
    learn(told)
    assert contents(tmp_path / "run") == before


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """A few kills of the real command; `benchmarks/kill.py --kills 100` is the long form."""
    harness = Path(__file__).parents[1] / "benchmarks" / "kill.py"
    command = [sys.executable, str(harness), "--kills", "4", "--methods", "ilora", "replay+olora"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.startswith("4 kills") and "all files equal those" in done.stdout


def test_the_page_says_how_many_methods_are_killed():
    page = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text()
    assert f"all {len(METHODS)} built-in methods and `replay+olora` in turn" in page
