"""Where tensors live: an engine in a process that is not its own."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from forgetless.learning.engine import Engine


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_trainer_of_another_precision_came_first(precision, dtype):
    """Accelerate keeps one state a process; ours computes in its own precision none the less."""
    AcceleratorState._reset_state()
    Accelerator(cpu=True, mixed_precision="bf16")
    try:
        engine = Engine("cpu", precision)
        weight = torch.ones(2, 2, requires_grad=True)
        with engine.autocast():
            product = weight @ torch.full((2, 2), 1.001)
        assert engine.dtype == product.dtype == dtype
        engine.backward(product.sum())
        assert weight.grad is not None and weight.grad.dtype == torch.float32
    finally:
        AcceleratorState._reset_state()
