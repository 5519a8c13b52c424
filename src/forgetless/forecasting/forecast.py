"""Fit the laws to points and keep them in a file; forecast from the file: forgetting at a rank and a number of steps,
and how large or how long a training may be to stay within a budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forgetless.errors import DataError, UsageError, nearest
from forgetless.forecasting import fitting
from forgetless.forecasting.fitting import Draws, Fit, Grid, curves, half_width
from forgetless.forecasting.laws import LAWS, published_form
from forgetless.forecasting.points import Point, read_points
from forgetless.runs.folder import make_folder, shaped
from forgetless.runs.seal import read_sealed, write_sealed

FORMAT = 1
AGAIN = "write it again with `forgetless forecast fit`"
DIGITS = 8  # of kept numbers
MOST_STEPS, MOST_RANK = 10**7, 10**5  # up to which the inverse looks
CURVES = ("loss", "forgetting")


# ------------------------------------------------------------------------------------------- fitting


def fit_laws(
    sources: Iterable[str | Path], *, law: str | None = None, confidence: float = 0.95, seed: int = 0,
    draws: int = fitting.DRAWS, starts: int = fitting.STARTS,
) -> dict:  # fmt: skip
    """The record of `forecast fit`: laws for each data set, method and learning rate of the points.

    law: the one to forecast with; by default that with the lowest AICc of those that the points identify.
    Raises `DataError` where the points cannot identify any, mix bases or texts, or do not vary.
    """
    if law is not None and law not in LAWS:
        raise UsageError(f"law: no {law!r}{nearest(law, LAWS)}")
    if not 0.5 <= confidence < 1:
        raise UsageError(f"confidence must be from 0.5 to below 1, not {confidence}")
    points, left_out = read_points(sources)
    _check_one(points, {"base": "a law is of one base", "text": "forgetting is comparable on one text only",
                        "targets": "a rank is another number of parameters on other layers"})  # fmt: skip
    unit = "parameters" if all(point.parameters is not None for point in points) else "rank"
    if unit == "rank" and any(point.rank is None for point in points):
        raise DataError("some points have only `parameters` and others only `rank`; give all of them the same one")
    groups: dict[tuple[str, str, float | None], list[Point]] = defaultdict(list)
    for point in points:
        groups[point.dataset, point.method, point.learning_rate].append(point)
    for found in groups.values():
        _check_one(found, {"loss_kind": "they are not one loss"})
        _check_one_recipe(found)
    told = {"law": law, "confidence": confidence, "seed": seed, "draws": draws, "starts": starts}
    return {
        "format": FORMAT,
        "base": points[0].base,
        "targets": ", ".join(sorted({point.targets for point in points})),
        "size": unit,
        "parameters_per_rank": _per_rank(points),
        "confidence": confidence,
        "seed": seed,
        "text": points[0].text,
        "left_out": left_out,
        "laws": [_fit_group(*key, points=found, unit=unit, told=told) for key, found in groups.items()],
    }


def _check_one(points: Sequence[Point], why: dict[str, str]) -> None:
    """DataError where an attribute of the points is not one and the same."""
    first = points[0]
    for name, reason in why.items():
        for point in points:
            _same(name, first.source, getattr(first, name), point.source, getattr(point, name), reason)


def _same(name: str, where: str, one: object, there: str, other: object, why: str) -> None:
    if one != other:
        raise DataError(
            f"mixed {name.removesuffix('s')}s in one table: {where} has {one!r}, {there} has {other!r}; {why}, so fit "
            "them apart"
        )


def _check_one_recipe(points: Sequence[Point]) -> None:
    """DataError where runs of one law differ in more than size, steps and seed.

    `lora_alpha` may be the same for all sizes, or in proportion to them: either is one way to grow.
    """
    first = next((point for point in points if point.recipe), points[0])
    for point in points:
        for name in sorted(first.recipe.keys() & point.recipe.keys()):
            _same(name, first.source, first.recipe[name], point.source, point.recipe[name], "it decides what is learnt")
    known = [point for point in points if point.lora_alpha is not None]
    scales = {f"{point.lora_alpha / (point.rank or point.parameters or 1):.6g}" for point in known if point.lora_alpha}
    if len(scales) > 1:
        why = "keep it, or lora_alpha / rank, the same for all ranks"
        for point in known:
            _same("lora_alpha", known[0].source, known[0].lora_alpha, point.source, point.lora_alpha, why)


def _per_rank(points: Sequence[Point]) -> float | None:
    """Tuned parameters of a rank of 1, where that is one number."""
    ratios = {point.parameters / point.rank for point in points if point.parameters and point.rank}
    return ratios.pop() if len(ratios) == 1 else None


def _fit_group(dataset: str, method: str, rate: float | None, points: list[Point], unit: str, told: dict) -> dict:
    called = (
        " ".join(filter(None, (dataset, method, "" if rate is None else f"learning rate {rate:g}"))) or "the points"
    )
    grid = as_grid(points, unit)
    check_grid(grid, called, unit)
    fits = fitting.fit_all(grid, starts=told["starts"], seed=told["seed"])
    chosen = told["law"] or fitting.best(fits, grid)
    if chosen is None or fits[chosen].refused:
        reasons = "; ".join(f"{name}: {one.refused}" for name, one in fits.items() if one.refused)
        raise DataError(f"{called}: the points cannot identify {told['law'] or 'any law'}. {reasons}")
    found = fits[chosen]
    drawn = fitting.bootstrap(found, grid, draws=told["draws"], seed=told["seed"])
    off = grid.measured - found(grid.parameters, grid.steps)
    return {
        "dataset": dataset,
        "method": method,
        "learning_rate": rate,
        "loss_kind": points[0].loss_kind,
        "runs": drawn.runs,
        "grid": {"sizes": np.unique(grid.parameters).tolist(), "steps": np.unique(grid.steps).tolist()},
        "linear": linear_law(grid, told["confidence"], told["seed"]),
        "fits": [_judged(one, grid, drawn if one is found else None, told) for one in fits.values()],
        "chosen": chosen,
        "centre": list(found.centre),
        "theta": _short(found.theta),
        "draws": _short(drawn.theta),
        "noise": _short(drawn.noise),
        "points": [
            {"run": point.run, "size": size, "steps": steps, "loss": loss, "forgetting": kl, "residuals": _short(rest)}
            for point, size, steps, loss, kl, rest in zip(
                points, grid.parameters.tolist(), grid.steps.tolist(), grid.loss.tolist(), grid.forgetting.tolist(),
                off.T, strict=True,
            )
        ],
    }  # fmt: skip


def as_grid(points: Sequence[Point], unit: str) -> Grid:
    """The points as columns; runs by number."""
    numbers = {run: i for i, run in enumerate(dict.fromkeys(point.run for point in points))}
    sizes, steps, loss, forgetting = (
        np.array([getattr(point, name) for point in points]) for name in (unit, "steps", "loss", "forgetting")
    )
    return Grid(sizes, steps, loss, forgetting, np.array([numbers[point.run] for point in points]))


def check_grid(grid: Grid, called: str, unit: str) -> None:
    """DataError where not even a straight line through the points would say something."""
    if len(grid.steps) < 4:
        raise DataError(f"{called}: {len(grid.steps)} points are too few; a law needs many ranks and steps")
    for name in CURVES:
        values = getattr(grid, name)
        if np.ptp(values) < 1e-9:
            raise DataError(f"{called}: {name} is {values[0]:g} at every point; what does not vary identifies no law")
    rows = [tuple(row) for row in zip(grid.run.tolist(), grid.parameters.tolist(), grid.steps.tolist(), strict=True)]
    if double := next((row for row in rows if rows.count(row) > 1), None):
        raise DataError(
            f"{called}: two points of one run at {unit} {double[1]:g} and step {double[2]:g}; name the runs in a "
            "column `run` (or `seed`), or leave one point out"
        )


def linear_law(grid: Grid, confidence: float, seed: int) -> dict:
    """L_f = s - c L_ft by least squares, with R² and intervals over runs."""
    J = np.stack([-grid.loss, np.ones_like(grid.loss)], axis=-1)  # (points, 2)
    solve = np.linalg.pinv(J)
    c, s = solve @ grid.forgetting
    fitted = J @ (c, s)
    grown = fitting.enlarged(J[None], (grid.forgetting - fitted)[None], grid.run)[0]
    rng, runs = np.random.default_rng(seed), np.unique(grid.run)
    factors = np.stack([fitting.webb(len(runs), rng) for _ in range(fitting.DRAWS)])[:, np.searchsorted(runs, grid.run)]
    half = half_width((fitted + factors * grown) @ solve.T, len(runs), confidence)
    return {
        "c": float(c),
        "s": float(s),
        "r_squared": float(fitting.r_squared(grid.forgetting, fitted)),
        "c_interval": None if half is None else [float(c - half[0]), float(c + half[0])],
        "s_interval": None if half is None else [float(s - half[1]), float(s + half[1])],
    }


def _judged(found: Fit, grid: Grid, drawn: Draws | None, told: dict) -> dict:
    """What is told of each law."""
    law = found.law
    record = {
        "law": law.name,
        "formula": law.formula,
        "constants": dict(zip(law.names, _short(found.theta), strict=True)),
        "r_squared": _short(fitting.r_squared(grid.measured, found(grid.parameters, grid.steps))),
        **fitting.criteria(found, grid),
        "held_out": {"ranks": None, "steps": None} if found.refused else fitting.held_out(law, grid, found),
        "refused": found.refused,
    }
    if "logit_w" in law.names or "logit_w_ft" in law.names:
        both = (published_form(law.constants(found.theta, curve), *found.centre) for curve in (0, 1))
        record["published_form"] = dict(zip(CURVES, both, strict=True))
    if drawn is not None and (half := half_width(drawn.theta, drawn.runs, told["confidence"])) is not None:
        ends = zip(law.names, _short(found.theta - half), _short(found.theta + half), strict=True)
        record["intervals"] = {name: [low, high] for name, low, high in ends}
    return record


def _short(values: np.ndarray) -> list:
    return np.vectorize(lambda x: float(f"{x:.{DIGITS}g}"))(values).tolist() if np.size(values) else []


def write_laws(record: dict, file: Path) -> None:
    """The file that forecasts are made from."""
    make_folder(file.parent, "give another --output")
    write_sealed(file, record)


# ------------------------------------------------------------------------------------------- forecasting


@dataclass(frozen=True)
class Forecast:
    """What a law says of one number of parameters (or rank) and of steps, in nats per token."""

    size: float
    steps: float
    value: float
    mean: tuple[float, float] | None  # where the law's own curve lies
    run: tuple[float, float] | None  # where one new run is measured: the curve, and what runs differ by
    beyond: tuple[str, ...]  # why it is an extrapolation


class Forecaster:
    """One law of a file, ready to be asked."""

    def __init__(self, record: dict, group: dict):
        self.record, self.group = record, group
        self.law = LAWS[group["chosen"]]
        self.theta = np.array(group["theta"])
        self.draws = np.array(group["draws"]).reshape(-1, len(self.theta))
        self.noise = np.array(group["noise"])

    def size_of(self, rank: float) -> float:
        """Tuned parameters of a rank, as in the runs that the law was fitted to."""
        if self.record["size"] == "rank":
            return rank
        if self.record["parameters_per_rank"] is None:
            raise UsageError("the points do not tell how many parameters a rank has; give --parameters")
        return rank * self.record["parameters_per_rank"]

    def __call__(self, size: float, steps: float, confidence: float, curve: str = "forgetting") -> Forecast:
        """The curve at one place, with an interval of its mean and one of a new run."""
        value, of_mean, of_run = self._at(size, np.array([steps]), curve)
        ends = []
        for drawn in (of_mean, of_run):
            half = half_width(drawn, self.group["runs"], confidence)
            ends.append(None if half is None else (float(value[0] - half[0]), float(value[0] + half[0])))
        return Forecast(size, steps, float(value[0]), ends[0], ends[1], self.beyond(size, steps))

    def _at(self, size: float | np.ndarray, steps: np.ndarray, curve: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The value at each place, draws of it, and draws of a new run there: (places,), (draws, places) twice."""
        i, centre = CURVES.index(curve), tuple(self.group["centre"])
        value = curves(self.law, self.theta, centre, size, steps)[i]  # type: ignore[arg-type]
        drawn = curves(self.law, self.draws, centre, size, steps)[:, i]  # type: ignore[arg-type]
        return value, drawn, drawn + self.noise[:, i, None]

    def upper(self, size: float | np.ndarray, steps: np.ndarray, confidence: float) -> np.ndarray:
        """With this confidence a new run forgets no more, at each place."""
        value, _, of_run = self._at(size, steps, "forgetting")
        half = half_width(of_run, self.group["runs"], confidence, sides=1)
        if half is None:
            raise DataError(
                f"{self.group['runs']} runs give no bound; it takes {fitting.FEWEST_RUNS}, of other ranks or seeds"
            )
        return value + half

    def most_steps(self, max_kl: float, size: float, confidence: float) -> int | None:
        """The largest number of steps up to which a new run stays within `max_kl`; None: not even one step."""
        return _last_within(lambda steps: self.upper(size, steps, confidence), max_kl, MOST_STEPS)

    def largest_rank(self, max_kl: float, steps: float, confidence: float) -> int | None:
        """The largest rank up to which a new run stays within `max_kl`; None: not even rank 1."""
        sizes = self.size_of(1.0)
        return _last_within(
            lambda ranks: self.upper(ranks * sizes, np.full(len(ranks), steps), confidence), max_kl, MOST_RANK
        )

    def beyond(self, size: float, steps: float) -> tuple[str, ...]:
        """In which direction a place lies outside of the points."""
        found = []
        for name, value, told in (
            (self.record["size"], size, self.group["grid"]["sizes"]), ("steps", steps, self.group["grid"]["steps"]),
        ):  # fmt: skip
            if not min(told) <= value <= max(told):
                found.append(f"{name} {value:,.0f} is outside of the measured {min(told):,.0f} to {max(told):,.0f}")
        return tuple(found)


