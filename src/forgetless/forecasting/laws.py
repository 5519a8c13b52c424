"""How fine-tuning loss and forgetting depend on tuned parameters P and steps N (Kalajdzievski 2024, arXiv 2401.05605).

    L_ft(P, N) = s_ft + c_ft [(a_ft/P)^α_ft + (b_ft/N)^β_ft]^ρ          falls
    L_f (P, N) = s_f  - c_f  [(a_f /P)^α_f  + (b_f /N)^β_f ]^ρ          grows
    L_f        = s_{f,ft} - c_{f,ft} L_ft                               the linear relation of the two

The abstract says "shifted power law"; this form of it is worked out from the names of the published constants, which
it brings into agreement. One of a, b and c is free in each curve: here (a/P0)^α + (b/N0)^β = 1 at the middle P0, N0
of the points. A fit searches over what the points see best: the elasticities at the middle, e_P = ραw and
e_N = ρβ(1-w), and the share w of the first term. As ρ grows, the law becomes a product of powers of P and N.

All of these level off: s_f - c_f N^-e is steepest at the first steps. A KL begins at 0 and is quadratic in an update
that is small, so at few steps it may grow straight or ever faster. Two laws of ours do that:

    L_f (P, N) = c_f P^p N^n,      L_f (P, N) = s_f + c_f P^p N^n
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Curve = Callable[[Mapping[str, np.ndarray], np.ndarray, np.ndarray], np.ndarray]
"""(constants (..., 1), log P/P0 (points,), log N/N0 (points,)) -> a curve's values, (..., points)."""

BOUNDS = {
    "e_P": (0.0, 5.0),
    "e_N": (0.0, 5.0),
    "p": (-5.0, 5.0),
    "n": (0.0, 5.0),
    "logit_w": (-4.0, 4.0),
    "log_rho": (math.log(0.2), math.log(30.0)),
    "log_c": (-20.0, 10.0),
}
"""Within which a constant is searched; others are free."""
SMALLEST = -600.0  # logarithm of a constant that is still a number
NAMES = {"logit_w": "the share w of its first term", "log_rho": "its exponent ρ", "e_P": "its exponent e_P of the size",
         "e_N": "its exponent e_N of the steps", "p": "its exponent p of the size", "n": "its exponent n of the steps",
         "log_c": "its factor c"}  # fmt: skip
IN_STEPS = ("e_N", "n")
LEAST_BEND = 0.1  # of e_N ln(last / first step): below it s ± c N^e is a logarithm to within 1 % of its own change


def shifted_power(
    P: np.ndarray | float, N: np.ndarray | float, *, a: float, b: float, alpha: float, beta: float, c: float,
    rho: float, s: float,
) -> np.ndarray:  # fmt: skip
    """s + c [(a/P)^α + (b/N)^β]^ρ, in the unit of s."""
    P, N = np.asarray(P, float), np.asarray(N, float)
    return s + c * ((a / P) ** alpha + (b / N) ** beta) ** rho


def linear(loss: np.ndarray | float, *, c: float, s: float) -> np.ndarray:
    """Forgetting that belongs to a fine-tuning loss: s - c loss."""
    return s - c * np.asarray(loss, float)


