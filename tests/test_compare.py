"""Comparisons: made-up runs in; groups, intervals, tests, figures, files and archives out."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import shutil
import statistics
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import Page, opened_in_browser, self_contained
from run_folders import SETTINGS, made_run
from safetensors.torch import save_file

from forgetless.cli import main
from forgetless.comparing.clusters import mean_over, sampled
from forgetless.comparing.comparison import SHARE, compare, over, spread, varies
from forgetless.comparing.entries import read_archive, read_entries
from forgetless.errors import DataError, ForgetlessError, RunError, UsageError
from forgetless.methods import METHODS
from forgetless.report.compare import compare_csv, compare_latex, compare_markdown, latex, write_compare
from forgetless.report.compare_figures import figures
from forgetless.report.figures import pdf, svg
from forgetless.report.papers import PAPERS, bibtex
from forgetless.runs.folder import RunFolder
from forgetless.runs.seal import sealed, write_sealed
from forgetless.runs.search import run_folders

ORDERS = (("a", "b", "c"), ("c", "a", "b"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three seeds of a sequence that forgets and of two shares of replay, one bound, one other order."""
    root = tmp_path_factory.mktemp("sweep")
    for seed in range(3):
        made_run(root / f"seq-{seed}", seed=seed, falls=0.2 + 0.025 * seed)
        for share, falls in ((10, 0.05), (50, 0.025)):
            made_run(root / f"replay-{share}-{seed}", "replay", seed=seed, falls=falls, learnt=0.85 + 0.025 * seed,
                     options={"memory": f"{share}%"}, kept_rows=share, tokens=200)  # fmt: skip
    made_run(root / "joint", "joint", falls=0.0, learnt=0.95)
    made_run(root / "order", seed=0, order=ORDERS[1], falls=0.3)
    return root


@pytest.fixture(scope="module")
def archive(runs, tmp_path_factory):
    """The same runs as one file, which is quicker to read."""
    file = tmp_path_factory.mktemp("archive") / "all.zip"
    compare([runs], file)
    return file


@pytest.fixture(scope="module")
def record(archive):
    return compare([archive])


def by_label(record: dict) -> dict[str, dict]:
    return {one["label"]: one for one in record["sets"][0]["configurations"]}


def test_runs_are_grouped_by_what_is_equal(record):
    assert len(record["sets"]) == 1 and record["runs"] == 11
    told = by_label(record)
    assert set(told) == {"sequential", "replay [memory=10%]", "replay [memory=50%]", "joint"}
    assert told["sequential"]["varies"] == "seeds and orders" and told["replay [memory=10%]"]["varies"] == "seeds"
    assert told["sequential"]["over"] == "seeds", "two orders are no sample of orders"
    assert told["joint"]["varies"] == told["joint"]["over"] == "rows" and told["joint"]["bound"]


def test_means_and_intervals_by_hand(record):
    """Averages of 0.85 - 0.05 and so on; the t of two degrees of freedom is 4.3027."""
    one = by_label(record)["replay [memory=10%]"]["figures"]["average_accuracy"]
    assert one["values"] == pytest.approx([0.8, 0.825, 0.85])
    assert (one["mean"], one["low"], one["high"]) == pytest.approx((0.825, 0.825 - 0.0621, 0.825 + 0.0621), abs=1e-4)
    single = by_label(record)["joint"]["figures"]["average_accuracy"]
    assert single["low"] < 0.95 <= single["high"], "over rows"
    assert by_label(record)["joint"]["tasks"][0]["low"] is not None


def runs_of(seeds, orders=("ab",)) -> list[dict]:
    """Every seed in every order; an order is its letters."""
    return [{"seed": seed, "tasks": [{"name": name} for name in order]} for order in orders for seed in seeds]


def test_two_runs_give_values_and_no_interval():
    told = spread([0.5, 0.7], runs_of(range(2)))
    assert told["mean"] == pytest.approx(0.6) and told["low"] is None
    assert spread([0.5, None, 0.7, 0.9], runs_of(range(4)))["mean"] is None, "a missing value is not left out of a mean"
    three = runs_of(range(3))
    assert spread([0.5, 0.6, 0.7], three)["low"] is not None and spread([0.5, 0.5, 0.5], three)["low"] is None
    high = spread([0.2, 0.9, 1.0], three)["high"]
    assert spread([0.2, 0.9, 1.0], three, SHARE)["high"] == 1.0 < high


# ------------------------------------------------------------------------------------------- seeds and orders


