"""What learning costs: tokens are counted as they go through the model, and methods say beforehand how many will."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import COLOURS, SIZES, SOUNDS, make_task

from forgetless.config import LearnConfig
from forgetless.data.batches import Encoder
from forgetless.data.tasks import Stream
from forgetless.learning.engine import Engine
from forgetless.learning.spending import Spending
from forgetless.learning.step import TrainSettings, learn_task
from forgetless.learning.stream import learn
from forgetless.methods.base import ABOUT
from forgetless.methods.finding import find_method
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.base import load_base, transformer

SETTINGS = TrainSettings(max_steps=2, batch_size=4, micro_batch_size=4)
ROWS = [make_task("", table, "thing").train[0] for table in (COLOURS, SIZES, SOUNDS)]  # of one length


@pytest.fixture
def unpacked(monkeypatch):
    """Rows go through the model as they are: packed ones that begin alike are computed, and counted, once."""
    monkeypatch.setattr("forgetless.model.answers.packs", lambda model: False)


def counted(name: str, options: dict, tiny: str) -> list[tuple[float, float]]:
    """Rows forward and back in a step of each of three tasks."""
    base = load_base(tiny, torch.float32)
    base.model.eval()
    spending = Spending(torch.device("cpu"), transformer(base.model).get_input_embeddings())
    method = find_method(name)(**options)
    method.start(Adapters(base.model, LoraSettings(r=2), tiny, 0), Encoder(base.tokenizer, 64), 0)
    found = []
    for task, row in enumerate(ROWS):
        method.begin_task(task)
        examples, before = [method.encoder(row)] * 8, spending.clocks()
        learn_task(method, examples, SETTINGS, Engine("cpu", "fp32"), seed=0, task=task, log=lambda record: None)
        after = spending.clocks()
        tokens = SETTINGS.max_steps * len(examples[0].ids)
        found.append(tuple((after[kind] - before[kind]) / tokens for kind in ("forward_tokens", "backward_tokens")))
        method.end_task(task, (row,) * 8)
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sequential", {}),
        ("replay", {"memory": 8, "replay_rows": 2}),
        ("ilora", {"memory": 8, "replay_rows": 2}),
        ("lwf", {}),
        ("gem", {"memory": 12, "replay_rows": 2}),
        ("agem", {"memory": 8}),
        ("hiddenkey", {"kl": 0.5}),
        ("replay+hiddenkey", {"memory": 8, "kl": 0.5}),
    ],
)
def test_the_model_is_passed_as_often_as_the_method_says(name, options, tiny, unpacked):
    told = [find_method(name)(**options).passes(4, task) for task in range(len(ROWS))]
    assert counted(name, options, tiny) == told


def test_what_costs_more_than_passes_says_nothing(tiny, unpacked):
    assert find_method("replay+olora")().passes(4, 1) is None
    assert counted("replay+incremental", {"memory": 8}, tiny) == [(4, 4), (8, 8), (8, 8)]


def test_what_is_measured_aside_counts_for_nothing(tiny):
    base = load_base(tiny, torch.float32)
    spending, ids = Spending(torch.device("cpu"), base.model.get_input_embeddings()), torch.ones(1, 5, dtype=torch.long)
    with spending.uncounted(), torch.no_grad():
        base.model(input_ids=ids)
    assert spending.clocks()["forward_tokens"] == 0
    base.model(input_ids=ids)
    assert (spending.clocks()["forward_tokens"], spending.clocks()["backward_tokens"]) == (5, 5)


def test_a_peak_is_of_its_own_time():
    spending = Spending(torch.device("cpu"))
    assert spending.peak() is None, "not begun"
    spending.begin()
    if not spending.anew:
        pytest.skip("this system does not let a process begin its peak of memory anew")
    low = spending.peak()
    torch.ones(64, 2**20).sum()  # 256 MiB
    high = spending.peak()
    spending.begin()
    assert high - low > 200 * 2**20 and spending.peak() < high - 100 * 2**20


def test_a_run_keeps_what_it_cost_and_what_its_method_is(tiny, two, tmp_path):
    config = LearnConfig(stream=Stream("one", two.tasks[:1]), method="replay+hiddenkey", model=tiny, device="cpu", r=2,
                         precision="fp32", max_steps=2, cells="last", max_length=64, forgetting_prompts=1,
                         forgetting_every=1, output_dir=str(tmp_path / "run"))  # fmt: skip
    learn(config)
    folder = tmp_path / "run" / "tasks" / "01-colours"
    times = json.loads((folder / "times.json").read_text())
    tokens = sum(json.loads(line)["tokens"] for line in (folder / "log.jsonl").read_text().splitlines())
    assert times["forward_tokens"] == times["backward_tokens"] >= tokens, "with padding; what was measured is not in it"
    assert times["forward_tokens"] < 1.5 * tokens
    assert times["cpu_seconds"] > 0 == times["gpu_seconds"]
    method = json.loads((tmp_path / "run" / "run.json").read_text())["method"]
    kind = find_method("replay+hiddenkey")
    assert {key: method[key] for key in ABOUT} == {key: getattr(kind, key) for key in ABOUT}
    assert method["paper"] == "2310.14152, 2403.00812" and method["old_rows"]
