"""How often the intervals of a forecast hold the truth.

    python benchmarks/forecast_coverage.py [--repeats 100] [--seeds 2]    (minutes)

Tables are drawn from a product law, and from the published constants of a shifted power law to which a product law is
then fitted, as a user would have to (they do not identify its exponent). Six ranks, some seeds each, steps 50 to 260;
every run has an offset of its own on top of the noise of its points. Told: the share of repeats in which the 95 %
interval of the mean holds the true curve, and that of a new run a new measurement, inside the grid, at its corner, and
at twice its ranks and steps.
"""

from __future__ import annotations

import argparse

import numpy as np

from forgetless.forecasting.fitting import Grid, bootstrap, curves, fit, half_width
from forgetless.forecasting.laws import LAWS, shifted_power

PER_RANK = 2_498_560
RANKS, STEPS = np.array([8, 16, 32, 64, 128, 256]), np.arange(50, 261, 30)
CENTRE = (PER_RANK * 45.0, 140.0)
PRODUCT = np.array([0.115, 0.49, -2.5, 0.6, 0.134, 0.59, -2.1, 0.95])
LOSS = {"a": 0.0007e7, "b": 72.9186, "alpha": 0.0424, "beta": 0.1219, "c": 0.0020, "rho": 7.6885, "s": 0.6126}
FORGETTING = {"a": 0.0388e7, "b": 23.6418, "alpha": 0.0351, "beta": 0.1468, "rho": 7.6885,
              "c": -1.7334 * 0.0020, "s": 2.0481 - 1.7334 * 0.6126}  # fmt: skip
SD_RUN, SD = 0.004, 0.002  # nats per token
PLACES = {"inside": (32, 140), "corner": (256, 260), "beyond": (512, 520)}


def product(P: np.ndarray, N: np.ndarray) -> np.ndarray:
    """(2, points)"""
    return curves(LAWS["product"], PRODUCT, CENTRE, P, N)


def published(P: np.ndarray, N: np.ndarray) -> np.ndarray:
    """(2, points)"""
    return np.stack([shifted_power(P, N, **LOSS), shifted_power(P, N, **FORGETTING)])


def coverage(truth, repeats: int, seeds: int, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Shares of repeats in which the mean, and a new run, lay within their intervals: (places,) each."""
    ranks = np.repeat(RANKS, seeds)
    P, N = (one.ravel().astype(float) for one in np.meshgrid(PER_RANK * ranks, STEPS, indexing="ij"))
    run = np.repeat(np.arange(len(ranks)), len(STEPS))
    at = tuple(np.array(list(PLACES.values()), float).T * np.array([[PER_RANK], [1]]))
    true, held = truth(*at)[1], np.zeros((2, len(PLACES)))
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        off = rng.normal(0, SD_RUN, (2, len(ranks)))[:, run] + rng.normal(0, SD, (2, len(P)))
        grid = Grid(P, N, *(truth(P, N) + off), run)
        found = fit(LAWS["product"], grid, starts=2, first=PRODUCT, seed=repeat)
        drawn = bootstrap(found, grid, seed=repeat, draws=100)
        means = curves(found.law, drawn.theta, found.centre, *at)[:, 1]
        new = true + rng.normal(0, SD_RUN) + rng.normal(0, SD, len(PLACES))
        for place, (draws, value) in enumerate(((means, true), (means + drawn.noise[:, 1:], new))):
            held[place] += abs(found(*at)[1] - value) <= half_width(draws, drawn.runs, confidence)
    return held[0] / repeats, held[1] / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each rank")
    told = parser.parse_args()
    print(f"| truth, {len(RANKS) * told.seeds} runs | interval | {' | '.join(PLACES)} |\n|---|---|---|---|---|")
    for truth in (product, published):
        shares = coverage(truth, told.repeats, told.seeds)
        for name, share in zip(("of the mean", "of a new run"), shares, strict=True):
            print(f"| {truth.__name__} | {name} | {' | '.join(f'{one:.2f}' for one in share)} |", flush=True)


if __name__ == "__main__":
    main()
