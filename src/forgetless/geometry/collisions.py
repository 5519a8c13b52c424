"""Which entries several updates change alike, counted over ΔW = s B A in blocks of rows; no product exists whole.

    above_i = {(a, b) : |ΔW_i[a,b]| > τ_i}           collisions_ij = |above_i ∩ above_j|,  collisions_ii = |above_i|

Collisions as in Yang et al. 2024 (arXiv 2410.10179); the thresholds are the caller's. A block of all updates stays in
a core's cache. What exceeds a threshold is kept as one bit an entry, so that a pair costs 1/64 operation an entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from forgetless.model.adapters import Pair

BLOCK_ENTRIES = 1 << 18  # of all updates' products together: 1 MiB in fp32
WORD = 64  # bits that are counted at a time


class Counts(NamedTuple):
    """Of n updates of one shape, at T thresholds."""

    collisions: np.ndarray  # (T, n, n) entries in which both exceed their thresholds
    l1: np.ndarray  # (n,) Σ|ΔW|


def count_collisions(pairs: Sequence[Pair], thresholds: np.ndarray) -> Counts:
    """The collisions of every two of n updates of one layer; thresholds (T, n), each update has its own."""
    many, (out, inside) = len(pairs), (pairs[0].B.shape[0], pairs[0].A.shape[1])
    factors = [(pair.scale * pair.B.float(), pair.A.float()) for pair in pairs]
    rows = min(out, max(1, BLOCK_ENTRIES // (many * inside)))
    buffer = torch.empty(many * rows * inside)
    found = Counts(np.zeros((len(thresholds), many, many), np.int64), np.zeros(many))
    limits = thresholds.astype(np.float32)[:, :, None]
    for start in range(0, out, rows):
        high = min(rows, out - start)
        block = buffer[: many * high * inside].view(many, high, inside)
        for product, (B, A) in zip(block, factors, strict=True):
            torch.mm(B[start : start + high], A, out=product)
        size = block.abs_().view(many, -1).numpy()
        found.l1[:] += size.sum(axis=1)
        bits = _bits(size, limits)
        for i in range(many):
            both = np.bitwise_count(bits[:, i : i + 1] & bits[:, i:])
            found.collisions[:, i, i:] += both.sum(axis=2, dtype=np.int64)
    found.collisions[:] = np.triu(found.collisions) + np.triu(found.collisions, 1).transpose(0, 2, 1)
    return found


def _bits(size: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Whether each entry exceeds each limit: size (n, entries), limits (T, n, 1) -> words (T, n, entries / 64)."""
    many, entries = size.shape
    packed = np.zeros((len(limits), many, -(-entries // WORD) * WORD // 8), np.uint8)
    above = np.empty(size.shape, bool)
    for limit, row in zip(limits, packed, strict=True):
        np.greater(size, limit, out=above)
        row[:, : -(-entries // 8)] = np.packbits(above, axis=1)
    return packed.view(np.uint64)
