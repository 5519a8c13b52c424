"""Forgetting against a reference's own predictions: the measure, its windows, and the reference's side on disk."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from forgetless.auditing.yardstick import yardstick
from forgetless.data.batches import Encoder
from forgetless.data.tasks import Row
from forgetless.errors import DataError, RunError, UsageError
from forgetless.forgetting import reference as reference_module
from forgetless.forgetting.divergence import Divergence, compare, compare_states, divergence
from forgetless.forgetting.reference import Reference, hidden_states, reference_of, write_states
from forgetless.forgetting.windows import measured_alike, row_windows, text_windows
from forgetless.model.head import Head, hidden_at

WORDS = 97
SHAPE = dict(vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=0.5)  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=4, final_logit_softcapping=2.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=4, n_positions=64)),
}


def make(kind: str = "llama", seed: int = 0):
    torch.manual_seed(seed)
    return MODELS[kind]().eval().requires_grad_(False)


def changed(model, size: float = 0.05, seed: int = 1):
    """A fine-tune of `model`, as it were."""
    twin = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    for weight in twin.parameters():
        weight.data += size * torch.randn(weight.shape, generator=draw)
    return twin


class Numbers:
    """A tokenizer for texts that are token numbers: "5 6 7"."""

    eos_token_id = 2

    def __init__(self, bos: int | None = None):
        self.bos_token_id = bos

    def __call__(self, text: str, **_) -> SimpleNamespace:
        first = [] if self.bos_token_id is None else [self.bos_token_id]
        return SimpleNamespace(input_ids=first + [int(number) for number in text.split()])


def texts(*lengths: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(str(number) for number in draw.integers(3, WORDS, length)) for length in lengths]


def obvious(x: torch.Tensor, y: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entropy, KL, agreement from whole logits in fp64, as the equations stand."""
    log_p, log_q = x.double().log_softmax(-1), y.double().log_softmax(-1)
    p = log_p.exp()
    entropy, cross = -(p * log_p).sum(-1), -(p * log_q).sum(-1)
    return entropy.numpy(), (cross - entropy).numpy(), (x.argmax(-1) == y.argmax(-1)).double().numpy()


def one_by_one(model, windows) -> torch.Tensor:
    """The logits at measured positions, a window at a time: no padding, no batches, no head apart."""
    rows = []
    with torch.no_grad():
        for window in windows.windows:
            logits = model(torch.tensor([window.ids])).logits[0]
            rows.append(logits[-len(window.ids) :][torch.tensor(window.measured)])
    return torch.cat(rows)


def assert_same(found: Divergence, x: torch.Tensor, y: torch.Tensor, tolerance: float = 2e-5) -> None:
    entropy, kl, agree = obvious(x, y)
    np.testing.assert_allclose(found.entropy, entropy, atol=tolerance)
    np.testing.assert_allclose(found.kl, kl, atol=tolerance)
    np.testing.assert_allclose(found.cross_entropy, entropy + kl, atol=tolerance)
    np.testing.assert_array_equal(found.agree, agree)


# ---------------------------------------------------------------- the measure


