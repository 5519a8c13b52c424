"""Eight methods on AG News -> Amazon -> MNLI -> DBpedia, each at a learning rate chosen on validation rows.

    python benchmarks/four_tasks.py --data CL_Benchmark [--minutes 60] [--methods sequential replay]
    python benchmarks/four_tasks.py --page

The first command makes the next runs until the minutes are over and adds a line a run to docs/results/four-tasks.jsonl.
Given again it goes on, on another machine too; where --work still has an unfinished run, in the middle of it. Several
at once with different --methods share a machine. The second writes their part of docs/results.md.

First every method tries the same learning rates with fewer rows, judged on validation rows; then each learns at its
best rate with every seed (which also draws the training rows), judged on the same test rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader
from pages import DOCS, write_block
from scipy.stats import t

from forgetless.config import LearnConfig
from forgetless.data.streams import load_stream
from forgetless.learning.stream import learn
from forgetless.methods import METHODS

RECORDS, PAGE = DOCS / "results" / "four-tasks.jsonl", DOCS / "results.md"
TASKS = ("TC/agnews", "SC/amazon", "NLI/MNLI", "TC/dbpedia")
EIGHT = ("sequential", "incremental", "per_task", "joint", "replay", "olora", "nlora", "ilora")
RATES, SEEDS = (5e-4, 1e-3, 2e-3), (0, 1, 2)
OPTIONS = {"replay": {"memory": "10%"}, "ilora": {"memory": "10%", "gamma": 0.1}, "nlora": {"lam": 1e-5}}
TRIAL = {"train": 150, "validation": 100, "test": 1}
FINAL = {"train": 400, "validation": 100, "test": 400}
PROTOCOL: dict[str, dict] = {
    "trial": {"cells": "last", "score_on": "validation", "forgetting_prompts": 0},
    "test": {"cells": "ends", "score_on": "test"},
}


def records() -> list[dict]:
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def best_rates(done: list[dict]) -> dict[str, float]:
    """Each method's learning rate with the highest average validation score, once all its trials are there."""
    found = {}
    for method in METHODS:
        trials = [one for one in done if one["stage"] == "trial" and one["method"] == method]
        if len(trials) == len(RATES):
            found[method] = max(trials, key=lambda one: one["average"])["learning_rate"]
    return found


def wanted(done: list[dict], methods: Sequence[str] = EIGHT) -> list[tuple]:
    """The runs that are missing, in the order in which they are made: (stage, method, seed, learning rate)."""
    made = {(one["stage"], one["method"], one["seed"], one["learning_rate"]) for one in done}
    rates = best_rates(done)
    plan = [("trial", method, 0, rate) for rate, method in product(RATES, methods)]
    plan += [("test", method, seed, rates[method]) for seed in SEEDS for method in methods if method in rates]
    return [one for one in plan if one not in made]


def run(data: Path, stage: str, method: str, seed: int, rate: float, folder: Path, base: Path) -> dict:
    """One run's line. `base`: where a run is kept whose scores of the untouched base the next ones take over."""
    rows = TRIAL if stage == "trial" else FINAL
    stream = load_stream(
        [
            {"olora": str(data / task), "limit": rows["train"], "limit_seed": seed, "validation": rows["validation"],
             "test_limit": rows["test"], "scorers": ["options"]}
            for task in TASKS
        ]
    )  # fmt: skip
    config = LearnConfig(
        stream=stream, method=method, method_options=OPTIONS.get(method, {}), seed=seed, learning_rate=rate,
        max_length=256, output_dir=str(folder), **PROTOCOL[stage],
    )  # fmt: skip
    summary = learn(config, base if base.exists() else None)
    if stage == "test" and not base.exists():
        copy = shutil.copytree(folder, folder.with_name(f"{folder.name}-copy"), dirs_exist_ok=True)
        try:
            copy.rename(base)
        except OSError:  # a process beside this one was first
            shutil.rmtree(copy)
    spent = sum(json.loads(file.read_text())["cpu_seconds"] for file in folder.glob("tasks/*/times.json"))
    return {
        "stage": stage, "method": method, "seed": seed, "learning_rate": rate, "options": OPTIONS.get(method, {}),
        "average": statistics.mean(summary["headline"]["matrix"][-1]),
        "tasks": [task["name"] for task in summary["tasks"]], "learned": summary["learned"],
        "majority": [task["majority"] for task in summary["tasks"]],
        "rows": rows, **summary["headline"], "forgotten": summary["forgotten"],
        "metrics": {name: metric["value"] for name, metric in summary["metrics"].items()},
        "trainable": summary["model"]["trainable"], "precision": summary["model"]["precision"],
        "kl": [border.get("kl") for border in summary.get("forgetting", [])],
        "warnings": summary["warnings"], "learning_cpu_minutes": round(spent / 60, 2),
        "threads": torch.get_num_threads(), "versions": summary["versions"],
    }  # fmt: skip


