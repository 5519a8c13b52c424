"""What several processes do together, for code that has no `Engine` at hand; with one process all of it is nothing."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank_and_count() -> tuple[int, int]:
    """This process's number, from 0, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def summed(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, the same bits on each of them."""
    if rank_and_count()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def gathered(tensor: Tensor) -> list[Tensor]:
    """Every process's tensor, in the order of the processes."""
    count = rank_and_count()[1]
    if count == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(count)]
    dist.all_gather(found, tensor)
    return found


def agreed(value: T) -> T:
    """The first process's value, on every process."""
    if rank_and_count()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
