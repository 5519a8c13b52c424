"""`sweep`: the grid, what is fair and chosen, without a model; then runs of the tiny model, locked, gone on, shared."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import pytest
import torch
import yaml

from forgetless.cli import main
from forgetless.comparing.comparison import compare
from forgetless.config import LearnConfig
from forgetless.errors import RunError, UsageError
from forgetless.learning.dryrun import Estimate
from forgetless.learning.step import TrainSettings
from forgetless.model.loading import load_settings
from forgetless.report.words import percent
from forgetless.runs.folder import RunFolder, complete, read_json
from forgetless.runs.seal import write_sealed
from forgetless.sweeping import commands, costs, running, workers
from forgetless.sweeping.cluster import on_ray
from forgetless.sweeping.definition import Entry, Sweep, read_sweep, sweep_of
from forgetless.sweeping.folder import DONE, FAILED, RUNNING, STOPPED, WAITING
from forgetless.sweeping.grid import cost_of, notes_of, orders_of, points, runs_of, with_choice
from forgetless.sweeping.record import write_record
from forgetless.sweeping.running import Judged, Terms, attempt, choose, open_plan, settle

TASKS = ("a", "b", "c")


def sweep(text: str) -> Sweep:
    return sweep_of(yaml.safe_load("stream: demo\n" + dedent(text)))


def cells(text: str, tasks=TASKS):
    return runs_of(sweep(text), tasks)[1]


# ---------------------------------------------------------------------------------------- the grid


def test_every_axis_multiplies_only_the_methods_that_have_it():
    found = cells("""
      grid: {methods: [sequential, replay], seed: [0, 1], r: [4, 8], method.memory: [5%, 10%, 20%], orders: 2}
    """)
    assert len(found) == (2 * 2 * 1 + 2 * 2 * 3) * 2
    assert {cell.config.method_options.get("memory") for cell in found} == {None, "5%", "10%", "20%"}
    assert len({cell.id for cell in found}) == len(found)


def test_points_are_the_product_in_the_order_of_the_file():
    assert list(points({"r": [4, 8], "method.memory": [1, 2]}, Entry("sequential"))) == [{"r": 4}, {"r": 8}]
    assert list(points({"r": [4], "method.memory": [1, 2]}, Entry("replay"))) == [
        {"r": 4, "method.memory": 1}, {"r": 4, "method.memory": 2},
    ]  # fmt: skip


def test_an_id_is_of_what_decides_the_run():
    [plain] = cells("grid: {methods: [replay]}")
    assert plain.id.startswith("replay-r8-lr0.001-o1-seed0-") and len(plain.digest) == 8
    same = (
        "learning_rate: 1e-3\ngrid: {methods: [{name: replay, memory: 10%}]}",  # defaults
        "score_batch_tokens: 100\ncells: last\ndevice: cpu\ngrid: {methods: [replay]}",  # decide nothing
        "grid: {methods: [replay], r: [8]}",
    )
    for text in same:
        assert cells(text)[0].id == plain.id, text
    other = (
        "grid: {methods: [{name: replay, policy: quota}]}", "max_length: 64\ngrid: {methods: [replay]}",
        "score_on: validation\ngrid: {methods: [replay]}",
    )  # fmt: skip
    assert len({cells(text)[0].id for text in other} | {plain.id}) == 4
    assert cells("grid: {methods: [replay]}", tasks=("a", "b"))[0].digest != plain.digest
    wider = {cell.id for cell in cells("grid: {methods: [olora, replay], seed: [0, 1], r: [8, 16]}")}
    assert plain.id in wider, "a wider grid keeps the runs that are there"


def test_orders_drawn_are_distinct_and_stay_when_more_are_asked_for():
    three, six = (orders_of(sweep(f"grid: {{methods: [sequential], orders: {n}}}"), TASKS) for n in (3, 6))
    assert three["o1"] == TASKS and len(set(six.values())) == 6
    assert {name: six[name] for name in three} == three
    other = orders_of(sweep("order_seed: 1\ngrid: {methods: [sequential], orders: 6}"), TASKS)
    assert other != six and set(other.values()) == set(six.values())


def test_orders_may_be_named():
    found = cells("grid: {methods: [sequential], orders: {given: [a, b, c], turned: [c, b, a]}}")
    assert [(cell.order, cell.tasks) for cell in found] == [("given", TASKS), ("turned", TASKS[::-1])]
    assert "-turned-seed0-" in found[1].id


# ---------------------------------------------------------------------------------------- fair


def test_equal_steps_are_the_same_for_all():
    assert {cell.config.max_steps for cell in cells("max_steps: 12\ngrid: {methods: [sequential, replay, ilora]}")} == {
        12
    }


def test_equal_compute_divides_the_steps_by_the_passes():
    """Of three tasks the first replays nothing: replay costs (1 + 2 + 2) / 3, ilora (1 + 2.5 + 2.5) / 3 = 2."""
    found = cells("fair: compute\nmax_steps: 60\ngrid: {methods: [sequential, replay, ilora]}")
    assert [cell.config.max_steps for cell in found] == [60, 36, 30]
    found = cells("fair: compute\nnum_train_epochs: 5\ngrid: {methods: [sequential, replay]}")
    assert [cell.config.num_train_epochs for cell in found] == [5, 3]
    found = cells("fair: compute\ncosts: {replay: 3}\nmax_steps: 1\ngrid: {methods: [replay]}")
    assert found[0].config.max_steps == 1


@pytest.mark.parametrize(
    ("method", "options", "two_tasks"),
    [
        ("replay", {"replay_rows": 2}, (1 + 1.25) / 2),  # 2 rows beside 8
        ("replay", {"memory": 4}, (1 + 1.5) / 2),
        ("replay", {"memory": "0%"}, 1),
        ("lwf", {}, (1 + 1.5) / 2),  # one pass more beside one forward and one back
        ("lwf", {"lam": 0}, 1),
        ("ilora", {"gamma": 0}, (1 + 2) / 2),
        ("gem", {}, (1 + 2) / 2),
        ("agem", {"replay_rows": 4}, (1 + 1.5) / 2),
        ("general_replay", {"general_rows": 2}, 1.25),
        ("hiddenkey", {"kl": 0.5}, 2),
        ("replay+sequential", {"replay_rows": 2}, (1 + 1.25) / 2),
    ],
)
def test_a_step_costs_what_its_options_say(method, options, two_tasks):
    config = LearnConfig(stream="demo", method=method, method_options=options, batch_size=8)
    assert cost_of(config, {}, 2) == pytest.approx(two_tasks)


def test_gem_costs_a_pass_a_task_and_a_pass_back_is_two_where_activations_are_computed_again():
    gem = LearnConfig(stream="demo", method="gem")
    assert cost_of(gem, {}, 5) == 3 == cost_of(gem, {"agem": 9}, 5) and cost_of(gem, {"gem": 9}, 5) == 9
    lwf = LearnConfig(stream="demo", method="lwf", gradient_checkpointing=True)
    assert cost_of(lwf, {}, 2) == pytest.approx((1 + 4 / 3) / 2)


def test_candidates_of_other_costs_take_other_steps():
    text = """
      fair: compute
      max_steps: 60
      grid: {methods: [{name: replay, choose: {replay_rows: [8, 2]}}]}
    """
    trials, [cell] = runs_of(sweep(text), ("a", "b"))
    assert [one.config.max_steps for one in trials] == [40, 53]  # 60 / 1.5, 60 / 1.125
    assert [with_choice(cell.config, one).max_steps for one in cell.candidates] == [40, 53]
    assert [dict(one.options) for one in cell.candidates] == [{"method.replay_rows": 8}, {"method.replay_rows": 2}]
    assert running._told(cell, cell.candidates[1]) == {
        "replay_rows": {"value": 2, "among": [8, 2], "tasks_seen": 1},
        "max_steps": {"value": 53, "among": [40, 53], "tasks_seen": 1},
    }  # fmt: skip
    told = " ".join(notes_of(sweep(text), ("a", "b")))
    assert "replay 1.12 to 1.5" in told and "as many rows as a step asks for" in told


def test_a_cost_that_is_not_known_is_asked_for():
    with pytest.raises(UsageError, match=r"what does a step of olora cost .* `costs: \{olora: 1.1\}`"):
        cost_of(LearnConfig(stream="demo", method="olora"), {}, 2)


def test_the_record_says_on_what_terms():
    told = " ".join(notes_of(sweep("grid: {methods: [sequential]}"), TASKS))
    assert "equal steps" in told and "nothing is chosen" in told
    text = "fair: compute\nchoose: {learning_rate: [1, 2, 3], tasks: %s}\ngrid: {methods: [sequential, replay]}"
    told = " ".join(notes_of(sweep(text % 1), TASKS))
    assert "equal compute" in told and "replay 1.67" in told and "3 trials each" in told and "first task" in told
    assert "none of the later ones" in " ".join(notes_of(sweep(text % 2), TASKS))
    for seen in ("all", 3):
        assert "WITH SIGHT OF ALL TASKS" in " ".join(notes_of(sweep(text % seen), TASKS))
    unequal = "choose: {equal_trials: false}\ngrid: {methods: [replay, {name: ilora, choose: {gamma: [1, 2]}}]}"
    assert "DIFFER (replay 1, ilora 2)" in " ".join(notes_of(sweep(unequal), TASKS))


# ---------------------------------------------------------------------------------------- choosing


def test_trials_see_the_beginning_of_an_order_on_validation_rows_and_one_seed():
    choice = "choose: {learning_rate: [1e-3, 2e-3], tasks: 2}"
    text = f"grid: {{methods: [sequential, replay], seed: [3, 4], orders: 6}}\n{choice}"
    trials, found = runs_of(sweep(text), TASKS)
    assert len(found) == 2 * 2 * 6
    assert len(trials) == 2 * 2 * 6, "every pair of first tasks, in both orders"
    for trial in trials:
        assert len(trial.tasks) == 2 and trial.config.seed == 3 and trial.kind == "trial"
        assert (trial.config.score_on, trial.config.cells, trial.config.forgetting_prompts) == ("validation", "last", 0)
    for cell in found:
        assert [one.options for one in cell.candidates] == [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}]
        assert all(one.trial.tasks == cell.tasks[:2] for one in cell.candidates)
        assert cell.config.score_on == "test" and "lr" not in cell.id


def test_orders_of_one_beginning_share_their_trials():
    trials, _ = runs_of(sweep("grid: {methods: [sequential], orders: 6}\nchoose: {learning_rate: [1e-3, 2e-3]}"), TASKS)
    assert len(trials) == 2 * 3


def test_a_method_may_choose_its_own_options_among_as_many():
    text = """
      choose: {learning_rate: [1e-3, 2e-3]}
      grid: {methods: [sequential, {name: olora, choose: {learning_rate: [1e-3], lam: [0.1, 0.5]}}]}
    """
    _, [_, olora] = runs_of(sweep(text), TASKS)
    assert [one.options for one in olora.candidates] == [
        {"learning_rate": 1e-3, "method.lam": 0.1}, {"learning_rate": 1e-3, "method.lam": 0.5},
    ]  # fmt: skip
    config = with_choice(olora.config, olora.candidates[1])
    assert config.method_options == {"lam": 0.5} and config.learning_rate == 1e-3


def test_one_candidate_is_no_choice():
    trials, [cell] = runs_of(sweep("choose: {learning_rate: [5e-4]}\ngrid: {methods: [sequential]}"), TASKS)
    assert not trials and not cell.candidates and cell.config.learning_rate == 5e-4


def candidates(*scores: float | None) -> list[Judged]:
    [cell] = cells(f"choose: {{r: {list(range(1, len(scores) + 1))}}}\ngrid: {{methods: [sequential]}}")
    return [Judged(one, score) for one, score in zip(cell.candidates, scores, strict=True)]


@pytest.mark.parametrize(
    "scores, best", [((0.2, 0.9, 0.5), 2), ((0.5, 0.5, 0.1), 1), ((None, 0.0, 0.0), 2), ((0.0, None, 0.1), 3)]
)
def test_the_best_is_chosen_the_first_of_equals_and_none_that_diverged(scores, best):
    assert choose(candidates(*scores)).options == {"r": best}


def test_nothing_is_chosen_where_all_diverged():
    with pytest.raises(RunError, match="every trial diverged; give lower learning rates"):
        choose(candidates(None, None))


# ---------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "text, said",
    [
        ("grid: {methods: [sequental]}", "no 'sequental'; did you mean 'sequential'?"),
        ("lerning_rate: 1\ngrid: {methods: [sequential]}", "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ("grid: {methods: [sequential], rr: [1]}", "unknown key 'rr'"),
        ("grid: {methods: [sequential], r: 8}", "r: expected a list of values, found 8"),
        ("grid: {methods: [sequential], r: [8, 8]}", "a value twice"),
        ("grid: {methods: [replay], method.memry: [1]}", "no method of this grid has the option 'method.memry'"),
        ("grid: {methods: [replay], r: [eight]}", "Expected a <class 'int'>. Got value: eight"),
        ("grid: {methods: [replay], r: [0]}", "r must be above 0"),
        ("grid: {methods: [{name: replay, memory: lots}]}", "memory 'lots'"),
        ("grid: {methods: [{name: replay, memry: 5}]}", "unknown key 'memry'; did you mean 'memory'?"),
        ("grid: {methods: [replay, {name: replay, memory: 10%}]}", "the same run twice"),
        ("grid: {methods: [replay, replay]}", "replay is there twice"),
        ("grid: {methods: [replay, {name: ilora, choose: {gamma: [1, 2]}}]}", "trials (replay 1, ilora 2)"),
        ("choose: {seed: [1, 2]}\ngrid: {methods: [replay]}", "seed must be equal for all methods"),
        ("choose: {max_length: [64, 128]}\ngrid: {methods: [replay]}", "max_length must be equal for all methods"),
        ("grid: {methods: [{name: replay, choose: {load_in: [as_stored, 4bit]}}]}", "load_in must be equal"),
        ("grid: {methods: [replay], precision: [fp32, bf16]}", "grid: precision does not tell runs apart; give one"),
        ("choose: {device: [cpu, cuda]}\ngrid: {methods: [replay]}", "choose: device does not tell runs apart"),
        ("grid: {methods: [{name: replay, choose: {cells: [ends, last]}}]}", "choose: cells does not tell runs apart"),
        ("grid: {methods: [replay], stream: [demo, trace]}", "grid: stream does not tell runs apart"),
        ("choose: {r: [1, 2]}\ngrid: {methods: [replay], r: [4]}", "r is both in the grid and to be chosen"),
        ("r: 8\ngrid: {methods: [replay], r: [4]}", "r is both in the grid and beside it"),
        ("choose: {learning_rate: [0.001, 1e-3]}\ngrid: {methods: [replay]}", "two candidates mean the same"),
        ("method: replay\ngrid: {methods: [replay]}", "methods are listed in `grid"),
        ("max_drop: [a=2pp]\ngrid: {methods: [replay]}", "a sweep blends nothing"),
        ("grid: {methods: [replay], orders: 7}", "7 orders, but 3 tasks have only 6"),
        ("grid: {methods: [replay], orders: {x: [a, b]}}", "order x: each task stands in it once; wrong for c"),
        ("grid: {methods: [replay], orders: {x: [a, b, d]}}", "order x: no task 'd'"),
        ("grid: {methods: []}", "expected a list such as"),
        ("fair: step\ngrid: {methods: [replay]}", "did you mean 'steps'?"),
        ("max_disk: 10\ngrid: {methods: [replay]}", "max_disk: expected a number with one of MB, GB"),
        ("max_time: 3 hours\ngrid: {methods: [replay]}", "max_time: expected a number with one of s, min, h"),
        ("threads: 0\ngrid: {methods: [replay]}", "threads: expected a number, 1 or above, found 0"),
        ("choose: {on: validation}\ngrid: {methods: [replay]}", "True is no name; YAML reads on"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_is_read(text, said):
    with pytest.raises(UsageError) as error:
        runs_of(sweep(text), TASKS)
    assert said in str(error.value) and str(error.value).startswith("sweep: ")


EXAMPLES = {"demo": (18, 3), "replay": (15, 3), "collisions": (12, 6), "slow-learner": (12, 6), "four-tasks": (24, 3),
            "forecast-sst2": (15, 3), "forecast-bbc": (15, 3)}  # fmt: skip
"""Runs and seeds; two methods are told apart by a test that has more than two degrees of freedom."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_what_they_say(name, monkeypatch):
    file = Path(__file__).parents[1] / "examples" / f"sweep-{name}.yaml"
    monkeypatch.chdir(file.parents[1])
    said, told = file.read_text(), read_sweep(f"examples/sweep-{name}.yaml")
    assert said.startswith(f"# forgetless sweep examples/sweep-{name}.yaml")
    tasks = ("sst2", "bbc", "mmlu") if told.common["stream"] == "demo" else (told.common["stream"].partition(":")[2],)
    found = runs_of(told, tasks)[1]
    assert (len(found), len({cell.config.seed for cell in found})) == EXAMPLES[name]
    assert "runs;" not in said or f"({len(found)} runs;" in said.replace("\n# ", " ")
    if name.startswith("forecast"):
        config = found[0].config
        assert len({cell.config.r for cell in found}) >= 5 and config.max_steps // config.forgetting_every >= 8
        assert config.lr_scheduler_type == "constant" and config.forgetting_prompts


