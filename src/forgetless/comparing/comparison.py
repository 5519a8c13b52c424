"""Runs next to one another: what is equal is grouped, what varies gives intervals, and pairs give tests.

set             runs that may be compared: the same base, tasks, test rows and measures
configuration   runs of a set in which nothing differs that decides a run but seed and order of tasks; an option that a
                sweep chose counts by what it was chosen among, so that a method stays one however the choice fell
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from forgetless.comparing.clusters import Levels, Mean, mean_over, sampled
from forgetless.comparing.entries import COSTS, read_entries, write_archive
from forgetless.errors import UsageError
from forgetless.report.compare_words import MEETINGS, SHARES
from forgetless.score.intervals import band, holm, paired_change

FORMAT = 2
CONFIDENCE = 0.95
HIGHER = ("average_accuracy", "learning_accuracy", "bwt", "fwt")  # is better; of the others lower is
FIGURES = (*HIGHER, "forgetting", "kl")
TESTED = ("average_accuracy", "bwt")
ANY, SHARE, NOT_BELOW_0 = (-math.inf, math.inf), (0.0, 1.0), (0.0, math.inf)  # where a figure lies


def compare(
    paths: Iterable[str | Path], archive: Path | None = None, *, rank_ours: bool = False, overlap: bool = False
) -> dict:
    """The record of a comparison; `archive` also writes its entries, without weights and row texts.

    Methods of this project are in no ranking unless `rank_ours`. `overlap`: also how far the updates of a run's tasks
    lie over one another, from its adapters.
    """
    entries = read_entries(paths, overlap=overlap)
    if archive is not None:
        if archive.suffix != ".zip":
            raise UsageError(f"--archive {archive}: the name must end in .zip")
        write_archive(entries, archive)
    finished = [entry for entry in entries if entry["status"] == "complete" and entry["matrix"]]
    unfinished = [_left_out(entry) for entry in entries if entry not in finished]
    if not finished:
        raise UsageError(f"no finished run to compare; not finished: {', '.join(unfinished)}")
    sets = [_compared(members, rank_ours) for members in _sets(finished)]
    _adjust([one for told in sets for one in told["tests"]])
    return {"format": FORMAT, "runs": len(finished), "unfinished": unfinished, "sets": sets}


def _left_out(entry: dict) -> str:
    """`replay-1`; of a cell of a sweep with its state."""
    return entry["name"] + (f" ({entry['status']})" if entry["source"] == "sweep" else "")


# ------------------------------------------------------------------------------------------- what is equal


def _sets(entries: list[dict]) -> list[list[dict]]:
    """Runs judged on the same rows from the same base; imported matrices join the first set with their tasks."""
    found: dict[str, list[dict]] = defaultdict(list)
    for entry in (one for one in entries if one["source"] == "run"):
        rows = sorted((task["name"], task["headline"], entry["test_rows"].get(task["name"])) for task in entry["tasks"])
        found[json.dumps([entry["base"], entry["score_on"], rows])].append(entry)
    for entry in (one for one in entries if one["source"] == "imported"):
        key = next((key for key, members in found.items() if _names(members[0]) == _names(entry)), None)
        found[key or json.dumps(sorted(_names(entry)))].append(entry)
    return list(found.values())


def _names(entry: dict) -> set[str]:
    return {task["name"] for task in entry["tasks"]}


def order_of(entry: dict) -> tuple[str, ...]:
    return tuple(task["name"] for task in entry["tasks"])


def _configurations(members: list[dict]) -> list[list[dict]]:
    found: dict[str, list[dict]] = defaultdict(list)
    for entry in members:
        key = [entry["source"], entry["method"]["name"], _decided(entry)]
        found[json.dumps(key, sort_keys=True)].append(entry)
    return list(found.values())


def _decided(entry: dict) -> dict:
    """What decides a run beside method, seed and order; of what was chosen, among what."""
    told = {"precision": entry["precision"], **entry["settings"], **entry["method"]["options"]}
    return told | {name: _choice(one) for name, one in entry["chosen"].items()}


def _choice(one: dict) -> str:
    """`chosen among 0.001, 0.002 by trials on 1 task`."""
    among, seen = ", ".join(map(str, one["among"])), one["tasks_seen"]
    return f"chosen among {among} by trials on {seen} task{'s' * (seen > 1)}"


def _labels(configurations: list[list[dict]]) -> list[str]:
    """The method's name, what was chosen, and of the rest what tells two configurations apart."""
    told = [_decided(runs[0]) for runs in configurations]
    names = [runs[0]["method"]["name"] for runs in configurations]
    labels = []
    for i, (mine, name) in enumerate(zip(told, names, strict=True)):
        same = [other for j, other in enumerate(told) if names[j] == name and j != i]
        chosen = configurations[i][0]["chosen"]
        differ = [key for key in mine if any(other.get(key) != mine[key] for other in same)]
        parts = [f"{key} {mine[key]}" if key in differ else f"{key} chosen" for key in chosen]
        said = ", ".join([*parts, *(f"{key}={mine[key]}" for key in differ if key not in chosen)])
        imported = " (imported)" if configurations[i][0]["source"] == "imported" else ""
        labels.append(name + (f" [{said}]" if said else "") + imported)
    return labels


