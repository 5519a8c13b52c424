"""How often the intervals and the bound of a forecast hold the truth.

    python benchmarks/forecast_coverage.py [--repeats 20] [--seeds 2]    (15 minutes)

Tables are drawn from a law and go the way of a user's: `forecast fit` from random starts, which chooses the law, then
the forecast. The truths: a product law, the published constants of a shifted power law, a power that keeps growing, and
one that none of the laws is (quadratic, then level). Sizes, some seeds each, and steps; every run has an offset of its
own on top of the noise of its points. Told: the share of tables in which the 95 % interval of the mean holds the true
curve, that of a new run a new measurement, and in which the new run stays below the one-sided 95 % bound that the
inverse keeps to; in the middle of the grid, at its corner, and at twice its ranks and steps. And of how many tables the
fit says that the law bends otherwise than the points.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from forgetless.forecasting.fitting import curves
from forgetless.forecasting.forecast import Forecaster, fit_laws
from forgetless.forecasting.laws import LAWS, shifted_power

PER_RANK = 2_498_560
PUBLISHED_GRID = PER_RANK * np.array([8, 16, 32, 64, 128, 256]), np.arange(50, 261, 30)
SMALL_GRID = PER_RANK * np.array([2, 4, 8, 16, 32]), np.arange(12, 97, 12)
CENTRE = (PER_RANK * 45.0, 140.0)
PRODUCT = np.array([0.115, 0.49, -2.5, 0.6, 0.134, 0.59, -2.1, 0.95])
POWER = np.array([0.1, 0.5, -2.0, 0.3, 0.2, 0.9, -2.0])
LOSS = {"a": 0.0007e7, "b": 72.9186, "alpha": 0.0424, "beta": 0.1219, "c": 0.0020, "rho": 7.6885, "s": 0.6126}
FORGETTING = {"a": 0.0388e7, "b": 23.6418, "alpha": 0.0351, "beta": 0.1468, "rho": 7.6885,
              "c": -1.7334 * 0.0020, "s": 2.0481 - 1.7334 * 0.6126}  # fmt: skip
SD_RUN, SD = 0.004, 0.002  # nats per token
CONFIDENCE = 0.95


def product(P: np.ndarray, N: np.ndarray) -> np.ndarray:
    """(2, points)"""
    return curves(LAWS["product"], PRODUCT, CENTRE, P, N)


def published(P: np.ndarray, N: np.ndarray) -> np.ndarray:
    """(2, points)"""
    return np.stack([shifted_power(P, N, **LOSS), shifted_power(P, N, **FORGETTING)])


def growing(P: np.ndarray, N: np.ndarray) -> np.ndarray:
    """(2, points)"""
    return curves(LAWS["power"], POWER, CENTRE, P, N)


def none(P: np.ndarray, N: np.ndarray) -> np.ndarray:
    """(2, points)"""
    x = (P / PER_RANK / 8) ** 0.15 * N / 40
    return np.stack([curves(LAWS["power"], POWER, CENTRE, P, N)[0], 0.25 * x**1.6 / (1 + x**1.6)])


TRUTHS = {product: PUBLISHED_GRID, published: PUBLISHED_GRID, growing: SMALL_GRID, none: SMALL_GRID}


def coverage(truth, repeats: int, seeds: int) -> tuple[np.ndarray, Counter, int]:
    """Shares of tables that held, (3, places): the mean, a new run, a new run below the bound; the laws chosen; the
    number of tables that lack fit.
    """
    sizes, steps = TRUTHS[truth]
    runs = np.repeat(sizes, seeds)
    P, N = (one.ravel().astype(float) for one in np.meshgrid(runs, steps, indexing="ij"))
    run = np.repeat(np.arange(len(runs)), len(steps))
    places = [(sizes[2], steps[len(steps) // 2]), (sizes[-1], steps[-1]), (2 * sizes[-1], 2 * steps[-1])]
    held, chosen, lacking = np.zeros((3, len(places))), Counter(), 0
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        off = rng.normal(0, SD_RUN, (2, len(runs)))[:, run] + rng.normal(0, SD, (2, len(P)))
        loss, forgetting = truth(P, N) + off
        law = fitted(parameters=P, steps=N, loss=loss, forgetting=forgetting, run=run)
        chosen[law.law.name] += 1
        lacking += law.told["lack_of_fit"]["lacks"]
        for place, (size, step) in enumerate(places):
            told = law(size, step, CONFIDENCE)
            true = truth(np.array([size]), np.array([step]))[1, 0]
            new = true + rng.normal(0, SD_RUN) + rng.normal(0, SD)
            bound = law.upper(size, np.array([step]), CONFIDENCE)[0]
            held[:, place] += within(true, told.mean), within(new, told.run), new <= bound
    return held / repeats, chosen, lacking


def fitted(**columns: np.ndarray) -> Forecaster:
    """The law of a table, as `forecast fit` writes it."""
    rows = [
        dict(zip(columns, row, strict=True)) for row in zip(*(one.tolist() for one in columns.values()), strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "points.json"
        file.write_text(json.dumps([row | {"base": "base"} for row in rows]))
        record = fit_laws([file], draws=100, starts=12)
    return Forecaster(record, record["laws"][0])


def within(value: float, ends: tuple[float, float]) -> bool:
    return ends[0] <= value <= ends[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each rank")
    told = parser.parse_args()
    print(
        "| truth | runs | of the mean | of a new run | bound | laws chosen | lack fit |\n|---|---|---|---|---|---|---|"
    )
    for truth, (sizes, _) in TRUTHS.items():
        shares, chosen, lacking = coverage(truth, told.repeats, told.seeds)
        shown = " | ".join(", ".join(f"{one:.2f}" for one in share) for share in shares)
        laws = ", ".join(f"{name} {many}" for name, many in chosen.most_common())
        print(f"| {truth.__name__} | {len(sizes) * told.seeds} | {shown} | {laws} | {lacking} |", flush=True)


if __name__ == "__main__":
    main()