def test_every_example_is_tested():
    folder = Path(__file__).parents[1] / "examples"
    assert {file.stem.removeprefix("sweep-") for file in folder.glob("sweep-*.yaml")} == set(EXAMPLES)


def test_commands_name_the_folder_that_a_sweep_makes(tmp_path, monkeypatch):
    """`runs/sweep-NAME` in an example or a page is where the plan of examples/sweep-NAME.yaml lies."""
    root = Path(__file__).parents[1]
    tasks = [SimpleNamespace(name=name, fingerprint="", validation=[1]) for name in TASKS]
    monkeypatch.setattr(running, "load_stream", lambda *_, **__: SimpleNamespace(tasks=tasks))
    monkeypatch.chdir(tmp_path)
    files = sorted((root / "examples").glob("sweep-*.yaml"))
    made = [str(open_plan(str(file)).folder.root) for file in files]
    assert made == [f"runs/{file.stem}" for file in files]
    for file in (*files, root / "docs/sweep.md", root / "docs/forecast.md"):
        named = set(re.findall(r"runs/sweep-[\w-]+", file.read_text()))
        assert named <= {*made, "runs/sweep-NAME"}, file


def test_amounts_have_units():
    found = sweep("max_disk: 1.5GB\nmax_time: 90min\ngrid: {methods: [replay]}")
    assert (found.max_disk, found.max_time) == (1.5e9, 5400)


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["sweep", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml" in capsys.readouterr().err


def test_costs_are_counted_by_steps():
    estimate = Estimate([10, 30], [1, 1], [2.0, 4.0], 100, 0.1, 10.0, answering=5.0, measuring=0.5, every=0, disk=1e6)
    assert estimate.seconds(TrainSettings(batch_size=10)) == 1 * 2 + 3 * 4 + 10 + 5 + 3 * 0.5
    assert estimate.seconds(TrainSettings(max_steps=5)) == 5 * 2 + 5 * 4 + 15 + 3 * 0.5
    inside = replace(estimate, every=2)  # after 2 and 4 of 5 steps of both tasks
    assert inside.seconds(TrainSettings(max_steps=5)) == 5 * 2 + 5 * 4 + 15 + (3 + 4) * 0.5


# ---------------------------------------------------------------------------------------- runs


GRID = {"methods": ["sequential", {"name": "replay", "memory": 4}], "orders": {"given": ["colours", "sizes"]}}


@pytest.fixture(scope="module")
def write(tiny, two, tmp_path_factory):
    """Writes a sweep file over two tasks with validation rows, and gives (file, folder)."""
    folder = tmp_path_factory.mktemp("stream")
    tasks = []
    for task in two.tasks:
        for split in ("train", "test"):
            rows = [{"prompt": row.prompt, "completion": row.answer} for row in getattr(task, split)]
            (folder / f"{task.name}-{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tasks.append({"name": task.name, "train": f"{task.name}-train.jsonl", "test": f"{task.name}-test.jsonl",
                      "validation": 3, "options": list(task.options)})  # fmt: skip
    (folder / "two.yaml").write_text(json.dumps({"tasks": tasks}))

    def written(to: Path, **told) -> tuple[str, str]:
        usual = {"stream": str(folder / "two.yaml"), "model": tiny, "batch_size": 4, "max_steps": 1, "cells": "ends",
                 "max_length": 64, "device": "cpu", "precision": "fp32", "forgetting_prompts": 0,
                 "grid": GRID}  # fmt: skip
        (to / "grid.yaml").write_text(yaml.safe_dump(usual | told))
        return str(to / "grid.yaml"), str(to / "out")

    return written


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the runs that must be the same in equal sweeps."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for part in ("cells", "trials") for path in sorted((folder / part).rglob("*"))
        if path.is_file() and not path.name.startswith(("times", ".lock"))
    }  # fmt: skip