@dataclass(frozen=True)
class Law:
    """A law of both curves, each with constants of its own and shared ones."""

    name: str
    formula: str  # of forgetting
    shared: tuple[str, ...]
    own: tuple[tuple[str, ...], tuple[str, ...]]  # of fine-tuning loss and of forgetting: c and s last, where they are
    curves: tuple[Curve, Curve]
    needs: tuple[int, int] = (1, 1)  # distinct numbers of parameters, and of steps

    @property
    def names(self) -> list[str]:
        """Of all constants, in the order in which a fit has them."""
        ends = zip(self.own, ("ft", "f"), strict=True)
        return [*self.shared, *(f"{name}_{end}" for own, end in ends for name in own)]

    def places(self, curve: int) -> list[int]:
        """Where a curve's constants are in that order (0: fine-tuning loss, 1: forgetting)."""
        start = len(self.shared) + curve * len(self.own[0])
        return [*range(len(self.shared)), *range(start, start + len(self.own[curve]))]

    def constants(self, theta: np.ndarray, curve: int) -> dict[str, np.ndarray]:
        """Of one curve, by name, (...,) each of (..., constants)."""
        names = (*self.shared, *self.own[curve])
        return {name: theta[..., i] for name, i in zip(names, self.places(curve), strict=True)}

    def __call__(self, theta: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
        """Fine-tuning loss and forgetting at p = log P/P0 and q = log N/N0: (..., 2, points) of (..., constants)."""
        both = (
            curve({name: value[..., None] for name, value in self.constants(theta, i).items()}, p, q)
            for i, curve in enumerate(self.curves)
        )
        with np.errstate(over="ignore"):  # far from the points a power may be infinite, and is told so
            return np.stack(list(both), axis=-2)


def bare(name: str) -> str:
    """A constant's name without its curve: e_P of e_P_ft."""
    return name.removesuffix("_ft").removesuffix("_f")


def _constant(told: Mapping[str, np.ndarray], p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.zeros_like(told["s"] + p)


def _log_linear(told: Mapping[str, np.ndarray], p: np.ndarray, q: np.ndarray) -> np.ndarray:
    # - k_P log P/P0 - k_N log N/N0
    return -told["k_P"] * p - told["k_N"] * q


def _product(told: Mapping[str, np.ndarray], p: np.ndarray, q: np.ndarray) -> np.ndarray:
    # c (P/P0)^-e_P (N/N0)^-e_N
    return np.exp(told["log_c"] - told["e_P"] * p - told["e_N"] * q)


def _shifted(told: Mapping[str, np.ndarray], p: np.ndarray, q: np.ndarray) -> np.ndarray:
    # c [w (P/P0)^-α + (1-w) (N/N0)^-β]^ρ, in logarithms, so that no power is too large for a float
    w, rho, alpha, beta = shape(told)
    inner = np.logaddexp(np.log(w) - alpha * p, np.log1p(-w) - beta * q)
    return np.exp(told["log_c"] + rho * inner)


def _power(told: Mapping[str, np.ndarray], p: np.ndarray, q: np.ndarray) -> np.ndarray:
    # c (P/P0)^p (N/N0)^n
    return np.exp(told["log_c"] + told["p"] * p + told["n"] * q)


def _above(rest: Curve) -> Curve:
    return lambda told, p, q: told["s"] + rest(told, p, q)


def _below(rest: Curve) -> Curve:
    return lambda told, p, q: told["s"] - rest(told, p, q)


def shape(told: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """w, ρ, α and β of a shifted power law (ρ = 1 where it is no constant of the law)."""
    w = 1 / (1 + np.exp(-told["logit_w"]))
    rho = np.exp(told["log_rho"]) if "log_rho" in told else np.ones_like(w)
    return w, rho, told["e_P"] / (rho * w), told["e_N"] / (rho * (1 - w))


def published_form(told: Mapping[str, np.ndarray], P0: float, N0: float) -> dict[str, float | None]:
    """a, b, α, β, c, ρ, s of a shifted power law's curve; a (b) is None where P (N) changes next to nothing."""
    w, rho, alpha, beta = map(float, shape(told))
    # (a/P0)^α = w and (b/N0)^β = 1 - w
    log_a, log_b = (math.log(share) / power if power > 0 else -math.inf for share, power in ((w, alpha), (1 - w, beta)))
    return {
        "a": P0 * math.exp(log_a) if log_a > SMALLEST else None,
        "b": N0 * math.exp(log_b) if log_b > SMALLEST else None,
        "alpha": alpha,
        "beta": beta,
        "c": math.exp(told["log_c"]),
        "rho": rho,
        "s": float(told["s"]),
    }


def _mirrored(
    name: str, formula: str, shared: tuple[str, ...], own: tuple[str, ...], fall: Curve, needs: tuple[int, int] = (3, 4)
) -> Law:
    """The loss falls as forgetting grows: L_ft = s + fall, L_f = s - fall."""
    return Law(name, formula, shared, (own, own), (_above(fall), _below(fall)), needs)


def _growing(name: str, formula: str, own: tuple[str, ...], curve: Curve) -> Law:
    """Forgetting that need not level off; the loss is a product law's."""
    return Law(name, formula, (), (PRODUCT, own), (_above(_product), curve), (3, 4))


SHAPE = ("e_P", "e_N", "logit_w")
PRODUCT = ("e_P", "e_N", "log_c", "s")
SUM = "c [(a/P)^α + (b/N)^β]"  # of a shifted power law
LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        _mirrored("constant", "s", (), ("s",), _constant, (1, 1)),
        _mirrored("log-linear", "s + k_P ln P + k_N ln N", (), ("k_P", "k_N", "s"), _log_linear, (2, 2)),
        _growing("power", "c P^p N^n", ("p", "n", "log_c"), _power),
        _growing("growing", "s + c P^p N^n", ("p", "n", "log_c", "s"), _above(_power)),
        _mirrored("product", "s - c P^-e_P N^-e_N", (), PRODUCT, _product),
        _mirrored("additive", f"s - {SUM}", (), (*SHAPE, "log_c", "s"), _shifted),
        _mirrored("tied", f"s - {SUM}^ρ, a b α β ρ of both curves", (*SHAPE, "log_rho"), ("log_c", "s"), _shifted),
        _mirrored("shifted", f"s - {SUM}^ρ, ρ of both curves", ("log_rho",), (*SHAPE, "log_c", "s"), _shifted),
    )
}
"""Name -> law, the simplest first. `tied`: the two curves are a linear function of one another."""