def test_seeds_by_orders_by_hand():
    """Two orders, three seeds: the seeds' means 1, 2, 3 over the orders: √(1/3), two degrees of freedom."""
    values = [0.0, 1.0, 2.0, 2.0, 3.0, 4.0]  # the second order is better by 2
    found = mean_over(values, {"seeds": [0, 1, 2] * 2, "orders": [0] * 3 + [1] * 3})
    assert (found.value, found.error, found.freedom, found.groups) == pytest.approx((2.0, (1 / 3) ** 0.5, 2, 3))
    # 3 x 3, order effects of 0, 3, 6 alone: V = 9/3 from the orders, 0 from the seeds
    found = mean_over([o for o in (0.0, 3.0, 6.0) for _ in range(3)], crossing(3, 3))
    assert (found.error**2, found.freedom) == pytest.approx((3.0, 2.0))
    # both: 9/3 + 1/3, (10/3)² / (3²/2 + (1/3)²/2)
    found = mean_over([o + s for o in (0.0, 3.0, 6.0) for s in range(3)], crossing(3, 3))
    assert (found.error**2, found.freedom) == pytest.approx((10 / 3, (100 / 9) / (9 / 2 + 1 / 18)))


def crossing(seeds: int, orders: int) -> dict[str, list[int]]:
    return {"seeds": list(range(seeds)) * orders, "orders": [o for o in range(orders) for _ in range(seeds)]}


def test_what_an_interval_is_over():
    assert sampled(crossing(3, 3)) == ["seeds", "orders"] and sampled(crossing(3, 2)) == ["seeds"]
    assert sampled(crossing(2, 3)) == ["orders"] and sampled(crossing(2, 2)) == [] == sampled(crossing(1, 1))
    assert sampled({"seeds": list(range(6)), "orders": [0, 0, 1, 1, 2, 2]}) == ["orders"], (
        "each order has seeds of its own"
    )
    assert sampled({"seeds": [0, 1, 2], "orders": [0, 1, 2]}) == ["seeds"], "counted once"
    assert over(runs_of([None] * 3)) == "seeds", "matrices without a seed are different runs"
    assert spread([0.1, 0.2, 0.3, 0.4], runs_of([0, 1], ("ab", "ba")))["low"] is None, (
        "four runs, and no three of one kind"
    )


@pytest.mark.parametrize(("of_seed", "of_order", "least"), [(0.3, 1.0, 0.92), (1.0, 0.3, 0.92), (0.0, 0.0, 0.95)])
def test_intervals_hold_the_mean_of_all_seeds_and_orders(of_seed, of_order, least):
    """4 seeds x 4 orders, each with an effect of its own, and noise; counted as 16 runs, far fewer would hold it."""
    rng, levels, held, naive = np.random.default_rng(0), crossing(4, 4), 0, 0
    for _ in range(400):
        seeds, orders = of_seed * rng.normal(size=4), of_order * rng.normal(size=4)
        values = [float(seeds[s] + orders[o] + 0.3 * rng.normal())
                  for s, o in zip(levels["seeds"], levels["orders"], strict=True)]  # fmt: skip
        low, high = mean_over(values, levels).interval(0.95)
        held += low <= 0 <= high
        low, high = mean_over(values, {"runs": range(16)}).interval(0.95)
        naive += low <= 0 <= high
    assert held / 400 >= least
    assert naive / 400 < 0.75 or not of_order, "what the interval of independent runs would come to"


def test_tests_are_over_pairs_of_seeds(record):
    told = record["sets"][0]["tests"]
    assert not any("joint" in (one["before"], one["after"]) for one in told), "bounds are not ranked"
    shares = [one for one in told if "10%" in one["before"] + one["after"] and "50%" in one["before"] + one["after"]]
    assert {(one["of"], one["n"], one["over"]) for one in shares} == {
        ("average_accuracy", 3, "seeds"),
        ("bwt", 3, "seeds"),
    }
    for one in told:
        assert one["p_holm"] >= one["p"] and one["shown"] == (one["p_holm"] < 0.05)
    by_hand = [one for one in told if one["of"] == "bwt" and one in shares]
    # changes of (0.1 + 0.05)/2 and (0.05 + 0.025)/2 in every seed, up to the rounding to whole rows
    assert by_hand[0]["change"] == pytest.approx(0.0375, abs=0.02)


