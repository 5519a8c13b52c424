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

CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate"


def learn(
    folder: Path, stream: Path, tiny: str, method: str, processes: int, *more: str, launch: str = "two-processes"
) -> dict:
    """The command's summary; one process is this one."""
    flags = flags_of(folder, stream, tiny, method, *more)
    if processes == 1:
        assert main(["learn", *flags]) == 0
        return json.loads((folder / "summary.json").read_text())
    process = launched(flags, launch)
    told = process.communicate(timeout=300)[1]
    assert process.returncode == 0, told[-3000:]
    said = " ".join(told.split())
    assert "2 processes" in said and ("base in shards" in said) == (launch == "fsdp2"), told[-3000:]
    return json.loads((folder / "summary.json").read_text())


def flags_of(folder: Path, stream: Path, tiny: str, method: str, *more: str) -> list[str]:
    flags = ["--stream", str(stream), "--model", tiny, "--method", method, "--output_dir", str(folder), "--r", "4"]
    flags += ["--batch_size", "6", "--micro_batch_size", "2", "--learning_rate", "1e-3", "--max_length", "64"]
    flags += ["--device", "cpu", "--precision", "fp32", "--num_train_epochs", "2", "--forgetting_prompts", "2"]
    return [*flags, *more]


def launched(flags: list[str], launch: str = "two-processes") -> subprocess.Popen:
    # the configuration starts several processes; --device cpu keeps them off the GPU
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{launch}.yaml")]
    command = [sys.executable, *accelerate, "--main_process_port", "0", "-m", "forgetless", "learn", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


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


def same_adapters_and_scores(one: dict, both: dict, tmp_path: Path) -> None:
    left, right = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    change = sum(float((left[k] - right[k]).norm() ** 2) for k in left) ** 0.5
    size = sum(float(left[k].norm() ** 2) for k in left) ** 0.5
    assert change < 1e-4 * size
    for task in one["losses"]:
        for a, b in zip(one["losses"][task], both["losses"][task], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert one["headline"] == both["headline"] and one["measures"] == both["measures"]


@pytest.mark.slow  # several processes
@pytest.mark.parametrize("method", ["ilora", "ewc", "gem", "l2p", "mbpa"])
def test_two_processes_equal_one(method, stream, tiny, tmp_path):
    one = learn(tmp_path / "one", stream, tiny, method, 1)
    both = learn(tmp_path / "two", stream, tiny, method, 2)
    same_adapters_and_scores(one, both, tmp_path)
    for a, b in zip(one["forgetting"], both["forgetting"], strict=True):
        assert a["kl"] == pytest.approx(b["kl"], abs=2e-5) and a["entropy"] == b["entropy"] > 1


@pytest.mark.slow  # several processes
# several passes a micro-batch; gradients on memory; the base's own weights
@pytest.mark.parametrize("method", ["ilora", "gem", "oplora"])
def test_a_base_in_shards_gives_what_a_whole_one_gives(method, stream, tiny, tmp_path):
    one = learn(tmp_path / "one", stream, tiny, method, 1)
    both = learn(tmp_path / "two", stream, tiny, method, 2, launch="fsdp2")
    same_adapters_and_scores(one, both, tmp_path)


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
    more = ("--save_steps", "2", "--num_train_epochs", "15")
    learn(tmp_path / "whole", stream, tiny, "ilora", 2, *more, launch=launch)
    parts = launched(flags_of(tmp_path / "parts", stream, tiny, "ilora", *more), launch)
    until = time.monotonic() + 240
    while not list((tmp_path / "parts").glob("checkpoints/*/step-*")) and time.monotonic() < until:
        time.sleep(0.02)
    parts.send_signal(signal.SIGTERM)
    told = parts.communicate(timeout=60)[1]
    assert parts.returncode and re.search(r"Step \d+ of 0\d-\w+ is saved", " ".join(told.split())), told[-3000:]
    learn(tmp_path / "parts", stream, tiny, "ilora", 2, *more, launch=launch)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
