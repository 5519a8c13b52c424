"""Option likelihoods: a shared prompt against one sequence an option, on several architectures."""

from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import modeling_flash_attention_utils as flash_utils

from forgetless.data.batches import Encoder
from forgetless.data.tasks import Row
from forgetless.model.answers import logits_at, packs
from forgetless.score.options import OptionScorer

OPTIONS = ("blue", "very blue", "dark green, almost black", "red")
ROWS = [Row("What colour has the sky? Answer:", " blue"), Row("Rose? Answer:", " red"), Row("Leaf:", " very blue")]

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
ARCHITECTURES = {
    "llama": SMALL,
    "qwen2": SMALL,
    "mistral": SMALL,
    "gemma2": SMALL | {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 128},
    "cohere": SMALL | {"logit_scale": 0.25},
    "granite": SMALL | {"logits_scaling": 4.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "init_std": 0.2,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.2},
}


def make(kind: str, tokenizer, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=tokenizer.pad_token_id,
        **ARCHITECTURES[kind] | more,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def wrapped(model):
    targets = ["in_proj"] if model.config.model_type == "mamba" else "all-linear"
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))


def obvious(model, encode, row, option):
    """log p(option | prompt) from all logits of one sequence."""
    [(context, tokens)] = encode.scoring_splits(row, [option])
    with torch.no_grad():
        logp = model(torch.tensor([[*context, *tokens]])).logits[0].float().log_softmax(-1)
    return sum(float(logp[len(context) - 1 + i, token]) for i, token in enumerate(tokens))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_likelihoods_equal_the_obvious_form(kind, tokenizer):
    """Padded batches, options of one and several tokens; models that cannot share a prompt are found out."""
    encode, model = Encoder(tokenizer, 64), wrapped(make(kind, tokenizer))
    scorer = OptionScorer(model, encode, torch.device("cpu"))
    found = scorer(ROWS, OPTIONS)
    for row, values in zip(ROWS, found, strict=True):
        expected = [obvious(model, encode, row, option) for option in OPTIONS]
        assert values == pytest.approx(expected, abs=1e-3)
    assert scorer.shared is (kind not in ("bloom", "mamba"))


def test_sharing_and_not_sharing_agree_with_eager_attention(tokenizer):
    encode, model = Encoder(tokenizer, 64), wrapped(make("llama", tokenizer))
    model.get_base_model().set_attn_implementation("eager")
    shared, apart = (OptionScorer(model, encode, torch.device("cpu")) for _ in range(2))
    apart.shared = False
    one, other = shared(ROWS, OPTIONS), apart(ROWS, OPTIONS)
    assert shared.shared is True
    for left, right in zip(one, other, strict=True):
        assert left == pytest.approx(right, abs=1e-4)


def flash(q, k, v, causal=False, softmax_scale=None, **more):
    """What flash attention computes: (rows, tokens, heads, width), no mask."""
    q, k, v = (one.transpose(1, 2) for one in (q, k, v))
    k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2)


def flash_without_padding(q, k, v, cu_seqlens_q=None, **more):
    """The same of rows that lie behind one another: (tokens, heads, width)."""
    ends = cu_seqlens_q.tolist()
    rows = (slice(start, end) for start, end in pairwise(ends))
    return torch.cat([flash(q[None, row], k[None, row], v[None, row], **more)[0] for row in rows])


def padded(x, places, rows, length):
    out = x.new_zeros(rows * length, *x.shape[1:])
    out[places] = x
    return out.view(rows, length, *x.shape[1:])


def test_flash_attention_takes_no_masks_so_options_are_scored_apart(tokenizer, monkeypatch):
    """transformers' own path to the kernel, with a stand-in for the kernel."""
    kernels = flash, flash_without_padding, None, padded, flash_utils._unpad_input
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *asked, **more: kernels)
    encode, model = Encoder(tokenizer, 64), make("llama", tokenizer)
    told = OptionScorer(model, encode, torch.device("cpu"))(ROWS, OPTIONS)
    model.config._attn_implementation = "flash_attention_2"  # by its own setter it asks for the package
    scorer = OptionScorer(model, encode, torch.device("cpu"))
    for left, right in zip(scorer(ROWS, OPTIONS), told, strict=True):
        assert left == pytest.approx(right, abs=1e-4)
    assert scorer.shared is False