def test_paired_t_by_hand():
    """(1, 2, 3): t = 2 / (1/√3) = 3.464 with two degrees of freedom, p = 0.0742."""
    assert mean_over([1.0, 2.0, 3.0], {"seeds": range(3)}).p() == pytest.approx(0.0742, abs=1e-4)
    assert mean_over([0.5] * 4, {"seeds": range(4)}).p() == 0.125, "equal differences: the sign test"
    assert mean_over([0.0] * 3, {"seeds": range(3)}).p() == 1.0
    # three seeds in each of three orders are no nine pairs
    assert mean_over([0.5] * 9, crossing(3, 3)).p() == 0.25


def test_single_pairs_are_tested_on_rows(tmp_path):
    made_run(tmp_path / "one", falls=0.3)
    made_run(tmp_path / "two", "incremental", falls=0.0)
    told = compare([tmp_path])["sets"][0]
    first = next(one for one in told["tests"] if one["of"] == "a")
    # 36 of 40 rows against 12 of 40: 24 rows, all one way; 2 / 2^24
    assert (abs(first["change"]), first["n"], first["p"]) == pytest.approx((0.6, 40, 2**-23))
    assert first["over"] == "rows" and first["shown"]
    assert "(over 40 rows of one run each, of which alone this is shown; p " in compare_markdown(compare([tmp_path]))


def test_two_pairs_give_their_changes_and_no_claim(tmp_path):
    """One seed says the one is better by far, the other seed the other."""
    for seed, (sequential, incremental) in enumerate(((0.0, 0.3), (0.3, 0.0))):
        made_run(tmp_path / f"a{seed}", seed=seed, falls=sequential)
        made_run(tmp_path / f"b{seed}", "incremental", seed=seed, falls=incremental)
    record = compare([tmp_path])
    told = record["sets"][0]["tests"]
    assert [(one["of"], one["n"], one["p"], one["p_holm"], one["shown"]) for one in told] == [
        ("average_accuracy", 2, None, None, False), ("bwt", 2, None, None, False)
    ]  # fmt: skip
    assert told[0]["values"] == pytest.approx([-0.3, 0.3]) and told[0]["change"] == pytest.approx(0)
    text = compare_markdown(record)
    assert "| 2 pairs | −30, +30 | – | – | too few for a claim |" in text
    assert "No difference between methods is shown" in text


def test_front_and_cost(record):
    told = by_label(record)
    assert not told["joint"]["front"] and told["replay [memory=50%]"]["front"]
    assert told["replay [memory=10%]"]["cost"]["relative_tokens"] == 2.0
    cost = told["sequential"]["cost"]
    assert (cost["seconds"], cost["deployed"], cost["trained"], cost["memory"]) == (30.0, 800, 800, None)
    assert told["replay [memory=50%]"]["cost"]["rows_kept"] == 50 and cost["stock_peft"] and not cost["task_id"]


def test_majority_and_base_stand_beside_every_score(record):
    """Both score the same on all three tasks of the made-up runs."""
    tables = compare_markdown(record).split("####")
    for title, times in {"Figures": 2, "Scores at the end": 3, "Order of tasks": 2, "How much old data": 2}.items():
        [table] = [one for one in tables if one.strip().startswith(title)]
        for name, score in (("majority answer", "50"), ("untouched base", "40")):
            [line] = [line for line in table.splitlines() if name in line]
            assert line.split("|").count(f" {score} ") == times, line


# ------------------------------------------------------------------------------------------- overlap


def with_adapters(root: Path, added: list[tuple[int, float]]) -> None:
    """Gives a made-up run real adapters, in which each task adds to one layer: (place in its first row, size)."""
    run = RunFolder(root)
    for number, name in enumerate("abc", start=1):
        folder = run.task(number, name)
        with run.publish(folder) as whole:
            shutil.copytree(folder, whole, dirs_exist_ok=True)
            (whole / "manifest.json").unlink()
            adapter = whole / "adapter"
            A, B = torch.zeros(number, 4), torch.zeros(6, number)  # the earlier tasks' pairs before its own
            for row, (place, size) in enumerate(added[:number]):
                A[row, place], B[0, row] = 1.0, size
            layer = "base_model.model.layers.0.q_proj"
            save_file({f"{layer}.lora_A.weight": A, f"{layer}.lora_B.weight": B}, adapter / "adapter_model.safetensors")
            config = {"peft_type": "LORA", "r": number, "lora_alpha": number, "target_modules": ["q_proj"],
                      "base_model_name_or_path": "tiny"}  # fmt: skip
            (adapter / "adapter_config.json").write_text(json.dumps(config))


