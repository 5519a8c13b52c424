"""How often a blended model is over its budget, and how much of the learning that the budget allows it keeps.

    python benchmarks/blend_promise.py [--repeats 500]    (minutes)

A path of ten points has a true loss at each, and a true score on a new task. In every repeat rows are drawn for all
points, a row's luck being the same along the path as it is with real models, and a point is chosen as `blend` does.
`over`: share of repeats in which the chosen point is truly over a budget; the promise is 5 % at most. `by the means`:
the same for whoever takes the best point whose measured loss is within the budget. `kept`: learning of the chosen
point as a share of what the best fixed point within the budget learns, which nobody knows beforehand; `nothing`: share
of repeats in which the old model is kept.

The second table is of two borders on the same rows: the model deployed at the first is where the second begins, so
these rows have chosen it. `over`: at the second border, against what was deployed at the first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forgetless.auditing.budgets import MAX_DROP, MAX_KL, MAX_LOST, Budget
from forgetless.auditing.measures import Divergence, Measure, Scores
from forgetless.geometry.promise import certified, chosen, is_shown

LEVEL = 0.05
ALPHAS = [number / 10 for number in range(1, 11)]
ALPHA = np.array(ALPHAS)
RISING = 0.04 * ALPHA**2
SAWTOOTH = np.where(np.arange(10) % 2, 0.021, 0.005)  # not monotone: every second point is a hair over 2pp
JUST_OVER = np.full(10, 0.0201)  # no point is within 2pp: the hardest to refuse
LATE_DIP = np.where(ALPHA < 0.75, 0.0201, 0.0)  # only the far end is within


@dataclass(frozen=True)
class Path:
    """True losses at each point; every budget is about rows of its own."""

    budgets: tuple[Budget, ...]
    losses: tuple[np.ndarray, ...]  # of each budget, (points,)
    gains: float = 0.0  # share of rows that are gained, on top of the loss and cancelling out in a net drop

    def within(self) -> np.ndarray:
        """Which points truly keep every budget."""
        return np.all([loss <= one.limit for one, loss in zip(self.budgets, self.losses, strict=True)], axis=0)


def lost(name: str = "old", limit: float = 0.02) -> Budget:
    return Budget(MAX_LOST, name, limit)


def drop(name: str = "old", limit: float = 0.02) -> Budget:
    return Budget(MAX_DROP, name, limit)


KL = Budget(MAX_KL, "text", 0.05)
CASES: dict[str, Path] = {
    "rows lost, rising": Path((lost(),), (RISING,)),
    "rows lost, all a hair over": Path((lost(),), (JUST_OVER,)),
    "rows lost, sawtooth": Path((lost(),), (SAWTOOTH,)),
    "rows lost, within at the far end only": Path((lost(),), (LATE_DIP,)),
    "rows lost, rare": Path((lost(limit=0.005),), (0.01 * ALPHA,)),
    "net drop, gains too": Path((drop(),), (RISING,), gains=0.05),
    "net drop, all a hair over": Path((drop(),), (JUST_OVER,), gains=0.02),
    "KL, rising": Path((KL,), (0.12 * ALPHA**2,)),
    "three budgets": Path((lost("a"), drop("b"), KL), (RISING, RISING / 2, 0.12 * ALPHA**2)),
    "three budgets, one kept at the far end only": Path((lost("a"), drop("b"), KL), (RISING, RISING[::-1], RISING)),
    "three budgets, one a hair over": Path((lost("a"), drop("b"), KL), (0 * ALPHA, JUST_OVER, 0.01 * ALPHA)),
}

TWICE = ("rows lost, rising", "rows lost, all a hair over", "rows lost, sawtooth")


def drawn(rng: np.random.Generator, path: Path, n: int) -> list[list[Measure]]:
    """For each point a measure of every budget, from n rows; the same uniform draw decides a row at all points."""
    columns = []
    for budget, losses in zip(path.budgets, path.losses, strict=True):
        luck = rng.random(n)
        columns.append([_measure(budget, float(loss), path.gains, luck) for loss in losses])
    return [list(point) for point in zip(*columns, strict=True)]


def _measure(budget: Budget, loss: float, gains: float, luck: np.ndarray) -> Measure:
    if budget.option == MAX_KL:  # exponential, so that few documents lose most
        nats = -loss * np.log1p(-luck)
        return Divergence(budget.name, tuple(nats.tolist()), (1,) * len(nats))
    gains = gains if budget.option == MAX_DROP else 0.0
    worse, better = luck < loss + gains, luck > 1 - gains
    return Scores(budget.name, tuple((~better).astype(float).tolist()), tuple((~worse).astype(float).tolist()))


def choose(path: Path, points: Sequence[Sequence[Measure]], learnt: Sequence[float]) -> float:
    """What `blend` takes."""
    shown = (all(is_shown(*told, LEVEL) for told in zip(point, path.budgets, strict=True)) for point in points)
    good = []
    for one in certified(shown):
        good.append(one)
        if not one:
            break
    good += [False] * (len(ALPHAS) - len(good))
    return chosen(ALPHAS, good, learnt)


def by_the_means(path: Path, points: Sequence[Sequence[Measure]], learnt: Sequence[float]) -> float:
    """The best of the points whose measured losses are within their budgets."""
    good = [
        all(float(one.losses.mean()) <= budget.limit for one, budget in zip(point, path.budgets, strict=True))
        for point in points
    ]
    return chosen(ALPHAS, good, learnt)


def simulate(path: Path, n: int, repeats: int, seed: int = 0) -> dict[str, float]:
    """Shares of repeats and of learning; the new task's score rises to 0.9 and falls a little at the end."""
    rng, within = np.random.default_rng(seed), path.within()
    learning = 0.9 * ALPHA * (1.6 - 0.6 * ALPHA)
    best = max((float(one) for one in learning[within]), default=0.0)
    over = naive = nothing = kept = 0.0
    for _ in range(repeats):
        points = drawn(rng, path, n)
        learnt = [0.0, *(rng.binomial(n, learning) / n).tolist()]
        taken, other = choose(path, points, learnt), by_the_means(path, points, learnt)
        over += bool(taken) and not within[ALPHAS.index(taken)]
        naive += bool(other) and not within[ALPHAS.index(other)]
        nothing += not taken
        kept += learning[ALPHAS.index(taken)] if taken else 0.0
    return {
        "over": over / repeats,
        "naive": naive / repeats,
        "kept": kept / repeats / best if best else float("nan"),
        "nothing": nothing / repeats,
    }


