"""One real pass from end to end: the packaged model, real data, both runs of the demo, the report."""

from __future__ import annotations

import os

import pytest
import torch

from forgetless.cli import main
from forgetless.runs.folder import read_json


@pytest.fixture
def all_cores():
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.mark.slow
def test_demo(users_cache, all_cores, tmp_path, capsys):
    arguments = ["demo", "--output_dir", str(tmp_path / "demo"), "--train_rows", "48", "--test_rows", "24"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "sequential" in told and "replay" in told and "report.html" in told
    summaries = [read_json(tmp_path / "demo" / method / "summary.json") for method in ("sequential", "replay")]
    for summary in summaries:
        assert summary["status"] == "complete" and not summary["warnings"]
        diagonal = [summary["headline"]["matrix"][i][i] for i in range(3)]
        majority = [task["majority"]["share"] for task in summary["tasks"]]
        assert sum(diagonal) > sum(majority) + 0.5, "three real tasks are learnt"
        assert all(entry["n"] == 24 for entry in summary["forgotten"])
    assert summaries[0]["headline"]["base"] == summaries[1]["headline"]["base"]
    assert summaries[0]["headline"]["matrix"][0] == summaries[1]["headline"]["matrix"][0]  # the first task is the same
    last = summaries[0]["forgetting"][-1]
    adapter = str(tmp_path / "demo" / "sequential" / "tasks" / "03-mmlu" / "adapter")
    told = ["--limit", "32", "--output_dir", str(tmp_path / "audit"), "--max-kl", "0.001"]
    assert main(["audit", "smollm2-135m-instruct", adapter, *told]) in (2, 3), "it moved far more than that"
    [audited] = read_json(tmp_path / "audit" / "audit.json")["models"]
    means = audited["divergence"]["own-answers"]["per_token"]
    assert means["kl"] == pytest.approx(last["kl"], rel=0.02) and last["kl"] > 0.01, "as at the run's last border"
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "sst2" in page and "http://" not in page
    before = (tmp_path / "demo" / "replay" / "tasks" / "03-mmlu" / "times.json").read_bytes()
    assert main(arguments) == 0  # again: nothing is learnt or scored anew
    assert (tmp_path / "demo" / "replay" / "tasks" / "03-mmlu" / "times.json").read_bytes() == before