def test_overlap_of_methods_over_seeds(tmp_path, capsys):
    """Of 24 entries all tasks of one method change the same one; of the other's only the first two do."""
    for seed in range(3):
        sizes = [1.0 + 0.1 * seed, 1.0, 2.0]
        for method, places in (("olora", (0, 0, 0)), ("nlora", (0, 0, 1))):
            root = made_run(tmp_path / f"{method}-{seed}", method, seed=seed, falls=0.2 + 0.05 * seed)
            with_adapters(root, list(zip(places, sizes, strict=True)))
    made_run(tmp_path / "joint", "joint", falls=0.0)
    plain = compare([tmp_path])
    record = compare([tmp_path], tmp_path / "all.zip", overlap=True)
    told = by_label(record)
    rates = told["olora"]["figures"]["collision_rate"], told["nlora"]["figures"]["collision_rate"]
    assert rates[0]["values"] == pytest.approx([1 / 24] * 3) and rates[1]["values"] == pytest.approx([1 / 72] * 3)
    # ΔW_i^T ΔW_j has one entry, s_i s_j: wherever they read from, both write to the same output
    by_hand = [(s * 1) ** 2 + (s * 2) ** 2 + (1 * 2) ** 2 for s in (1.0, 1.1, 1.2)]
    for method in ("olora", "nlora"):
        assert told[method]["figures"]["overlap"]["values"] == pytest.approx(by_hand)
    assert "collision_rate" not in by_label(plain)["olora"]["figures"]
    [ratio] = [one for one in record["sets"][0]["tests"] if one["of"] == "collision_rate"]
    assert ratio["values"] == pytest.approx([math.log(1 / 3)] * 3 if ratio["after"] == "nlora" else [math.log(3)] * 3)
    text = compare_markdown(record)
    [row] = [line for line in text.splitlines() if line.startswith("| olora | 3 | seeds | 4.17 |")]
    assert "| 3.00× |" in row and re.search(r"collision rate \| 3 pairs \(seeds\) \| (0.333|3)× \|", text)
    assert [line.split(",")[-1] for line in compare_csv(record).splitlines() if "olora-0" in line and "rate" in line]
    assert compare([tmp_path / "all.zip"]) == record
    assert compare([tmp_path, tmp_path / "all.zip"])["runs"] == 7, "a run with and without counts once"
    assert main(["compare", str(tmp_path / "olora-0"), str(tmp_path / "nlora-0"), "--overlap", "--markdown"]) == 0
    assert "Tasks' updates on one another" in capsys.readouterr().out


def test_order_sensitivity(record):
    told = by_label(record)["sequential"]["by_order"]
    assert {tuple(one["order"]): one["runs"] for one in told} == {ORDERS[0]: 3, ORDERS[1]: 1}
    assert told[1]["average_accuracy"] > told[0]["average_accuracy"], "the other order's run forgets more"
    assert by_label(record)["joint"]["by_order"] == []
    assert varies([{"seed": 0, "tasks": []}] * 2).startswith("repeats")


def test_how_much_old_data(record):
    [curve] = record["sets"][0]["replay"]
    assert [one["share"] for one in curve["points"]] == [0.0, 0.1, 0.5]
    assert [one["rows_kept"] for one in curve["points"]] == [0, 10, 50]
    old = [one["old"]["mean"] for one in curve["points"]]
    assert old == sorted(old)
    # of the two old tasks at 10 %, in the three seeds: learnt - 0.1 and learnt - 0.05
    assert curve["points"][1]["old"]["mean"] == pytest.approx(statistics.fmean([0.875 - 0.1, 0.875 - 0.05]), abs=0.005)


def test_runs_on_other_rows_and_bases_stand_apart(tmp_path):
    made_run(tmp_path / "one")
    made_run(tmp_path / "two", rows=60)
    made_run(tmp_path / "three", base="cd" * 16)
    made_run(tmp_path / "four", status="running")
    told = compare([tmp_path])
    assert len(told["sets"]) == 3 and told["unfinished"] == ["four"]
    with pytest.raises(UsageError, match="no finished run"):
        compare([tmp_path / "four"])


