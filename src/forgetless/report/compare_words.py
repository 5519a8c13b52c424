"""What a comparison says, in sentences and tables, for every form of it."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

from forgetless.report.audit import Table
from forgetless.report.contents import mean
from forgetless.report.words import clean, figure, number, p_value, percent, points, signed

NAMES = {
    "average_accuracy": "average accuracy",
    "learning_accuracy": "score when just learnt",
    "bwt": "backward transfer",
    "forgetting": "forgetting",
    "fwt": "forward transfer",
    "kl": "KL from the base",
}
SHARES = ("average_accuracy", "learning_accuracy")  # of which a model without learning has one too
MEETINGS = {"collision_rate": "collision rate", "overlap": "overlap"}  # of tasks' updates; compared as ratios
DIFFERENCES = ("bwt", "forgetting", "fwt")  # in points
FLOORS = (("majority answer", "majority"), ("untouched base", "untouched"))
MOST = 3  # runs that a sentence names
CAUTIONS = (
    "An interval over seeds or orders says how runs differ, not how test rows do; one over rows says the reverse.",
    "Fewer than three seeds and orders give values and no interval; a claim needs p < 0.05 after Holm's correction "
    "over all tests.",
)


def sentences(told: dict, record: dict) -> list[str]:
    """What stands out in a set, and what was left out."""
    names = ", ".join(clean(one["name"]) for one in told["tasks"])
    many = sum(len(one["runs"]) for one in told["configurations"])
    lines = [f"{many} runs of {len(told['configurations'])} configurations on {names}, from {clean(told['model'])}."]
    shown = [one for one in told["tests"] if one["shown"]]
    lines += [claim(one) for one in shown]
    if told["tests"] and not shown:
        lines.append("No difference between methods is shown by these runs.")
    if not told["tests"]:
        lines.append("No two methods have runs with the same seed and order of tasks, so none were tested.")
    lines += [lack(one) for one in told["lacking"]]
    front = [clean(one["label"]) for one in told["configurations"] if one["front"]]
    if front:
        lines.append(f"By their means no other both learns more and keeps more than: {', '.join(front)}.")
    if any(one["chosen"] for one in told["configurations"]):
        lines.append("A value that is said to be chosen was chosen on validation rows, for each order by itself.")
    if any(
        one["tasks_seen"] >= len(told["tasks"]) > 1 for run in told["configurations"] for one in run["chosen"].values()
    ):
        lines.append("Some values were chosen WITH SIGHT OF ALL TASKS, which one who learns task by task cannot have.")
    if len(told["texts"]) > 1:
        lines.append(
            "KL from the base was measured on different texts, whose beginnings of a hash stand beside it: it is "
            "comparable on one text only, and where runs of one method have several it is left out."
        )
    if len(record["sets"]) > 1:
        lines.append("Other runs have other tasks, test rows or bases: they are in tables of their own.")
    if record["unfinished"]:
        missing = ", ".join(map(clean, record["unfinished"]))
        lines.append(f"Not finished, and left out: {missing}. The errors of a sweep's runs stand in its sweep.md.")
    return lines


def claim(test: dict) -> str:
    """A difference that is shown, in words."""
    what = (NAMES | MEETINGS).get(test["of"], f"score on {clean(test['of'])}")
    better = "higher" if test["change"] > 0 else "lower"
    much = _times_as(abs(test["change"]), " times") if test["of"] in MEETINGS else points(test["change"])
    over = f"{test['n']} rows of one run each, of which alone this is shown" if test["over"] == "rows" else (
        f"{test['n']} pairs of runs")  # fmt: skip
    return (
        f"{clean(test['after'])} has {much} {better} {what} than {clean(test['before'])} "
        f"(over {over}; p {p_value(test['p_holm'])})."
    )


def lack(one: dict) -> str:
    """Whose mean is over other runs than the others', and which it has not."""
    said = [f"seed {run['seed']} in {' > '.join(map(clean, run['order']))}" for run in one["runs"][:MOST]]
    more = f" and {len(one['runs']) - MOST} more" if len(one["runs"]) > MOST else ""
    return (
        f"{clean(one['label'])} has no run of {'; '.join(said)}{more}, as others have: its means are over other runs."
    )


def tables(told: dict) -> list[Table]:
    """Figures, scores of tasks, overlap, differences, orders, replay, cost."""
    found = [
        _figures(told),
        _tasks(told),
        _meetings(told),
        _tests(told),
        _orders(told),
        _chosen(told),
        *_replay(told),
        _cost(told),
    ]
    return [table for table in found if table.rows]


def value_of(key: str, value: float | None) -> str:
    """A figure as people say it, short."""
    if value is None:
        return "–"
    if key == "kl":
        return f"{value:.4f}"
    if key in MEETINGS:
        return f"{100 * value if key == 'collision_rate' else value:.3g}"
    return signed(100 * value) if key in DIFFERENCES else number(100 * value)


