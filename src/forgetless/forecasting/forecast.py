"""Fit the laws to points and keep them in a file; forecast from the file: forgetting at a rank and a number of steps,
and how large or how long a training may be to stay within a budget."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from forgetless.errors import DataError, UsageError, nearest
from forgetless.forecasting import fitting
from forgetless.forecasting.fitting import Draws, Fit, Grid, curves, half_width
from forgetless.forecasting.laws import LAWS, Law, published_form
from forgetless.forecasting.points import Point, read_points
from forgetless.runs.folder import make_folder, shaped
from forgetless.runs.seal import read_sealed, write_sealed

FORMAT = 2
AGAIN = "write it again with `forgetless forecast fit`"
DIGITS = 8  # of kept numbers
MOST_STEPS, MOST_RANK, MOST_PARAMETERS = 10**7, 10**5, 10**13  # up to which the inverse looks
CURVES = ("loss", "forgetting")
NOT_HELD = {"ranks": None, "steps": None}


# ------------------------------------------------------------------------------------------- fitting


def fit_laws(
    sources: Iterable[str | Path], *, law: str | None = None, from_step: float = 0, confidence: float = 0.95,
    seed: int = 0, draws: int = fitting.DRAWS, starts: int = fitting.STARTS,
) -> dict:  # fmt: skip
    """The record of `forecast fit`: laws for each data set, method and learning rate of the points.

    law: the one to forecast with; by default the simplest of those that err least on held-out points, of those that the
    points identify. from_step: points of fewer steps are left out.
    Raises `DataError` where the points cannot identify any, mix bases or texts, or do not vary.
    """
    if law is not None and law not in LAWS:
        raise UsageError(f"law: no {law!r}{nearest(law, LAWS)}")
    if not 0.5 <= confidence < 1:
        raise UsageError(f"confidence must be from 0.5 to below 1, not {confidence}")
    points, left_out = read_points(sources)
    if not (points := [point for point in points if point.steps >= from_step]):
        raise UsageError(f"from_step {from_step:g}: no point has as many steps")
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
        "from_step": from_step,
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
    held = {name: fitting.held_out(one.law, grid, one) for name, one in fits.items() if not one.refused}
    used = [told["law"]] if told["law"] else fitting.best(fits, grid, held)
    if not used or fits[used[0]].refused:
        reasons = "; ".join(f"{name}: {one.refused}" for name, one in fits.items() if one.refused)
        raise DataError(f"{called}: the points cannot identify {told['law'] or 'any law'}. {reasons}")
    found = fits[used[0]]
    drawn = {name: fitting.bootstrap(one, grid, draws=told["draws"], seed=told["seed"])
             for name, one in fits.items() if not one.refused}  # fmt: skip
    off = grid.measured - found(grid.parameters, grid.steps)
    return {
        "dataset": dataset,
        "method": method,
        "learning_rate": rate,
        "loss_kind": points[0].loss_kind,
        "runs": len(np.unique(grid.run)),
        "grid": {
            "sizes": (sizes := np.unique(grid.parameters).tolist()),
            "steps": np.unique(grid.steps).tolist(),
            "reach": [[size, *_ends(grid.steps[grid.parameters == size])] for size in sizes],
        },
        "linear": linear_law(grid, told["confidence"], told["seed"]),
        "fits": [_judged(one, grid, drawn.get(name), held.get(name, NOT_HELD), told) for name, one in fits.items()],
        "centre": list(found.centre),
        "used": [
            {"law": name, "theta": _short(fits[name].theta), "draws": _short(drawn[name].theta),
             "noise": _short(drawn[name].noise)}
            for name in used
        ],
        "points": [
            {"run": point.run, "size": size, "steps": steps, "loss": loss, "forgetting": kl, "residuals": _short(rest)}
            for point, size, steps, loss, kl, rest in zip(
                points, grid.parameters.tolist(), grid.steps.tolist(), grid.loss.tolist(), grid.forgetting.tolist(),
                off.T, strict=True,
            )
        ],
    }  # fmt: skip


def _ends(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


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
    half = half_width((factors * grown) @ solve.T, len(runs), confidence)
    return {
        "c": float(c),
        "s": float(s),
        "r_squared": float(fitting.r_squared(grid.forgetting, fitted)),
        "c_interval": None if half is None else [float(c - half[0]), float(c + half[0])],
        "s_interval": None if half is None else [float(s - half[1]), float(s + half[1])],
    }


def _judged(found: Fit, grid: Grid, drawn: Draws | None, held: dict, told: dict) -> dict:
    """What is told of each law."""
    law = found.law
    record = {
        "law": law.name,
        "formula": law.formula,
        "constants": dict(zip(law.names, _short(found.theta), strict=True)),
        "r_squared": _short(fitting.r_squared(grid.measured, found(grid.parameters, grid.steps))),
        "residual": _short(np.sqrt(((grid.measured - found(grid.parameters, grid.steps)) ** 2).mean(axis=1))),
        "lack_of_fit": fitting.lack_of_fit(found, grid),
        "below_zero": fitting.below_zero(found, grid),
        **fitting.criteria(found, grid),
        "held_out": held,
        "refused": found.refused,
        "loss_refused": found.loss_refused,
    }
    if "logit_w" in law.names or "logit_w_ft" in law.names:
        both = (published_form(law.constants(found.theta, curve), *found.centre) for curve in (0, 1))
        record["published_form"] = dict(zip(CURVES, both, strict=True))
    if (
        drawn is not None
        and (half := half_width(drawn.theta - found.theta, drawn.runs, told["confidence"])) is not None
    ):
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


@dataclass(frozen=True)
class Used:
    """A law with its constants, (constants,), draws of them, (draws, constants), and of a measurement's, (draws, 2)."""

    law: Law
    theta: np.ndarray
    draws: np.ndarray
    noise: np.ndarray