def test_cells_that_are_not_done_are_named_and_seeds_that_are_lacking(tmp_path):
    """Of four seeds of two methods one failed before it made a folder and one within; a state may be of long ago."""
    for seed in range(4):
        made_run(tmp_path / "cells" / f"a{seed}", seed=seed, falls=0.2 + 0.025 * seed)
    for seed in range(3):
        made_run(tmp_path / "cells" / f"b{seed}", "incremental", seed=seed, status="complete" if seed else "running")
    states = {"a0": "done", "a1": "running", "b0": "failed", "b1": "done", "b3": "failed", "c": "waiting"}
    cells = [{"id": id, "status": status} for id, status in states.items()]
    write_sealed(tmp_path / "sweep.json", {"format": 1, "cells": cells})
    record = compare([tmp_path], tmp_path / "all.zip")
    assert record["runs"] == 6 and record["unfinished"] == ["b0 (failed)", "b3 (failed)", "c (waiting)"]
    assert compare([tmp_path / "all.zip"]) == record
    text = html.unescape(compare_markdown(record))
    assert "Not finished, and left out: b0 (failed), b3 (failed), c (waiting)." in text
    lacking = "incremental has no run of seed 0 in a > b > c; seed 3 in a > b > c, as others have"
    assert lacking in text and text.count("has no run of") == 1
    assert compare([tmp_path / "cells" / "a0"])["unfinished"] == [], "a run by itself"
    write_sealed(tmp_path / "sweep.json", {"format": 1, "cells": [3]})
    with pytest.raises(RunError, match=r"sweep.json: cells\[0\]: expected an object"):
        compare([tmp_path])


def test_damage_is_seen(tmp_path):
    made_run(tmp_path / "one")
    (tmp_path / "one" / "tasks" / "01-a" / "scores" / "predictions.jsonl").write_text("")
    with pytest.raises(RunError, match=r"predictions\.jsonl: has changed"):
        compare([tmp_path])


# ------------------------------------------------------------------------------------------- configurations


def test_a_method_stays_one_however_its_options_were_chosen(tmp_path):
    """Two orders chose different rates among the same three; beside them the method at a fixed one."""
    among = [1e-3, 2e-3, 5e-3]
    for order, rate in zip(ORDERS, (1e-3, 5e-3), strict=True):
        for seed in range(3):
            chosen = {"learning_rate": {"value": rate, "among": among, "tasks_seen": 1}}
            made_run(tmp_path / f"{rate}-{seed}", "replay", seed=seed, order=order, learning_rate=rate,
                     falls=0.2 + 0.025 * seed, more={"chosen": chosen})  # fmt: skip
    made_run(tmp_path / "fixed", "replay", learning_rate=1e-3)
    record = compare([tmp_path])
    told = by_label(record)
    assert set(told) == {
        "replay [learning_rate chosen among 0.001, 0.002, 0.005 by trials on 1 task]",
        "replay [learning_rate=0.001]",
    }
    chosen, _ = told.values()
    assert len(chosen["runs"]) == 6 and chosen["over"] == "seeds"
    assert chosen["chosen"]["learning_rate"]["values"] == [1e-3] * 3 + [5e-3] * 3
    text = compare_markdown(record)
    assert "Chosen on validation rows" in text and "| 1 of 3 | 0.001 (3), 0.005 (3) |" in text
    assert "WITH SIGHT" not in text
    assert "chosen: learning_rate" in compare_csv(record)


def test_a_chosen_share_of_memory_is_on_no_curve(tmp_path):
    for seed, share in enumerate(("5%", "20%")):
        among = {"memory": {"value": share, "among": ["5%", "20%"], "tasks_seen": 1}}
        made_run(tmp_path / share, "replay", seed=seed, options={"memory": share}, more={"chosen": among})
    [told] = compare([tmp_path])["sets"]
    assert [one["label"] for one in told["configurations"]] == ["replay [memory chosen]"] and told["replay"] == []


def test_a_choice_that_saw_later_tasks_is_said(tmp_path):
    choice = {"value": 1e-3, "among": [1e-3, 2e-3], "tasks_seen": 3}
    made_run(tmp_path / "one", more={"chosen": {"learning_rate": choice}})
    made_run(tmp_path / "two", more={"chosen": {"learning_rate": choice | {"tasks_seen": 1}}}, seed=1)
    record = compare([tmp_path])
    assert len(by_label(record)) == 2 and "by trials on 3 tasks" in next(iter(by_label(record)))
    assert "WITH SIGHT OF ALL TASKS" in compare_markdown(record)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_rslora": True}, "use_rslora=True"),
        ({"method_code": {"Mine": "0123456789abcdef"}}, "code of Mine=01234567"),
        (
            {"more": {"adopted": [{"name": "x", "kind": "summed", "sha256": "fedcba98"}]}},
            "adopted x=summed fedcba98",
        ),
    ],
)
def test_whatever_decides_a_run_tells_configurations_apart(tmp_path, change, said):
    made_run(tmp_path / "one", "Mine")
    made_run(tmp_path / "two", "Mine", seed=1, **change)
    [told] = compare([tmp_path])["sets"]
    assert len(told["configurations"]) == 2 and said in told["configurations"][1]["label"]


