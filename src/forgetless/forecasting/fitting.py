"""Fits a law to points: least squares that a few wild points do not move, from many starts, with intervals.

A training run gives many points, one for each number of steps at which it was measured, and they err together. So
intervals resample whole runs: in every draw each run's residuals get one random factor (the wild cluster bootstrap of
Cameron, Gelbach and Miller 2008, with Webb's six factors, which few runs need), both curves the same one, and the law
is fitted again. The design stays as it is: a rank that only one run has is in every draw. Residuals are first made
larger by what the fit has taken of them, as leaving a run out would show them (CR3; MacKinnon, Nielsen and Webb 2023
find it the safest with few runs). Intervals are the value ± t times the root mean square of what the draws are off by,
t having one degree of freedom less than there are runs.

Points seldom tell which law is true. Of the laws that err about as little where they had not seen the points the
simplest one forecasts. All of them give draws, each around its own curve: what they disagree on widens the interval (as
in Buckland, Burnham and Augustin 1997).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import t

from forgetless.forecasting.laws import BOUNDS, IN_STEPS, LAWS, LEAST_BEND, NAMES, Law, bare

STARTS = 24  # of the search
ROUNDS, ROUNDS_NEAR = 30, 8  # of steps from a random start, and from constants that are nearly right
DRAWS = 200  # of the bootstrap
FEWEST_RUNS = 5  # of which intervals are given
HUBER = 1.345  # robust scales beyond which a residual counts linearly: 95 % efficient on normal errors
DEGENERATE = 1e-6  # ratio of singular values of the scaled Jacobian
LARGEST_LEVERAGE = 0.95  # of a direction of a run's residuals, beyond which it is not made larger
RIVAL = 1.25  # times the least error on held-out points: laws that err no more may be as true
FAR = 3.0  # standard errors
WEBB = np.sqrt([0.5, 1.0, 1.5])


@dataclass(frozen=True)
class Grid:
    """Measured points of one data set: everything (points,)."""

    parameters: np.ndarray  # or ranks
    steps: np.ndarray
    loss: np.ndarray  # fine-tuning loss, nats per token
    forgetting: np.ndarray  # nats per token
    run: np.ndarray  # number of the training run

    @property
    def centre(self) -> tuple[float, float]:
        """P0 and N0: geometric means of the distinct values."""
        return tuple(float(np.exp(np.log(np.unique(one)).mean())) for one in (self.parameters, self.steps))  # type: ignore[return-value]

    @property
    def measured(self) -> np.ndarray:
        """Both curves: (2, points)."""
        return np.stack([self.loss, self.forgetting])

    def only(self, kept: np.ndarray) -> Grid:
        """The points where `kept` is true."""
        return Grid(*(getattr(self, name)[kept] for name in ("parameters", "steps", "loss", "forgetting", "run")))


@dataclass(frozen=True)
class Fit:
    """A law with its constants, and why the points cannot identify its curve of forgetting, or that of the loss."""

    law: Law
    theta: np.ndarray  # (constants,)
    centre: tuple[float, float]
    scale: np.ndarray  # (2,) robust size of the residuals, at which they were weighed
    refused: str | None = None
    loss_refused: str | None = None

    def __call__(self, parameters: np.ndarray | float, steps: np.ndarray | float) -> np.ndarray:
        """Fine-tuning loss and forgetting: (2, points)."""
        return curves(self.law, self.theta, self.centre, parameters, steps)


def curves(
    law: Law, theta: np.ndarray, centre: tuple[float, float], parameters: np.ndarray | float, steps: np.ndarray | float
) -> np.ndarray:
    """Fine-tuning loss and forgetting of a law with these constants: (..., 2, points) of (..., constants)."""
    p, q = (np.log(np.atleast_1d(np.asarray(x, float)) / x0) for x, x0 in zip((parameters, steps), centre, strict=True))
    return law(theta, *np.broadcast_arrays(p, q))


def fit(law: Law, grid: Grid, *, starts: int = STARTS, seed: int = 0, centre: tuple[float, float] | None = None,
        first: np.ndarray | None = None) -> Fit:  # fmt: skip
    """The constants with the least Huber loss of residuals, each curve's in units of its own robust scale.

    `first`: constants that are nearly right, to begin with instead of random ones. `centre`: P0 and N0; default those
    of the points.
    """
    centre = centre or grid.centre
    rng = np.random.default_rng(seed)
    many = starts if "log_c" in law.own[1] else 1  # without powers there is one valley
    begins = [_start(law, grid, centre, rng) for _ in range(many)] if first is None else [first]
    scale = np.maximum(grid.measured.std(axis=1), 1e-9)
    rounds = ROUNDS if first is None else ROUNDS_NEAR
    tried, costs = descend(law, np.array(begins), grid.measured, grid, centre, scale, rounds)
    found = _polish(law, tried[np.argmin(costs)], grid, centre, scale)
    for _ in range(2):  # once more with the scale that the residuals have
        scale = _robust_scale(grid.measured - curves(law, found, centre, grid.parameters, grid.steps), grid)
        found = _polish(law, found, grid, centre, scale)
    refused = (_refusal(law, found, grid, centre, scale, curve) for curve in (1, 0))
    return Fit(law, found, centre, scale, *refused)


def _start(law: Law, grid: Grid, centre: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A random shape; c and s of each curve then by least squares."""
    drawn = {
        "e_P": math.exp(rng.uniform(math.log(0.003), 0.0)),
        "e_N": math.exp(rng.uniform(math.log(0.01), 0.0)),
        "p": rng.uniform(-0.5, 0.5),
        "n": math.exp(rng.uniform(math.log(0.05), math.log(2.0))),
        "logit_w": rng.uniform(-2, 2),
        "log_rho": rng.uniform(math.log(0.5), math.log(12)),
        "k_P": 0.0,
        "k_N": 0.0,
        "log_c": 0.0,
        "s": 0.0,
    }
    theta = np.array([drawn[bare(name)] for name in law.names])
    rises = curves(law, theta, centre, grid.parameters, grid.steps)
    for curve, (rise, y) in enumerate(zip(rises, grid.measured, strict=True)):
        place = dict(zip((*law.shared, *law.own[curve]), law.places(curve), strict=True))
        one = np.ones_like(rise) if "s" in place else np.zeros_like(rise)
        slope, floor = np.linalg.lstsq(np.stack([rise, one], axis=-1), y, rcond=None)[0]
        if "log_c" in place:
            theta[place["log_c"]] = math.log(max(slope, 1e-3))
        if "s" in place:
            theta[place["s"]] = floor
    return np.clip(theta, *_bounds(law))