@pytest.fixture(scope="module")
def swept(write, tmp_path_factory):
    """Two orders, a learning rate chosen on the first task of each; made by the command."""
    to = tmp_path_factory.mktemp("swept")
    grid = {"methods": ["replay"], "orders": {"given": ["colours", "sizes"], "turned": ["sizes", "colours"]}}
    file, folder = write(to, grid=grid, choose={"learning_rate": [0.001, 0.02]})
    assert main(["sweep", file, "--output_dir", folder]) == 0
    return file, Path(folder)


def test_every_run_is_a_run_folder_and_the_record_names_it(swept):
    _, folder = swept
    record = read_json(folder / "sweep.json")
    assert record["status"] == "complete" and record["counts"] == {"done": 2}
    assert len(record["cells"]) == 2 and len(record["trials"]) == 4
    scores = {trial["id"]: trial["score"] for trial in record["trials"]}
    for cell in record["cells"]:
        run = read_json(folder / cell["folder"] / "run.json")
        assert (
            run["status"] == "complete" and [task["name"] for task in run["tasks"]] == record["orders"][cell["order"]]
        )
        assert run["config"]["learning_rate"] == cell["chosen"]["learning_rate"]
        best = max(cell["among"], key=lambda one: scores[one["trial"]])
        assert cell["chosen"] == best["options"]
        assert run["chosen"] == {
            "learning_rate": {"value": cell["chosen"]["learning_rate"], "among": [0.001, 0.02], "tasks_seen": 1}
        }
        summary = read_json(folder / cell["folder"] / "summary.json")
        assert cell["average"] == pytest.approx(sum(summary["headline"]["matrix"][-1]) / 2)
        majority = [task["majority"]["share"] for task in summary["tasks"]]
        assert cell["majority"] == pytest.approx(sum(majority) / 2)
        assert cell["untouched"] == pytest.approx(sum(summary["headline"]["base"]) / 2)
    page = (folder / "sweep.md").read_text()
    for one in (*record["cells"], *record["trials"]):
        [row] = [line for line in page.splitlines() if line.startswith(f"| {one['id']} |".replace("_", "\\_"))]
        assert row.endswith(f"| {percent(one['majority'])} | {percent(one['untouched'])} |"), row
    assert "2 trials each" in page and all(cell["id"] in page for cell in record["cells"])


