"""The benchmarks that wait for a GPU run without one, on a model of nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_step_of_every_contender_runs_without_a_gpu(tmp_path):
    contenders = ["task_1", "task_15", "nlora", "bare", *(["trl"] if importlib.util.find_spec("trl") else [])]
    command = [sys.executable, "benchmarks/gpu_step.py", "--device", "cpu", "--tiny", "--uneven", "--shared", "8"]
    told = subprocess.run(
        [*command, "--folder", str(tmp_path), "--contenders", *contenders], cwd=ROOT, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    record = json.loads(told.stdout[told.stdout.index('{\n "device"') :])
    assert set(record["results"]) == set(contenders)
    assert all(one["seconds"] > 0 and one["tokens_a_second"] > 0 for one in record["results"].values())
    assert {"bare_over_task_1", "task_15_over_task_1", "penalty_share_of_a_step"} <= set(record["ratios"])
