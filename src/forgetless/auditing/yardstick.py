"""How far a reference is from itself when only the rounding differs: less than this is noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch

from forgetless.forgetting.divergence import Divergence, compare_states
from forgetless.forgetting.reference import BATCH_TOKENS, Reference, hidden_states, write_states
from forgetless.model.head import Head, Using


def yardstick(
    reference: Reference, model, batch_tokens: int = BATCH_TOKENS // 4, using: Using = nullcontext,
    label: str | None = None,
) -> Divergence:  # fmt: skip
    """The reference against itself in another precision and other batches.

    `model` and `using` are what `reference` was made of. A reference that computes in fp32 is compared with its
    products in bf16, one of 16 bits with the same weights in fp32, which takes twice their memory while it lasts; where
    there is no room for that, only the batches differ.
    """
    with TemporaryDirectory() as temporary:
        with _another_precision(model, using) as other:
            head = Head(model, other).copy()
            states = hidden_states(model, reference.windows, batch_tokens, other, label)
            write_states(Path(temporary), states, {})
        again = Reference(Path(temporary), reference.windows, head)
        batches = reference.windows.batches(batch_tokens)
        stored = ((numbers, again.states(numbers)) for numbers in batches)
        return compare_states(reference, stored, head, reference.windows)


@contextmanager
def _another_precision(model, using: Using) -> Iterator[Using]:
    kind = model.device.type
    with using():
        short = torch.is_autocast_enabled(kind) or model.dtype != torch.float32

    @contextmanager
    def other() -> Iterator[None]:
        with using(), torch.autocast(kind, torch.bfloat16, enabled=not short):
            yield

    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if short and _is_short(tensor)]
    if sum(2 * tensor.nbytes for tensor in tensors) > _free(model.device):
        yield using
        return
    dtypes = [tensor.dtype for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield other
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):  # exact: the numbers were of this precision
            tensor.data = tensor.data.to(dtype)


def _free(device: torch.device) -> int:
    """Bytes of memory that nobody uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _is_short(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)