def test_a_comparison_takes_what_was_chosen_as_one_method(swept):
    """Whatever the two orders chose."""
    [told] = compare([swept[1]])["sets"]
    assert [one["label"] for one in told["configurations"]] == ["replay [learning_rate chosen]"]
    assert len(told["configurations"][0]["orders"]) == 2 and told["configurations"][0]["cost"]["passes"] > 0


def test_trials_learn_the_first_task_only_and_are_judged_on_validation_rows(swept):
    _, folder = swept
    for trial in read_json(folder / "sweep.json")["trials"]:
        run = read_json(folder / trial["folder"] / "run.json")
        assert [task["name"] for task in run["tasks"]] == trial["tasks"] and len(trial["tasks"]) == 1
        assert run["config"]["score_on"] == "validation" and run["tasks"][0]["test"] == 3


def test_the_untouched_base_is_scored_once_and_shared(swept):
    _, folder = swept
    assert len(list((folder / "base").iterdir())) == 1
    found = {path.read_bytes() for path in (folder / "cells").glob("*/tasks/00-base/scores/predictions.jsonl")}
    assert len(found) == 1
    for cell in read_json(folder / "sweep.json")["cells"]:
        summary = read_json(folder / cell["folder"] / "summary.json")
        assert None not in summary["headline"]["base"]
        assert None not in summary["measures"]["likelihood_union"]["base"], "the union of labels in another order"


