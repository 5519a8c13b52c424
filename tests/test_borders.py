"""Forgetting at the task borders of `learn`: the audit's number, kept when a run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from forgetless import AuditConfig, LearnConfig, audit, learn
from forgetless.data.tasks import Stream
from forgetless.errors import UsageError
from forgetless.forecasting.points import from_run
from forgetless.forgetting.kept import cache_folder
from forgetless.learning import stream as module
from forgetless.report.summary import summarise

CPU = {"device": "cpu", "precision": "fp32"}
PROMPTS = 10  # the fewest that give an interval


def config(tiny: str, stream: Stream, folder: Path, **more) -> LearnConfig:
    told = {"learning_rate": 2e-2, "batch_size": 4, "r": 4, "max_length": 64, "cells": "last", "method": "olora",
            "num_train_epochs": 1.0, "forgetting_prompts": PROMPTS, "lr_scheduler_type": "constant"}  # fmt: skip
    return LearnConfig(model=tiny, stream=stream, output_dir=str(folder), **(told | CPU | more))


def borders(folder: Path) -> dict[str, bytes]:
    return {file.parts[-3]: file.read_bytes() for file in folder.glob("tasks/*/forgetting/forgetting.json")}


@pytest.fixture(scope="module")
def ran(tiny, two, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    learn(config(tiny, two, folder))
    return folder


def test_a_border_says_what_an_audit_of_its_adapter_says(ran, tiny, tmp_path):
    states = set(cache_folder().glob("states/*"))
    told = audit(AuditConfig(tiny, [str(ran)], limit=PROMPTS, output_dir=str(tmp_path / "audit"), **CPU))
    assert set(cache_folder().glob("states/*")) == states, "the base's side is not computed again"
    found = summarise(ran)["forgetting"]
    assert [one["after"] for one in found] == ["colours", "sizes"]
    for mine, model in zip(found, told["models"], strict=True):
        [theirs] = model["divergence"].values()
        assert {name: mine[name] for name in ("kl", "cross_entropy", "entropy", "agree")} == pytest.approx(
            {name: theirs["per_token"][name] for name in ("kl", "cross_entropy", "entropy", "agree")}, abs=6e-6
        )
        assert mine["per_document"] == pytest.approx(theirs["per_document"]["kl"], abs=6e-6)
        assert 0 < mine["low"] < mine["kl"] < mine["high"]
        assert mine["text"]["sha256"] == told["texts"][0]["sha256"] and mine["text"]["documents"] == PROMPTS


def test_the_report_shows_it_in_every_form(ran):
    last = summarise(ran)["forgetting"][-1]
    said = f"After sizes, predictions on the base's own answers to {PROMPTS} general prompts are {last['kl']:.3g} nats"
    for name in ("report.html", "report.md", "report.json"):
        assert said in (ran / name).read_text().replace("&#39;", "'"), name
    assert 'class="whisker"' in (ran / "report.html").read_text()


def test_a_run_that_goes_on_keeps_its_borders(ran, tiny, two, tmp_path, monkeypatch):
    learn(config(tiny, Stream("two", two.tasks[:1]), tmp_path / "run"))
    first = borders(tmp_path / "run")
    assert first == {"01-colours": borders(ran)["01-colours"]}
    learn(config(tiny, two, tmp_path / "run"))
    assert borders(tmp_path / "run") == borders(ran)
    for folder in (tmp_path / "run").glob("tasks/*/forgetting"):  # as an earlier version left it
        shutil.rmtree(folder)
    assert "forgetting" not in summarise(tmp_path / "run")
    monkeypatch.setattr(module, "learn_task", lambda *args, **kwargs: pytest.fail("learnt again"))
    learn(config(tiny, two, tmp_path / "run"))
    assert borders(tmp_path / "run") == borders(ran)


def test_another_text_is_measured_anew_at_every_border(ran, tiny, two, tmp_path, monkeypatch):
    shutil.copytree(ran, tmp_path / "run")
    (tmp_path / "notes.txt").write_text("The sky is blue. The grass is green.")
    monkeypatch.setattr(module, "learn_task", lambda *args, **kwargs: pytest.fail("learnt again"))
    summary = learn(config(tiny, two, tmp_path / "run", forgetting_text=str(tmp_path / "notes.txt")))
    assert [one["text"]["name"] for one in summary["forgetting"]] == ["notes", "notes"]
    assert summary["forgetting"][1]["low"] is None, "a few documents have no interval"
    assert "predictions on notes (1 document) are" in (tmp_path / "run" / "report.md").read_text()
    with pytest.raises(UsageError, match=r"gone\.txt: cannot be read"):
        learn(config(tiny, two, tmp_path / "other", forgetting_text=str(tmp_path / "gone.txt")))
    assert not (tmp_path / "other").exists()


def test_off_means_absent(ran, tiny, two, tmp_path):
    shutil.copytree(ran, tmp_path / "run", ignore=shutil.ignore_patterns("forgetting"))
    summary = learn(config(tiny, two, tmp_path / "run", forgetting_prompts=0))
    assert "forgetting" not in summary and not borders(tmp_path / "run")
    assert 'id="predictions"' not in (tmp_path / "run" / "report.html").read_text()
    assert 'id="predictions"' in (ran / "report.html").read_text()


def test_an_adapter_per_task_is_no_one_model(tiny, two, tmp_path):
    summary = learn(config(tiny, two, tmp_path / "run", method="per_task"))
    assert all("no one model is deployed" in one["not_measured"] for one in summary["forgetting"])
    assert "is not measured: each task has an adapter of its own" in (tmp_path / "run" / "report.md").read_text()


def test_measuring_within_a_task_changes_nothing_but_the_log(ran, tiny, two, tmp_path):
    """The same bytes of the adapter; the last step's KL is the border's; `forecast` reads a point of each."""
    folder = tmp_path / "often"
    learn(config(tiny, two, folder, forgetting_every=1))
    for name in ("01-colours", "02-sizes"):
        file = f"tasks/{name}/adapter/adapter_model.safetensors"
        assert (folder / file).read_bytes() == (ran / file).read_bytes()
    assert borders(folder) == borders(ran)
    points = from_run(folder)
    assert [one.steps for one in points] == [1, 2, 3] and points[-1].dataset == "colours"
    assert points[-1].forgetting == summarise(ran)["forgetting"][0]["kl"] > points[0].forgetting >= 0
    assert [one.steps for one in from_run(ran)] == [3], "at the border alone"
