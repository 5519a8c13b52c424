"""Logits at the answer rows only.

A vocabulary of 50,000 words makes the output embedding the largest product of a small model, and a row
of 100 tokens may have 2 answer tokens. A pre-hook on the output embedding keeps the rows that are asked
for, so that logit scaling and soft-caps stay the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn

from forgetless.model.attention import BLOCKED, PACKED
from forgetless.model.encoder_decoder import halves, is_encoder_decoder
from forgetless.model.packing import pack
from forgetless.model.prompted import Prompted, before_answers


@contextmanager
def _only(head: nn.Module, select: Callable[[Tensor], Tensor]) -> Iterator[list[bool]]:
    """`select` (batch, length, width) -> (kept, width) before the head; the list is not empty once it was called."""
    called: list[bool] = []

    def before(module: nn.Module, inputs: tuple) -> tuple:
        hidden, *rest = inputs
        called.append(True)
        return (select(hidden).unsqueeze(0), *rest)  # (1, kept, width)

    handle = head.register_forward_pre_hook(before)
    try:
        yield called
    finally:
        handle.remove()


def logits_at(
    model,
    keep: Tensor,
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None = None,
    sees: Tensor | None = None,
    hidden: bool = False,
    pack_rows: bool = True,
):
    """Logits (kept, vocabulary) at the True positions of `keep` (batch, length), in row-major order.

    Rows are right-padded, `attention_mask` (batch, length) is 1 where there is a token. `position_ids` and `sees`
    (batch, 1, length, length) are for rows that branch, as in `pack`. A model that can is given the rows packed, unless
    not `pack_rows`. With `hidden=True` returns `(logits, hidden_states)`, the latter a tuple of (batch, length, width).
    An encoder-decoder's rows are cut in `halves`; they do not branch, and have no `hidden` states.
    """
    packed = pack(input_ids, attention_mask, position_ids, sees) if pack_rows and packs(model) else None
    if packed:
        inputs = packed.inputs

        def select(states: Tensor) -> Tensor:
            return states[0, packed.place[keep]]

    elif is_encoder_decoder(model):
        inputs, asked = halves(input_ids, attention_mask, keep)

        def select(states: Tensor) -> Tensor:
            return states[asked]

    else:
        mask = attention_mask if sees is None else _mask(model, sees)
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        inputs |= {} if position_ids is None else {"position_ids": position_ids}
        inputs |= {"context": before_answers(keep, attention_mask)} if isinstance(model, Prompted) else {}

        def select(states: Tensor) -> Tensor:
            return states[keep]

    with _only(model.get_output_embeddings(), select) as called:
        output = model(**inputs, use_cache=False, output_hidden_states=hidden)
    # A model that does not call its output embedding as a module gives all rows: select here.
    logits = output.logits[0] if called else select(output.logits)
    if logits.shape[0] != int(keep.sum()):
        raise RuntimeError(f"expected logits at {int(keep.sum())} positions, got {logits.shape[0]}")
    if not hidden:
        return logits
    states = output.hidden_states
    return logits, tuple(state[0, packed.place] for state in states) if packed else states


def packs(model) -> bool:
    """Whether the model takes rows without padding; not if an adapter looks for the begin or end of each of them."""
    if isinstance(model, Prompted):
        return False
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
    by_place = any(one.is_prompt_learning or getattr(one, "alora_invocation_tokens", None) for one in adapters)
    return model.config._attn_implementation == PACKED and not by_place


def takes_masks(model) -> bool:
    """Whether its attention takes a mask that says of each token which others it sees; flash attention takes none."""
    return model.config._attn_implementation in ("eager", "sdpa", BLOCKED, PACKED)


def _mask(model, sees: Tensor) -> Tensor:
    """`sees` as the model's attention takes it."""
    if model.config._attn_implementation in ("sdpa", BLOCKED, PACKED):
        return sees
    zeros = torch.zeros(sees.shape, dtype=model.dtype, device=sees.device)
    return zeros.masked_fill_(~sees, torch.finfo(model.dtype).min)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in fp32: (kept, vocabulary), (kept,) -> (kept,)."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
