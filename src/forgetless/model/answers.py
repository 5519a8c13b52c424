"""Logits at the answer rows only.

A vocabulary of 50,000 words makes the output embedding the largest product of a small model, and a row
of 100 tokens may have 2 answer tokens. A pre-hook on the output embedding keeps the rows that are asked
for, so that logit scaling and soft-caps stay the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def _only(head: nn.Module, keep: Tensor) -> Iterator[None]:
    def select(module: nn.Module, inputs: tuple) -> tuple:
        hidden, *rest = inputs  # (batch, length, width)
        return (hidden[keep].unsqueeze(0), *rest)  # (1, kept, width)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def logits_at(model, keep: Tensor, *, hidden: bool = False, **inputs: Tensor):
    """Logits (kept, vocabulary) at the True positions of `keep` (batch, length), in row-major order.

    With `hidden=True` returns `(logits, hidden_states)`, the latter a tuple of (batch, length, width).
    """
    with _only(model.get_output_embeddings(), keep):
        output = model(**inputs, use_cache=False, output_hidden_states=hidden)
    # A model that does not call its output embedding as a module gives all rows: select here.
    logits = output.logits[0] if output.logits.shape[:2] != keep.shape else output.logits[keep]
    if logits.shape[0] != int(keep.sum()):
        raise RuntimeError(f"expected logits at {int(keep.sum())} positions, got {logits.shape[0]}")
    return (logits, output.hidden_states) if hidden else logits


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in fp32: (kept, vocabulary), (kept,) -> (kept,)."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
