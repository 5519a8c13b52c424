"""How often a model that is over its budget passes an audit, and how many rows a model within it needs.

    python benchmarks/verdict_coverage.py [--repeats 500]    (minutes)

For every case rows are drawn with a true mean loss, and the budget is put a hair below it: a test that keeps its word
passes at most 5 % of them. `wide` is how far the upper bound lies above the true loss, on average. The last table
draws from models that lose nothing net and counts how often a budget of 2pp is shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from scipy.stats import norm

from forgetless.score.bounds import Betting, HoeffdingBentkus

CONFIDENCE = 0.95
Draw = Callable[[np.random.Generator, int], np.ndarray]


def flips(lost: float, gained: float) -> Draw:
    """Rows that were right and are wrong, and the reverse."""
    return lambda rng, n: rng.choice([1.0, -1.0, 0.0], n, p=[lost, gained, 1 - lost - gained])


CASES: dict[str, tuple[Draw, float, float]] = {  # rows, least, most
    "0.2 % lost": (flips(0.002, 0.0), -1, 1),
    "2 % lost": (flips(0.02, 0.0), -1, 1),
    "3 % lost, 1 % gained": (flips(0.03, 0.01), -1, 1),
    "12 % lost, 10 % gained": (flips(0.12, 0.10), -1, 1),
    "graded, mostly equal": (lambda rng, n: (rng.random(n) < 0.1) * rng.beta(2, 3, n), -1, 1),
    "KL, gamma": (lambda rng, n: np.minimum(rng.gamma(0.2, 0.25, n), 1.0), 0, 1),
    "KL, 1 % of documents ruined": (lambda rng, n: np.where(rng.random(n) < 0.01, 1.0, rng.uniform(0, 0.02, n)), 0, 1),
}


def betting(x: np.ndarray, least: float, most: float) -> float:
    return Betting(x, least, most, CONFIDENCE).upper(CONFIDENCE)


def hoeffding_bentkus(x: np.ndarray, least: float, most: float) -> float:
    return HoeffdingBentkus(x, least, most).upper(CONFIDENCE)


def normal(x: np.ndarray, least: float, most: float) -> float:
    """The usual bound, which is right for many rows only."""
    return float(x.mean() + norm.ppf(CONFIDENCE) * x.std(ddof=1) / len(x) ** 0.5)


def bootstrap(x: np.ndarray, least: float, most: float) -> float:
    """Percentile of 500 resampled means."""
    rng = np.random.default_rng(0)
    return float(np.quantile(rng.multinomial(len(x), np.full(len(x), 1 / len(x)), 500) @ x / len(x), CONFIDENCE))


BOUNDS = (betting, hoeffding_bentkus, normal, bootstrap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=500)
    repeats = parser.parse_args().repeats
    print(f"## Models over their budget: share that passes at {CONFIDENCE:.0%}, {repeats:,} repeats\n")
    head = " | ".join(f"{bound.__name__} passes | wide" for bound in BOUNDS)
    print(f"| case | rows | {head} |\n|---|---|" + "---|" * 2 * len(BOUNDS))
    for case, (draw, least, most) in CASES.items():
        truth = float(draw(np.random.default_rng(1), 4_000_000).mean())
        for n in (30, 150, 1000):
            rng = np.random.default_rng(n)
            samples = [draw(rng, n) for _ in range(repeats)]
            cells = []
            for bound in BOUNDS:
                upper = np.array([bound(x, least, most) for x in samples])
                cells += [f"{(upper < truth).mean():.1%}", f"{(upper - truth).mean():.4f}"]
            print(f"| {case} | {n} | {' | '.join(cells)} |", flush=True)
    print("\n## Models that lose nothing net: share shown to be within 2pp by betting\n")
    sizes = (200, 400, 800, 1600, 3200)
    print(f"| flips each way | {' | '.join(map(str, sizes))} rows |\n|---|" + "---|" * len(sizes))
    for share in (0.0, 0.005, 0.02, 0.05):
        rng, few = np.random.default_rng(0), max(1, repeats // 10)
        shown = [
            np.mean([Betting(flips(share, share)(rng, n), -1, 1).p_at_least(0.02) <= 0.05 for _ in range(few)])
            for n in sizes
        ]
        print(f"| {share:.1%} | {' | '.join(f'{one:.0%}' for one in shown)} |", flush=True)


if __name__ == "__main__":
    main()
