"""HiddenKey: whole keys are dropped before attention's softmax, and single entries of hidden states.

    attention of query i    Σ_j softmax_j( q_i·k_j / √d + log m_j ) v_j,   m_j ~ Bernoulli(1 - p)     a key: a column
    hidden states           h <- h ∘ M / (1 - p),   M_ij ~ Bernoulli(1 - p)                           each by itself

    L = 1/2 (CE_1 + CE_2) + w 1/2 ( KL(p_1 || p_2) + KL(p_2 || p_1) )                            arXiv 2403.00812

1 and 2 are two passes over the same rows with masks of their own; with w = 0 there is one, and L = CE. The softmax
compensates for dropped keys by itself. Nothing is dropped when the model answers.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from forgetless.data.batches import Part
from forgetless.errors import UsageError
from forgetless.methods.base import ADAPTER, Check, Method
from forgetless.model.answers import logits_at, takes_masks, token_losses
from forgetless.model.dropping import PATTERNS, Drop, blocks, dropping
from forgetless.seeds import generator


class HiddenKey(Method):
    """HiddenKey dropout.

    Args:
        key_drop: p of attention's logits, from 0 to below 1
        key_pattern: 'column' (a key for all queries), 'element' (each query and key), 'span' (a run of keys, by query)
        hidden_drop: p of the feed-forward blocks' outputs, from 0 to below 1
        hidden_pattern: 'element' (each entry), 'column' (a feature for all tokens), 'span' (a run of them, by token)
        kl: w, weight of the divergence between two passes; 0: one pass
    """

    paper = "2403.00812"
    adopts = ADAPTER
    summary = "drops keys of attention and entries of hidden states in training, under any method"
    extra_compute = "rows are not packed; with `kl`, 2x: a second pass"
    under_any = True
    within_task: ClassVar[tuple[str, ...]] = ("steps", "dropped", "divergence", "step_divergence")
    off: ClassVar[dict] = {"key_drop": 0.0, "hidden_drop": 0.0}
    example: ClassVar[dict] = {"key_drop": 0.1, "hidden_drop": 0.1, "kl": 0.5}

    def __init__(
        self,
        key_drop: float = 0.1,
        key_pattern: str = "column",
        hidden_drop: float = 0.1,
        hidden_pattern: str = "element",
        kl: float = 0.0,
    ):
        for name, p in (("key_drop", key_drop), ("hidden_drop", hidden_drop)):
            if not 0 <= p < 1:
                raise UsageError(f"{name} {p}: a share, from 0 to below 1")
        for name, pattern in (("key_pattern", key_pattern), ("hidden_pattern", hidden_pattern)):
            if pattern not in PATTERNS:
                raise UsageError(f"{name} {pattern!r}: one of {', '.join(PATTERNS)}")
        if kl < 0:
            raise UsageError(f"kl {kl}: a negative weight would drive the passes apart; 0 or more")
        self.keys, self.hidden, self.kl = Drop(key_drop, key_pattern), Drop(hidden_drop, hidden_pattern), kl

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        base = adapters.model.get_base_model()
        blocks(base)  # an error comes before training
        if any(vars(module).get("gradient_checkpointing") for module in base.modules()):
            raise UsageError(
                "hiddenkey: gradient_checkpointing would compute activations again without the dropped entries; "
                "leave it out, and lower micro_batch_size instead"
            )
        if not takes_masks(base):
            raise UsageError(
                f"hiddenkey: drops keys by a mask, which the attention {base.config._attn_implementation!r} does not "
                "take; use auto, sdpa or eager"
            )

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.steps, self.dropped = 0, 0
        self.divergence, self.step_divergence = 0.0, 0.0  # summed over steps; of the step

    def loss(self, part: Part) -> Tensor:
        if not (self.keys.p or self.hidden.p):
            return super().loss(part)
        passes = [self._pass(part, number) for number in range(2 if self.kl else 1)]
        # L = 1/2 (CE_1 + CE_2) + w 1/2 (KL(p_1 || p_2) + KL(p_2 || p_1))
        loss = torch.stack([(part.weights * token_losses(logits, part.targets)).sum() for logits in passes]).mean()
        if self.kl:
            divergence = (part.weights * between(*passes)).sum()
            self.step_divergence += float(divergence.detach())
            loss = loss + self.kl * divergence
        return loss

    def passes(self, rows: int, task: int) -> tuple[float, float]:
        twice = 2 if self.kl and (self.keys.p or self.hidden.p) else 1
        return twice * rows, twice * rows

    def _pass(self, part: Part, number: int) -> Tensor:
        """Logits (answers, vocabulary) with masks that are a function of seed, task, step, pass and a row's tokens."""
        lengths = part.mask.sum(1).tolist()
        rows = [ids[:n].tolist() for ids, n in zip(part.ids, lengths, strict=True)]
        draws = [generator("hiddenkey", self.seed, self.task, self.steps, number, *row) for row in rows]
        count, length = part.ids.shape
        sees = torch.ones(length, length, dtype=torch.bool, device=part.ids.device).tril().expand(count, 1, -1, -1)
        model = self.adapters.model
        with dropping(model.get_base_model(), draws, lengths, self.keys, self.hidden) as dropped:
            logits = logits_at(
                model, part.keep, input_ids=part.ids, attention_mask=part.mask, sees=sees, pack_rows=False
            )
        self.dropped += sum(dropped)
        return logits

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1
        self.divergence += self.step_divergence
        self.last_divergence, self.step_divergence = self.step_divergence, 0.0

    def after_skip(self) -> None:
        self.step_divergence = 0.0

    def told(self) -> dict[str, float]:
        return {"divergence": self.last_divergence} if self.kl and self.keys.p + self.hidden.p else {}

    def checks(self) -> list[Check]:
        needed = self.keys.p + self.hidden.p > 0
        found = [Check("dropped entries", self.dropped, self.dropped > 0 or not needed, "keys and hidden entries")]
        if self.kl:
            meaning = "Σ over steps of 1/2 (KL(p_1 || p_2) + KL(p_2 || p_1)); 0 means that both passes were one"
            found.append(Check("divergence of passes", self.divergence, self.divergence > 0 or not needed, meaning))
        return [*super().checks(), *found]


def between(one: Tensor, other: Tensor) -> Tensor:
    """1/2 (KL(p_1 || p_2) + KL(p_2 || p_1)) of logits (answers, vocabulary) twice -> (answers,)."""
    p, q = log_softmax(one.float(), -1), log_softmax(other.float(), -1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2  # Σ (p_1 - p_2)(log p_1 - log p_2) is the sum of both
