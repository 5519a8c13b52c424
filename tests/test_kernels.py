"""The fast forms of layers against the obvious ones: equal outputs, equal gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from forgetless.model import attention
from forgetless.model.adapters import Adapters, LoraSettings, Pair
from forgetless.model.attention import BLOCKED, PACKED, BlockedAttention, use_blocked_attention
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
    room = (torch.cat([new(rank, inner), past[0]]), torch.cat([new(out, rank), past[1]], 1)) if ranks else None
    fast = outcomes(lambda x, A, B: lora_linear(x, W, b, A, B, 1.5, room), [x, A, B])
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


SMALL = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
MODELS = {
    "llama": SMALL,
    "mistral": SMALL | {"sliding_window": 4},  # rows of 9 tokens
    "falcon": SMALL | {"new_decoder_architecture": False, "multi_query": True},  # adds to an output in place
    "olmo": SMALL | {"clip_qkv": 0.5},  # clips outputs in place
    "deepseek_v3": SMALL | {  # values of another width than queries
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
        "first_k_dense_replace": 2, "num_key_value_heads": 4, "head_dim": 4,
    },
}  # fmt: skip


def trained_in(adapters, precision: torch.dtype) -> list[torch.Tensor]:
    """Logits and the gradients of the trainable tensors on two rows, one of them padded."""
    ids, mask = torch.arange(5, 23).view(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    torch.manual_seed(1)  # dropout
    adapters.model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        logits = adapters.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float()
    return [logits.detach(), *torch.autograd.grad(logits.log_softmax(-1)[:, 7].sum(), adapters.parameters())]


def adapted(model, **settings) -> Adapters:
    """Adapters with frozen pairs and a trainable pair that is not zero."""
    adapters = Adapters(model.requires_grad_(False), LoraSettings(r=4, **settings), "made", seed=0)
    adapters.set_past({name: Pair(torch.randn(6, pair.A.shape[1]) / 9, torch.randn(pair.B.shape[0], 6) / 9, pair.scale)
                       for name, pair in adapters.pairs().items()})  # fmt: skip
    for pair in adapters.pairs().values():
        torch.nn.init.normal_(pair.B, std=0.1)
    return adapters


def outcome_of(kind: str, precision: torch.dtype, own: bool, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **MODELS[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").bfloat16().to(precision)
    if own:
        use_blocked_attention(model)
        own_attention = model.config._attn_implementation in (BLOCKED, PACKED)
        assert own_attention == (kind != "falcon")  # Falcon's is its own
    adapters = adapted(model)
    if not own:
        for layer in adapters.layers().values():
            layer.__dict__.pop("forward", None)
    return trained_in(adapters, precision)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_computes_what_peft_and_torch_compute(kind):
    exact = outcome_of(kind, torch.float32, own=False)
    for one, other in zip(outcome_of(kind, torch.float32, own=True), exact, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_rounding_in_bf16_is_no_worse_than_that_of_peft_and_torch():
    """Relative errors of logits and gradients against fp32, over models: single tensors differ either way."""
    ours, theirs = 0.0, 0.0
    for kind, seed in [(kind, seed) for kind in ("llama", "mistral", "olmo") for seed in range(3)]:
        exact = outcome_of(kind, torch.float32, own=False, seed=seed)
        fast = outcome_of(kind, torch.bfloat16, own=True, seed=seed)
        slow = outcome_of(kind, torch.bfloat16, own=False, seed=seed)
        for one, other, truth in zip(fast, slow, exact, strict=True):
            ours += float((one - truth).norm() / truth.norm()) ** 2
            theirs += float((other - truth).norm() / truth.norm()) ** 2
    assert ours <= 1.2**2 * theirs


def test_a_layer_with_a_product_of_its_own_keeps_it():
    """Quantised layers are subclasses of torch's, whose weight alone is not what they compute with."""

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    plain = model.model.layers[0].mlp.up_proj
    scaled = Scaled(plain.in_features, plain.out_features, bias=False)
    scaled.weight = plain.weight
    model.model.layers[0].mlp.up_proj = scaled
    ids = torch.arange(5, 14).view(1, 9)
    with torch.no_grad():
        untouched = model(ids).logits
        adapters = Adapters(model.requires_grad_(False), LoraSettings(r=4), "made", seed=0)
        torch.testing.assert_close(adapters.model(ids).logits, untouched)
        adapters.finish(1)
        torch.testing.assert_close(adapters.model(ids).logits, untouched)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_finished_task_is_kept_in_the_precision_in_which_it_is_computed(precision):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).to(precision)
    adapters = Adapters(model.requires_grad_(False), LoraSettings(r=4), "made", seed=0)
    for pair in adapters.pairs().values():
        torch.nn.init.normal_(pair.B, std=0.1)
    learnt, before = adapters.summed(), trained_in(adapters, precision)[0]
    exact = {name: pair.A.detach().clone() for name, pair in learnt.items()}
    adapters.finish(1)
    torch.testing.assert_close(trained_in(adapters, precision)[0], before)
    for name, past in adapters.past().items():
        assert past.A.dtype == precision
        torch.testing.assert_close(past.A, exact[name].to(precision), rtol=0, atol=0)
    adapters.finish(2)  # reads what the first one keeps in its memory
    torch.testing.assert_close(trained_in(adapters, precision)[0], before)