def _last_within(bound, limit: float, most: int) -> int | None:
    """The last whole number before the bound first passes the limit."""
    tried = np.unique(np.round(np.geomspace(1, most, 400)))
    over = np.flatnonzero(bound(tried) > limit)
    if not len(over):
        return most
    if over[0] == 0:
        return None
    low, high = int(tried[over[0] - 1]), int(tried[over[0]])
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bound(np.array([float(middle)]))[0] <= limit else (low, middle)
    return low


def read_law(
    file: Path, dataset: str | None = None, method: str | None = None, rate: float | None = None
) -> Forecaster:
    """A law of a file, by its data set, method and learning rate where there are several."""
    if not file.is_file():
        raise UsageError(f"{file}: no such file; `forgetless forecast fit POINTS` writes one")
    record = read_sealed(file, AGAIN, reads=FORMAT)
    asked = {"dataset": dataset, "method": method, "learning_rate": rate}
    with shaped(file, AGAIN):
        fitting_ones = [
            one for one in record["laws"] if all(value is None or one[name] == value for name, value in asked.items())
        ]
    if len(fitting_ones) != 1:
        known = "; ".join(
            f"--dataset {one['dataset']!r} --method {one['method']!r} --learning_rate {one['learning_rate']}"
            for one in record["laws"]
        )
        raise UsageError(f"{file}: {len(fitting_ones)} laws fit; it has {known}")
    with shaped(file, AGAIN):
        return Forecaster(record, fitting_ones[0])
