"""L2P: a pool of prompts, out of which each row's own features choose.

    q(x)     = mean over the tokens before the answer of the untouched base's last hidden states
    S(x)     = the N of the M keys k_m with the largest cos(q(x), k_m)
    p(y | x) = base(y | [P_s1; ... P_sN; E(x)]),   s_i in S(x), the nearest first
    L        = CE + λ Σ_{m in S(x)} (1 - cos(q(x), k_m))                        Wang et al. 2022, arXiv 2112.08654

Pool and keys are trained on from task to task. Rows of another task choose other prompts, so no task need be told.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from forgetless.data.batches import Part
from forgetless.errors import UsageError
from forgetless.learning.gradients import evaluating
from forgetless.methods.base import Check, Method
from forgetless.model.adapters import Adapters
from forgetless.model.prompted import encoded
from forgetless.model.prompts import PROMPT, Prompts
from forgetless.seeds import generator

KEYS = "keys"


class L2P(Method):
    """Learning to prompt.

    Args:
        pool: M, prompts in the pool
        tokens: virtual tokens of each of them
        top: N, how many of them stand before a row
        pull: λ, weight with which chosen keys are pulled to the rows that chose them
    """

    paper = "2112.08654"
    adopts = "it trains a soft prompt, and an adopted adapter has LoRA pairs; take sequential"
    summary = "a pool of soft prompts, out of which each row's features choose; no task id"
    adapter_class: ClassVar[type[Adapters]] = Prompts
    plain_pairs = False
    extra_memory = "none: the pool stands in the adapter's place"
    extra_compute = (
        "one more forward pass of the base, without gradient; `top` x `tokens` more tokens a row; not packed"
    )
    stock_peft = False
    remedy = (
        "its virtual tokens depend on the row: `L2P.resume` puts pool and keys of a task's folder back into a model"
    )
    off: ClassVar[str] = "it trains virtual tokens where `sequential` trains pairs, and rows always choose among them"
    within_task: ClassVar[tuple[str, ...]] = ("uses",)
    example: ClassVar[dict] = {"pool": 4, "tokens": 2, "top": 2}
    adapters: Prompts

    def __init__(self, pool: int = 10, tokens: int = 5, top: int = 3, pull: float = 0.5):
        if tokens < 1 or not 1 <= top <= pool:
            raise UsageError(
                f"pool {pool}, tokens {tokens}, top {top}: all 1 or more, and no more chosen than there are"
            )
        if pull < 0:
            raise UsageError(
                f"pull {pull}: a negative weight would push keys away from the rows that chose them; 0 or more"
            )
        self.pool, self.tokens, self.top, self.pull = pool, tokens, top, pull

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        keys = 2 * torch.rand(self.pool, adapters.width, generator=generator("keys", seed)) - 1
        tables = {PROMPT: self.adapters.drawn(self.pool * self.tokens, 0), KEYS: keys}
        self.adapters.put(tables, self.before, kind="L2P")

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.adapters.check_room(self.top * self.tokens, self.encoder.max_length)
        self.adapters.mark()
        self.uses = torch.zeros(self.pool, dtype=torch.long, device=self.adapters.base.device)  # rows that chose each
        self.nearness, self.step_nearness = 0.0, 0.0  # mean cos(q, k) of chosen keys, in the last step and in this one

    def before(self, ids: Tensor, context: Tensor) -> Tensor:
        """[P_s1; ... P_sN] of each row: (rows, N tokens, width)."""
        tables = self.adapters.pairs()
        with evaluating(self.adapters.base):
            q = encoded(self.adapters.base, ids, context)
        self.cosine, self.chosen = nearest(q, tables[KEYS].P, self.top)
        return tables[PROMPT].P.view(self.pool, self.tokens, -1)[self.chosen].flatten(1, 2)

    def loss(self, part: Part) -> Tensor:
        """A row counts in the second term as much as its answer tokens do in the first."""
        loss = super().loss(part)  # `before` chooses
        weights = torch.stack([one.sum() for one in part.weights.split(part.keep.sum(1).tolist())])
        self.uses += torch.bincount(self.chosen.flatten(), minlength=self.pool)
        self.step_nearness += float((weights * self.cosine.mean(1)).sum().detach())
        return loss + self.pull * (weights * (1 - self.cosine).sum(1)).sum()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.nearness, self.step_nearness = self.step_nearness, 0.0

    def told(self) -> dict[str, float]:
        return {"key_cosine": self.nearness}

    def checks(self) -> list[Check]:
        used, moved = int((self.uses > 0).sum()), self.adapters.moved(KEYS)
        return [
            *super().checks(),
            Check("chosen prompts", used, used >= self.top, "prompts of the pool that some row of the task chose"),
            Check("keys", moved, moved > 0 or not self.pull, "norm of what the task changed of the keys"),
        ]


def nearest(q: Tensor, keys: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """cos(q, k_m) of the `top` nearest keys and which they are: (rows, width), (pool, width) -> (rows, top) twice."""
    found = cosine_similarity(q[:, None], keys[None], dim=-1).topk(top, dim=1)
    return found.values, found.indices