def test_dropout_disabled_adapters_and_checkpointing():
    def outcome(change=lambda model, adapters: None, **settings):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
        use_blocked_attention(model)
        adapters = adapted(model, **settings)
        change(model, adapters)
        return trained_in(adapters, torch.float32)

    def checkpoint(model, adapters):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()

    plain = outcome()
    for one, other in zip(plain, outcome(checkpoint), strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(plain[0], outcome(lora_dropout=0.3)[0]), "dropout acts"
    torch.manual_seed(0)
    bare = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).eval()
    ids = torch.arange(5, 14).view(1, 9)
    with torch.no_grad():
        untouched = bare(ids).logits
        adapters = adapted(bare)
        assert not torch.allclose(adapters.model(ids).logits, untouched)
        with adapters.disabled():
            torch.testing.assert_close(adapters.model(ids).logits, untouched)


def test_a_model_that_goes_by_the_name_of_its_attention_keeps_torchs(monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    forward = model.model.forward

    def by_name(*args, **more):
        out = forward(*args, **more)
        if model.config._attn_implementation != "sdpa":
            out.last_hidden_state = 2 * out.last_hidden_state + 1
        return out

    monkeypatch.setattr(attention, "_tried", {})
    monkeypatch.setattr(model.model, "forward", by_name)
    use_blocked_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_what_passed_is_not_tried_again(monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "_tried", {})
    monkeypatch.setattr(attention, "_tried_on", lambda model: calls.append(model) or PACKED)
    for changed in ({}, {}, {"num_hidden_layers": 1}):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL | changed))
        use_blocked_attention(model)
        assert model.config._attn_implementation == PACKED
    assert len(calls) == 2


def test_attention_that_computes_something_else_is_not_used(monkeypatch):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    monkeypatch.setattr(attention, "_tried", {})
    monkeypatch.setattr(attention, "_attend", lambda module, q, *rest, **more: (0 * q.transpose(1, 2), None))
    use_blocked_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_deep_model_in_bf16_is_not_refused_for_its_rounding():
    """Small differences grow from layer to layer until logits differ; the attention is the same none the less."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SMALL | {"num_hidden_layers": 24, "initializer_range": 1.0})
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    use_blocked_attention(model)
    assert model.config._attn_implementation in (BLOCKED, PACKED)


def test_what_is_not_plain_attention_is_left_alone(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    use_blocked_attention(model)
    assert model.config._attn_implementation == "eager"
