"""A causal language model with virtual tokens before each row.

    f(x) = base([P; E(x)])        P (tokens, width), of the row; E the input embedding

What comes back is of the row's own tokens, so nobody who asks for logits has to know of the virtual ones. Positions
count from the first virtual token, as PEFT's prompt tuning does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

Before = Callable[[Tensor, Tensor], Tensor]
"""ids (rows, length), context (rows, length) -> the virtual tokens' embeddings (rows, tokens, width). The context is
True at the tokens that are known when the row is answered: they alone may choose the virtual tokens.
"""


class Prompted(nn.Module):
    """Calls the base with what `before` gives put before each row; without a `before` it is the base."""

    def __init__(self, base: PreTrainedModel):
        super().__init__()
        self.base = base
        self.before: Before | None = None

    @property
    def config(self):
        return self.base.config

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        context: Tensor | None = None,
        **options: Any,
    ):
        """As the base's forward, of right-padded rows. `context`: as for `Before`; None: all of the row's tokens.

        `attention_mask` is (rows, length), or (rows, 1, length, length) where rows branch: True, or 0, where a token
        (row) looks at another (column).
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if self.before is None:
            return self.base(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **options)
        if context is None:
            context = attention_mask.bool()
        inputs = self._embedded(input_ids, context)
        tokens = inputs.shape[1] - input_ids.shape[1]
        if position_ids is not None:
            first = torch.arange(tokens, device=position_ids.device).expand(len(position_ids), -1)
            position_ids = torch.cat([first, tokens + position_ids], 1)
        cut: list[bool] = []

        def own_tokens(head: nn.Module, given: tuple) -> tuple:
            hidden, *rest = given
            cut.append(True)
            return (hidden[:, tokens:], *rest)

        with self.get_output_embeddings().register_forward_pre_hook(own_tokens, prepend=True):
            output = self.base(
                inputs_embeds=inputs, attention_mask=_seen(attention_mask, tokens), position_ids=position_ids, **options
            )
        if not cut:  # its output embedding is not called as a module
            output.logits = output.logits[:, tokens:]
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(state[:, tokens:] for state in output.hidden_states)
        return output

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: GenerationConfig) -> Tensor:
        """Left-padded rows (rows, length) and what follows them, as the base's `generate` gives it."""
        if self.before is None:
            return self.base.generate(  # type: ignore[operator]  # torch's stub: a Tensor
                input_ids=input_ids, attention_mask=attention_mask, generation_config=generation_config
            )
        inputs = self._embedded(input_ids, attention_mask.bool())
        seen = _seen(attention_mask, inputs.shape[1] - input_ids.shape[1])
        made = self.base.generate(  # type: ignore[operator]
            inputs_embeds=inputs, attention_mask=seen, generation_config=generation_config
        )
        return torch.cat([input_ids, made], 1)

    def _embedded(self, ids: Tensor, context: Tensor) -> Tensor:
        """[P; E(x)]: (rows, tokens + length, width)."""
        assert self.before is not None
        own = self.base.get_input_embeddings()(ids)
        return torch.cat([self.before(ids, context).to(own.dtype), own], 1)


def _seen(mask: Tensor, tokens: int) -> Tensor:
    """A mask for rows with `tokens` more in front: all of a row sees them, and they see those before them."""
    if mask.dim() == 2:
        return torch.cat([mask.new_ones(len(mask), tokens), mask], 1)
    sees, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    rows, _, length, _ = mask.shape
    whole = mask.new_full((rows, 1, tokens + length, tokens + length), hidden)
    whole[:, :, :, :tokens] = sees
    whole[:, :, :tokens, :tokens].masked_fill_(~mask.new_ones(tokens, tokens, dtype=torch.bool).tril(), hidden)
    whole[:, :, tokens:, tokens:] = mask
    return whole


def before_answers(keep: Tensor, mask: Tensor) -> Tensor:
    """The context of rows whose logits are asked for at `keep` (rows, length): up to the first such position."""
    count = torch.arange(keep.shape[1], device=keep.device)
    last = torch.where(keep.any(1), keep.long().argmax(1), keep.shape[1] - 1)
    return (count <= last[:, None]) & mask.bool()


@torch.no_grad()
def encoded(base: PreTrainedModel, ids: Tensor, context: Tensor) -> Tensor:
    """q(x) = mean over the context's tokens of the decoder's last hidden states: (rows, length) twice -> (rows, width).

    `base` computes as it is: without adapters where the features are to be those of the frozen model.
    """
    positions = (context.long().cumsum(1) - 1).clamp_min(0)
    hidden = base.base_model(
        input_ids=ids, attention_mask=context.long(), position_ids=positions, use_cache=False
    ).last_hidden_state.float()
    weights = context.float() / context.sum(1, keepdim=True)
    return (weights.unsqueeze(-1) * hidden).sum(1)