# ------------------------------------------------------------------------------------------- one set


def _compared(members: list[dict], rank_ours: bool) -> dict:
    configurations = _configurations(members)
    labels, first = _labels(configurations), next((m for m in members if m["source"] == "run"), members[0])
    tasks = list(order_of(first))
    told = [_configuration(runs, label, tasks) for runs, label in zip(configurations, labels, strict=True)]
    for relative, amount in (("relative_tokens", "tokens"), ("relative_compute", "passes")):
        _relative(told, relative, amount)
    for one in told:
        one["ranked"] = not one["bound"] and (rank_ours or not one["ours"])
    _mark_front(told)
    return {
        "tasks": [
            {key: task[key] for key in ("name", "test", "majority")} | {"untouched": untouched}
            for task, untouched in zip(first["tasks"], first["untouched"], strict=True)
        ],
        "model": first["model"],
        "base": first["base"],
        "score_on": first["score_on"],
        "texts": list(dict.fromkeys(run["text"] for run in members if run["text"])),
        "streams": list(dict.fromkeys(one["stream"] for one in members)),
        "configurations": told,
        "lacking": _lacking(configurations, labels),
        "tests": _tests(configurations, labels),
        "replay": _replay_curves(configurations, labels, tasks),
    }


def _configuration(runs: list[dict], label: str, tasks: list[str]) -> dict:
    first = runs[0]
    orders = list(dict.fromkeys(map(order_of, runs)))
    figures: dict[str, dict] = {}
    for key in FIGURES:
        values = [run["kl"] if key == "kl" else run["metrics"][key] for run in runs]
        figures[key] = spread(values, runs, SHARE if key in SHARES else ANY)
    if any(run.get("overlap") for run in runs):
        for key in MEETINGS:
            values = [(run.get("overlap") or {}).get(key) for run in runs]
            figures[key] = spread(values, runs, SHARE if key == "collision_rate" else NOT_BELOW_0)
    texts = list(dict.fromkeys(run["text"] for run in runs if run["text"]))
    if len(texts) > 1:  # nats on one text and on another are two figures
        figures["kl"] |= {"mean": None, "low": None, "high": None}
    if len(runs) == 1 and figures["average_accuracy"]["mean"] is not None:
        figures["average_accuracy"] |= _over_rows(first)
    scores = [dict(zip(order_of(run), run["matrix"][-1], strict=True)) for run in runs]
    by_task = [spread([one[name] for one in scores], runs, SHARE) for name in tasks]
    if len(runs) == 1:
        ranges = dict(zip(order_of(first), first["intervals"], strict=True))
        for name, one in zip(tasks, by_task, strict=True):
            one |= dict(zip(("low", "high"), ranges[name], strict=True)) if ranges.get(name) else {}
    return {
        "label": label,
        "method": first["method"],
        "source": first["source"],
        "settings": first["settings"],
        "bound": first["method"]["bound"],
        "ours": first["method"]["ours"],
        "chosen": {
            name: {"among": one["among"], "tasks_seen": one["tasks_seen"]}
            | {"values": [run["chosen"][name]["value"] for run in runs]}
            for name, one in first["chosen"].items()
        },
        "texts": texts,
        "runs": [{"name": run["name"], "seed": run["seed"], "order": orders.index(order_of(run))} for run in runs],
        "orders": [list(order) for order in orders],
        "varies": varies(runs),
        "over": over(runs),
        "figures": figures,
        "tasks": by_task,
        "by_order": _by_order(runs, orders),
        "cost": first["cost"] | {key: _mean([run["cost"][key] for run in runs]) for key in COSTS},
    }


def varies(runs: list[dict]) -> str:
    """What differs between runs of a configuration."""
    if len(runs) == 1:
        return "rows"
    told = [name for name, found in levels(runs).items() if len(set(found)) > 1]
    return " and ".join(told) or "repeats of one seed and order"


def over(runs: list[dict]) -> str:
    """Over what the intervals of a configuration are; empty where too little varies for any."""
    return "rows" if len(runs) == 1 else " and ".join(sampled(levels(runs)))


def levels(runs: list[dict]) -> Levels:
    """The seed and the order of each run. A matrix of other code without a seed is taken to have one of its own."""
    seeds = [json.dumps(["untold", i] if run["seed"] is None else run["seed"]) for i, run in enumerate(runs)]
    return {"seeds": seeds, "orders": [order_of(run) for run in runs]}