def test_other_training_rows_are_another_configuration(tmp_path):
    for i, digest in enumerate(("aa", "bb")):
        folder = made_run(tmp_path / digest, seed=i)
        run = json.loads((folder / "run.json").read_text())
        for task in run["tasks"]:
            task["digests"] = {"train": digest + task["name"]}
        (folder / "run.json").write_text(json.dumps(sealed({key: run[key] for key in run if key != "sha256"})))
    assert len(compare([tmp_path])["sets"][0]["configurations"]) == 2


def test_kl_on_different_texts_is_not_averaged(tmp_path):
    for seed in range(3):
        made_run(tmp_path / f"one-{seed}", seed=seed, text="a" * 8)
        made_run(tmp_path / f"two-{seed}", "replay", seed=seed, text=("b" if seed else "c") * 8)
    record = compare([tmp_path])
    told = by_label(record)
    assert told["sequential"]["figures"]["kl"]["mean"] == pytest.approx(0.3)
    assert told["replay"]["figures"]["kl"]["mean"] is None and len(told["replay"]["texts"]) == 2
    text = compare_markdown(record)
    assert "measured on different texts" in text and "aaaaaa" in text
    shutil.rmtree(tmp_path / "two-0")
    assert by_label(compare([tmp_path]))["replay"]["figures"]["kl"]["mean"] == pytest.approx(0.3)


def test_methods_of_this_project_are_in_no_ranking_unless_asked(tmp_path, capsys):
    made_run(tmp_path / "mine", "mine", falls=0.0, learnt=0.95, about={"ours": True})
    made_run(tmp_path / "one", falls=0.2)
    told = by_label(compare([tmp_path]))
    assert not told["mine"]["front"] and told["sequential"]["front"]
    table = compare_markdown(compare([tmp_path]))
    assert table.index("| sequential") < table.index("| mine (ours)")
    told = by_label(compare([tmp_path], rank_ours=True))
    assert told["mine"]["front"] and not told["sequential"]["front"]
    assert main(["compare", str(tmp_path), "--markdown", "--rank_ours"]) == 0
    table = capsys.readouterr().out
    assert table.index("| mine (ours)") < table.index("| sequential")


def test_what_a_method_is_stands_in_its_run(tmp_path):
    """No built-in method: what run.json tells of it is all that is known."""
    about = {"paper": "1706.08840, 2310.14152", "task_id": True, "bound": True, "extra_compute": "much"}
    made_run(tmp_path / "one", "gem+Mine", about=about)
    made_run(tmp_path / "two")
    record = compare([tmp_path])
    told = by_label(record)["gem+Mine"]
    assert told["bound"] and told["cost"]["task_id"] and told["cost"]["extra_compute"] == "much"
    assert told["cost"]["deployed"] == 3 * 800, "an adapter a task"
    write_compare(record, tmp_path / "out")
    assert "1706.08840}" in (tmp_path / "out" / "compare.bib").read_text()


def test_passes_are_what_was_counted(tmp_path):
    """(300 + 100) against (100 + 100); with gradient checkpointing a backward pass counts twice."""
    counted = {"forward_tokens": 100, "backward_tokens": 100, "gpu_seconds": 5.0}
    made_run(tmp_path / "plain", spent=counted)
    made_run(tmp_path / "lwf", "lwf", spent=counted | {"forward_tokens": 300})
    again = SETTINGS | {"seed": 0, "gradient_checkpointing": True}
    made_run(tmp_path / "again", "agem", spent=counted, more={"config": again})
    made_run(tmp_path / "old", "ewc")
    cost = {label: one["cost"] for label, one in by_label(compare([tmp_path])).items()}
    assert [cost[name]["relative_compute"] for name in ("sequential", "lwf", "agem", "ewc")] == [1.0, 2.0, 1.5, None]
    assert (
        cost["lwf"]["relative_tokens"] == 1.0 and cost["lwf"]["cpu_seconds"] == 30.0 == 2 * cost["lwf"]["gpu_seconds"]
    )


# ------------------------------------------------------------------------------------------- other code


