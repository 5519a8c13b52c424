"""How fine-tuning loss and forgetting depend on tuned parameters P and steps N (Kalajdzievski 2024, arXiv 2401.05605).

    L_ft(P, N) = s_ft + c_ft [(a_ft/P)^α_ft + (b_ft/N)^β_ft]^ρ          falls
    L_f (P, N) = s_f  - c_f  [(a_f /P)^α_f  + (b_f /N)^β_f ]^ρ          grows
    L_f        = s_{f,ft} - c_{f,ft} L_ft                               the linear relation of the two

The abstract says "shifted power law"; this form of it is worked out from the names of the published constants, which
it brings into agreement. One of a, b and c is free in each curve: here (a/P0)^α + (b/N0)^β = 1 at the middle P0, N0
of the points. A fit searches over what the points see best: the elasticities at the middle, e_P = ραw and
e_N = ρβ(1-w), and the share w of the first term. As ρ grows, the law becomes a product of powers of P and N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Curve = Callable[[Mapping[str, np.ndarray], np.ndarray, np.ndarray], np.ndarray]
"""(constants (..., 1), log P/P0 (points,), log N/N0 (points,)) -> what a curve lies above its floor, (..., points)."""

BOUNDS = {
    "e_P": (0.0, 5.0),
    "e_N": (0.0, 5.0),
    "logit_w": (-4.0, 4.0),
    "log_rho": (math.log(0.2), math.log(30.0)),
    "log_c": (-20.0, 10.0),
}
"""Within which a constant is searched; others are free."""
SMALLEST = -600.0  # logarithm of a constant that is still a number
EDGES = {"logit_w": "the share w of its first term", "log_rho": "its exponent ρ"}
"""Constants that say nothing where they end at an edge: there the law is a simpler one."""


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
    """A law of both curves: L_ft = s + fall and L_f = s - fall, each with constants of its own and shared ones."""

    name: str
    formula: str  # of the loss; forgetting has a minus before what falls
    shared: tuple[str, ...]
    own: tuple[str, ...]  # of each curve, `s` last
    fall: Curve
    needs: tuple[int, int] = (1, 1)  # distinct numbers of parameters, and of steps

    @property
    def names(self) -> list[str]:
        """Of all constants, in the order in which a fit has them."""
        return [*self.shared, *(f"{name}_ft" for name in self.own), *(f"{name}_f" for name in self.own)]

    def constants(self, theta: np.ndarray, curve: int) -> dict[str, np.ndarray]:
        """Of one curve (0: fine-tuning loss, 1: forgetting), by name, (...,) each of (..., constants)."""
        start = len(self.shared) + curve * len(self.own)
        places = [*range(len(self.shared)), *range(start, start + len(self.own))]
        return {name: theta[..., i] for name, i in zip((*self.shared, *self.own), places, strict=True)}

    def __call__(self, theta: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
        """Fine-tuning loss and forgetting at p = log P/P0 and q = log N/N0: (..., 2, points) of (..., constants)."""
        loss, forgetting = (
            {name: value[..., None] for name, value in self.constants(theta, curve).items()} for curve in (0, 1)
        )
        both = loss["s"] + self.fall(loss, p, q), forgetting["s"] - self.fall(forgetting, p, q)
        return np.stack(both, axis=-2)


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


SHAPE = ("e_P", "e_N", "logit_w")
LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law("constant", "s", (), ("s",), _constant),
        Law("log-linear", "s - k_P ln P - k_N ln N", (), ("k_P", "k_N", "s"), _log_linear, (2, 2)),
        Law("product", "s + c P^-e_P N^-e_N", (), ("e_P", "e_N", "log_c", "s"), _product, (3, 4)),
        Law("additive", "s + c [(a/P)^α + (b/N)^β]", (), (*SHAPE, "log_c", "s"), _shifted, (3, 4)),
        Law("tied", "s + c [(a/P)^α + (b/N)^β]^ρ, a b α β ρ of both curves", (*SHAPE, "log_rho"), ("log_c", "s"),
            _shifted, (3, 4)),
        Law("shifted", "s + c [(a/P)^α + (b/N)^β]^ρ, ρ of both curves", ("log_rho",), (*SHAPE, "log_c", "s"),
            _shifted, (3, 4)),
    )
}  # fmt: skip
"""Name -> law, the simplest first. `tied`: the two curves are a linear function of one another."""