def with_interval(key: str, one: dict) -> str:
    """`80 (75 to 84)`; a value alone where there is no interval."""
    told = value_of(key, one["mean"])
    if one["low"] is None:
        return told
    return f"{told} ({value_of(key, one['low'])} to {value_of(key, one['high'])})"


def _figures(told: dict) -> Table:
    rows = [
        [marked(one), _runs(one), one["over"] or "–", *(with_interval(key, one["figures"][key]) for key in NAMES)]
        for one in ranked(told)
    ]
    if len(told["texts"]) > 1:
        for row, one in zip(rows, ranked(told), strict=True):
            row[-1] += f" [{', '.join(text[:6] for text in one['texts'])}]" if one["texts"] else ""
    floors = [
        [name, "–", "–", *(score if key in SHARES else "–" for key in NAMES)] for name, score in _floors(told).items()
    ]
    rows = floors + rows
    head = ["method", "runs", "interval over", *NAMES.values()]
    return Table("Figures, % and points; KL in nats per token", head, rows, (CAUTIONS[1],))


def _floors(told: dict) -> dict[str, str]:
    """What a model without learning reaches on average over the tasks, when they are learnt as at the end."""
    return {name: value_of("score", mean([task[key] for task in told["tasks"]])) for name, key in FLOORS}


def _runs(one: dict) -> str:
    """`6 (3 seeds, 2 orders)`."""
    seeds = {str(run["seed"]) for run in one["runs"]}
    told = [f"{many} {name}" for many, name in ((len(seeds), "seeds"), (len(one["orders"]), "orders")) if many > 1]
    return f"{len(one['runs'])} ({', '.join(told)})" if len(told) > 1 else str(len(one["runs"]))


def ranked(told: dict) -> list[dict]:
    """By average accuracy; after them what is in no ranking, bounds last."""

    def place(one: dict) -> tuple:
        mean = one["figures"]["average_accuracy"]["mean"]
        return one["bound"], not one["ranked"], -1.0 if mean is None else -mean

    return sorted(told["configurations"], key=place)


def marked(one: dict) -> str:
    """`joint (bound)`, `keep (ours)`."""
    return clean(one["label"]) + (" (bound)" if one["bound"] else " (ours)" if one["ours"] else "")


def _tasks(told: dict) -> Table:
    """Scores at the end, under what a model without learning reaches."""
    rows = [[name, *(value_of("score", task[key]) for task in told["tasks"])] for name, key in FLOORS]
    rows += [[marked(one), *(with_interval("score", task) for task in one["tasks"])] for one in ranked(told)]
    return Table("Scores at the end, %", ["", *(clean(task["name"]) for task in told["tasks"])], rows)


def _meetings(told: dict) -> Table:
    """How far the updates of tasks lie over one another, and how many times as far as in the method with the least."""
    known = [one for one in ranked(told) if MEETINGS.keys() <= one["figures"].keys()]
    rows = [[marked(one), _runs(one), "–" if one["over"] in ("", "rows") else one["over"]] for one in known]
    for key in MEETINGS:
        means = [one["figures"][key]["mean"] for one in known]
        least = min(filter(None, means), default=None)
        for row, one, value in zip(rows, known, means, strict=True):
            row += [with_interval(key, one["figures"][key]), _times(value / least if value and least else None)]
    head = ["method", "runs", "interval over", "collision rate, %", "× least", "overlap", "× least"]
    note = (
        "Of what each task added to the weights. Collision rate: entries that two tasks both change by more than the "
        "root mean square of their layer, mean over pairs of tasks. Overlap: the squared Frobenius norm of two "
        "updates' product on the output side, summed over pairs."
    )
    return Table("Tasks' updates on one another", head, rows, (note,))


def _tests(told: dict) -> Table:
    rows = [
        [
            f"{clean(one['after'])} – {clean(one['before'])}",
            (NAMES | MEETINGS).get(one["of"], clean(one["of"])),
            _tested_over(one),
            _change(one),
            *(["–", "–", "too few for a claim"] if one["p"] is None else
              [p_value(one["p"]), p_value(one["p_holm"]), "shown" if one["shown"] else "not shown"]),
        ]
        for one in told["tests"]
    ]  # fmt: skip
    unit = "points, or times" if any(one["of"] in MEETINGS for one in told["tests"]) else "points"
    head = ["difference", "of", "over", unit, "p", "p (Holm)", ""]
    note = (
        "Pairs: paired t test. Rows right or wrong: exact McNemar test and Tango's interval; others: paired bootstrap."
    )
    return Table("Differences on the same seeds, orders and rows", head, rows, (note,))