MATRIX = {"method": "theirs", "tasks": ["a", "b", "c"], "matrix": [[0.9, 0.4, 0.4], [0.8, 0.9, 0.4], [0.7, 0.8, 0.9]],
          "base": [0.4, 0.4, 0.4], "seed": 3, "paper": "2402.18865"}  # fmt: skip


def test_matrices_of_other_code_join_and_are_marked(archive, tmp_path):
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps([MATRIX, MATRIX | {"seed": 4, "matrix": [[0.8, 0.8, 0.8]], "method": "their joint"}]))
    told = compare([archive, file])
    assert len(told["sets"]) == 1
    found = by_label(told)
    assert found["theirs (imported)"]["figures"]["bwt"]["mean"] == pytest.approx(-0.15)
    assert found["their joint (imported)"]["figures"]["bwt"]["mean"] is None
    assert not any("imported" in one["before"] + one["after"] for one in told["sets"][0]["tests"])
    assert "imported" in compare_markdown(told)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": [[0.9, 0.4]]}, "row 1: 3 scores are needed"),
        ({"matrix": [[90, 40, 40]]}, "90 is no share from 0 to 1; divide percentages by 100"),
        ({"matrix": [[0.1] * 3] * 2}, "a row after each of the 3 tasks"),
        ({"tasks": ["a", "a", "b"]}, "different names"),
        ({"test_rows": [10]}, "test_rows must be 3 numbers"),
        ({"methd": "x"}, "unknown key 'methd'; did you mean 'method'?"),
        ({"method": ["x"]}, "method: expected text, found ['x']"),
        ({"paper": 2402.18865}, "paper: expected text, found 2402.18865"),
        ({"cost": {"passes": "x"}}, "cost.passes: expected a number, found 'x'"),
        ({"cost": {"gpu_seconds": "5"}}, "cost.gpu_seconds: expected a number, found '5'"),
        ({"cost": {"secnds": 5}}, "cost: unknown key 'secnds'; did you mean 'seconds'?"),
        ({"cost": {"extra_compute": 5}}, "cost: unknown key 'extra_compute'"),
        ({"cost": {"cpu_seconds": -5}}, "cost: cpu_seconds is -5; it must be 0 or above"),
    ],
)
def test_matrices_that_do_not_fit(tmp_path, change, message):
    (tmp_path / "theirs.json").write_text(json.dumps(MATRIX | change))
    with pytest.raises(DataError) as error:
        read_entries([tmp_path / "theirs.json"])
    assert message in str(error.value) and "theirs.json: run 1" in str(error.value)


def test_what_is_no_run(tmp_path):
    (tmp_path / "x.json").write_text("[3]")
    (tmp_path / "missing.json").write_text(json.dumps({"method": "x", "tasks": ["a"]}))
    (tmp_path / "x.txt").write_text("")
    for name, message in {
        "x.json": "a run is an object", "missing.json": "no 'matrix'", "x.txt": "give a run folder",
        "nothing": "no such", "": "no runs",
    }.items():  # fmt: skip
        with pytest.raises(ForgetlessError, match=message):
            read_entries([tmp_path / "empty" if name == "" and not (tmp_path / "empty").mkdir() else tmp_path / name])


# ------------------------------------------------------------------------------------------- archives


def test_an_archive_draws_the_same(runs, archive, record, tmp_path):
    assert compare([runs]) == record
    again = tmp_path / "again.zip"
    compare([archive], again)
    assert again.read_bytes() == archive.read_bytes()
    text = json.dumps(read_archive(again))
    assert "gold" not in text and '"answer"' not in text


