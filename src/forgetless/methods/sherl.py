"""SHERL: a side network reads what the frozen early blocks give, less of what says the same, and speaks to the last
block. Nothing runs backward through the early blocks; of their activations only the h_i are kept.

    z_i = LN_i(P_i h_i + b_i)                          h_0, ..., h_n: the embeddings and what each early block gives
    g   = z_n                                          the guide
    ρ_i = Σ_j relu(cos(z_i, z_j)),   a_i = relu(w · (z_i ∘ g) + c) / ρ_i,   α = a / Σ a             i, j = 0 ... n-1
    s   = rms(h_n) LN(W relu(g + Σ_i α_i z_i) + b)              of the size of h_n, which grows from block to block
    input of the late blocks:   s + (1 + tanh(10 γ)) h_n                                            arXiv 2407.07523

All blocks are frozen; what is trained is P, b, w, c, W, the norms and γ, trained on from task to task.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, normalize

from forgetless.errors import UsageError
from forgetless.methods.base import Check, Method
from forgetless.model.adapters import Adapters
from forgetless.model.side import SideNetwork
from forgetless.seeds import generator

STEEPNESS = 10.0  # of the gate


class SHERL(Method):
    """A side network between early and late blocks.

    Args:
        hidden: width of the z_i
        late: how many of the last blocks read what the side network says
        from_base: training begins at the untouched base; false: at the side network alone, as the release does: h_n
            counts tanh(10 γ) times, at first not at all, and the last norm's gain begins at 1
    """

    paper = "2407.07523"
    adopts = "it trains a side network, and an adopted adapter has LoRA pairs; take sequential"
    summary = "a side network from the frozen early blocks to the last one, trained on; no backward pass through them"
    adapter_class: ClassVar[type[Adapters]] = SideNetwork
    plain_pairs = False
    extra_compute = "(blocks + 1) x `hidden` x width products a token, instead of pairs and early backward passes"
    stock_peft = False
    remedy = "it stands between two blocks: `SHERL.resume` puts a task's side network back into a model"
    off: ClassVar[str] = "it trains a side network where `sequential` trains pairs"
    example: ClassVar[dict] = {"hidden": 16}
    adapters: SideNetwork

    def __init__(self, hidden: int = 64, late: int = 1, from_base: bool = True):
        if hidden < 2:
            raise UsageError(f"hidden {hidden}: 2 or more, since a norm of one number says nothing")
        self.hidden, self.late, self.from_base = hidden, late, from_base

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        n, width = len(self.adapters.blocks(self.late)[0]), self.adapters.width

        def drawn(name: str, inputs: int, *shape: int) -> Tensor:
            """Uniform in ±1/sqrt(inputs), as torch begins a linear layer."""
            return (2 * torch.rand(shape, generator=generator("side", seed, name)) - 1) / math.sqrt(inputs)

        def norm(gain: float, *shape: int) -> Tensor:
            return torch.stack([torch.full(shape, gain), torch.zeros(shape)])

        tables = {
            "P": drawn("P", width, n + 1, self.hidden, width),
            "b": drawn("b", width, n + 1, self.hidden),
            "norm": norm(1, n + 1, self.hidden),
            "w": drawn("w", self.hidden, self.hidden),
            "c": drawn("c", self.hidden, 1),
            "W": drawn("W", self.hidden, width, self.hidden),
            "out_b": drawn("out_b", self.hidden, width),
            "out_norm": norm(0 if self.from_base else 1, width),
            "gate": torch.zeros(1),
        }
        self.adapters.put(tables, self.route, self.late, kind="SHERL", hidden=self.hidden, from_base=self.from_base)

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.adapters.mark()

    def route(self, states: list[Tensor]) -> Tensor:
        """[h_0, ..., h_n], each (rows, length, width) -> what goes into the late blocks."""
        h_n = states[-1]
        t = {name: table.P.to(h_n.dtype) for name, table in self.adapters.pairs().items()}
        gain, shift = t["norm"]
        z = [layer_norm(linear(h, P, b), b.shape, *norm)
             for h, P, b, *norm in zip(states, t["P"], t["b"], gain, shift, strict=True)]  # fmt: skip
        told = consolidated(torch.stack(z, -2), t["w"], t["c"]).to(h_n.dtype)
        size = h_n.float().square().mean(-1, keepdim=True).sqrt().to(h_n.dtype)
        side = size * layer_norm(linear(told.relu(), t["W"], t["out_b"]), t["out_b"].shape, *t["out_norm"])
        return side + self.gate().to(h_n.dtype) * h_n + (h_n if self.from_base else 0)

    def gate(self) -> Tensor:
        """tanh(10 γ)."""
        return (STEEPNESS * self.adapters.pairs()["gate"].P).tanh()

    def passes(self, rows: int, task: int) -> tuple[float, float]:
        return rows, rows * self.adapters.comes_back

    def loudness(self) -> float:
        """Root mean square of the last norm's gain and shift: about ||s|| / ||h_n||."""
        return float(self.adapters.pairs()["out_norm"].P.detach().square().sum(0).mean().sqrt())

    def told(self) -> dict[str, float]:
        return {"side": self.loudness(), "gate": float(self.gate().detach())}

    def checks(self) -> list[Check]:
        loud = self.loudness()
        meaning = "rms of the last norm's gain and shift, about ||s|| / ||h_n||; 0: the late blocks hear nothing"
        return [*super().checks(), Check("side", loud, loud > 0, meaning)]


def consolidated(z: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """g + Σ_i α_i z_i of features z (..., n + 1, hidden), the last of which is the guide g -> (..., hidden) in fp32."""
    with torch.autocast(z.device.type, enabled=False):
        early, guide = z[..., :-1, :].float(), z[..., -1, :].float()
        unit = normalize(early, dim=-1)
        redundancy = (unit @ unit.mT).relu().sum(-1)
        a = ((early * guide.unsqueeze(-2)) @ w.float() + c.float()).relu() / redundancy.clamp_min(1e-8)
        return guide + (normalize(a, p=1, dim=-1).unsqueeze(-1) * early).sum(-2)