def _bounds(law: Law) -> tuple[np.ndarray, np.ndarray]:
    every = [BOUNDS.get(bare(name), (-math.inf, math.inf)) for name in law.names]
    low, high = np.array(every).T
    return low, high


def descend(
    law: Law, thetas: np.ndarray, measured: np.ndarray, grid: Grid, centre: tuple[float, float], scale: np.ndarray,
    rounds: int = ROUNDS,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Levenberg's steps from many starts at once, and where each one's Huber loss then stands.

    thetas: (starts, constants); measured: (2, points), or (starts, 2, points) where each start has values of its own.
    """
    low, high = _bounds(law)
    thetas = np.clip(thetas, low, high)

    def off(told: np.ndarray) -> np.ndarray:
        return _flat((curves(law, told, centre, grid.parameters, grid.steps) - measured) / scale[:, None])

    residuals, damping = off(thetas), np.full(len(thetas), 1e-2)
    costs = _huber(residuals)
    for _ in range(rounds):
        J = _flat(
            np.moveaxis(jacobian(law, thetas, grid, centre) / scale[:, None, None], -1, -3)
        )  # (starts, constants, values)
        # a residual beyond HUBER weighs as much less as it is larger
        J_weighted = J * np.minimum(1.0, HUBER / np.maximum(np.abs(residuals), 1e-12))[:, None]
        normal = J_weighted @ np.swapaxes(J, -1, -2)  # (starts, constants, constants)
        diagonal = np.einsum("bii->bi", normal)
        diagonal += damping[:, None] * diagonal + 1e-12
        step = np.linalg.solve(normal, J_weighted @ residuals[..., None])[..., 0]
        moved = np.clip(thetas - step, low, high)
        there = off(moved)
        better = (new := _huber(there)) < costs
        thetas, residuals = np.where(better[:, None], moved, thetas), np.where(better[:, None], there, residuals)
        costs, damping = np.where(better, new, costs), np.clip(np.where(better, damping / 5, damping * 5), 1e-9, 1e9)
    return thetas, costs


def _flat(values: np.ndarray) -> np.ndarray:
    """(..., 2, points) -> (..., 2 points)."""
    return values.reshape(*values.shape[:-2], -1)


def _huber(residuals: np.ndarray) -> np.ndarray:
    sizes = np.abs(residuals)
    near = np.minimum(sizes, HUBER)
    told = (near * (sizes - 0.5 * near)).sum(axis=-1)
    return np.where(np.isfinite(told), told, np.inf)


def _polish(law: Law, theta: np.ndarray, grid: Grid, centre: tuple[float, float], scale: np.ndarray) -> np.ndarray:
    """The bottom of the valley, to machine accuracy."""

    def residuals(told: np.ndarray) -> np.ndarray:
        return _flat((curves(law, told, centre, grid.parameters, grid.steps) - grid.measured) / scale[:, None])

    def derivatives(told: np.ndarray) -> np.ndarray:
        return (jacobian(law, told, grid, centre) / scale[:, None, None]).reshape(-1, len(theta))

    low, high = _bounds(law)
    inside = np.clip(theta, low + 1e-9, high - 1e-9)
    return least_squares(residuals, inside, derivatives, bounds=(low, high), loss="huber", f_scale=HUBER,
                         x_scale="jac", max_nfev=30).x  # fmt: skip


def _robust_scale(residuals: np.ndarray, grid: Grid) -> np.ndarray:
    """1.4826 times the median size, (2,); not below a millionth of what the curve varies by."""
    sizes = 1.4826 * np.median(np.abs(residuals), axis=1)
    return np.maximum(sizes, np.maximum(1e-6 * grid.measured.std(axis=1), 1e-12))


def jacobian(law: Law, theta: np.ndarray, grid: Grid, centre: tuple[float, float]) -> np.ndarray:
    """Central differences of both curves by (..., constants): (..., 2, points, constants)."""
    moves = 1e-5 * np.maximum(1.0, np.abs(theta))
    aside = np.moveaxis(moves[..., None] * np.eye(theta.shape[-1]), -1, 0)  # (constants, ..., constants)
    up, down = (curves(law, theta + sign * aside, centre, grid.parameters, grid.steps) for sign in (1, -1))
    return np.moveaxis(up - down, 0, -1) / (2 * moves[..., None, None, :])


def _refusal(
    law: Law, theta: np.ndarray, grid: Grid, centre: tuple[float, float], scale: np.ndarray, curve: int
) -> str | None:
    """Why these points do not identify a curve of the law; None where they do."""
    have = len(np.unique(grid.parameters)), len(np.unique(grid.steps))
    for many, need, what in zip(have, law.needs, ("numbers of parameters (ranks)", "numbers of steps"), strict=True):
        if many < need:
            return f"it needs at least {need} distinct {what}, the points have {many}"
    places = law.places(curve)
    if len(grid.steps) < len(places) + 2:
        return f"{len(places)} constants need at least {len(places) + 2} points, there are {len(grid.steps)}"
    low, high = _bounds(law)
    for i in places:
        name = bare(law.names[i])
        if min(theta[i] - low[i], high[i] - theta[i]) < 1e-3 and not (name == "e_P" and theta[i] < 1e-3):
            return f"{NAMES[name]} runs to the edge of what was searched, where the law is a simpler one"
        bend = theta[i] * np.log(grid.steps.max() / grid.steps.min())
        if name in IN_STEPS and "s" in law.own[curve] and bend < LEAST_BEND:
            return f"{NAMES[name]} is {theta[i]:.2g}: over these steps that is a logarithm, and log-linear says as much"
    J = (jacobian(law, theta, grid, centre) / scale[:, None, None]).reshape(-1, len(theta))[:, places]
    sizes = np.linalg.norm(J, axis=0)
    if (sizes == 0).any():
        return f"{law.names[places[int(np.argmin(sizes))]]} changes nothing at these points"
    values = np.linalg.svd(J / sizes, compute_uv=False)
    if values[-1] < DEGENERATE * values[0]:
        return (
            "its Jacobian is degenerate at these points (smallest to largest singular value "
            f"{values[-1] / values[0]:.1g}): other constants give the same curves"
        )
    return None


# ------------------------------------------------------------------------------------------- intervals


@dataclass(frozen=True)
class Draws:
    """The bootstrap: constants of every draw, and errors of a new run's measurement."""

    theta: np.ndarray  # (draws, constants)
    noise: np.ndarray  # (draws, 2)
    runs: int


def bootstrap(found: Fit, grid: Grid, *, draws: int = DRAWS, seed: int = 0) -> Draws:
    """Refits under random factors of each run's residuals."""
    rng = np.random.default_rng(seed)
    fitted = found(grid.parameters, grid.steps)
    J = jacobian(found.law, found.theta, grid, found.centre) / found.scale[:, None, None]
    off = (grid.measured - fitted) / found.scale[:, None]
    runs = np.unique(grid.run)
    grown = enlarged(J, off, grid.run) * found.scale[:, None]
    factors = np.stack([webb(len(runs), rng) for _ in range(draws)])[:, np.searchsorted(runs, grid.run)]
    told = fitted + factors[:, None] * grown  # (draws, 2, points)
    begin = np.broadcast_to(found.theta, (draws, len(found.theta)))
    thetas, _ = descend(found.law, begin, told, grid, found.centre, found.scale, ROUNDS_NEAR)
    of = [rng.choice(np.flatnonzero(grid.run == one)) for one in rng.choice(runs, draws)]
    return Draws(thetas, (grown[:, of] * rng.choice([-1.0, 1.0], draws)).T, len(runs))


def enlarged(J: np.ndarray, residuals: np.ndarray, run: np.ndarray) -> np.ndarray:
    """(I - H_gg)^{-1} e_g for each run g, with H = J (JᵀJ)⁺ Jᵀ: in a linear law what the fit without g misses g by.

    J: (curves, points, constants); residuals: (curves, points). (CR3; MacKinnon, Nielsen, Webb 2023, Journal of Applied
    Econometrics 38:671)
    """
    grown, whole = np.empty_like(residuals), J.reshape(-1, J.shape[-1])
    inverse = np.linalg.pinv(whole.T @ whole)
    for one in np.unique(run):
        mine = run == one
        rows = J[:, mine].reshape(-1, J.shape[-1])
        leverage, turned = np.linalg.eigh(rows @ inverse @ rows.T)
        factor = 1 / (1 - np.clip(leverage, 0.0, LARGEST_LEVERAGE))
        grown[:, mine] = (turned @ (factor * (turned.T @ residuals[:, mine].ravel()))).reshape(len(J), -1)
    return grown


def webb(many: int, rng: np.random.Generator) -> np.ndarray:
    """Factors with mean 0 and variance 1: ±√½, ±1, ±√1½. (Webb 2023, Canadian Journal of Economics 56:839)"""
    return rng.choice(np.concatenate([-WEBB, WEBB]), many)


def half_width(off: np.ndarray, runs: int, confidence: float, sides: int = 2) -> np.ndarray | None:
    """t times the root mean square of what draws are off by, (draws, ...); None below five runs.

    `sides`: 1 for a bound on one side.
    """
    if runs < FEWEST_RUNS:
        return None
    return t.ppf(1 - (1 - confidence) / sides, runs - 1) * np.sqrt((off**2).mean(axis=0))


# ------------------------------------------------------------------------------------------- how good is it?


def r_squared(measured: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """1 - Σ (y - ŷ)² / Σ (y - ȳ)² along the last axis."""
    total = ((measured - measured.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1)
    return 1 - ((measured - fitted) ** 2).sum(axis=-1) / total


def criteria(found: Fit, grid: Grid) -> dict[str, float]:
    """AICc and BIC of the curve of forgetting, errors being normal and points of a run counted as if independent.

    n points, K constants of the curve and a variance: AIC = n ln(RSS/n) + 2K, + 2K(K+1)/(n-K-1); BIC: K ln n for 2K.
    """
    n, K = len(grid.steps), len(found.law.places(1)) + 1
    off = grid.forgetting - found(grid.parameters, grid.steps)[1]
    misfit = n * math.log(max(float((off**2).mean()), 1e-24))
    small = 2 * K * (K + 1) / (n - K - 1) if n > K + 1 else math.inf
    return {"aicc": misfit + 2 * K + small, "bic": misfit + K * math.log(n)}


def lack_of_fit(found: Fit, grid: Grid) -> dict[str, Any]:
    """Mean residual of forgetting at the first, middle and last numbers of steps, in units of `spread`: the standard
    deviation between runs of one size (of all runs where each has a size of its own) at those steps.

    `lacks`: one of the means is more than FAR standard errors off, so the law bends otherwise than the points.
    """
    off = grid.forgetting - found(grid.parameters, grid.steps)[1]
    lengths = np.unique(grid.steps)
    at = [grid.steps == lengths[i] for i in (0, len(lengths) // 2, -1)]
    seeds = [
        of
        for one in at
        for size in np.unique(grid.parameters[one])
        if (of := one & (grid.parameters == size)).sum() > 1
    ]
    alike = [off[of] - off[of].mean() for of in seeds or at]
    free = sum(len(one) - 1 for one in alike)
    spread = math.sqrt(sum(float((one**2).sum()) for one in alike) / free) if free > 0 else 0.0
    means = [float(off[one].mean()) / max(spread, 1e-12) for one in at]
    lacks = any(abs(mean) * math.sqrt(one.sum()) > FAR for mean, one in zip(means, at, strict=True))
    return {"steps": lengths[[0, len(lengths) // 2, -1]].tolist(), "means": means, "spread": spread, "lacks": lacks}


def below_zero(found: Fit, grid: Grid) -> int:
    """The last whole step, up to the last measured, at which forgetting is below 0 at a measured size; 0 if at none, or
    if a measured value is below 0 too, so that it is no KL."""
    steps = np.arange(1, int(grid.steps.max()) + 1)
    P, N = np.meshgrid(np.unique(grid.parameters), steps, indexing="ij")
    negative = (found(P.ravel(), N.ravel())[1] < 0).reshape(P.shape).any(axis=0)
    return int(steps[negative].max()) if negative.any() and grid.forgetting.min() >= 0 else 0


def held_out(law: Law, grid: Grid, found: Fit) -> dict[str, list[float] | None]:
    """Root mean squared error (loss, forgetting) where the law had not seen it.

    `ranks`: each number of parameters in turn, from the others. `steps`: the longest third of the numbers of steps,
    from the shorter ones. None where too few are left. The search begins at the constants of all points.
    """
    sizes, lengths = np.unique(grid.parameters), np.unique(grid.steps)
    by_rank = [_errors(law, grid, grid.parameters != one, found) for one in sizes]
    by_steps = [_errors(law, grid, grid.steps < lengths[-max(1, len(lengths) // 3)], found)]
    return {"ranks": _rms(by_rank), "steps": _rms(by_steps)}


def _errors(law: Law, grid: Grid, kept: np.ndarray, found: Fit) -> np.ndarray | None:
    have = len(np.unique(grid.parameters[kept])), len(np.unique(grid.steps[kept]))
    if have < (1, 1) or any(many < need for many, need in zip(have, law.needs, strict=True)):
        return None
    again = fit(law, grid.only(kept), centre=found.centre, first=found.theta)
    rest = grid.only(~kept)
    return rest.measured - again(rest.parameters, rest.steps)


def _rms(errors: list[np.ndarray | None]) -> list[float] | None:
    if any(one is None for one in errors):
        return None
    told = np.concatenate([one for one in errors if one is not None], axis=1)
    return [float(one) for one in np.sqrt((told**2).mean(axis=1))]


def fit_all(grid: Grid, *, starts: int = STARTS, seed: int = 0) -> dict[str, Fit]:
    """Every law by its name."""
    return {name: fit(law, grid, starts=starts, seed=seed) for name, law in LAWS.items()}


def unseen(held: dict[str, dict[str, list[float] | None]]) -> dict[str, float]:
    """Each law's error of forgetting where it had not seen it: root mean square of those over ranks and over steps.

    Of the two what all laws have; empty where that is neither.
    """
    kinds = [kind for kind in ("ranks", "steps") if all(one[kind] for one in held.values())]
    squares = {name: [one[kind][1] ** 2 for kind in kinds] for name, one in held.items()}  # type: ignore[index]
    return {name: math.sqrt(sum(told) / len(kinds)) for name, told in squares.items()} if kinds else {}


def best(fits: dict[str, Fit], grid: Grid, held: dict[str, dict[str, list[float] | None]]) -> list[str]:
    """The laws that say best what forgetting is where they had not seen it, which err at most RIVAL times as much as
    the best one; the simplest first. Of the laws that the points identify; a constant forecasts nothing.

    Where nothing can be held out, the law with the lowest AICc alone.
    """
    known = [name for name, one in fits.items() if not one.refused and name != "constant"]
    errors = unseen({name: held[name] for name in known})
    if not errors:
        return sorted(known, key=lambda name: criteria(fits[name], grid)["aicc"])[:1]
    return [name for name in known if errors[name] <= RIVAL * min(errors.values())]