def test_again_makes_nothing_and_a_wider_grid_only_what_is_new(swept, monkeypatch):
    file, folder = swept
    before, tried = contents(folder), []
    monkeypatch.setattr(running, "learn", lambda config, base: tried.append(config))
    assert main(["sweep", file, "--output_dir", str(folder)]) == 0
    assert not tried and contents(folder) == before
    told = yaml.safe_load(Path(file).read_text())
    told["grid"]["seed"] = [0, 1]
    wide = Path(file).with_name("wide.yaml")
    wide.write_text(yaml.safe_dump(told))
    left = commands.listed(str(wide), str(folder))
    assert len(left) == 2 and all("seed1" in line for line in left)


def test_a_command_a_run_gives_the_same_bytes_in_any_order(swept, write, tmp_path, capsys):
    file, folder = swept
    alone = tmp_path / "alone"
    assert main(["sweep", file, "--output_dir", str(alone), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and shlex.split(lines[0])[:3] == ["forgetless", "sweep", file]
    assert main(shlex.split(lines[-1])[1:]) == 0  # a cell first: it makes the trials that it needs
    made, same = contents(alone), contents(folder)
    assert made and all(same[name] == content for name, content in made.items())
    record = read_json(alone / "sweep.json")
    assert record["counts"] == {"done": 1, "waiting": 1} and record["status"] == "incomplete"
    assert len(commands.listed(file, str(alone))) == 6 - 1 - 2


def test_a_run_that_fails_is_listed_and_the_others_are_made(write, tmp_path, capsys):
    file, folder = write(tmp_path, grid=GRID | {"r": [2, 3]}, target_modules=["q_proj"])
    plan = open_plan(file, folder)
    broken = plan.folder.run(plan.cells[0])
    broken.mkdir(parents=True)
    (broken / "notes.txt").write_text("mine")
    told = {run.id for run in plan.cells[1:]}
    record = workers.run_sweep(
        plan, lambda runs: ((run, attempt(plan, run) if run.id not in told else DONE) for run in runs)
    )
    assert record["counts"] == {FAILED: 1, WAITING: 3} and record["status"] == "incomplete"
    [failed] = [cell for cell in record["cells"] if cell["status"] == FAILED]
    assert "holds other files and no run.json" in failed["error"] and "average" not in failed
    assert failed["error"][:40] in Path(folder, "sweep.md").read_text().replace("\\_", "_")
    (broken / "notes.txt").unlink()
    assert attempt(plan, plan.cells[0]) == DONE, "a failed run is tried again"


def test_a_trial_that_diverged_is_below_the_others_and_not_tried_again(write, tmp_path):
    file, folder = write(tmp_path, grid=GRID | {"methods": ["sequential"]}, choose={"learning_rate": [1e30, 0.001]},
                         max_steps=3)  # fmt: skip
    plan = open_plan(file, folder)
    [cell] = plan.cells
    assert settle(plan, cell) == DONE
    diverged, fine = plan.trials
    assert plan.folder.state(diverged) == FAILED and running.settled(plan.folder, diverged)
    assert plan.folder.state(fine) == DONE and plan.folder.attempt(cell)["chosen"] == {"learning_rate": 0.001}


def test_without_its_trials_a_run_is_not_made(write, tmp_path, monkeypatch):
    file, folder = write(tmp_path, choose={"learning_rate": [0.001, 0.02]})
    plan = open_plan(file, folder)

    def breaks(*given):
        raise MemoryError("no room")

    monkeypatch.setattr(running, "learn", breaks)
    assert settle(plan, plan.cells[0]) == FAILED
    error = plan.folder.attempt(plan.cells[0])["error"]
    assert "its options cannot be chosen: trial sequential-" in error and "MemoryError: no room" in error


def test_states_are_read_from_locks_and_files(write, tmp_path):
    plan = open_plan(*write(tmp_path))
    run = plan.cells[0]
    assert plan.folder.state(run) == WAITING
    with plan.folder.held(run) as mine:
        assert mine
        plan.folder.note(run, {"status": RUNNING, "attempts": 1})
        assert plan.folder.state(run) == RUNNING
        assert attempt(plan, run) == running.BUSY
    assert plan.folder.state(run) == STOPPED, "its process ended without a word"


def test_a_process_that_ends_without_a_word_three_times_is_a_failure(write, tmp_path, monkeypatch):
    plan = open_plan(*write(tmp_path, grid=GRID | {"methods": ["sequential"]}))
    monkeypatch.setattr(workers, "POLL_SECONDS", 0)

    def crash(runs):
        for run in runs:
            plan.folder.note(run, {"status": RUNNING, "attempts": 1, "threads": 1})
            yield run, workers.CRASHED

    record = workers.run_sweep(plan, crash)
    assert record["counts"] == {FAILED: 1} and "ended 3 times without an error" in record["cells"][0]["error"]


def test_runs_that_others_hold_are_waited_for(write, tmp_path, monkeypatch):
    plan = open_plan(*write(tmp_path))
    monkeypatch.setattr(workers, "POLL_SECONDS", 0)
    rounds: list[list[str]] = []

    def execute(runs):
        rounds.append([run.id for run in runs])
        for run in runs:
            yield run, running.BUSY if len(rounds) < 3 and run is plan.cells[1] else DONE

    workers.run_sweep(plan, execute)
    second = plan.cells[1].id
    assert rounds == [[plan.cells[0].id, second], [second], [second]]


def test_other_rows_are_refused(swept, write, tmp_path):
    _, folder = swept
    stored = read_json(folder / "sweep.json")
    assert set(stored["tasks"]) == {"colours", "sizes"}
    file, other = write(tmp_path)
    Path(other).mkdir()
    write_sealed(Path(other) / "sweep.json", {"format": 1, "tasks": {"sizes": "0" * 16}})
    with pytest.raises(RunError, match="the rows, options or scoring of task 'sizes' have changed"):
        open_plan(file, other)


def test_a_grid_too_large_is_said_before_anything_starts(write, tmp_path, capsys):
    grid = GRID | {"methods": ["sequential"]}
    file, folder = write(tmp_path, max_disk="0.001MB", grid=grid)
    assert main(["sweep", file, "--output_dir", folder]) == 1
    assert "max_disk is 1 kB" in " ".join(capsys.readouterr().err.split()) and not Path(folder).exists()
    file, folder = write(tmp_path, max_time="0.001s", grid=grid)
    assert main(["sweep", file, "--output_dir", folder, "--dry-run"]) == 1
    assert "max_time is 0 s" in " ".join(capsys.readouterr().err.split()) and not Path(folder).exists()


def test_a_list_and_a_cell_honour_the_limits_too(write, tmp_path, capsys):
    for limit, said in ({"max_disk": "0.001MB"}, "max_disk is 1 kB"), ({"max_time": "0.001s"}, "max_time is 0 s"):
        file, folder = write(tmp_path, **limit)
        for asked in (["--list"], ["--list", "--workers", "2"], ["--cell", open_plan(file, folder).cells[0].id]):
            assert main(["sweep", file, "--output_dir", folder, *asked]) == 1
            told = capsys.readouterr()
            assert said in " ".join(told.err.split()) and not told.out and not Path(folder).exists()


def test_the_free_disk_is_looked_at_without_any_limit(write, tmp_path, monkeypatch):
    file, folder = write(tmp_path)
    monkeypatch.setattr(costs.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UsageError, match=r"the runs left need about .* has 1 kB free; .* make room"):
        commands.sweep(file, folder)
    assert not Path(folder).exists()


def test_what_a_folder_holds_is_counted_while_others_work_in_it(tmp_path):
    """A name whose file is gone when it is looked at, as a lock or a temporary file may be."""
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "a").write_bytes(bytes(100))
    (tmp_path / "cells" / "gone").symlink_to(tmp_path / "nothing")
    assert costs._taken(tmp_path) == 100 and costs._taken(tmp_path / "none") == 0


def test_costs_are_of_the_dearest_candidate_with_the_threads_of_a_run(write, tmp_path, monkeypatch):
    seen: list[tuple[int, int]] = []

    def measured(config: LearnConfig) -> Estimate:
        seen.append((config.r, torch.get_num_threads()))
        return Estimate([10], [1], [float(config.r)], 0, 0.0, 0.0, answering=0, measuring=0, every=0,
                        disk=config.r * 1e6)  # fmt: skip

    monkeypatch.setattr(costs, "prepare", lambda config: config)
    monkeypatch.setattr(costs, "estimate", measured)
    before = torch.get_num_threads()
    plan = open_plan(*write(tmp_path, threads=3, choose={"r": [4, 64]}, grid=GRID | {"methods": ["sequential"]}))
    found = costs.costs_of(plan, plan.cells)
    assert (found.seconds, found.longest, found.bytes) == (64.0, 64.0, 64e6)
    assert sorted(seen) == [(4, 3), (64, 3)] and torch.get_num_threads() == before


def test_what_is_measured_and_the_base_are_loaded_as_the_runs_are(write, tmp_path, monkeypatch):
    loaded: list[str] = []
    for module in (costs, running):
        prepared = module.prepare
        seen = lambda config, prepared=prepared: loaded.append(load_settings().attn_implementation) or prepared(config)  # noqa: E731
        monkeypatch.setattr(module, "prepare", seen)
    grid = GRID | {"methods": ["sequential"]}
    assert commands.sweep(*write(tmp_path, attn_implementation="eager", grid=grid))["status"] == "complete"
    assert loaded == ["eager", "eager"], "a run that is measured, and the base"


def test_runs_at_once_take_as_long_as_the_longest():
    costs_of_three = costs.Costs(seconds=30, longest=20, bytes=0)
    assert [costs_of_three.lasts(at_once) for at_once in (1, 2, 24)] == [30, 20, 20]


# ---------------------------------------------------------------------------------------- one machine or another


def test_what_a_machine_decides_is_decided_once(write, tmp_path, monkeypatch):
    """Two machines that would take other precisions and threads make the runs of one sweep alike."""
    grid = GRID | {"methods": ["sequential"], "seed": [0, 1]}
    file, folder = write(tmp_path, device="auto", precision="auto", grid=grid)
    first, second = open_plan(file, folder).cells
    for here, run in ((Terms("cpu", "fp32", 1), first), (Terms("cpu", "bf16", 2), second)):
        monkeypatch.setattr(running, "terms_here", lambda _, here=here: here)
        commands.one(file, folder, run.id)
    plan = open_plan(file, folder)
    assert plan.terms == Terms("cpu", "fp32", 1) and "on cpu in fp32 with 1 thread" in plan.folder.page.read_text()
    assert [plan.folder.attempt(run)["threads"] for run in plan.cells] == [1, 1]
    assert {read_json(plan.folder.run(run) / "run.json")["precision"] for run in plan.cells} == {"float32"}
    assert len(list((plan.folder.root / "base").iterdir())) == 1
    assert len(compare([folder])["sets"][0]["configurations"]) == 1


def test_a_sweep_that_was_begun_otherwise_is_refused(write, tmp_path):
    """With another precision than its file says, and on a GPU where there is none."""
    plan = open_plan(*write(tmp_path, precision="fp32", device="auto"))
    plan.terms = Terms("cuda", "fp32", 1)
    write_record(plan)
    with pytest.raises(RunError, match=r"begun with precision fp32 and its file now says bf16.*another --output_dir"):
        open_plan(*write(tmp_path, precision="bf16", device="auto"))
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match="begun on a GPU, and this machine offers none"):
            commands.sweep(*write(tmp_path, precision="fp32", device="auto"))
    plan = open_plan(*write(tmp_path, precision="fp32", device="auto"))
    assert {plan.folder.state(run) for run in plan.cells} == {WAITING}, "no run is to blame"


