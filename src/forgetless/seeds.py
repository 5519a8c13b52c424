"""Random choices as functions of what they are for, not of what was drawn before.

Rows and replay draws follow (seed, task, step): a run that stops and goes on, is split differently or runs on
several processes then draws the same by construction. Dropout follows (seed, task, step, process, micro-batch): it is
the same when a run goes on, and another draw when the split changes.
"""

from __future__ import annotations

import hashlib

import torch


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed from any mix of numbers and words; equal parts give equal seeds everywhere."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `seed_for(*parts)`."""
    return torch.Generator().manual_seed(seed_for(*parts))
