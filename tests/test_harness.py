"""Tasks of lm-evaluation-harness as probes, against the harness's own evaluator. No network: a task of local rows."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from forgetless.auditing.probes import load_probes
from forgetless.errors import DownloadError, UsageError

DOCS = [
    {"question": f"What colour has the {'very ' * (i % 4)}{key}?", "choices": choices, "label": i % len(choices)}
    for i in range(6)
    for key, choices in (
        ("sky", ["blue", "a very large green", "red"]),
        ("dog", ["bark", "meow"]),
        ("rose", ["red", "grass green", "blue", "small"]),
    )
]
TASK = {
    "task": "mine", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "choices", "doc_to_target": "label",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
    ],
    "metadata": {"version": 1.5},
}  # fmt: skip


def test_without_the_harness_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match=r"lm-eval:arc_easy: needs lm-eval; pip install 'forgetless\[eval\]'"):
        load_probes(["lm-eval:arc_easy"])


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a task's file, with some of its keys changed, and gives the probe's name."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    def write(docs=DOCS, **changes) -> str:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        told = TASK | {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}} | changes
        (tmp_path / "mine.yaml").write_text(json.dumps(told))  # JSON is YAML
        return f"lm-eval:{tmp_path}/mine.yaml"

    return write


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"doc_to_text": "Question: {{question}} Answer:\n", "target_delimiter": "", "description": "Answer shortly. "},
    ],
)
def test_the_evaluators_own_numbers(written, tiny, tmp_path, form):
    """acc, acc_norm and both predictions of every row, in fp32."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from forgetless.data.batches import Encoder
    from forgetless.learning.engine import Engine
    from forgetless.score.scorers import Scorer

    [probe] = load_probes([written(**form)])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks=[f"{tmp_path}/mine.yaml"],
        task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    engine = Engine(device="cpu", precision="fp32")
    ours = Scorer(model, Encoder(tokenizer, 128), engine, (), 512)(probe.task)
    assert ours.mean("completion") == theirs["results"]["mine"]["acc,none"]
    assert ours.mean("completion_per_char") == theirs["results"]["mine"]["acc_norm,none"]
    samples = sorted(theirs["samples"]["mine"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(ours.predictions) == len(DOCS)
    chosen = set()
    for sample, record, row in zip(samples, ours.predictions, probe.task.test, strict=True):
        values = torch.tensor([float(value) for value, _ in sample["filtered_resps"]], dtype=torch.float64)
        assert record["log_likelihoods"] == pytest.approx(values.tolist(), abs=1e-3)
        lengths = torch.tensor([len(choice) for choice in row.options])
        best = [row.options[int(told.argmax())] for told in (values, values / lengths)]
        assert [record[name]["answer"] for name in ("completion", "completion_per_char")] == best
        assert [record["completion"]["score"], record["completion_per_char"]["score"]] == [
            sample["acc"], sample["acc_norm"]
        ]  # fmt: skip
        chosen.add(best[0] == best[1])
    assert chosen == {True, False}, "length decides in some rows"


def test_rows_without_one_right_answer_are_left_out_and_counted(written):
    bad = [{"choices": ["a", "a"]}, {"label": 7}, {"choices": ["a ", "b"]}]
    docs = DOCS[:2] + [{"question": "q", "choices": ["a", "b"], "label": 0} | one for one in bad]
    [probe] = load_probes([written(docs)])
    assert len(probe.task.test) == 2 and probe.task.notes[0].startswith("3 of 5 rows left out")
    assert probe.task.name == "lm-eval:mine" and probe.source.startswith("task mine, version 1.5, of lm-eval ")
    row = probe.task.test[0]
    assert (row.prompt, row.answer) == ("Question: What colour has the sky?\nAnswer:", " blue")
    assert row.source == "lm-eval:mine:0"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"output_type": "generate_until", "doc_to_choice": None, "metric_list": None},
            "is generate_until, not",
        ),
        ({"metric_list": [{"metric": "acc"}, {"metric": "brier_score"}]}, "it asks for brier_score, not only"),
        ({"num_fewshot": 2}, "it puts 2 examples before each question"),
        ({"filter_list": [{"name": "f", "filter": [{"function": "take_first"}]}]}, "it has a filter_list of its own"),
        ({"target_delimiter": " = "}, "target_delimiter ' = ' is more than white space"),
        ({"doc_to_target": "{{[label]}}"}, "several right answers a row"),
        ({"doc_to_text": "{{label}}", "doc_to_target": "{{question}}"}, "several prompts"),
    ],
)
def test_what_is_not_reproduced_is_refused(written, changes, said):
    with pytest.raises(UsageError, match="run lm_eval itself") as error:
        load_probes([written(**changes)])
    assert said in str(error.value)


def test_tasks_that_are_none(written, tmp_path):
    written()
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DownloadError, match="lm-eval could not load it"):
        load_probes([f"lm-eval:{tmp_path}/mine.yaml"])
    with pytest.raises(UsageError, match="no such file"):
        load_probes(["lm-eval:./none.yaml"])
    with pytest.raises(UsageError, match="lm-eval has no such task; did you mean 'arc_easy'"):
        load_probes(["lm-eval:arc_easi"])
    with pytest.raises(UsageError, match="a group of tasks"):
        load_probes(["lm-eval:mmlu"])