def mean_and_half(values: list[float]) -> tuple[float, float | None]:
    """The mean and half of its 95 % t-interval; None for fewer than three values."""
    if len(values) < 3:
        return statistics.mean(values), None
    return statistics.mean(values), float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def shown(values: list[float]) -> str:
    if not values:
        return "–"
    mean, half = mean_and_half([100 * value for value in values])
    return f"{mean:.1f}" + ("" if half is None else f" ± {half:.1f}")


def nats(values: list[float]) -> str:
    if not values:
        return "–"
    mean, half = mean_and_half(values)
    return f"{mean:.2f}" + ("" if half is None else f" ± {half:.2f}")


def page(done: list[dict]) -> str:
    """Their part of docs/results.md."""
    tests = [one for one in done if one["stage"] == "test"]
    lines = [line for name in METHODS if (line := _line(name, tests))]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("four_tasks.md.jinja").render(
        trial=TRIAL, final=FINAL, rates=RATES, lines=lines, precision=done[0]["precision"], tasks=done[0]["tasks"],
        versions=", ".join(f"{name} {version}" for name, version in done[0]["versions"].items()),
        missing=len(EIGHT) * (len(RATES) + len(SEEDS)) - sum(one["method"] in EIGHT for one in done),
        trials=[(name, _trials(name, done)) for name in METHODS if any(one["method"] == name for one in done)],
        bounds=_bounds(tests[0]) if tests else [],
        warnings=[f"{one['method']}, seed {one['seed']}: {text}" for one in tests for text in one["warnings"]],
    )  # fmt: skip


def _trials(method: str, done: list[dict]) -> list[str]:
    found = {one["learning_rate"]: one["average"] for one in done if (one["stage"], one["method"]) == ("trial", method)}
    best = max(found.values(), default=None)
    text = {rate: f"**{100 * value:.1f}**" if value == best else f"{100 * value:.1f}" for rate, value in found.items()}
    return [text.get(rate, "–") for rate in RATES]


def _bounds(test: dict) -> list[dict]:
    told = {"base, untouched": test["base"], "majority answer": [one["share"] for one in test["majority"]]}
    return [
        {"scores": [name, "", *(f"{100 * value:.1f}" for value in [*values, statistics.mean(values)]), "", "", ""]}
        for name, values in told.items()
    ]


def _line(name: str, tests: list[dict]) -> dict | None:
    """A method's scores and costs over its seeds."""
    mine, kind = [one for one in tests if one["method"] == name], METHODS[name]
    plain = {one["seed"]: one for one in tests if one["method"] == "sequential"}
    pairs = [(one, plain[one["seed"]]) for one in mine if one["seed"] in plain]
    if not mine:
        return None
    ends = [one["matrix"][-1] for one in mine]
    changes = [one["metrics"]["bwt"] for one in mine if one["metrics"].get("bwt") is not None]
    moved = [one["kl"][-1] for one in mine if one["kl"] and one["kl"][-1] is not None]
    gains = [one["average"] - other["average"] for one, other in pairs]
    times = [one["learning_cpu_minutes"] / other["learning_cpu_minutes"] for one, other in pairs]
    label = f"{name} (bound)" if kind.bound else name
    return {
        "scores": [label, len(mine), *(shown(list(column)) for column in zip(*ends, strict=True)),
                   shown([one["average"] for one in mine]), shown(changes), shown(gains), nats(moved)],
        "costs": [label, "yes" if kind.old_rows else "no", "yes" if kind.task_id else "no", kind.extra_memory,
                  kind.extra_compute.replace("|", "\\|"), f"{statistics.median(times):.2f}" if times else "–",
                  "yes" if kind.stock_peft else "no"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the benchmark's folder, which holds TC, SC and NLI")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=EIGHT, help="only these (default: eight)")
    parser.add_argument("--work", type=Path, default=Path("runs/four-tasks"), help="for unfinished runs (%(default)s)")
    parser.add_argument("--page", action="store_true", help="write it into docs/results.md")
    told = parser.parse_args()
    if told.page:
        write_block(PAGE, "four-tasks", page(records()))
        print(PAGE)
        return
    if not told.data or not (told.data / TASKS[0] / "train.json").exists():
        sys.exit(f"--data {told.data}: holds no {TASKS[0]}/train.json; give the benchmark's CL_Benchmark folder")
    RECORDS.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    while (left := wanted(records(), told.methods)) and (time.monotonic() - began) / 60 < told.minutes:
        print(f"{len(left)} or more runs to make; now {left[0]}", flush=True)
        folder = told.work / "-".join(map(str, left[0]))
        record = run(told.data, *left[0], folder, told.work / "base")
        with RECORDS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
