"""Dropout inside a decoder's blocks: of keys, before the softmax of attention, and of the feed-forward's output.

A row's masks come from a generator of its own, so they do not depend on the other rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from forgetless.errors import UsageError

PATTERNS = ("element", "column", "span")


@dataclass(frozen=True)
class Drop:
    """What share of a matrix is dropped, and in which pattern."""

    p: float
    pattern: str

    def kept(self, rows: int, columns: int, draw: torch.Generator) -> Tensor:
        """(rows, columns), True where an entry stays.

        element: each by itself. column: a column in all rows or in none. span: in each row a run of neighbours.
        """
        if self.pattern == "span":
            start = torch.randint(columns - self._run(columns) + 1, (rows, 1), generator=draw)
            place = torch.arange(columns)
            return (place < start) | (place >= start + self._run(columns))
        drawn = torch.rand(rows if self.pattern == "element" else 1, columns, generator=draw)
        return (drawn >= self.p).expand(rows, columns)

    def rescale(self, columns: int) -> float:
        """1 / the share that stays in the mean."""
        return 1 / (1 - (self._run(columns) / columns if self.pattern == "span" else self.p))

    def _run(self, columns: int) -> int:
        return min(round(self.p * columns), columns - 1)


def blocks(model) -> list[tuple[nn.Module, nn.Module]]:
    """(attention, feed-forward) of each block of a transformers model. UsageError where they are called otherwise."""
    try:
        return [(block.self_attn, block.mlp) for block in model.get_decoder().layers]
    except AttributeError as error:
        raise UsageError(
            f"{type(model).__name__}: dropout is put on the blocks' self_attn and mlp, as Llama-like models have them "
            f"({error}); take another model, or a method without it"
        ) from error


@contextmanager
def dropping(model, draws: list[torch.Generator], lengths: list[int], keys: Drop, hidden: Drop) -> Iterator[list[int]]:
    """Drops inside the block; gives a list of how many entries were dropped, by place.

    `draws`, `lengths`: of each row, right-padded. The model must be given attention masks of
    (rows, 1, length, length). A token's own key stays, so that every softmax has something to weigh.
    """
    dropped: list[int] = []

    def before(attention: nn.Module, args: tuple, inputs: dict) -> tuple[tuple, dict]:
        mask = inputs["attention_mask"]
        stays = torch.ones(len(draws), 1, *mask.shape[2:], dtype=torch.bool)
        for row, (draw, n) in enumerate(zip(draws, lengths, strict=True)):
            stays[row, 0, :n, :n] = keys.kept(n, n, draw) | torch.eye(n, dtype=torch.bool)
        dropped.append(int((~stays).tril().sum()))
        stays = stays.to(mask.device)
        least = torch.finfo(mask.dtype).min if mask.is_floating_point() else False
        return args, inputs | {"attention_mask": mask.masked_fill(~stays, least)}

    def after(feed_forward: nn.Module, args: tuple, out: Tensor) -> Tensor:
        stays = [hidden.kept(n, out.shape[-1], draw) for draw, n in zip(draws, lengths, strict=True)]
        dropped.append(sum(int((~one).sum()) for one in stays))
        scale = hidden.rescale(out.shape[-1])
        return out * (pad_sequence(stays, batch_first=True).to(out.device) * scale).to(out.dtype)

    hooks = []
    for attention, feed_forward in blocks(model):
        if keys.p:
            hooks.append(attention.register_forward_pre_hook(before, with_kwargs=True))
        if hidden.p:
            hooks.append(feed_forward.register_forward_hook(after))
    try:
        yield dropped
    finally:
        for hook in hooks:
            hook.remove()