def test_more_threads_than_processors_are_said(write, tmp_path, capsys):
    file, folder = write(tmp_path, threads=64)
    running.check_terms(open_plan(file, folder), 2)
    assert f"2 at once with 64 threads each, as this sweep was begun, are slow on {os.cpu_count()} CPUs" in " ".join(
        capsys.readouterr().err.split()
    )


def test_the_disk_is_estimated_by_the_bytes_of_the_adapters(swept, write, tmp_path):
    """Adapters exactly; beside them checkpoints while a task is learnt, and a few hundred bytes a prediction."""
    file, _ = swept
    plan = open_plan(file, str(tmp_path))
    cell = plan.cells[0]
    found = costs.costs_of(plan, [cell])
    made = swept[1] / "cells" / cell.id
    tensors = sum(path.stat().st_size for path in made.rglob("adapter_model.safetensors"))
    heads = 3 * 2000  # of safetensors files: names and shapes
    checkpoints = 3 * 3 * tensors / 3  # three of them, each a pair and AdamW's two moments; a pair a task is kept
    assert found.bytes - 600 * 100 - checkpoints < tensors < found.bytes + heads
    assert found.seconds > 0


SAYS = """#!/bin/sh
if [ "$3" = --list ]; then
  printf "forgetless sweep grid.yaml --output_dir 'runs/a b' --cell %s\\n" a b c
else
  for one; do printf '<%s>' "$one"; done; echo
fi
"""