def spread(values: list[float | None], runs: list[dict], within: tuple[float, float] = ANY) -> dict:
    """Mean over runs, and its interval (`clusters`); none where a value is missing. `within`: where values can lie."""
    told: dict = {"values": values, "mean": _mean(values), "low": None, "high": None}
    ends = found.interval(CONFIDENCE) if (found := _over_levels(values, runs)) else None
    if ends:
        told["low"], told["high"] = (min(max(end, within[0]), within[1]) for end in ends)
    return told


def _over_levels(values: list[float | None], runs: list[dict]) -> Mean | None:
    known = [value for value in values if value is not None]
    return mean_over(known, levels(runs)) if len(known) == len(values) else None


def _mean(values: list) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _over_rows(run: dict) -> dict:
    """Bounds of one run's average accuracy, over its test rows."""
    if set(run["rows"]) != _names(run):
        return {}
    rows = [np.array(one["scores"])[:, None] for one in run["rows"].values()]
    found = band([(scores, np.ones(len(scores))) for scores in rows], CONFIDENCE, added=(0.0, 1.0))
    if np.isnan(found.low).any():
        return {}
    return {"low": float(found.low[0]), "high": float(found.high[0])}


def _by_order(runs: list[dict], orders: list[tuple[str, ...]]) -> list[dict]:
    """Average accuracy in each order, over its seeds; nothing for one order."""
    if len(orders) < 2:
        return []
    return [
        {"order": list(order), "average_accuracy": _mean([run["metrics"]["average_accuracy"] for run in mine]),
         "runs": len(mine)}
        for order in orders for mine in [[run for run in runs if order_of(run) == order]]
    ]  # fmt: skip


def _relative(configurations: list[dict], relative: str, amount: str) -> None:
    """An amount against the naive sequence's, or where there is none against the least."""
    known = [one for one in configurations if one["cost"][amount]]
    naive = [one for one in known if one["method"]["name"] == "sequential"]
    unit = min((one["cost"][amount] for one in naive or known), default=None)
    for one in configurations:
        one["cost"][relative] = one["cost"][amount] / unit if unit and one["cost"][amount] else None


def _lacking(configurations: list[list[dict]], labels: list[str]) -> list[dict]:
    """The seeds in orders that a configuration has no run of and others have: their means are over other runs."""
    own = {label: dict.fromkeys((run["seed"], order_of(run)) for run in runs)
           for label, runs in zip(labels, configurations, strict=True) if runs[0]["source"] == "run"}  # fmt: skip
    every = dict.fromkeys(point for points in own.values() for point in points)
    return [
        {"label": label, "runs": [{"seed": seed, "order": list(order)} for seed, order in every if (seed, order) not in
                                  points]}
        for label, points in own.items() if len(points) < len(every)
    ]  # fmt: skip


def _mark_front(configurations: list[dict]) -> None:
    """Which means no other beats in both learning accuracy and backward transfer, of those that are ranked."""
    places = [
        (one, one["figures"]["learning_accuracy"]["mean"], one["figures"]["bwt"]["mean"]) for one in configurations
    ]
    ranked = [place for place in places if place[0]["ranked"] and None not in place[1:]]
    for one, *_ in places:
        one["front"] = False
    for one, learning, kept in ranked:
        beaten = any(a >= learning and b >= kept and (a, b) != (learning, kept) for _, a, b in ranked)
        one["front"] = not beaten


# ------------------------------------------------------------------------------------------- tests


def _tests(configurations: list[list[dict]], labels: list[str]) -> list[dict]:
    """Every two configurations, over pairs of runs with the same seed and order; a single pair over its test rows."""
    ours = [
        (runs, label)
        for runs, label in zip(configurations, labels, strict=True)
        if runs[0]["source"] == "run" and not runs[0]["method"]["bound"]
    ]
    found = []
    for (before, one), (after, other) in itertools.combinations(ours, 2):
        pairs = _pairs(before, after)
        told = _on_rows(*pairs[0]) if len(pairs) == 1 else _over_runs(pairs)
        found += [{"before": one, "after": other, **test, "p_holm": None, "shown": False} for test in told]
    return found


def _pairs(before: list[dict], after: list[dict]) -> list[tuple[dict, dict]]:
    others = {(json.dumps(run["seed"]), order_of(run)): run for run in after}
    keys = [(json.dumps(run["seed"]), order_of(run)) for run in before]
    return [(run, others[key]) for run, key in zip(before, keys, strict=True) if key in others]