def two_borders(path: Path, n: int, repeats: int, seed: int = 0) -> dict[str, float]:
    """The same path twice, one after the other: at a second border with loss l the rows are lost whose luck lies within
    l above the first's, so that rows at the edge decide both.
    """
    [budget], [losses] = path.budgets, path.losses
    rng, learning, first, second = np.random.default_rng(seed), 0.9 * ALPHA, 0.0, 0.0
    for _ in range(repeats):
        luck = rng.random(n)
        learnt = [0.0, *learning.tolist()]
        taken = choose(path, [[_measure(budget, float(loss), 0.0, luck)] for loss in losses], learnt)
        begin = float(losses[ALPHAS.index(taken)]) if taken else 0.0
        left = np.where(luck < begin, 1.0, luck - begin)  # what is lost already is not lost again
        later = choose(path, [[_measure(budget, float(loss), 0.0, left)] for loss in losses], learnt)
        first += bool(taken) and not path.within()[ALPHAS.index(taken)]
        second += bool(later) and not path.within()[ALPHAS.index(later)]
    return {"first": first / repeats, "second": second / repeats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=500)
    repeats = parser.parse_args().repeats
    print("| path | rows | over | by the means: over | kept | nothing |\n|---|---|---|---|---|---|")
    for name, path in CASES.items():
        for n in (150, 500, 2000):
            told = simulate(path, n, repeats)
            kept = "-" if np.isnan(told["kept"]) else f"{told['kept']:.0%}"
            print(
                f"| {name} | {n} | {told['over']:.1%} | {told['naive']:.1%} | {kept} | {told['nothing']:.0%} |",
                flush=True,
            )
    print("\n| path, twice | rows | over at the first | over at the second |\n|---|---|---|---|")
    for name in TWICE:
        for n in (150, 500, 2000):
            told = two_borders(CASES[name], n, repeats)
            print(f"| {name} | {n} | {told['first']:.1%} | {told['second']:.1%} |", flush=True)


if __name__ == "__main__":
    main()