def test_lines_for_queues_do_what_they_say(tmp_path):
    """Those of the page and the script's own, with a `forgetless` that lists three runs and says what it was given."""
    root = Path(__file__).parents[1]
    for name in ("forgetless", "sbatch"):
        (tmp_path / name).write_text(SAYS)
        (tmp_path / name).chmod(0o755)
    script = root / "examples" / "sweep-slurm.sh"
    page = (root / "docs" / "sweep.md").read_text().splitlines()
    [queue] = [line for line in page if "xargs" in line]
    [array] = [line for line in page if line.startswith("sbatch")]
    shell = lambda line: subprocess.run(  # noqa: E731
        ["bash", "-c", line], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    ).stdout.splitlines()  # fmt: skip
    assert sorted(shell(queue)) == [f"<sweep><grid.yaml><--output_dir><runs/a b><--cell><{one}>" for one in "abc"]
    said = ["<--array=1-3><examples/sweep-slurm.sh><grid.yaml>"]
    assert shell(array) == shell(script.read_text().splitlines()[1].removeprefix("# ")) == said
    assert shell(f"bash -n {shlex.quote(str(script))}") == []


def test_help_and_wrong_use(capsys):
    assert main(["sweep", "--help"]) == 0
    assert "exit codes" in capsys.readouterr().out
    assert main(["sweep", "x.yaml", "--list", "--cell", "y"]) == 1
    assert "give one of" in capsys.readouterr().err


