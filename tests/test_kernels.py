"""The fast forms of layers against the obvious ones: equal outputs, equal gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetless.model.attention import BLOCKED, BlockedAttention, use_blocked_attention
from forgetless.model.lora import lora_linear


def obvious_lora(x, W, b, A, B, scale, past):
    y = x @ W.T if b is None else x @ W.T + b
    for left, right in [(A, B), *([past] if past else [])]:
        y = y + scale * (x @ left.T) @ right.T
    return y


def obvious_attention(q, k, v, seen, scale):
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


def outcomes(function, tensors, *more):
    """Output and gradients of a weighted sum of it."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves, *more)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


sizes = st.integers(1, 7)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, sizes, st.integers(0, 9), st.booleans(), st.integers(0, 10**6))
def test_a_lora_layer_in_one_operation_is_the_sum_of_its_pairs(rows, inner, out, rank, ranks, bias, seed):
    draw = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    x, A, B, W = new(2, rows, inner), new(rank, inner), new(out, rank), new(out, inner)
    b = new(out) if bias else None
    past = (new(ranks, inner), new(out, ranks)) if ranks else ()
    fast = outcomes(lambda x, A, B: lora_linear(x, W, b, A, B, 1.5, past), [x, A, B])
    slow = outcomes(lambda x, A, B: obvious_lora(x, W, b, A, B, 1.5, past), [x, A, B])
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), sizes, st.integers(1, 12), st.integers(0, 10**6))
def test_blocked_attention_is_attention(batch, groups, shared, length, block, seed):
    import forgetless.model.attention as attention

    draw = torch.Generator().manual_seed(seed)
    new = lambda heads: torch.randn(batch, heads, length, 4, generator=draw, dtype=torch.float64)  # noqa: E731
    tensors = [new(groups * shared), new(groups), new(groups)]
    seen = torch.rand(batch, 1, length, length, generator=draw) < 0.5
    seen |= torch.eye(length, dtype=torch.bool)
    kept, attention.BLOCK = attention.BLOCK, block * batch * groups * shared
    try:
        fast = outcomes(BlockedAttention.apply, tensors, seen, 0.7)
    finally:
        attention.BLOCK = kept
    for one, other in zip(fast, outcomes(obvious_attention, tensors, seen, 0.7), strict=True):
        torch.testing.assert_close(one, other)


def test_a_row_that_sees_nothing_is_finite():
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    out = BlockedAttention.apply(q, k, v, torch.zeros(1, 1, 3, 3, dtype=torch.bool), 1.0)
    out.sum().backward()
    assert out.isfinite().all() and all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_adapters_compute_what_peft_computes(tiny, dropout):
    from forgetless.model.adapters import Adapters, LoraSettings, Pair
    from forgetless.model.base import load_base

    base = load_base(tiny, torch.float32)
    assert base.model.config._attn_implementation == BLOCKED
    adapters = Adapters(base.model, LoraSettings(r=4, lora_dropout=dropout), tiny, seed=0)
    adapters.set_past({n: Pair(torch.randn(6, p.A.shape[1]) / 9, torch.randn(p.B.shape[0], 6) / 9, p.scale)
                       for n, p in adapters.pairs().items()})  # fmt: skip
    torch.nn.init.normal_(adapters.parameters()[1], std=0.1)
    ids, mask = torch.randint(5, 300, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)  # dropout
        adapters.model.train()
        logits = adapters.model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        return [logits, *torch.autograd.grad(logits.log_softmax(-1)[:, 7].sum(), adapters.parameters())]

    fast = gradients()
    base.model.set_attn_implementation("sdpa")
    for layer in adapters.layers().values():
        del layer.forward
    for one, other in zip(fast, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_not_plain_attention_is_left_alone(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    use_blocked_attention(model)
    assert model.config._attn_implementation == "eager"