def _over_runs(pairs: list[tuple[dict, dict]]) -> list[dict]:
    """Paired t test of the mean difference, after minus before; pairs of a seed or an order err together.

    Where they vary over too few levels the differences stand there, and p is None. What tasks have in common is
    compared by its logarithm: differences are of ratios.
    """
    found, runs = [], [before for before, _ in pairs]
    for key in (*TESTED, *MEETINGS):
        values = [(_tested(a, key), _tested(b, key)) for a, b in pairs]
        differences: list[float | None] = [b - a for a, b in values if a is not None and b is not None]
        if not pairs or len(differences) < len(pairs):
            continue
        told, sample = spread(differences, runs), _over_levels(differences, runs)
        found.append({"of": key, "over": over(runs), "n": len(pairs), "values": differences, "change": told["mean"],
                      "low": told["low"], "high": told["high"], "p": sample.p() if sample else None})  # fmt: skip
    return found


def _tested(run: dict, key: str) -> float | None:
    """A metric, or the logarithm of how far tasks' updates lie over one another; None for what was not measured."""
    if key not in MEETINGS:
        return run["metrics"][key]
    value = (run.get("overlap") or {}).get(key)
    return math.log(value) if value else None


def _on_rows(before: dict, after: dict) -> list[dict]:
    """The same test rows of each task at the end of two runs; rows are joined by their keys."""
    found = []
    for name, one in before["rows"].items():
        if name not in after["rows"]:
            continue
        other = dict(zip(after["rows"][name]["keys"], after["rows"][name]["scores"], strict=True))
        pairs = [(score, other[key]) for key, score in zip(one["keys"], one["scores"], strict=True) if key in other]
        if pairs:
            change = paired_change([old for old, _ in pairs], [new for _, new in pairs])
            found.append({"of": name, "over": "rows", "n": change.n, "values": [change.change],
                          "change": change.change, "low": change.low, "high": change.high,
                          "p": change.p})  # fmt: skip
    return found


def _adjust(tests: list[dict]) -> None:
    """Holm over all tests of the comparison; a claim needs the adjusted p below .05, and what has no p is no claim."""
    known = [test for test in tests if test["p"] is not None]
    for test, p in zip(known, holm([test["p"] for test in known]), strict=True):
        test["p_holm"], test["shown"] = p, p < 1 - CONFIDENCE


# ------------------------------------------------------------------------------------------- how much old data?


def _replay_curves(configurations: list[list[dict]], labels: list[str], tasks: list[str]) -> list[dict]:
    """Scores at the end against the share of old rows that is kept, where runs differ in nothing else."""
    families: dict[str, list[tuple[float, list[dict]]]] = defaultdict(list)
    for runs in configurations:
        share = kept_share(runs[0])
        if share is not None:
            rest = {key: value for key, value in _decided(runs[0]).items() if key != "memory"}
            families[json.dumps([runs[0]["method"]["name"], rest], sort_keys=True)].append((share, runs))
    found = []
    for key, members in families.items():
        name, decided = json.loads(key)
        own = members[0][1][0]["method"]["options"]
        plain = {key: value for key, value in decided.items() if key not in own}
        naive = [
            (0.0, runs)
            for runs in configurations
            if runs[0]["method"]["name"] == "sequential" and _same(_decided(runs[0]), plain)
        ]
        if len({share for share, _ in members}) >= 2:
            ordered = sorted(naive + members, key=lambda one: one[0])
            floors = {key: _floor(ordered[0][1], key) for key in ("majority", "untouched")}
            found.append({"method": name, "points": [_replayed(*one) for one in ordered], **floors})
    return found


def _same(settings: dict, others: dict) -> bool:
    return json.dumps(settings, sort_keys=True) == json.dumps(others, sort_keys=True)


def kept_share(run: dict) -> float | None:
    """The share of each earlier task that a run keeps; None where it is no share, or was chosen run by run."""
    memory = None if "memory" in run["chosen"] else run["method"]["options"].get("memory")
    return float(memory.rstrip("% ")) / 100 if isinstance(memory, str) and memory.strip().endswith("%") else None


def _floor(runs: list[dict], key: str) -> dict[str, float | None]:
    """What the majority answer or the untouched base scores on the old tasks and on the newest one of the runs."""
    rows = [run["untouched"] if key == "untouched" else [task[key] for task in run["tasks"]] for run in runs]
    return {"old": _mean([_mean(row[:-1]) for row in rows]), "new": _mean([row[-1] for row in rows])}


def _replayed(share: float, runs: list[dict]) -> dict:
    old: Callable[[dict], float | None] = lambda run: _mean(run["matrix"][-1][:-1])  # noqa: E731
    return {
        "share": share,
        "old": spread([old(run) for run in runs], runs, SHARE),
        "new": spread([run["matrix"][-1][-1] for run in runs], runs, SHARE),
        "rows_kept": _mean([run["cost"]["rows_kept"] for run in runs]),
    }
