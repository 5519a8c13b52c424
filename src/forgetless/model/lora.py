"""A linear layer and its LoRA pairs as one operation: y = x W^T + b + s (x A^T) B^T.

PEFT's own forward makes, for each pair, an fp32 copy of x, a bf16 copy of that, and two tensors as large as y. Here x
is kept once for the backward pass, shared by all layers that read it, and the update is added into y in place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

Joined = tuple[Tensor, Tensor] | None


class LoraLinear(torch.autograd.Function):
    """x (..., in), W (out, in), b (out) or None, A (rank, in), B (out, rank), all of one dtype -> (..., out).

    `joined`: frozen pairs of the same scale, A (rank + ranks, in) and B (out, rank + ranks), with room before them for
    the trainable pair, which is written there, so that all pairs cost two products. W, b and `joined` get no gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, joined: Joined):
        ctx.scale, ctx.joined = scale, joined
        both_A, both_B = _join(A, B, joined)
        inner = x.reshape(-1, x.shape[-1]) @ both_A.T  # (rows, rank + ranks)
        y = linear(x, W, b)
        y.view(-1, y.shape[-1]).addmm_(inner, both_B.T, alpha=scale)
        ctx.save_for_backward(x, W, A, B, inner[:, : A.shape[0]].contiguous())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, W, A, B, inner = ctx.saved_tensors
        both_A, both_B = _join(A, B, ctx.joined)
        rows, out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_inner = (out @ both_B).mul_(ctx.scale)  # (rows, rank + ranks)
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            grad_x = (out @ W).addmm_(grad_inner, both_A).view_as(x)
        if ctx.needs_input_grad[3]:
            grad_A = grad_inner[:, : A.shape[0]].T @ rows
        if ctx.needs_input_grad[4]:
            grad_B = (out.T @ inner).mul_(ctx.scale)
        return grad_x, None, None, grad_A, grad_B, None, None


def _join(A: Tensor, B: Tensor, joined: Joined) -> tuple[Tensor, Tensor]:
    """[A; past A] and [B, past B]: what another forward pass may have written into the room is overwritten."""
    if joined is None:
        return A, B
    both_A, both_B = joined
    both_A[: A.shape[0]], both_B[:, : B.shape[1]] = A, B
    return both_A, both_B


def lora_linear(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, joined: Joined = None
) -> Tensor:
    """`LoraLinear` of tensors of any floating types: computed in W's, or in autocast's where that is on."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else W.dtype
    x, W, A, B = (tensor.to(dtype) for tensor in (x, W, A, B))
    if joined is not None:
        joined = (joined[0].to(dtype), joined[1].to(dtype))
    return LoraLinear.apply(x, W, b if b is None else b.to(dtype), A, B, scale, joined)