class Forecaster:
    """One group of a file, ready to be asked: its best law, and draws of all laws that may be as true."""

    def __init__(self, record: dict, group: dict):
        self.record, self.group = record, group
        self.used = [
            Used(LAWS[one["law"]], np.array(one["theta"]), np.array(one["draws"]), np.array(one["noise"]))
            for one in group["used"]
        ]
        self.law, self.theta = self.used[0].law, self.used[0].theta
        self.told = next(one for one in group["fits"] if one["law"] == self.law.name)  # of this law

    def size_of(self, rank: float) -> float:
        """Tuned parameters of a rank, as in the runs that the law was fitted to."""
        if self.record["size"] == "rank":
            return rank
        if self.record["parameters_per_rank"] is None:
            raise UsageError("the points do not tell how many parameters a rank has; give --parameters")
        return rank * self.record["parameters_per_rank"]

    def __call__(self, size: float, steps: float, confidence: float, curve: str = "forgetting") -> Forecast:
        """The curve at one place, with an interval of its mean and one of a new run."""
        value, *off = self._at(size, np.array([steps]), curve)
        halves = [half_width(one, self.group["runs"], confidence) for one in off]
        mean, run = (None if h is None else (float(value[0] - h[0]), float(value[0] + h[0])) for h in halves)
        return Forecast(size, steps, float(value[0]), mean, run, self.beyond(size, steps))

    def _at(self, size: float | np.ndarray, steps: np.ndarray, curve: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best law's value at each place, and what draws of it, and of a new run there, are off by: (places,),
        (draws, places) twice."""
        i, centre = CURVES.index(curve), tuple(self.group["centre"])
        value = curves(self.law, self.theta, centre, size, steps)[i]  # type: ignore[arg-type]
        off = [curves(one.law, one.draws, centre, size, steps)[:, i] - value for one in self.used]  # type: ignore[arg-type]
        new = [mean + one.noise[:, i, None] for mean, one in zip(off, self.used, strict=True)]
        return value, np.concatenate(off), np.concatenate(new)

    def upper(self, size: float | np.ndarray, steps: np.ndarray, confidence: float) -> np.ndarray:
        """With this confidence a new run forgets no more, at each place."""
        value, _, off = self._at(size, steps, "forgetting")
        half = half_width(off, self.group["runs"], confidence, sides=1)
        if half is None:
            raise DataError(
                f"{self.group['runs']} runs give no bound; it takes {fitting.FEWEST_RUNS}, of other ranks or seeds"
            )
        return value + half

    def most_steps(self, max_kl: float, size: float, confidence: float) -> Within:
        """The largest number of steps up to which a new run of this size stays within `max_kl`."""
        measured = min(self.group["grid"]["steps"])
        told = last_within(lambda steps: self.upper(size, steps, confidence), max_kl, measured, MOST_STEPS)
        return replace(told, beyond=self.beyond(size, told.most or 1))

    def largest_size(self, max_kl: float, steps: float, confidence: float) -> Within:
        """The largest rank (number of parameters, where ranks are not known) up to which a new run stays within it."""
        unit, most = (self.size_of(1.0), MOST_RANK) if self.has_ranks else (1.0, MOST_PARAMETERS)
        measured = min(self.group["grid"]["sizes"]) / unit

        def bound(sizes: np.ndarray) -> np.ndarray:
            return self.upper(sizes * unit, np.full(len(sizes), steps), confidence)

        told = last_within(bound, max_kl, measured, most)
        return replace(told, beyond=self.beyond((told.most or 1) * unit, steps))

    def doubts(self, forgetting: Forecast) -> list[str]:
        """What else to know of a forecast."""
        found = []
        if min(point["forgetting"] for point in self.group["points"]) >= 0:
            if forgetting.value < 0:
                found.append("the law is below 0 here, where no KL can be: it knows nothing of this place")
            elif forgetting.run and forgetting.run[0] < 0:
                found.append("the interval reaches below 0, where no KL can be")
        if self.told["lack_of_fit"]["lacks"]:
            found.append("the law bends otherwise than the points do (law.md: lack of fit)")
        if self.told["loss_refused"]:
            found.append(f"the points do not identify the curve of the loss: {self.told['loss_refused']}")
        return found

    @property
    def has_ranks(self) -> bool:
        return self.record["size"] == "rank" or self.record["parameters_per_rank"] is not None

    def beyond(self, size: float, steps: float) -> tuple[str, ...]:
        """Why a place lies outside of the points: runs of no smaller and of no larger size were measured around it."""
        grid, unit = self.group["grid"], self.record["size"]
        found = [
            f"{name} {value:,.0f} is outside of the measured {min(told):,.0f} to {max(told):,.0f}"
            for name, value, told in ((unit, size, grid["sizes"]), ("steps", steps, grid["steps"]))
            if not min(told) <= value <= max(told)
        ]
        reached = [one for one, first, last in grid["reach"] if first <= steps <= last]
        if not found and not (reached and min(reached) <= size <= max(reached)):
            where = f"only with {unit} {min(reached):,.0f} to {max(reached):,.0f}" if reached else "with no size"
            found.append(f"{steps:,.0f} steps were reached {where}, not around {size:,.0f}")
        return tuple(found)


@dataclass(frozen=True)
class Within:
    """The last whole number within a budget, and how far that can be relied on."""

    most: int | None  # None: not one
    end: bool = False  # it is the largest that is looked at
    uneven: tuple[str, ...] = ()  # where the bound is on the wrong side of the budget
    beyond: tuple[str, ...] = ()  # why the answer is an extrapolation


def last_within(bound: Callable[[np.ndarray], np.ndarray], limit: float, measured: float, most: int) -> Within:
    """The last whole number before the bound first passes the limit, beginning at the smallest measured number.

    Smaller ones only where the bound there is over the limit already.
    """
    begin = max(1, math.ceil(measured))
    tried = np.unique(np.round([*np.geomspace(1, begin, 100), *np.geomspace(begin, most, 400)]))
    over = ~(bound(tried) <= limit)
    start = int(np.searchsorted(tried, begin))
    if over[start]:
        start = int(np.flatnonzero(~over[:start]).max(initial=-1))
    if start < 0:
        return Within(None, uneven=_back_within(tried, over, begin))
    passed = np.flatnonzero(over[start:])
    below = tried[:start][over[:start]]
    uneven = (f"the bound is not monotone: up to {below.max():,.0f} it is over the budget too",) if len(below) else ()
    if not len(passed):
        return Within(most, True, uneven)
    low, high = (int(tried[start + passed[0] - i]) for i in (1, 0))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bound(np.array([float(middle)]))[0] <= limit else (low, middle)
    return Within(low, False, uneven + _back_within(tried, over, high))


def _back_within(tried: np.ndarray, over: np.ndarray, after: float) -> tuple[str, ...]:
    later = tried[(tried > after) & ~over]
    return (
        (f"the bound is not monotone: from {later.min():,.0f} on it is within the budget again",) if len(later) else ()
    )


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