def test_strange_archives_are_refused(tmp_path):
    for name, members in {
        "out": ["../entries.json"],
        "more": ["entries.json", "x"],
        "format": ["entries.json"],
    }.items():
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for member in members:
                archive.writestr(member, '{"format": 99}')
    (tmp_path / "broken.zip").write_bytes(b"PK")
    for name, message in {"out": "not entries.json alone", "more": "not entries.json alone", "format": "format 99",
                          "broken": "no archive that can be read"}.items():  # fmt: skip
        with pytest.raises(RunError, match=message):
            read_entries([tmp_path / f"{name}.zip"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.zip", "format.zip", "more.zip", "out.zip"]
    with pytest.raises(UsageError, match=r"end in \.zip"):
        compare([made_run(tmp_path / "one")], tmp_path / "x.tar")


# ------------------------------------------------------------------------------------------- forms


def test_every_form(record, tmp_path):
    names = write_compare(record, tmp_path)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    text = (tmp_path / "compare.html").read_text()
    page = Page(text)
    self_contained(page, text)
    assert "majority answer" in page.text and "untouched base" in page.text and "How much old data?" in page.text
    for words in ("<script", "None", "nan"):
        assert words not in (tmp_path / "compare.md").read_text()
    assert json.loads((tmp_path / "compare.json").read_text()) == record
    assert "pareto-1.pdf" in names and "replay-1-replay.svg" in names


def test_names_that_are_markup(tmp_path):
    bad = "<script>alert(1)</script>"
    told = MATRIX | {"method": bad, "tasks": [bad, "b_%", "c"], "model": bad, "stream": bad}
    (tmp_path / "bad.json").write_text(json.dumps([told, told | {"method": "other"}]))
    record = compare([tmp_path / "bad.json"])
    write_compare(record, tmp_path / "out")
    for name in ("compare.html", "compare.md", "pareto-1.svg"):
        assert "<script" not in (tmp_path / "out" / name).read_text(), name
    assert r"b\_\%" in compare_latex(record)


def test_csv_has_every_value(record):
    rows = list(csv.DictReader(io.StringIO(compare_csv(record))))
    values = {(row["configuration"], row["seed"]): row["value"] for row in rows
              if row["figure"] == "average_accuracy" and row["order"] == "a > b > c"}  # fmt: skip
    assert len(values) == 10 and float(values["replay [memory=10%]", "0"]) == pytest.approx(0.8)
    assert {row["figure"] for row in rows} >= {"kl", "bwt", "score at the end: a"}


def test_latex(record):
    text = compare_latex(record)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\toprule")
    assert not re.search(r"(?<!\\)[%_#]", text.partition("\n")[2])
    assert latex("a_b & 5 %") == r"a\_b \& 5 \%"


def test_bibtex_knows_every_methods_paper():
    numbers = {method.paper for method in METHODS.values() if method.paper}
    text = bibtex(sorted(numbers))
    assert text.count("@misc{") == len(numbers) == len(set(re.findall(r"@misc\{(.*),", text)))
    assert all(PAPERS[number][0] and PAPERS[number][2] in (y := 2000 + int(number[:2]), y + 1) for number in numbers)
    assert "eprint = {2402.18865}" in text and "Ren, Weijieying" in text
    assert all(PAPERS[number][1] for number in numbers)
    assert bibtex(["1234.56789"]).count("title") == 0
    assert bibtex(["1706.08840, 2310.14152", "2310.14152"]).count("@misc{") == 2, "of a method of two parts"


def test_figures_as_files(record):
    for name, drawing in figures(record["sets"][0], 1):
        text, raw = svg(drawing), pdf(drawing)
        Page(text)
        assert "var(" not in text and "xmlns" in text, name
        assert raw.startswith(b"%PDF-1.4") and raw.endswith(b"%%EOF\n")
        start = int(raw.rsplit(b"startxref\n", 1)[1].split()[0])
        assert raw[start : start + 4] == b"xref"
        for number, line in enumerate(raw[start:].split(b"\n")[3:8], start=1):  # each object where the table says
            assert raw[int(line[:10]) :].startswith(b"%d 0 obj" % number)
        assert pdf(drawing) == raw


def test_command_line(archive, tmp_path, capsys):
    assert main(["compare", str(archive), "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "average accuracy" in said and "compare.html" in said
    for form in ("csv", "json", "latex", "markdown"):
        assert main(["compare", str(archive), f"--{form}"]) == 0
        assert capsys.readouterr().out
    assert main(["compare", str(tmp_path / "none")]) == 1


@pytest.mark.slow
def test_page_in_a_browser(record, tmp_path):
    write_compare(record, tmp_path)
    page = opened_in_browser(tmp_path / "compare.html", tmp_path)
    assert "Learning against forgetting" in page.text


def test_a_run_that_is_given_twice_counts_once(tmp_path):
    made_run(tmp_path / "one")
    compare([tmp_path / "one"], tmp_path / "one.zip")
    assert compare([tmp_path / "one", tmp_path, tmp_path / "one.zip"])["runs"] == 1


def test_the_trials_of_a_sweep_are_no_results(tmp_path):
    for place in ("cells/a", "trials/b"):
        made_run(tmp_path / place)
    (tmp_path / "sweep.json").write_text("{}")
    assert run_folders(tmp_path) == [tmp_path / "cells" / "a"]
