"""HypLoRA: the pair acts between the maps of a hyperbolic space, so that an update bends with its input's length.

    x_s = √K sinh( min( ||x|| / (s √K), 12 ) ) x / ||x||          space part of the exponential map at the origin
    y   = B A x_s,   t = √( ||y||² + K )                          back on the hyperboloid
    h   = W_0 x + α/r √K arccosh( t / √K ) y / ||y||              logarithmic map                    arXiv 2410.04010

K = softplus(k) + 10⁻⁶ and s, one of each a layer, are trained with A and B; k begins at 1, s at √in.

With u = ||y|| / √K,  arccosh √(u² + 1) = arcsinh u:  both maps are a vector times sinh(a) / a or arcsinh(u) / u, which
are smooth at 0, where B begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from forgetless.methods.base import Check, Method, State
from forgetless.seeds import generator

LONGEST = 12.0  # sinh(12) = 81,377
STEEPEST = 0.01  # of k's gradient
NEAR_0 = 1e-6


class HypLoRA(Method):
    """Hyperbolic LoRA. It has no options of its own."""

    paper = "2410.04010"
    adopts = "its update bends with the input's length, and an adopted one does not; take sequential"
    plain_pairs = False
    summary = "one adapter between the maps of a hyperbolic space, trained on; its update bends with the input's length"
    extra_compute = "a few operations a number on each adapted layer's input and output, in fp32"
    stock_peft = False
    remedy = (
        "its update is no fixed B A, since it bends with the input's length: `HypLoRA.resume` puts A, B, K and s from "
        "a task's folder back into a model"
    )
    within_task: ClassVar[tuple[str, ...]] = ("curved",)
    off: ClassVar[str] = "the maps bend every update; there is no value of K at which they do not"

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        A = [pair.A for pair in adapters.pairs().values()]
        self.layer = {name: i for i, name in enumerate(adapters.pairs())}
        self.k = nn.Parameter(torch.ones(len(A), device=A[0].device))
        self.s = nn.Parameter(torch.tensor([math.sqrt(one.shape[1]) for one in A], device=A[0].device))
        adapters.compute_by(self._update, [self.k, self.s], kind="HYPLORA")

    def _update(self, name: str, x: Tensor) -> Tensor:
        pair, i = self.adapters.pairs()[name], self.layer[name]
        K = softplus(self.k[i]) + 1e-6
        y = linear(linear(exponential(x.float(), K, self.s[i]), pair.A), pair.B)
        return pair.scale * logarithmic(y.float(), K)

    def after_backward(self) -> None:
        if self.k.grad is not None:
            self.k.grad.clamp_(-STEEPEST, STEEPEST)

    @property
    def curved(self) -> list[Tensor]:
        return [self.k.detach(), self.s.detach()]

    @curved.setter
    def curved(self, values: list[Tensor]) -> None:
        for mine, value in zip(self.curved, values, strict=True):
            mine.copy_(value)

    def state(self) -> State:
        return State({"k": self.k, "s": self.s}, {})

    def restore(self, state: State) -> None:
        self.curved = [state.tensors["k"], state.tensors["s"]]

    def told(self) -> dict[str, float]:
        return {"K": float((softplus(self.k.detach()) + 1e-6).mean()), "s": float(self.s.detach().mean())}

    def checks(self) -> list[Check]:
        bend = max(self._bend(name) for name in self.layer)
        meaning = "||f(2x) - 2 f(x)|| / ||2 f(x)|| of a random input, in the most bent layer; 0 for a product B A"
        return [*super().checks(), Check("bend", bend, bend > 0, meaning)]

    @torch.no_grad()
    def _bend(self, name: str) -> float:
        A = self.adapters.pairs()[name].A
        x = torch.randn(A.shape[1], generator=generator("bend", self.seed, name)).to(A.device)
        once, twice = self._update(name, x), self._update(name, 2 * x)
        return float((twice - 2 * once).norm() / (2 * once).norm().clamp_min(1e-30))


def exponential(x: Tensor, K: Tensor, s: Tensor) -> Tensor:
    """√K sinh( min( ||x|| / (s √K), 12 ) ) x / ||x||, of x (..., in); 0 at 0."""
    length = x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    a = (length / (s * K.sqrt())).clamp_max(LONGEST)
    return x * (K.sqrt() * (a / length) * divided(torch.sinh, a.square(), 1 / 6))


def logarithmic(y: Tensor, K: Tensor) -> Tensor:
    """√K arccosh( √(||y||² + K) / √K ) y / ||y||, of y (..., out); 0 at 0."""
    return y * divided(torch.arcsinh, y.square().sum(-1, keepdim=True) / K, -1 / 6)


def divided(f: Callable[[Tensor], Tensor], square: Tensor, second: float) -> Tensor:
    """f(a) / a from a², for an odd f with f(a) = a + second a³ + ...: also at 0, with its gradient."""
    near = square < NEAR_0
    a = torch.where(near, 1.0, square).sqrt()
    return torch.where(near, 1 + second * square, f(a) / a)
