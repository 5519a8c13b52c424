"""Blending between two real models against the best fixed point, from measured rows.

    forgetless interpolate BEFORE AFTER --tasks tasks.yaml --new boolq --output_dir OUT
    python benchmarks/blend_real.py OUT --max-lost sst2=10pp bbc=10pp [--repeats 500]

The first command scores every row at every point of the straight path. In each repeat a half of each task's rows, drawn
at random, chooses a point and the other half judges it:

    blend          the point that `forgetless blend` takes, at 95 %
    by the means   the best of the points whose measured losses are within the budgets
    hindsight      the best of the points that are within the budgets on all rows: nobody knows it beforehand
    0.5, 1         that fixed point, always

`over`: share of repeats in which the point is over a budget on all rows. `old` and `new`: mean change of the score
against the model before, on the judging rows, over the tasks with a budget and over the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from forgetless.auditing.budgets import MAX_LOST, Budget, flag_budgets
from forgetless.auditing.measures import Scores
from forgetless.errors import UsageError
from forgetless.geometry.promise import certified, chosen, is_shown

LEVEL = 0.05
Rows = Mapping[str, np.ndarray]  # task -> the score of each row at each point, (1 + points, rows); the first is before


def read(folder: Path) -> tuple[list[float], Rows]:
    """The path's α and every row's score, from what `forgetless interpolate` wrote."""
    points = json.loads((folder / "points.json").read_text())["line-product"]
    scores = {name: np.array([point["tasks"][name]["scores"] for point in points]) for name in points[0]["tasks"]}
    return [point["weights"]["b"] for point in points[1:]], scores


def loss(budget: Budget, rows: Rows) -> np.ndarray:
    """What the budget bounds, at each point after the first."""
    change = rows[budget.name][0] - rows[budget.name][1:]
    return (change > 0).mean(1) if budget.option == MAX_LOST else change.mean(1)


def within(budgets: Sequence[Budget], rows: Rows) -> np.ndarray:
    return np.all([loss(budget, rows) <= budget.limit for budget in budgets], axis=0)


def shown(budgets: Sequence[Budget], rows: Rows, point: int) -> bool:
    """Whether these rows certify every budget at the point, as `blend` tests them."""
    tested = ((budget, rows[budget.name]) for budget in budgets)
    return all(is_shown(Scores(one.name, tuple(all_[0]), tuple(all_[point])), one, LEVEL) for one, all_ in tested)


def choices(alphas: list[float], budgets: Sequence[Budget], new: list[str], rows: Rows, every: Rows) -> dict:
    """The α that each way of choosing takes; 0: the model before."""
    learnt = np.mean([rows[name].mean(1) for name in new], axis=0).tolist()
    ahead = np.mean([every[name].mean(1) for name in new], axis=0).tolist()
    good = certified(shown(budgets, rows, point) for point in range(1, len(alphas) + 1))
    return {
        "blend": chosen(alphas, list(good), learnt),
        "by the means": chosen(alphas, within(budgets, rows).tolist(), learnt),
        "hindsight": chosen(alphas, within(budgets, every).tolist(), ahead),
        **{f"{alpha:g}": alpha for alpha in (alphas[len(alphas) // 2 - 1], alphas[-1])},
    }


def simulate(alphas: list[float], budgets: Sequence[Budget], every: Rows, repeats: int) -> dict[str, np.ndarray]:
    """For each way of choosing (repeats, 4): α, over a budget, change on the old and on the new tasks."""
    rng, old = np.random.default_rng(0), [budget.name for budget in budgets]
    new = [name for name in every if name not in old]
    fine = [True, *within(budgets, every).tolist()]
    found: dict[str, list] = {}
    for _ in range(repeats):
        order = {name: rng.permutation(scores.shape[1]) for name, scores in every.items()}
        first, second = (
            {name: scores[:, part(order[name])] for name, scores in every.items()}
            for part in (lambda o: o[: len(o) // 2], lambda o: o[len(o) // 2 :])
        )
        for way, alpha in choices(alphas, budgets, new, first, every).items():
            point = [0.0, *alphas].index(alpha)
            changes = [np.mean([(second[one][point] - second[one][0]).mean() for one in part]) for part in (old, new)]
            found.setdefault(way, []).append([alpha, not fine[point], *changes])
    return {way: np.array(told, float) for way, told in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-drop", nargs="+", default=[])
    parser.add_argument("--max-lost", nargs="+", default=[])
    parser.add_argument("--repeats", type=int, default=500)
    told = parser.parse_args()
    alphas, rows = read(told.folder)
    try:
        budgets = flag_budgets(told.max_drop, (), told.max_lost)
    except UsageError as error:
        parser.error(str(error))
    if not budgets or not {one.name for one in budgets} < rows.keys():
        parser.error(f"give budgets for some of {', '.join(rows)}, not for all: what is left is what was learnt")
    print("| α | " + " | ".join(rows) + " |\n|---" + "|---" * len(rows) + "|")
    for alpha, *scores in zip([0.0, *alphas], *(one.mean(1) for one in rows.values()), strict=True):
        print(f"| {alpha:g} | " + " | ".join(f"{100 * score:.1f}" for score in scores) + " |")
    print("\n| | α, median (10 to 90 %) | over | old | new | kept the old model |\n|---|---|---|---|---|---|")
    for way, one in simulate(alphas, budgets, rows, told.repeats).items():
        low, middle, high = np.quantile(one[:, 0], [0.1, 0.5, 0.9])
        over, old, new = one[:, 1:].mean(0)
        print(
            f"| {way} | {middle:g} ({low:g} to {high:g}) | {over:.1%} | {100 * old:+.1f} | {100 * new:+.1f} "
            f"| {(one[:, 0] == 0).mean():.0%} |"
        )


if __name__ == "__main__":
    main()
