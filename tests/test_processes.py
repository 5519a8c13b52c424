"""One process and two give the same adapters, for one- and two-term losses, through the real command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_learn import contents

from forgetless.cli import main
from forgetless.data.batches import Example
from forgetless.learning.engine import Engine
from forgetless.runs.folder import read_json

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "accelerate"


def learn(commands: list[list[str]], launch: str = "two-processes") -> None:
    """The commands in turn, in two processes that are started once."""
    process = launched(["tests/launched.py", json.dumps(commands)], launch)
    told = process.communicate(timeout=400)[1]
    assert process.returncode == 0, told[-3000:]
    said = " ".join(told.split())
    assert said.count("2 processes") == len(commands), told[-3000:]
    assert ("base in shards" in said) == (launch == "fsdp2"), told[-3000:]


def flags_of(folder: Path, stream: Path, tiny: str, method: str, *more: str) -> list[str]:
    flags = ["--stream", str(stream), "--model", tiny, "--method", method, "--output_dir", str(folder), "--r", "4"]
    flags += ["--batch_size", "6", "--micro_batch_size", "2", "--learning_rate", "1e-3", "--max_length", "64"]
    flags += ["--device", "cpu", "--precision", "fp32", "--num_train_epochs", "2", "--forgetting_prompts", "2"]
    return [*flags, *more]


def launched(program: list[str], launch: str) -> subprocess.Popen:
    # the configuration starts several processes; --device cpu keeps them off the GPU
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{launch}.yaml")]
    command = [sys.executable, *accelerate, "--main_process_port", "0", *program]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


@pytest.fixture(scope="module")
def stream(two, tmp_path_factory) -> Path:
    """Answers of uneven length, an odd number of rows: processes get unequal shares."""
    folder, tasks = tmp_path_factory.mktemp("stream"), []
    for task in two.tasks:
        for split in ("train", "test"):
            rows = getattr(task, split)[: 11 if split == "train" else 6]
            lines = [json.dumps({"prompt": r.prompt, "completion": r.answer + " indeed" * (i % 3)})
                     for i, r in enumerate(rows)]  # fmt: skip
            (folder / f"{task.name}-{split}.jsonl").write_text("\n".join(lines))
        tasks.append({"name": task.name, "train": f"{task.name}-train.jsonl", "test": f"{task.name}-test.jsonl",
                      "validation": 0, "max_new_tokens": 4, "scorers": ["options", "exact_match"],
                      "options": [word + " indeed" * i for word in task.options for i in range(3)]})  # fmt: skip
    (folder / "stream.yaml").write_text(json.dumps({"tasks": tasks}))
    return folder / "stream.yaml"


def same_adapters_and_scores(one: Path, two: Path) -> None:
    left, right = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    change = sum(float((left[k] - right[k]).norm() ** 2) for k in left) ** 0.5
    size = sum(float(left[k].norm() ** 2) for k in left) ** 0.5
    assert change < 1e-4 * size
    alone, both = (read_json(folder / "summary.json") for folder in (one, two))
    for task in alone["losses"]:
        for a, b in zip(alone["losses"][task], both["losses"][task], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert alone["headline"] == both["headline"] and alone["measures"] == both["measures"]


def one_and_two(methods: list[str], stream: Path, tiny: str, folder: Path, launch: str) -> None:
    """Each method in this process, then all of them in two."""
    for method in methods:
        assert main(["learn", *flags_of(folder / method / "one", stream, tiny, method)]) == 0
    learn([flags_of(folder / method / "two", stream, tiny, method) for method in methods], launch)
    for method in methods:
        same_adapters_and_scores(folder / method / "one", folder / method / "two")


@pytest.mark.slow  # several processes
def test_two_processes_equal_one(stream, tiny, tmp_path):
    methods = ["ilora", "ewc", "gem", "l2p", "mbpa", "sherl"]
    one_and_two(methods, stream, tiny, tmp_path, "two-processes")
    for method in methods:
        one, both = (read_json(tmp_path / method / name / "summary.json")["forgetting"] for name in ("one", "two"))
        for a, b in zip(one, both, strict=True):
            assert a["kl"] == pytest.approx(b["kl"], abs=2e-5) and a["entropy"] == b["entropy"] > 1


@pytest.mark.slow  # several processes
def test_a_base_in_shards_gives_what_a_whole_one_gives(stream, tiny, tmp_path):
    """Several passes a micro-batch; gradients on memory; the base's own weights."""
    one_and_two(["ilora", "gem", "oplora"], stream, tiny, tmp_path, "fsdp2")


@pytest.mark.parametrize("shards, rank, mine", [(False, 0, 2), (False, 1, 1), (True, 0, 2), (True, 1, 2)])
def test_in_shards_every_process_makes_as_many_passes(shards, rank, mine):
    """Three micro-batches on two processes: the fourth repeats rows that weigh nothing."""
    engine = Engine("cpu", "fp32")
    engine.processes, engine.rank, engine.shards = 2, rank, shards
    parts = [[Example((1, 2), (False, True), weight=weight)] for weight in (1.0, 2.0, 4.0)]
    found = engine.parts(parts)
    assert len(found) == mine
    assert sum(part[0].weight for part in found) == (5.0 if rank == 0 else 2.0)
    engine.repeats = True
    assert engine.parts(parts) == parts and engine.mine(parts) == (parts if shards else parts[rank::2])


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["two-processes", "fsdp2"])
def test_two_processes_stop_at_the_same_step_and_go_on(launch, stream, tiny, tmp_path):
    """SIGTERM to the launcher reaches both; the same command again gives the uninterrupted bytes."""
    more = ("--save_steps", "2", "--num_train_epochs", "8")
    whole = flags_of(tmp_path / "whole", stream, tiny, "ilora", *more)
    flags = flags_of(tmp_path / "parts", stream, tiny, "ilora", *more)
    parts = launched(["-m", "forgetless", "learn", *flags], launch)
    until = time.monotonic() + 240
    while not list((tmp_path / "parts").glob("checkpoints/*/step-*")) and time.monotonic() < until:
        time.sleep(0.02)
    parts.send_signal(signal.SIGTERM)
    told = parts.communicate(timeout=60)[1]
    assert parts.returncode and re.search(r"Step \d+ of 0\d-\w+ is saved", " ".join(told.split())), told[-3000:]
    learn([flags, whole], launch)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
