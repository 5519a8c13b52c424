"""`forgetless blend` from the command to its files: a tiny model that knows colours, and one that learnt sizes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, SIZES, SOUNDS
from pages import Page, opened_in_browser, self_contained
from peft import PeftModel
from safetensors.torch import load_file
from test_audit import taught
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetless import BlendConfig, LearnConfig, blend, learn
from forgetless.auditing import measuring
from forgetless.auditing.budgets import flag_budgets
from forgetless.auditing.measuring import ask
from forgetless.auditing.remedies import place_of
from forgetless.cli import main
from forgetless.cli.learn import parse_learn
from forgetless.data.packages import sha256_of
from forgetless.errors import DataError, UsageError
from forgetless.geometry import blend as blending
from forgetless.geometry import borders
from forgetless.geometry.path import straight_path
from forgetless.report import blend_page
from forgetless.report.glossary import BLEND_GLOSSARY
from forgetless.runs.folder import read_json
from forgetless.subjects.models import find_subjects

ROOT = Path(__file__).parents[1]
COPIES = 8  # of each question, 48 rows a task
CPU = {"device": "cpu", "precision": "fp32"}


def rows(what: str, table: dict[str, str]) -> list[tuple[str, str]]:
    return [
        (f"{i}. What {what} has the {key}? Answer:", f" {value}") for i in range(COPIES) for key, value in table.items()
    ]


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory) -> dict[str, str]:
    """`before` knows the colours, `after` learnt the sizes on top: an adapter, and the same as full weights."""
    root = tmp_path_factory.mktemp("models")
    whole = taught(tiny, rows("colour", COLOURS), root / "colours", steps=60).merge_and_unload()
    whole.save_pretrained(root / "before")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(root / "before")
    learnt = taught(str(root / "before"), rows("size", SIZES), root / "after", steps=60, rate=3e-3)
    learnt.merge_and_unload().save_pretrained(root / "whole")
    tokenizer.save_pretrained(root / "whole")
    return {name: str(root / name) for name in ("before", "after", "whole")}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "train.jsonl").write_text('{"prompt": "unseen", "completion": " blue"}\n')
    (folder / "train2.jsonl").write_text('{"prompt": "unseen", "completion": " small"}\n')
    for what, table in (("colour", COLOURS), ("size", SIZES)):
        lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in rows(what, table)]
        (folder / f"{what}.jsonl").write_text("\n".join(lines))
    (folder / "tasks.yaml").write_text(
        "tasks:\n"
        "  - {name: colours, train: train.jsonl, test: colour.jsonl, validation: 0, options: [blue, green, red]}\n"
        "  - {name: sizes, train: train2.jsonl, test: size.jsonl, validation: 0, options: [small, large]}\n"
    )
    (folder / "notes.txt").write_text("\n\n".join(f"The {key} is {value} in note {i}." for i in range(20)
                                                   for key, value in COLOURS.items()))  # fmt: skip
    return str(folder / "tasks.yaml")


def options(models: dict, tasks: str, out: Path, after: str = "after", **more) -> BlendConfig:
    told = {"max_lost": ["colours=50pp"], "output_dir": str(out), **CPU} | more
    return BlendConfig(models["before"], models[after], tasks=tasks, **told)


@pytest.fixture(scope="module")
def measured(models, tasks, tmp_path_factory) -> Path:
    """The folder of a blend whose points are measured up to the first that is not certified."""
    out = tmp_path_factory.mktemp("blend") / "out"
    blend(options(models, tasks, out))
    return out


@pytest.fixture
def out(measured, tmp_path, monkeypatch) -> Path:
    """A copy of it in which nothing may be measured again."""

    def fail(*told) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(blending, "measure_role", fail)
    monkeypatch.setattr(blending, "measure_model", fail)
    return Path(shutil.copytree(measured, tmp_path / "out"))


def test_the_point_that_learns_most_within_the_budget_is_written(models, measured):
    record = read_json(measured / "blend.json")
    alphas = [point["alpha"] for point in record["points"]]
    good = [point["certified"] for point in record["points"]]
    assert alphas == [i / 10 for i in range(1, len(alphas) + 1)] and good == [True] * (len(good) - 1) + [False]
    assert record["chosen"] == max(alphas[:-1], key=lambda alpha: record["learnt"][1 + alphas.index(alpha)]) > 0.1
    best = record["points"][alphas.index(record["chosen"])]
    assert best["learnt"]["sizes"]["after"] > best["learnt"]["sizes"]["before"]
    [held] = best["budgets"]
    assert held["high"] <= 0.5 < record["points"][-1]["budgets"][0]["high"] and held["lost"] == round(48 * held["loss"])
    base = AutoModelForCausalLM.from_pretrained(models["before"])
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    end = AutoModelForCausalLM.from_pretrained(models["whole"]).state_dict()
    written = PeftModel.from_pretrained(base, measured / "adapter").merge_and_unload().state_dict()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, plain[name] + record["chosen"] * (end[name] - plain[name]))
    assert len(find_subjects(str(measured / "adapter"))) == 1, "an audit takes it as it is"
    assert not list(measured.glob(".points*"))


def test_no_row_text_is_in_the_files(measured):
    for file in (*measured.glob("blend.*"), *measured.glob("points/*")):
        assert "What colour" not in file.read_text(), file.name


def test_a_finished_point_is_not_measured_again(models, tasks, out):
    before = read_json(out / "blend.json")
    shutil.rmtree(out / "adapter")
    record = blend(options(models, tasks, out))
    assert record["points"] == before["points"] and (out / "adapter" / "adapter_config.json").exists()
    assert record["exit_code"] == 0
    with pytest.raises(AssertionError, match="measured again"):
        blend(options(models, tasks, out, limit=40))


def test_a_blend_that_was_stopped_goes_on_after_its_last_point(models, tasks, tmp_path, monkeypatch):
    seen, measure = [], blending.measure_model

    def counted(*told) -> None:
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        measure(*told)

    monkeypatch.setattr(blending, "measure_model", counted)
    few = options(models, tasks, tmp_path / "out", points=3, max_lost=["colours=99pp"])
    with pytest.raises(KeyboardInterrupt):
        blend(few)
    assert [file.name for file in tmp_path.glob("out/points/*")] == ["0.333333.json"]
    assert blend(few)["outcome"] in ("blended", "all of it") and len(seen) == 4


def test_a_stopped_blend_says_that_its_points_are_kept(monkeypatch, capsys):
    def stop(config) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(borders, "blend", stop)
    assert main(["blend", "a", "b"]) == 130 and "Finished points are kept" in capsys.readouterr().err


def test_too_few_rows_keep_the_old_model_and_say_how_many_it_takes(models, tasks, out, capsys):
    where = ["--tasks", tasks, "--output_dir", str(out), "--device", "cpu", "--precision", "fp32"]
    assert main(["blend", models["before"], models["after"], "--max_lost", "colours=2pp", *where]) == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert "keep the model before: these rows are too few" in printed
    assert "max-lost colours=2pp: 48 rows; at least 149 that lose nothing would show it" in printed
    assert not (out / "adapter").exists(), "that of an earlier blend does not stay behind"
    assert read_json(out / "blend.json")["outcome"] == "too few rows"


def test_several_borders_share_the_confidence(models, tasks, out, capsys):
    """0.9^48 = 0.0064: without a loss 48 rows show 10pp at the level 0.05, not at 0.05 / 20."""
    where = ["--tasks", tasks, "--output-dir", str(out), "--device", "cpu", "--precision", "fp32"]
    told = ["blend", models["before"], models["after"], "--max-lost", "colours=10pp", *where]
    assert main(told) == 0 and read_json(out / "blend.json")["level"] == pytest.approx(0.05)
    assert main([*told, "--borders", "20"]) == 3
    assert read_json(out / "blend.json")["outcome"] == "too few rows" and "at least 57" in capsys.readouterr().out


def test_without_a_new_task_the_largest_certified_point_is_taken(models, tasks, out):
    record = blend(options(models, tasks, out, max_lost=["colours=50pp", "sizes=50pp"]))
    alphas = [point["alpha"] for point in record["points"] if point["certified"]]
    assert record["chosen"] == max(alphas) and record["new_tasks"] == [] and record["learnt"] is None
    text = (out / "blend.html").read_text()
    self_contained(Page(text), text)
    assert "way from before to after" in text and "no task without a budget" in (out / "blend.md").read_text()


def test_a_point_that_learns_nothing_is_not_written(models, tasks, tmp_path):
    """The old task as the new one: the model after answers it no better than before."""
    record = blend(options(models, tasks, tmp_path / "out", max_lost=["sizes=50pp"], points=1))
    assert record["outcome"] == "learns nothing" and not record["chosen"] and record["exit_code"] == 3
    record = blend(options(models, tasks, tmp_path / "out", points=1))
    assert record["outcome"] == "not shown" and record["exit_code"] == 3
    said = (tmp_path / "out" / "blend.md").read_text()
    assert "no point is shown to be within every budget" in said and "alpha 1 is not certified: max-lost" in said


def test_full_weights_and_a_budget_on_a_text(models, tasks, tmp_path):
    notes = str(Path(tasks).parent / "notes.txt")
    out = tmp_path / "out"
    whole = models | {"whole": str(shutil.copytree(models["whole"], tmp_path / "whole"))}
    file = tmp_path / "whole" / "config.json"
    file.write_text(json.dumps(read_json(file) | {"rms_norm_eps": 2e-6}))
    told = options(whole, tasks, out, "whole", max_lost=[], max_kl=["0.9"], text=[notes], points=5, limit=40)
    record = blend(told)
    assert "differ in rms_norm_eps (2e-06, not 1e-06)" in str(record["facts"]["settings"]["notes"])
    kl = [point["budgets"][0] for point in record["points"]]
    assert [one["rows"] for one in kl] == [40] * len(kl) and 0 < kl[0]["loss"] < kl[0]["high"] < 0.9
    assert set(record["new_tasks"]) == {"colours", "sizes"}
    assert record["kind"] == "model" and (out / "model").exists() == bool(record["chosen"])
    if record["chosen"]:
        assert (out / "model" / "tokenizer_config.json").exists()
    again = tmp_path / "again"
    path = straight_path(*(find_subjects(models[name])[0] for name in ("before", "whole")))
    path.write(0.2, again)
    one, two = (load_file(Path(models[name]) / "model.safetensors") for name in ("before", "whole"))
    for name, tensor in load_file(again / "model.safetensors").items():
        torch.testing.assert_close(tensor, 0.8 * one[name] + 0.2 * two[name])


def test_without_a_text_the_own_answers_of_the_model_before_are_measured(models, tasks, tmp_path, monkeypatch):
    """No point is asked for answers of its own: only how it finds those of the model before."""
    asked = []
    monkeypatch.setattr(measuring, "ask", lambda session, *told: asked.append(told[0].name) or ask(session, *told))
    told = {"max_lost": [], "max_kl": ["0.9"], "points": 1, "limit": 30}
    record = blend(options(models, tasks, tmp_path / "out", **told))
    [kl] = record["points"][0]["budgets"]
    assert kl["text"] == "max-kl own-answers=0.9" and kl["rows"] > 20 and asked == [models["before"]]
    assert "a document counts as 1 nats per token" in (tmp_path / "out" / "blend.md").read_text()


def test_what_cannot_be_blended_is_refused_by_name(models, tasks, tmp_path):
    def refused(match: str, **more) -> None:
        with pytest.raises(UsageError, match=match):
            blend(options(models, tasks, tmp_path / "out", **more))

    refused("how much may be forgotten", max_lost=[])
    refused("give one with --max-kl", text=["notes.txt"])
    refused("no task or probe 'colour'; did you mean 'colours'", max_lost=["colour=2pp"])
    refused("max-drop colours=2: '2' is a number without a unit", max_drop=["colours=2"])
    refused("new: no task 'size'; did you mean 'sizes'", new=["size"])
    refused("colours has a budget .max-lost colours=50pp.; a task is either learnt or kept", new=["colours", "sizes"])
    refused("score_on: no 'train'", score_on="train")
    with pytest.raises(DataError, match="task colours has no validation rows"):
        blend(options(models, tasks, tmp_path / "out", score_on="validation"))
    refused("borders must be 1 or above", borders=0)
    refused("confidence must be from 0.5", confidence=95.0)
    refused("every model would pass", max_kl=["1.5"])
    assert not (tmp_path / "out").exists()


def test_a_users_models_are_never_replaced_or_removed(models, tasks, out, tmp_path):
    """What no blend wrote, and what is blended, stays; a model of an earlier blend of another kind goes."""
    mine = Path(shutil.copytree(models["after"], tmp_path / "mine" / "adapter")).parent
    with pytest.raises(UsageError, match="adapter: no blend wrote it"):
        blend(options(models, tasks, mine))
    (mine / "adapter").rename(mine / "model")
    with pytest.raises(UsageError, match="model: no blend wrote it"):
        blend(options(models, tasks, mine))
    assert (mine / "model" / "adapter_model.safetensors").exists() and not (mine / "points").exists()
    again = options(models, tasks, out, max_lost=["colours=2pp"])  # would keep the model before, and write none
    with pytest.raises(UsageError, match="adapter: is one of the models to be blended"):
        blend(replace(again, before=f"{models['before']}+{out / 'adapter'}"))
    inside = shutil.copytree(models["before"], out / "model" / "base")
    with pytest.raises(UsageError, match="model: is one of the models to be blended, or their base"):
        blend(replace(again, before=str(inside)))
    assert (inside / "model.safetensors").exists() and (out / "adapter" / "adapter_config.json").exists()
    blend(options(models, tasks, out))
    assert (out / "adapter").exists() and not (out / "model").exists(), "of an earlier blend between whole weights"


# ---------------------------------------------------------------------------------------- a run, border by border


TRAIN = {"learning_rate": 2e-2, "batch_size": 6, "num_train_epochs": 3.0, "r": 4, "max_length": 64,
         "forgetting_prompts": 0, "cells": "last"}  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """A run of three tasks: its folder, and beside it the stream with validation rows."""
    root = tmp_path_factory.mktemp("run")
    entries = []
    for name, what, table in (("a", "colour", COLOURS), ("b", "size", SIZES), ("c", "sound", SOUNDS)):
        lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in rows(what, table)]
        for split, few in (("train", lines[:12]), ("val", lines[12:24]), ("test", lines[44:])):
            (root / f"{name}-{split}.jsonl").write_text("\n".join(few))
        options = ", ".join(dict.fromkeys(table.values()))
        entries.append(f"  - {{name: {name}, train: {name}-train.jsonl, validation: {name}-val.jsonl, "
                       f"test: {name}-test.jsonl, options: [{options}]}}")  # fmt: skip
    (root / "stream.yaml").write_text("\n".join(["tasks:", *entries]))
    learn(LearnConfig(stream=str(root / "stream.yaml"), model=tiny, output_dir=str(root / "run"), **TRAIN, **CPU))
    return root


def test_a_run_is_blended_border_by_border(tiny, run, capsys):
    """Budgets of a border are those of earlier tasks; each border begins where the last deployed model is."""
    told = ["--tasks", str(run / "stream.yaml"), "--score-on", "validation", "--points", "2", "--device", "cpu",
            "--precision", "fp32", "--max-lost", "a=90pp", "b=90pp"]  # fmt: skip
    learner = sha256_of(run / "run" / "tasks" / "02-b" / "adapter" / "adapter_model.safetensors")
    code = main(["blend", tiny, str(run / "run"), *told])
    one, two = (read_json(run / "run" / "blended" / name / "blend.json") for name in ("02-b", "03-c"))
    assert code == (0 if two["chosen"] else 3)
    assert [[held["text"] for held in told["points"][0]["budgets"]] for told in (one, two)] == [
        ["max-lost a=90pp"], ["max-lost a=90pp", "max-lost b=90pp"],
    ]  # fmt: skip
    assert (one["new_tasks"], two["new_tasks"]) == (["b"], ["c"])
    assert one["before"]["name"] == f"{tiny}+{run / 'run' / 'tasks' / '01-a' / 'adapter'}"
    deployed = run / "run" / "blended" / "02-b" / "adapter" if one["chosen"] else run / "run" / "tasks/01-a/adapter"
    assert two["before"]["name"] == f"{tiny}+{deployed}"
    assert two["after"]["name"] == f"{tiny}+{run / 'run' / 'tasks' / '03-c' / 'adapter'}"
    assert one["points"][0]["budgets"][0]["rows"] == 12, "validation rows"
    assert sha256_of(run / "run" / "tasks" / "02-b" / "adapter" / "adapter_model.safetensors") == learner
    capsys.readouterr()
    for more, why in (
        (["--max-lost", "a=90pp", "c=90pp"], "max-lost c=90pp: no finished task comes after c, so there is no border"),
        (["--max-lost", "a=90pp", "--new", "c"], "at each border of a run it is the task that was learnt there"),
    ):
        assert main(["blend", tiny, str(run / "run"), *told[:-3], *more]) == 1
        assert why in " ".join(capsys.readouterr().err.split())


def test_a_run_gives_each_border_and_the_worst_exit_code(tiny, run, monkeypatch):
    monkeypatch.setattr(borders, "blend_run", lambda config: [{"exit_code": 3}, {"exit_code": 0}])
    told = blend(BlendConfig(tiny, str(run / "run"), tasks="any", max_lost=["a=90pp"]))
    assert told["exit_code"] == 3 and len(told["blends"]) == 2 and told["path"] == str(run / "run")


def test_a_models_place_is_what_a_command_takes(run):
    """A run's task has a name that is no path: its adapter's folder is."""
    for told in find_subjects(str(run / "run")):
        assert not Path(told.name).exists()
        assert place_of(told) == str(run / "run" / "tasks" / Path(told.name).name / "adapter")
        [found] = find_subjects(place_of(told))
        assert found.decided_by == told.decided_by and place_of(found) == found.name


def test_learn_blends_what_is_to_be_deployed(tiny, run, tmp_path, capsys):
    """The same as blending the run afterwards; what cannot be is refused before anything is trained."""
    folder = Path(shutil.copytree(run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("blended", ".lock")))
    flags = [f"--{name}={value}" for name, value in (TRAIN | CPU).items()]
    told = ["learn", "--stream", str(run / "stream.yaml"), "--model", tiny, *flags]
    code = main([*told, "--output_dir", str(folder), "--max_lost", "b=90pp", "--max_drop", "b=95pp"])
    assert "max-lost b=90pp" in capsys.readouterr().out
    record = read_json(folder / "blended" / "03-c" / "blend.json")
    assert code == (0 if record["chosen"] else 3), "as `blend` exits"
    assert [held["text"] for held in record["points"][0]["budgets"]] == ["max-drop b=95pp", "max-lost b=90pp"]
    assert not (folder / "blended" / "02-b").exists(), "nothing was to be kept there"
    config = LearnConfig(
        stream=str(run / "stream.yaml"), model=tiny, output_dir=str(folder), max_lost=["b=90pp"], blend_on="test",
        **TRAIN, **CPU,
    )  # fmt: skip
    [told_so] = learn(config)["blends"]
    assert told_so["points"][0]["budgets"][0]["rows"] == 4, "test rows; and the same from Python"
    for wrong, why in (
        ("--max_lost c=2pp", "c is the last task"),
        ("--max_lost d=2pp", "no task or probe 'd'"),
        ("--max_lost b=2", "without a unit"),
        ("--max_lost b=2pp", "b has 12 validation rows, and at least 149 are needed"),
        ("--max_kl general=0.5", "no text 'general'"),
        ("--max_kl 1.5", "1.5"),
        ("--max_kl 0.5 --method hyplora", "method hyplora: its adapters cannot be blended"),
        ("--max_lost d=2pp --dry_run", "no task or probe 'd'"),
    ):
        assert main([*told, "--output_dir", str(tmp_path / "new"), *wrong.split()]) == 1
        assert why in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()


def test_budgets_are_given_in_one_word_or_several(tmp_path):
    """`learn` takes what `blend` takes, and a YAML file a number, a list or a mapping."""
    for told in (["a=2pp,b=3pp"], ["a=2pp", "b=3pp"]):
        assert parse_learn(["--stream", "demo", "--max-drop", *told]).max_drop == ["a=2pp", "b=3pp"]
        assert [str(one) for one in flag_budgets(told)] == ["max-drop a=2pp", "max-drop b=3pp"]
    assert parse_learn(["--stream", "demo", "--max_kl", "0.05"]).max_kl == ["0.05"]
    assert [one.name for one in flag_budgets([], ["my, text=0.05"])] == ["my, text"]
    file = tmp_path / "learn.yaml"
    file.write_text("stream: demo\nmax_kl: 0.05\nmax_drop: {a: 2pp, b: 3pp}\nmax_lost: [a=1pp]\n")
    found = parse_learn(["--config", str(file)])
    assert (found.max_kl, found.max_drop, found.max_lost) == (["0.05"], ["a=2pp", "b=3pp"], ["a=1pp"])
    assert found.as_blend("").on_bad_row == "error"


# ---------------------------------------------------------------------------------------- the page


def test_the_page_holds_all_it_needs_and_explains_its_words(measured):
    text = (measured / "blend.html").read_text()
    page = Page(text)
    self_contained(page, text)
    never = {anchor for anchor in BLEND_GLOSSARY if f'href="#g-{anchor}"' not in text}
    assert not never
    assert [tag for tag, _ in page.tags].count("svg") == 1 and "chosen" in page.text
    lines = (ROOT / "docs" / "glossary.md").read_text().splitlines()
    terms = {line.split("|")[1].strip().lower() for line in lines if line.startswith("| ")}
    assert {term for term, _ in BLEND_GLOSSARY.values()} <= terms


def test_the_chart_by_hand(measured):
    """Marks lie where their numbers are: the budget to the right of each certified point's bar."""
    record = read_json(measured / "blend.json")
    drawn = blend_page.chart(record, 0)
    before, *points = drawn["points"]
    assert before["x"] == before["high"] == drawn["box"]["left"]
    for point, told in zip(points, record["points"], strict=True):
        assert (point["high"] <= drawn["budget"]) == told["certified"]
        assert point["x"] <= point["high"]
    assert [point["kind"] for point in points].count("chosen") == 1