def test_a_run_that_is_not_in_the_grid_names_the_nearest(write, tmp_path):
    plan = open_plan(*write(tmp_path))
    with pytest.raises(UsageError, match="did you mean"):
        plan.find(plan.cells[0].id[:-1])


# ---------------------------------------------------------------------------------------- several processes


@pytest.mark.slow  # two processes, each of which imports torch
def test_two_workers_give_the_bytes_of_one(swept, tmp_path):
    file, folder = swept
    record = commands.sweep(file, str(tmp_path / "two"), workers=2)
    assert record["status"] == "complete" and {cell["threads"] for cell in record["cells"]} == {1}
    assert contents(tmp_path / "two") == contents(folder)


KILLED = """
import os, signal, time
from multiprocessing import parent_process
from forgetless.methods.sequential import Sequential

class Killed(Sequential):
    hooks = 1
    summary = "its process is killed, as one out of memory is"
    def begin_task(self, number):
        super().begin_task(number)
        if parent_process():  # where it is measured nothing happens
            os.kill(os.getpid(), signal.SIGKILL)

class Long(Sequential):
    hooks = 1
    summary = "is at work while others are killed"
    def begin_task(self, number):
        super().begin_task(number)
        time.sleep(4)
"""


@pytest.mark.slow  # a process a run, each of which imports torch
def test_a_run_that_is_killed_takes_no_other_with_it(write, tmp_path):
    (tmp_path / "mine.py").write_text(KILLED)
    grid = GRID | {"methods": [f"{tmp_path}/mine.py:{name}" for name in ("Killed", "Long")]}
    file, folder = write(tmp_path, grid=grid)
    record = commands.sweep(file, folder, workers=2)
    tried = [(cell["method"].rpartition(":")[2], cell["status"]) for cell in record["cells"]]
    assert tried == [("Killed", FAILED), ("Long", DONE)]
    plan = open_plan(file, folder)
    assert [plan.folder.attempt(run)["attempts"] for run in plan.cells] == [3, 1]
    assert "ended 3 times without an error" in record["cells"][0]["error"]


def test_what_a_process_cannot_read_is_said_once(write, tmp_path, capfd):
    """The sweep file went away: no run is to blame."""
    plan = open_plan(*write(tmp_path, grid=GRID | {"methods": ["sequential"]}))
    Path(plan.file).unlink()
    with pytest.raises(UsageError, match=r"grid.yaml: .*No such file"):
        list(workers.side_by_side(plan, 1)(plan.cells))
    assert "Traceback" not in capfd.readouterr().err and plan.folder.state(plan.cells[0]) == WAITING


@pytest.mark.slow  # a cluster
def test_a_killed_worker_of_a_cluster_loses_and_doubles_nothing(write, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'forgetless[ray]'")
    grid = GRID | {"methods": ["sequential"], "seed": [0, 1]}
    file, folder = write(tmp_path, grid=grid, max_steps=30, threads=1)
    plan = open_plan(file, folder)
    killed: dict[str, int] = {}

    def kill_one() -> None:
        """The first worker that is in the middle of a run."""
        while not killed:
            for run in plan.cells:
                told = plan.folder.attempt(run)
                if told.get("status") == RUNNING and complete(RunFolder(plan.folder.run(run)).task(1, "colours")):
                    killed[run.id] = told["pid"]
                    os.kill(told["pid"], signal.SIGKILL)
                    return
            time.sleep(0.02)

    watcher = threading.Thread(target=kill_one, daemon=True)
    watcher.start()
    record = commands.sweep(file, folder, workers=2, ray="local")
    assert record["status"] == "complete" and len(killed) == 1
    tried = {run.id: plan.folder.attempt(run) for run in plan.cells}
    assert {id: told["attempts"] for id, told in tried.items()} == {id: 1 + (id in killed) for id in tried}
    assert all(told["pid"] not in killed.values() for told in tried.values()), "another worker took it over"
    commands.sweep(file, str(tmp_path / "whole"))
    assert contents(Path(folder)) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_no_cluster_is_named(write, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'forgetless[ray]'")
    file, folder = write(tmp_path)
    with pytest.raises(UsageError, match="--ray auto: no cluster there"):
        commands.sweep(file, folder, ray="auto")


@pytest.mark.parametrize(("has", "at_once"), [({"CPU": 7.0}, 3), ({"CPU": 7.0, "GPU": 1.0}, 1), ({"CPU": 1.0}, 0)])
def test_a_cluster_runs_as_many_at_once_as_it_has_room_for(write, tmp_path, monkeypatch, has, at_once):
    """Runs of two threads, on a cluster that answers at once in this process."""
    asked = lambda function: SimpleNamespace(remote=function)  # noqa: E731
    fake = SimpleNamespace(init=lambda **_: None, shutdown=lambda: None, cluster_resources=lambda: has,
                           remote=lambda **_: asked, get=lambda told: told)  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", fake)
    file, folder = write(tmp_path, threads=2, max_time="0.001s", device="auto")
    if not at_once:
        with pytest.raises(UsageError, match="a run takes 2 CPUs, the cluster has 1; give fewer `threads:`"):
            commands.planned(file, folder, ray="auto")
        return
    with on_ray(open_plan(file, folder), "auto", 1) as place:
        assert place.at_once == at_once
    with pytest.raises(UsageError, match=rf"with {at_once} side by side, max_time is 0 s"):
        commands.planned(file, folder, ray="auto")


def test_without_ray_the_remedy_is_named(write, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'forgetless\[ray\]'"):
        commands.sweep(*write(tmp_path), ray="local")