def test_worked_numbers():
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    found = compare(p.log(), q.log(), 3)
    assert found.entropy.item() == pytest.approx(0.801819, abs=1e-6)
    assert found.kl.item() == pytest.approx(0.085123, abs=1e-6)
    loss = (found.entropy + found.kl).item()
    assert loss == pytest.approx(0.886941, abs=1e-6)
    assert abs(loss - 0.693147) > 0.1  # which it would be against the reference's likeliest word alone
    assert found.agree.item() == 1
    assert compare(p.log(), q.flip(1).log(), 3).agree.item() == 0
    equals = torch.tensor([[0.2, 0.4, 0.4]])
    assert compare(p.log(), equals.log(), 3).agree.item() == 0
    assert compare(equals.flip(1).log(), equals.log(), 3).agree.item() == 1


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.floats(0.01, 30), st.floats(0, 5), st.floats(-50, 50))
def test_against_the_equations(seed, scale, step, constant):
    draw = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(4, 50, generator=draw)
    y = x + step * torch.randn(4, 50, generator=draw)
    found = compare(x, y, 50)
    entropy, kl, agree = obvious(x, y)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.agree, agree)
    assert (found.kl >= -3e-7).all()
    shifted = compare(x + constant, y - constant, 50)
    np.testing.assert_allclose(shifted.entropy, found.entropy, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(shifted.kl, found.kl, rtol=1e-3, atol=2e-4)


def test_a_small_divergence_is_not_lost_in_rounding():
    x = 5 * torch.randn(8, 5000, generator=torch.Generator().manual_seed(0))
    y = x + 1e-3 * torch.randn(8, 5000, generator=torch.Generator().manual_seed(1))
    kl = obvious(x, y)[1]
    log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
    as_it_stands = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert np.abs(as_it_stands - kl).max() > 1e-7
    np.testing.assert_allclose(compare(x, y, 5000).kl, kl, atol=3e-8)


def test_sums_over_a_large_vocabulary():
    x = 4 * torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    y = x + 0.3 * torch.randn(4, 50_000, generator=torch.Generator().manual_seed(1))
    found, (entropy, kl, _) = compare(x, y, 50_000), obvious(x, y)
    np.testing.assert_allclose(found.entropy, entropy, atol=2e-6)  # by log_softmax in fp32: 1e-5
    np.testing.assert_allclose(found.kl, kl, atol=3e-7)


def test_equal_logits_diverge_by_nothing():
    x = 20 * torch.randn(5, 300)
    assert (compare(x, x.clone(), 300).kl == 0).all()


def test_forbidden_words_have_no_part_in_it():
    x, y = torch.randn(3, 10), torch.randn(3, 10)
    allowed = compare(x[:, 1:], y[:, 1:], 9)
    x[:, 0] = y[:, 0] = -torch.inf
    for mine, theirs in zip(compare(x, y, 10), allowed, strict=True):
        torch.testing.assert_close(mine, theirs)
    x[:, 0] = 0.0  # forbidden by the model alone: as far away as can be
    assert (compare(x, y, 10).kl > 1e30).all()


def test_vocabularies_of_two_sizes_are_compared_on_what_they_share():
    x, y = 3 * torch.randn(6, 40), 3 * torch.randn(6, 43)
    found = compare(x, y, 38)
    entropy, kl, _ = obvious(x[:, :38], y[:, :38])
    outside = [one.double().softmax(-1)[:, 38:].sum(-1) for one in (x, y)]
    np.testing.assert_allclose(found.entropy, entropy, atol=1e-5)
    np.testing.assert_allclose(found.kl, kl - sum((1 - one).log().numpy() for one in outside), atol=1e-5)
    torch.testing.assert_close(found.outside_reference, outside[0].float())
    torch.testing.assert_close(found.outside_model, outside[1].float())
    assert (compare(x, y[:, :40], 40).outside_model == 0).all()


def over_all_words(x: torch.Tensor, y: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`obvious` for a model with more words than the reference, which gives them 0."""
    more = y.shape[-1] - x.shape[-1]
    entropy, _, _ = obvious(x, y[:, : x.shape[-1]])
    log_p, log_q = x.double().log_softmax(-1), y.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q[:, : x.shape[-1]])).sum(-1).numpy()
    agree = torch.nn.functional.pad(x, (0, more), value=-torch.inf).argmax(-1) == y.argmax(-1)
    return entropy, kl, agree.double().numpy()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.floats(-20, 60))
def test_added_words_are_part_of_the_divergence(seed, lift):
    """However likely a model holds the words that it has more, it is the KL over all of them."""
    draw = torch.Generator().manual_seed(seed)
    x, y = 3 * torch.randn(6, 40, generator=draw), 3 * torch.randn(6, 43, generator=draw)
    y[:, 40:] += lift
    found, (entropy, kl, agree) = compare(x, y, 40), over_all_words(x, y)
    np.testing.assert_allclose(found.entropy, entropy, atol=1e-5)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.agree, agree)


def test_most_of_the_mass_on_one_added_word_is_no_pass():
    """-log .1 = 2.3 nats where the words that both have are as likely among themselves as before."""
    p = torch.tensor([[0.7, 0.2, 0.1]])
    found = compare(p.log(), torch.cat([0.1 * p, torch.tensor([[0.9]])], dim=1).log(), 3)
    assert found.kl.item() == pytest.approx(2.302585, abs=1e-5) and found.agree.item() == 0
    turned = compare(torch.cat([0.1 * p, torch.tensor([[0.9]])], dim=1).log(), p.log(), 3)
    assert turned.kl.item() == pytest.approx(2.302585, abs=1e-5), "words that only the reference has"


def test_per_token_and_per_document():
    zero = np.zeros(4)
    found = Divergence(
        document=np.array([0, 0, 0, 2]), place=np.array([1, 2, 3, 1]), target=np.array([5, 5, 5, 5]),
        entropy=np.array([1.0, 2.0, 3.0, 4.0]), kl=np.array([0.1, 0.2, 0.3, 1.0]), agree=np.array([1.0, 1.0, 0.0, 0.0]),
        outside_reference=zero, outside_model=zero, words=9,
    )  # fmt: skip
    assert found.per_token.kl == pytest.approx(0.4)
    assert found.per_token.cross_entropy == pytest.approx(2.9)
    assert found.per_token.agree == 0.5
    assert found.per_document.kl == pytest.approx((0.2 + 1.0) / 2)
    assert found.per_document.as_json()["cross_entropy"] == pytest.approx((2.2 + 5.0) / 2)
    assert found.documents.document.tolist() == [0, 2]
    assert found.documents.tokens.tolist() == [3, 1]
    assert found.documents.kl == pytest.approx([0.6, 1.0])
    assert found.documents.cross_entropy == pytest.approx([6.6, 5.0])
    assert found.documents.agree.tolist() == [2, 0]


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("kind", MODELS)
def test_the_models_own_logits(kind, tmp_path):
    """Scaled, capped, biased as the model does it; padding and batches leave no trace."""
    before = make(kind)
    after = changed(before)
    windows = text_windows(texts(30, 9, 2, 17), Numbers(), length=12, stride=8)
    reference = reference_of(before, windows, {"model": kind}, tmp_path, batch_tokens=40)
    found = divergence(reference, after, batch_tokens=24)
    assert found.kl.mean() > 1e-4
    assert_same(found, one_by_one(before, windows), one_by_one(after, windows))


@pytest.mark.parametrize("kind", MODELS)
def test_head_and_states_give_the_logits(kind):
    model = make(kind)
    ids, keep = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]]).bool()
    logits = Head(model)(hidden_at(model, keep, input_ids=ids))
    torch.testing.assert_close(logits, model(ids).logits[keep])


def test_a_model_against_itself(tmp_path):
    model = make()
    reference = reference_of(model, text_windows(texts(30, 20), Numbers(), 16), {}, tmp_path)
    found = divergence(reference, model)
    assert (found.kl == 0).all()
    assert found.per_token.cross_entropy == found.per_token.entropy
    assert (found.agree == 1).all()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_adapters(tmp_path, targets):
    """B = 0 changes nothing; the base is the same model with its adapter off, head and all."""
    base = make()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")).eval()
    windows = text_windows(texts(30, 20), Numbers(), 16)
    reference = reference_of(model, windows, {}, tmp_path, using=model.disable_adapter)
    assert np.abs(divergence(reference, model).kl).max() < 1e-6
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    found = divergence(reference, model)
    assert found.kl.mean() > 1e-4
    assert_same(found, one_by_one(base, windows), one_by_one(model, windows))


def test_an_adapter_of_virtual_tokens(tmp_path):
    base = make()
    told = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(copy.deepcopy(base), told).eval()
    windows = text_windows(texts(14, 9), Numbers(), 8)
    found = divergence(reference_of(base, windows, {}, tmp_path), model)
    assert_same(found, one_by_one(base, windows), one_by_one(model, windows))


def test_added_tokens(tmp_path):
    base = make()
    model = changed(base)
    model.resize_token_embeddings(WORDS + 5, mean_resizing=False)
    windows = text_windows(texts(20, 9), Numbers(), 8)
    found = divergence(reference_of(base, windows, {}, tmp_path), model)
    logits = one_by_one(model, windows)
    assert found.words == WORDS
    entropy, kl, agree = over_all_words(one_by_one(base, windows), logits)
    np.testing.assert_allclose(found.entropy, entropy, atol=2e-5)
    np.testing.assert_allclose(found.kl, kl, atol=2e-5)
    np.testing.assert_array_equal(found.agree, agree)
    assert (found.outside_reference == 0).all()
    np.testing.assert_allclose(found.outside_model, logits.softmax(-1)[:, WORDS:].sum(-1), atol=1e-6)


def test_the_reference_keeps_its_head_and_lets_the_decoder_go(tmp_path):
    model = make()
    windows = text_windows(texts(20), Numbers(), 8)
    reference, after = reference_of(model, windows, {}, tmp_path), changed(model)
    logits, layer = one_by_one(model, windows), weakref.ref(model.model.layers[0])
    del model
    gc.collect()
    assert layer() is None
    assert_same(divergence(reference, after), logits, one_by_one(after, windows))


class LooksBack(LlamaForCausalLM):
    """Its logits depend on the tokens themselves."""

    def forward(self, input_ids, **inputs):
        output = super().forward(input_ids=input_ids, **inputs)
        output.logits = output.logits + 10 * torch.nn.functional.one_hot(input_ids, WORDS)
        return output


def test_a_head_that_reads_more_than_the_states_is_refused():
    torch.manual_seed(0)
    with pytest.raises(RunError, match=r"LooksBack.*more than a function of its last hidden states"):
        Head(LooksBack(LlamaConfig(**SHAPE)).eval())


def test_logits_that_are_no_numbers(tmp_path):
    model = make()
    windows = text_windows(texts(6, 9), Numbers(), 8)
    reference, broken = reference_of(model, windows, {}, tmp_path), changed(model)
    only_there = int(windows.windows[-1].ids[-1])
    broken.model.embed_tokens.weight.data[only_there] = torch.nan
    first = next(w.document for w in windows.windows if only_there in w.ids)
    with pytest.raises(RunError, match=f"not numbers at .* first in text or row {first}"):
        divergence(reference, broken)


# ---------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor))])
        return made


@pytest.mark.parametrize("positions", [1, 3, 1000])
def test_chunks_bound_memory_and_change_nothing(tmp_path, positions):
    before = make()
    after = changed(before)
    windows = text_windows(texts(60, 60), Numbers(), 30)
    reference, head, states = reference_of(before, windows, {}, tmp_path), Head(after), hidden_states(after, windows)
    states = list(states)
    with Largest() as largest:
        found = compare_states(reference, states, head, windows, 4 * WORDS * positions)
    assert_same(found, one_by_one(before, windows), one_by_one(after, windows))
    assert windows.positions == 118
    assert largest.numbers <= max(min(positions, 118) * WORDS, 118 * 16 * 4)  # logits, or the bytes of the states
    assert positions < 1000 or largest.numbers == 118 * WORDS


# ---------------------------------------------------------------- windows


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5), length=st.integers(2, 12), data=st.data(),
    bos=st.sampled_from([None, 1]),
)  # fmt: skip
def test_every_token_is_predicted_once(lengths, length, data, bos):
    stride = data.draw(st.integers(1, length))
    corpus = texts(*lengths)
    whole = [Numbers(bos)(text).input_ids for text in corpus]
    if max(len(ids) for ids in whole) < 2:
        with pytest.raises(DataError, match="none has two tokens"):
            text_windows(corpus, Numbers(bos), length, stride)
        return
    windows = text_windows(corpus, Numbers(bos), length, stride)
    found = list(zip(windows.document, windows.place, windows.target, strict=True))
    assert found == [(i, place, ids[place]) for i, ids in enumerate(whole) for place in range(1, len(ids))]
    first = bos is not None
    for window in windows.windows:
        assert 1 <= len(window.ids) == len(window.measured) <= length
        assert first <= (window.ids[0] == bos)
        places = iter(window.places)
        for i, measured in enumerate(window.measured):
            if measured:  # what the model sees is the text before the token, from where the window begins
                place = next(places)
                seen = window.ids[first : i + 1]
                assert list(seen) == whole[window.document][place - len(seen) : place]
                assert len(seen) >= min(place - first, length - first - min(stride, length - first))
    for tokens in (1, 25, 1000):
        batches = windows.batches(tokens)
        assert sorted(i for batch in batches for i in batch) == list(range(len(windows.windows)))
        shapes = [windows.collate(batch)[0].shape for batch in batches]
        assert all(rows * longest <= tokens or rows == 1 for rows, longest in shapes)


def test_windows_by_hand():
    windows = text_windows(["10 11 12 13 14 15 16"], Numbers(), length=4, stride=2).windows
    assert [(window.ids, window.places) for window in windows] == [
        ((10, 11, 12, 13), (1, 2, 3, 4)),
        ((12, 13, 14, 15), (5, 6)),
    ]
    windows = text_windows(["10 11 12 13 14 15 16"], Numbers(bos=1), length=4).windows
    assert [(window.ids, window.places, window.measured) for window in windows] == [
        ((1, 10, 11, 12), (1, 2, 3, 4), (True, True, True, True)),
        ((1, 13, 14, 15), (5, 6, 7), (False, True, True, True)),
    ]


def test_more_context_is_what_a_stride_buys(tmp_path):
    before = make()
    after = changed(before)
    corpus = texts(24)
    apart, near = (text_windows(corpus, Numbers(), 8, stride) for stride in (8, 1))
    results = [divergence(reference_of(before, w, {}, tmp_path), after) for w in (apart, near)]
    np.testing.assert_array_equal(results[0].target, results[1].target)
    np.testing.assert_allclose(results[0].kl[:8], results[1].kl[:8], atol=1e-6)  # the first window
    assert np.abs(results[0].kl[8:] - results[1].kl[8:]).max() > 1e-3


def test_short_texts_are_counted():
    windows = text_windows(["5", "6 7 8", ""], Numbers(), length=6)
    assert set(windows.document) == {1}
    assert windows.documents == 3
    assert windows.notes == (
        "2 of 3 texts have fewer than two tokens and are left out",
        "no text fills a window of 6 tokens; the longest has 3",
    )
    assert text_windows(texts(6), Numbers(), length=6).notes == ()


def test_windows_that_cannot_be():
    for length, stride in ((1, None), (8, 0), (8, 9)):
        with pytest.raises(UsageError, match="the stride is from 1"):
            text_windows(texts(9), Numbers(), length, stride)
    model = make("gpt2")  # of 64 positions
    with pytest.raises(UsageError, match="windows of 70 tokens, and the model's context is 64"):
        next(iter(hidden_states(model, text_windows(texts(90), Numbers(), 70))))


def test_answers_only(tokenizer, tmp_path):
    rows = [Row("The sky is", " blue", source="a:1"), Row("What colour has the sea? Answer:", " blue green red")]
    rows.append(Row("", "small", (("user", "What size has the ant?"), ("assistant", "small"))))
    encoder = Encoder(tokenizer, 60)
    windows = row_windows(rows, encoder)
    for document, row in enumerate(rows):
        said = tokenizer.decode(windows.target[windows.document == document])
        assert said.removesuffix("<|end|>").strip() == row.label
    torch.manual_seed(0)
    before = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": len(tokenizer)})).eval()
    after = changed(before)
    found = divergence(reference_of(before, windows, {}, tmp_path), after)
    assert len(found.kl) == sum(encoder(row).answers for row in rows)
    assert_same(found, one_by_one(before, windows), one_by_one(after, windows))
    assert row_windows(rows, Encoder(tokenizer, 14)).notes == ("1 of 3 rows are longer than 14 tokens and were cut",)
    with pytest.raises(DataError, match="no rows"):
        row_windows([], encoder)


def test_a_prompt_may_be_put_in_another_way(tokenizer, tmp_path):
    """Another chat template before the same answer."""
    encoder = Encoder(tokenizer, 60)
    theirs = row_windows([Row("The sky is", " blue"), Row("The grass of the hill is", " green")], encoder)
    mine = row_windows([Row("What colour has the sky? The sky is", " blue"), Row("The grass is", " green")], encoder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": len(tokenizer)})).eval()
    reference = reference_of(model, theirs, {}, tmp_path, batch_tokens=1)
    assert_same(divergence(reference, model, mine), one_by_one(model, theirs), one_by_one(model, mine))
    other = row_windows([Row("The sky is", " blue"), Row("The grass is", " red")], encoder)
    with pytest.raises(DataError, match="not the same ones"):
        divergence(reference, model, other)


def test_turns_that_end_otherwise_are_measured_without_their_ends(tokenizer):
    turns = (("user", "The sky?"), ("assistant", "blue"), ("user", "The ant?"), ("assistant", "small"))
    rows = [Row("", "small", turns), Row("", "", (("user", "The rose?"), ("assistant", "")))]
    other = copy.deepcopy(tokenizer)
    other.chat_template = "Hello. " + tokenizer.chat_template.replace("<|end|>", "<|pad|>")
    theirs, mine = (row_windows(rows, Encoder(one, 60)) for one in (tokenizer, other))
    end = tokenizer.eos_token_id
    found = measured_alike([theirs, mine], {end})
    for one, before in zip(found, (theirs, mine), strict=True):
        assert [tokenizer.decode(one.target[one.document == i]) for i in (0, 1)] == ["bluesmall", ""]
        for window, whole in zip(one.windows, before.windows, strict=True):
            after = [i + 1 for i, measured in enumerate(window.measured) if measured]
            assert window.ids == whole.ids and list(window.places) == after
            assert [dict(zip(whole.places, whole.targets, strict=True))[i] for i in after] == list(window.targets)
    assert found[0].notes[0].startswith("3 tokens that end an answer")
    assert measured_alike([theirs, theirs], ()) == [theirs, theirs]
    with pytest.raises(DataError, match="in different tokens"):
        measured_alike([theirs, mine], ())
    with pytest.raises(DataError, match="every answer is empty"):
        measured_alike([row_windows(rows[1:], Encoder(one, 60)) for one in (tokenizer, other)], {end})


# ---------------------------------------------------------------- the reference on disk


def arrays(found: Divergence) -> list[bytes]:
    return [value.tobytes() for value in vars(found).values() if isinstance(value, np.ndarray)]


@pytest.fixture
def pair(tmp_path):
    """(model, its windows, a fine-tune of it)"""
    model = make()
    return model, text_windows(texts(30, 12, 21), Numbers(), 10), changed(model)


def only_folder(root):
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    return folder


def test_a_second_audit_reads_what_the_first_wrote(pair, tmp_path, monkeypatch):
    model, windows, after = pair
    first = arrays(divergence(reference_of(model, windows, {"weights": "a"}, tmp_path), after))

    def never(*args, **kwargs):
        raise AssertionError("the reference's decoder ran again")

    with monkeypatch.context() as patched:
        patched.setattr(reference_module, "hidden_states", never)
        again = reference_of(make(), windows, {"weights": "a"}, tmp_path)
    assert arrays(divergence(again, after)) == first


def test_another_question_is_not_answered_from_the_cache(pair, tmp_path):
    model, windows, _ = pair
    reference_of(model, windows, {"weights": "a"}, tmp_path)
    other_windows = text_windows(texts(30, 12, 21), Numbers(), 10, 9)
    for number, (other, identity, batch_tokens, shown) in enumerate(
        [
            (model, {"weights": "a", "adapter": "b"}, 4096, windows),
            (model, {"weights": "a"}, 20, windows),
            (model, {"weights": "a"}, 4096, other_windows),
            (copy.deepcopy(model).bfloat16(), {"weights": "a"}, 4096, windows),
        ]
    ):
        reference_of(other, shown, identity, tmp_path, batch_tokens)
        assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == number + 2


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "unfinished"])
def test_damage_is_found_and_made_good(pair, tmp_path, capsys, harm):
    model, windows, after = pair
    first = arrays(divergence(reference_of(model, windows, {}, tmp_path), after))
    file = next(only_folder(tmp_path).glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[-3] ^= 1
        file.write_bytes(content)
    elif harm == "truncate":
        file.write_bytes(content[:-8])
    elif harm == "remove":
        file.unlink()
    else:
        (file.parent / "manifest.json").unlink()
    reference = reference_of(model, windows, {}, tmp_path)
    told = " ".join(capsys.readouterr().err.split())
    assert harm == "unfinished" or "The reference's predictions are computed again." in told
    assert arrays(divergence(reference, after)) == first


def test_nothing_half_written_is_left(pair, tmp_path, monkeypatch):
    model, windows, _ = pair

    def stops(*args, **kwargs):
        yield from list(hidden_states(*args, **kwargs))[:1]
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(reference_module, "hidden_states", stops)
        reference_of(model, windows, {}, tmp_path, batch_tokens=20)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_shards(pair, tmp_path):
    model, windows, after = pair
    expected = arrays(divergence(reference_of(model, windows, {}, tmp_path / "one", 20), after))
    many = tmp_path / "many"
    many.mkdir()
    write_states(many, hidden_states(model, windows, 20), {}, shard_bytes=1)
    assert len(list(many.glob("*.safetensors"))) == len(windows.batches(20)) > 2
    assert arrays(divergence(Reference(many, windows, Head(model)), after)) == expected


def test_states_are_kept_in_the_models_precision(pair, tmp_path):
    model, windows, _ = pair
    short = copy.deepcopy(model).bfloat16()
    reference = reference_of(short, windows, {}, tmp_path, batch_tokens=20)
    for numbers, hidden in hidden_states(short, windows, 20):
        assert hidden.dtype == torch.bfloat16
        assert torch.equal(reference.states(numbers), hidden)


def test_a_place_that_cannot_be_written(pair, tmp_path):
    model, windows, _ = pair
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file: cannot be written .*give another folder for the reference's"):
        reference_of(model, windows, {}, tmp_path / "file")


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_yardstick_is_rounding_and_leaves_the_model_as_it_was(tmp_path, dtype):
    model = make().to(dtype)
    windows = text_windows(texts(40, 25, 33), Numbers(), 16)
    reference = reference_of(model, windows, {}, tmp_path)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    noise = yardstick(reference, model, batch_tokens=20)
    for name, weight in model.state_dict().items():
        assert weight.dtype == before[name].dtype
        assert torch.equal(weight, before[name])
    other = copy.deepcopy(model).to(torch.bfloat16 if dtype == torch.float32 else torch.float32)
    changed_weights = divergence(reference, other)
    assert 1e-9 < noise.per_token.kl < 0.1
    assert noise.per_token.kl < 5 * changed_weights.per_token.kl
    assert noise.per_token.agree > 0.8
    assert (divergence(reference, model).kl == 0).all()