def test_logits_are_in_memory_a_few_at_a_time(tokenizer, monkeypatch):
    encode, model = Encoder(tokenizer, 64), wrapped(make("llama", tokenizer))
    told = OptionScorer(model, encode, torch.device("cpu"))(ROWS, OPTIONS)
    monkeypatch.setattr("forgetless.score.options.POSITIONS", 3)
    for left, right in zip(OptionScorer(model, encode, torch.device("cpu"))(ROWS, OPTIONS), told, strict=True):
        assert left == pytest.approx(right, abs=1e-5)


def test_small_batches_give_the_same(tokenizer):
    encode, model = Encoder(tokenizer, 64), wrapped(make("llama", tokenizer))
    large = OptionScorer(model, encode, torch.device("cpu"))(ROWS, OPTIONS)
    small = OptionScorer(model, encode, torch.device("cpu"), batch_tokens=8)(ROWS, OPTIONS)
    for left, right in zip(large, small, strict=True):
        assert left == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_at_answer_rows_are_the_models_own(kind, tokenizer):
    """Scaling and soft-caps stay the model's: the rows asked for equal the rows of the full logits."""
    model = make(kind, tokenizer)
    ids = torch.randint(5, len(tokenizer), (3, 9))
    keep = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.3
    with torch.no_grad():
        full = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[keep]
        rows = logits_at(model, keep, input_ids=ids, attention_mask=torch.ones_like(ids))
        one = logits_at(model, torch.ones_like(keep[:1]), input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]))
    assert rows.shape == full.shape
    assert torch.allclose(rows, full, atol=1e-5)
    assert one.shape == (9, len(tokenizer))


@pytest.mark.parametrize("kind", ["gemma2", "mistral"])
def test_rows_longer_than_a_sliding_window_are_scored_right(kind, tokenizer):
    """Four short rows let the prompt be shared; the long one must not see more than its model's window."""
    encode, model = Encoder(tokenizer, 128), wrapped(make(kind, tokenizer, sliding_window=24))
    rows = [*ROWS, ROWS[0], Row("The sky and the sea and the leaf and " * 6 + "the rose? Answer:", " red")]
    scorer = OptionScorer(model, encode, torch.device("cpu"))
    for row, values in zip(rows, scorer(rows, OPTIONS), strict=True):
        assert values == pytest.approx([obvious(model, encode, row, option) for option in OPTIONS], abs=1e-3)
    assert scorer.shared is True


def test_generation_does_not_follow_the_models_own_settings(tokenizer):
    """A repetition penalty in generation_config is for chatting; scores are greedy."""
    from forgetless.score.generation import generate

    model = make("llama", tokenizer)
    contexts = [tokenizer(row.prompt).input_ids for row in ROWS]
    plain = generate(model, tokenizer, contexts, 12, torch.device("cpu"))
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.do_sample = True
    assert generate(model, tokenizer, contexts, 12, torch.device("cpu")) == plain
    assert generate(wrapped(model).get_base_model(), tokenizer, contexts, 12, torch.device("cpu")) == plain
    assert model.generation_config.repetition_penalty == 5.0


def test_generation_is_greedy_and_batches_change_nothing(tokenizer):
    from forgetless.score.generation import generate

    model = make("llama", tokenizer)
    contexts = [tokenizer(row.prompt).input_ids for row in ROWS]
    together = generate(model, tokenizer, contexts, 5, torch.device("cpu"))
    apart = [generate(model, tokenizer, [context], 5, torch.device("cpu"))[0] for context in contexts]
    assert together == apart
    ids = list(contexts[0])
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in (0, tokenizer.eos_token_id):
                break
    assert together[0] == tokenizer.decode(ids[len(contexts[0]) :], skip_special_tokens=True)


def test_what_all_prompts_begin_with_is_computed_once(tokenizer):
    """Two system prompts and some rows of neither: the answers are those of rows by themselves."""
    from forgetless.model.attention import use_blocked_attention
    from forgetless.score.generation import generate

    model = make("llama", tokenizer)
    use_blocked_attention(model)
    assert packs(model)
    draw = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(5, len(tokenizer), (count,), generator=draw).tolist()

    prompts = tokens(40), tokens(30)
    contexts = [[*prompts[i % 2], *tokens(1 + i % 5)] for i in range(20)] + [tokens(7), tokens(3)]
    read: list[int] = []
    handle = model.model.layers[0].register_forward_hook(
        lambda module, given, out: read.append(given[0][..., 0].numel())
    )
    together = generate(model, tokenizer, contexts, 6, torch.device("cpu"))
    once = sum(read)
    read.clear()
    apart = [generate(model, tokenizer, [context], 6, torch.device("cpu"))[0] for context in contexts]
    handle.remove()
    assert together == apart and len(set(apart)) > 1
    assert once < 0.5 * sum(read), "both beginnings went through the model once"