def test_the_page_opens_in_a_browser(measured, tmp_path):
    page = opened_in_browser(measured / "blend.html", tmp_path)
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == [
        "plain", "path", "points", "details", "glossary",
    ]  # fmt: skip


def test_marks_on_one_another_share_a_label():
    points = [{"x": 0, "y": 9, "label": "before"}] + [
        {"x": x, "y": 100, "label": label} for x, label in ((50, "0.1"), (51, "0.2"), (60, "0.3"), (99, "0.4"))
    ]
    assert [one["text"] for one in blend_page._labels(points)] == ["before", "0.1 to 0.3", "0.4"]


# ---------------------------------------------------------------------------------------- the benchmark


def test_the_comparison_with_fixed_points_by_hand(tmp_path):
    """Old rows fall one after another along the path, new ones are learnt at its middle; half of the rows chooses."""
    told = importlib.util.spec_from_file_location("blend_real", ROOT / "benchmarks" / "blend_real.py")
    blend_real = importlib.util.module_from_spec(told)
    told.loader.exec_module(blend_real)
    points = [
        {"weights": {"b": alpha}, "tasks": {"old": {"scores": [1.0] * (200 - lost) + [0.0] * lost},
                                            "new": {"scores": [float(alpha >= 0.5)] * 20}}}
        for alpha, lost in ((0, 0), (0.25, 0), (0.5, 2), (0.75, 120), (1, 160))
    ]  # fmt: skip
    (tmp_path / "points.json").write_text(json.dumps({"line-product": points}))
    alphas, rows = blend_real.read(tmp_path)
    budgets = flag_budgets([], (), ["old=10pp"])
    assert alphas == [0.25, 0.5, 0.75, 1] and blend_real.within(budgets, rows).tolist() == [True, True, False, False]
    found = blend_real.simulate(alphas, budgets, rows, 20)
    for way, alpha, over in (("blend", 0.5, 0), ("by the means", 0.5, 0), ("hindsight", 0.5, 0), ("1", 1, 1)):
        assert (found[way][:, 0] == alpha).all() and (found[way][:, 1] == over).all(), way
    assert np.isclose(found["1"][:, 2].mean(), -0.8, atol=0.03) and (found["blend"][:, 3] == 1).all()
