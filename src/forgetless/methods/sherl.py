"""SHERL: a side network reads the outputs of the frozen early blocks, less of those that say the same, and speaks to
the last block. Nothing runs backward through the early blocks, so nothing of them is kept.

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
        from_base: training begins at the untouched base; false: as in the release, where h_n counts tanh(10 γ) times,
            at first not at all, and the last norm begins at 1
    """

    paper = "2407.07523"
    adopts = "it trains a side network, and an adopted adapter has LoRA pairs; take sequential"
    summary = "a side network from the early blocks to the last one, trained on; no activations of early blocks kept"
    adapter_class: ClassVar[type[Adapters]] = SideNetwork
    plain_pairs = False
    extra_compute = "(blocks + 1) x `hidden` x width products a token, instead of pairs and early backward passes"
    stock_peft = False
    remedy = "it stands between two blocks: `SHERL.resume` puts a task's side network back into a model"
    off: ClassVar[str] = "it trains a side network where `sequential` trains pairs"
    within_task: ClassVar[tuple[str, ...]] = ("share",)
    example: ClassVar[dict] = {"hidden": 16}
    adapters: SideNetwork

    def __init__(self, hidden: int = 64, late: int = 1, from_base: bool = True):
        if hidden < 2:
            raise UsageError(f"hidden {hidden}: 2 or more, since a norm of one number says nothing")
        self.hidden, self.late, self.from_base = hidden, late, from_base

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        n, width = len(self.adapters.blocks(self.late)[0]), adapters.base.get_input_embeddings().embedding_dim

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
        self.adapters.put(tables, self.route, self.late, kind="SHERL")

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.adapters.mark()
        self.share = torch.zeros(())  # ||side|| / ||h_n|| of the last batch

    def route(self, states: list[Tensor]) -> Tensor:
        """[h_0, ..., h_n], each (rows, length, width) -> what goes into the late blocks."""
        t = {name: table.P.to(states[0].dtype) for name, table in self.adapters.pairs().items()}
        gain, shift = t["norm"]
        z = [layer_norm(linear(h, P, b), b.shape, *norm)
             for h, P, b, *norm in zip(states, t["P"], t["b"], gain, shift, strict=True)]  # fmt: skip
        spoken = linear(consolidated(torch.stack(z, -2), t["w"], t["c"]).relu(), t["W"], t["out_b"])
        size = states[-1].float().square().mean(-1, keepdim=True).sqrt().to(spoken.dtype)
        side = size * layer_norm(spoken, t["out_b"].shape, *t["out_norm"])
        if torch.is_grad_enabled():
            self.share = side.detach().float().norm() / states[-1].float().norm()
        return side + (float(self.from_base) + (STEEPNESS * t["gate"]).tanh()) * states[-1]

    def told(self) -> dict[str, float]:
        gate = self.adapters.pairs()["gate"].P.detach()
        return {"side_share": float(self.share), "gate": float((STEEPNESS * gate).tanh())}

    def checks(self) -> list[Check]:
        meaning = "||s|| / ||h_n|| in the last step: how loud the side network is"
        share = float(self.share)
        return [*super().checks(), Check("side", share, share > 0, meaning)]


def consolidated(z: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """g + Σ_i α_i z_i of features z (..., n + 1, hidden), the last of which is the guide g -> (..., hidden)."""
    early, guide = z[..., :-1, :], z[..., -1, :]
    unit = normalize(early, dim=-1)
    redundancy = (unit @ unit.mT).relu().sum(-1)
    a = ((early * guide.unsqueeze(-2)) @ w + c).relu() / redundancy.clamp_min(1e-8)
    return guide + (normalize(a, p=1, dim=-1).unsqueeze(-1) * early).sum(-2)