def _change(test: dict) -> str:
    """`+5 (+2 to +8)` points, `0.02× (0.01× to 0.03×)` of a ratio; each pair's where there is no claim."""
    say = _times_as if test["of"] in MEETINGS else partial(value_of, "bwt")
    if test["p"] is None:
        return ", ".join(map(say, test["values"]))
    return say(test["change"]) + (f" ({say(test['low'])} to {say(test['high'])})" if test["low"] is not None else "")


def _times_as(log: float, unit: str = "×") -> str:
    """`58.1×`, of a ratio's logarithm."""
    return f"{math.exp(log):.3g}{unit}"


def _tested_over(test: dict) -> str:
    """`6 pairs (seeds)`, `2 pairs`, `100 rows of one run each`."""
    if test["over"] == "rows":
        return f"{test['n']} rows of one run each"
    return f"{test['n']} pairs" + (f" ({test['over']})" if test["over"] else "")


def _orders(told: dict) -> Table:
    rows = []
    for one in told["configurations"]:
        known = [each["average_accuracy"] for each in one["by_order"] if each["average_accuracy"] is not None]
        if len(known) > 1:
            rows.append([marked(one), str(len(known)), value_of("score", min(known)), value_of("score", max(known)),
                         number(100 * (max(known) - min(known)))])  # fmt: skip
    if rows:
        rows = [*([name, "–", score, score, "–"] for name, score in _floors(told).items()), *rows]
    head = ["method", "orders", "worst", "best", "range, points"]
    return Table("Order of tasks: average accuracy, each order the mean of its runs", head, rows)


def _chosen(told: dict) -> Table:
    rows = [
        [marked(one), clean(name), ", ".join(map(clean, map(str, choice["among"]))),
         f"{choice['tasks_seen']} of {len(told['tasks'])}", _counted(choice["values"])]
        for one in ranked(told) for name, choice in one["chosen"].items()
    ]  # fmt: skip
    return Table(
        "Chosen on validation rows", ["method", "option", "among", "tasks that trials saw", "chosen (runs)"], rows
    )


def _counted(values: list) -> str:
    """`0.001 (4), 0.002 (2)`, the commonest first."""
    return ", ".join(f"{clean(value)} ({many})" for value, many in Counter(map(str, values)).most_common())


def _replay(told: dict) -> list[Table]:
    return [
        Table(
            f"How much old data? {clean(curve['method'])}: scores at the end, %",
            ["kept of each task", "rows kept", "runs", "old tasks", "newest task"],
            [
                *(
                    [name, "–", "–", value_of("score", curve[key]["old"]), value_of("score", curve[key]["new"])]
                    for name, key in FLOORS
                ),
                *map(_replayed, curve["points"]),
            ],
        )
        for curve in told["replay"]
    ]  # fmt: skip


def _replayed(one: dict) -> list[str]:
    rows = "–" if one["rows_kept"] is None else figure(one["rows_kept"])
    scores = (with_interval("score", one[key]) for key in ("old", "new"))
    return [percent(one["share"]), rows, str(len(one["old"]["values"])), *scores]


def _cost(told: dict) -> Table:
    rows = []
    for one in told["configurations"]:
        cost = one["cost"]
        rows.append([
            marked(one), _amount(cost["rows_kept"]), _yes(cost["task_id"]), _yes(cost["label_set"]),
            _amount(cost["trained"]), _amount(cost["deployed"]), _seconds(cost["seconds"]),
            _seconds(cost["cpu_seconds"]), _seconds(cost["gpu_seconds"]), _bytes(cost["memory"]),
            _times(cost["relative_tokens"]), _times(cost["relative_compute"]), clean(cost["extra_compute"]),
            _yes(cost["stock_peft"]),
        ])  # fmt: skip
    head = ["method", "rows kept", "task id at test", "label set at test", "trained", "deployed",
            "time", "CPU time", "GPU time", "peak memory", "tokens, relative", "passes, relative", "extra compute",
            "stock PEFT"]  # fmt: skip
    notes = (
        "Trained at a time and deployed: numbers in adapters. Time, processor time, time that a GPU was held, and the "
        "process's peak of memory are of learning, without scoring.",
        "Tokens: of the rows of all steps. Passes: tokens that went forward through the model + those that came back, "
        "as counted while learning, with a method's extra passes; its products beside the model's are not in them. "
        "Both are relative to the naive sequence (or the least). – : not recorded.",
    )
    return Table("What it takes", head, rows, notes)


def _amount(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _yes(value: bool | None) -> str:
    return "–" if value is None else "yes" if value else "no"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{number(value)} s" if value < 120 else f"{number(value / 60)} min"


def _bytes(value: float | None) -> str:
    return "–" if value is None else f"{number(value / 2**30, 2)} GiB"
