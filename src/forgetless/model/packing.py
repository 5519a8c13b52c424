"""Rows without their padding, and what they begin with in common computed once.

Rows of a task mostly begin with the same instruction. Here a batch becomes one sequence: group by group the common
beginning, then what is left of each row. Position numbers say where a token stands in its row. All of a decoder but
its attention works token by token and does not notice; attention lays the rows out again (`attention.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from forgetless.data.batches import Alike, alike

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # q, k, v, seen -> as q


@dataclass(frozen=True)
class Group:
    """Rows that begin with the same `shared` tokens, and go on with `rest` tokens in all, up to `longest` each."""

    shared: int
    rest: int
    padded: Tensor  # (rows, longest): which of the rest stands there; 0 for padding
    place: Tensor  # (rest,): where each stands in the padded rows
    seen: Tensor  # (rows, 1, longest, shared + longest): True where a token looks at another


@dataclass(frozen=True)
class Packed:
    """A batch as one sequence of n tokens."""

    ids: Tensor  # (1, n)
    positions: Tensor  # (1, n)
    place: Tensor  # (rows, length): where in the sequence a token of the padded batch is; 0 for padding
    groups: tuple[Group, ...]

    @property
    def inputs(self) -> dict:
        """For the model's forward: the mask is a stand-in, handed on as it is; `packed` is what the attention reads."""
        stand_in = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=self.ids.device)
        return {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": stand_in, "packed": self}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Attention of each row by itself: q (1, heads, n, width), k, v (1, groups, n, width) -> as q."""
        sizes = [size for group in self.groups for size in (group.shared, group.rest)]
        pieces = iter(zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True))
        out: list[Tensor] = []
        for group in self.groups:
            shared, rest = next(pieces), next(pieces)
            if group.shared:
                causal = torch.ones((group.shared,) * 2, dtype=torch.bool, device=q.device).tril()[None, None]
                out.append(attend(*shared, causal))
            own_q, own_k, own_v = (_Spread.apply(x, group.padded, group.place) for x in rest)
            keys, values = (
                torch.cat([before.expand(len(own), -1, -1, -1), own], dim=2)
                for before, own in ((shared[1], own_k), (shared[2], own_v))
            )
            out.append(_Gather.apply(attend(own_q, keys, values, group.seen), group.padded, group.place))
        return torch.cat(out, dim=2)


def pack(ids: Tensor, mask: Tensor, positions: Tensor | None = None, sees: Tensor | None = None) -> Packed:
    """ids and mask (rows, length), right-padded; mask is 1 where there is a token.

    A row may branch: `positions` (rows, length) then start again somewhere, and `sees` (rows, 1, length, length) is
    True where a token (row) looks at another (column). Without them a row counts from 0 and looks at what is before it.
    A beginning is shared only up to the first branch.
    """
    length, device = ids.shape[1], ids.device
    tokens, real, count = ids.cpu(), mask.cpu().bool(), torch.arange(ids.shape[1])
    told = count.expand_as(tokens) if positions is None else positions.cpu()
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    sees = (causal & real.unsqueeze(1)).unsqueeze(1) if sees is None else sees.cpu()
    straight = (real & (told == count)).long().cumprod(1).sum(1)  # tokens up to the first branch
    place = torch.zeros_like(tokens)
    sources: list[tuple[int, int, int]] = []  # (row, from, to): the sequence, piece by piece
    groups: list[Group] = []
    n = 0
    for rows, shared in _groups(tokens, straight):
        ends = real[rows].sum(1).tolist()
        if shared:
            place[rows, :shared] = torch.arange(n, n + shared)
            sources.append((rows[0], 0, shared))
            n += shared
        for row, end in zip(rows, ends, strict=True):
            place[row, shared:end] = torch.arange(n, n + end - shared)
            sources.append((row, shared, end))
            n += end - shared
        longest, rest = max(ends) - shared, sum(ends) - shared * len(rows)
        inside = real[rows, shared : shared + longest]
        padded = torch.zeros_like(inside, dtype=torch.long)
        padded[inside] = torch.arange(rest)
        seen = sees[rows, :, shared : shared + longest, : shared + longest]
        groups.append(
            Group(shared, rest, padded.to(device), inside.flatten().nonzero().flatten().to(device), seen.to(device))
        )
    flat = [torch.cat([x[row, start:end] for row, start, end in sources]) for x in (tokens, told)]
    return Packed(flat[0][None].to(device), flat[1][None].to(device), place.to(device), tuple(groups))


def _groups(tokens: Tensor, straight: Tensor) -> list[Alike]:
    """Rows that begin alike, up to the first branch and so that each keeps a token; all that share nothing together."""
    found = alike([row[: max(0, end - 1)] for row, end in zip(tokens.tolist(), straight.tolist(), strict=True)])
    alone = [row for group in found if not group.shared for row in group.rows]
    return [group for group in found if group.shared] + ([Alike(alone, 0)] if alone else [])


class _Spread(torch.autograd.Function):
    """(1, heads, rest, width) -> (rows, heads, longest, width). `padded`, `place`: as in `Group`."""

    @staticmethod
    def forward(ctx, x: Tensor, padded: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(padded, place)
        return _spread(x, padded)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _gather(grad, ctx.saved_tensors[1]), None, None


class _Gather(torch.autograd.Function):
    """(rows, heads, longest, width) -> (1, heads, rest, width): what stands in padding is dropped."""

    @staticmethod
    def forward(ctx, x: Tensor, padded: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(padded, place)
        return _gather(x, place)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        padded, place = ctx.saved_tensors
        out = grad.new_zeros(padded.numel(), *grad.transpose(1, 2).shape[2:])
        out[place] = grad[0].transpose(0, 1)
        return out.view(*padded.shape, *out.shape[1:]).transpose(1, 2), None, None


def _spread(x: Tensor, padded: Tensor) -> Tensor:
    return x[0].transpose(0, 1)[padded.flatten()].view(*padded.shape, x.shape[1], x.shape[3]).transpose(1, 2)


def _gather(x: Tensor, place: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)[place].transpose(0, 1)[None]
