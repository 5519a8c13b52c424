"""SHERL: what the side network makes of the early blocks, where it stands, and what it spares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_more_methods import kept_bytes
from test_prompt_methods import ROWS, build, config
from torch.nn.functional import cosine_similarity

from forgetless.data.batches import collate
from forgetless.errors import RunError, UsageError
from forgetless.learning.stream import learn
from forgetless.methods.sherl import SHERL, consolidated
from forgetless.model.answers import logits_at
from forgetless.model.tables import Table
from forgetless.runs.folder import read_json
from forgetless.score.generation import generate
from forgetless.seeds import generator


def spoken(method) -> None:
    """Tables at random, so that every part of the side network says something."""
    for name, table in method.adapters.pairs().items():
        with torch.no_grad():
            table.P.copy_(torch.randn(table.P.shape, generator=generator("test", name)) / 3)


def part_of(method):
    return collate([method.encoder(row) for row in ROWS], method.encoder.tokenizer.pad_token_id)


def test_features_that_say_the_same_share_one_voice():
    """z_0 = z_1 and z_2 speak equally loud with the guide: redundancies 2, 2, 1, so weights 1/4, 1/4, 1/2."""
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    torch.testing.assert_close(consolidated(z, torch.ones(2), torch.zeros(1)), torch.tensor([1.5, 1.5]))
    silent = consolidated(z, -torch.ones(2), torch.zeros(1))
    torch.testing.assert_close(silent, z[-1])  # nobody agrees with the guide: it speaks alone


@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_consolidated_equals_the_equations_token_by_token(n, width, seed):
    draw = generator("test", seed)
    z, w, c = (torch.randn(*shape, generator=draw) for shape in ((3, 2, n + 1, width), (width,), (1,)))
    for row, found_row in zip(z, consolidated(z, w, c), strict=True):
        for token, found in zip(row, found_row, strict=True):
            *early, guide = token
            rho = [sum(max(0.0, float(cosine_similarity(a, b, dim=0))) for b in early) for a in early]
            a = [max(0.0, float(w @ (one * guide) + c)) / each for one, each in zip(early, rho, strict=True)]
            total = sum(a) or 1.0
            expected = guide + sum(weight / total * one for weight, one in zip(a, early, strict=True))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_it_begins_at_the_base_or_as_the_release_does(tiny):
    method = build("sherl", tiny)
    part = part_of(method)
    with method.adapters.disabled():
        untouched = method.adapters.model(part.ids, attention_mask=part.mask).logits
    assert torch.equal(method.adapters.model(part.ids, attention_mask=part.mask).logits, untouched)
    release = build("sherl", tiny, from_base=False)
    assert not torch.allclose(release.adapters.model(part.ids, attention_mask=part.mask).logits, untouched)


@torch.no_grad()
def test_the_late_block_reads_what_the_side_network_says(tiny):
    """By hand: embeddings, block, side network, block, head."""
    method = build("sherl", tiny)
    spoken(method)
    base, ids = method.adapters.base, torch.tensor([[5, 6, 7, 8]])
    with method.adapters.disabled():
        states = list(base(ids, output_hidden_states=True).hidden_states)
        early = states[:2]  # before block 1 and before block 2
        seen = []
        hook = base.get_decoder().layers[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]) or None)
        replaced = method.route(early)
        hook.remove()
        change = base.get_decoder().layers[1].register_forward_pre_hook(lambda _, given: (replaced, *given[1:]))
        expected = base(ids).logits
        change.remove()
    torch.testing.assert_close(method.adapters.model(ids).logits, expected)
    assert not torch.allclose(replaced, early[-1])


@torch.no_grad()
def test_rows_packed_or_padded_and_answers_with_a_cache(tiny):
    method = build("sherl", tiny)
    spoken(method)
    model, part, tokenizer = method.adapters.model, part_of(method), method.encoder.tokenizer
    packed = logits_at(model, part.keep, input_ids=part.ids, attention_mask=part.mask)
    padded = logits_at(model, part.keep, input_ids=part.ids, attention_mask=part.mask, pack_rows=False)
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)
    context = tokenizer("The sky is").input_ids
    found = generate(model, tokenizer, [context], 6, torch.device("cpu"))[0]
    ids = list(context)
    while len(ids) < len(context) + 6 and (len(ids) == len(context) or ids[-1] != tokenizer.eos_token_id):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert found == tokenizer.decode(ids[len(context) :], skip_special_tokens=True)


def test_nothing_of_early_blocks_is_kept_for_the_backward_pass(tiny):
    method = build("sherl", tiny)
    kept = kept_bytes(method.adapters.base, part_of(method))
    assert 0 not in kept and kept[1] > 0
    whole, plain = sum(kept.values()), build("sequential", tiny)
    assert whole < sum(kept_bytes(plain.adapters.model.get_base_model(), part_of(plain)).values())


def test_blocks_that_are_computed_again_give_the_same_gradient(tiny):
    """Gradient checkpointing runs blocks, and with them what stands between them, twice."""

    def gradients(again: bool) -> list[torch.Tensor]:
        method = build("sherl", tiny)
        spoken(method)
        base = method.adapters.base
        if again:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
            base.train()
        loss = method.loss(part_of(method))
        return [loss, *torch.autograd.grad(loss, method.adapters.parameters())]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_learnt_saved_and_taken_up_again(tiny, two, tmp_path):
    told = {"method": "sherl", "method_options": {"hidden": 16}, "learning_rate": 0.01}
    summary = learn(config(tiny, two, tmp_path / "run", **told))
    assert "side network" in read_json(tmp_path / "run" / "summary.json")["method"]["summary"] and summary["tasks"]
    assert read_json(tmp_path / "run" / "adapter" / "adapter_config.json")["peft_type"] == "SHERL"
    method = build("sherl", tiny, hidden=16)
    tables = method.adapters.load(tmp_path / "run" / "adapter")
    method.adapters.set_current(tables)
    assert method.adapters.moved() > 0
    with pytest.raises(RunError, match="Side network 'gate'"):
        method.adapters.set_current(tables | {"gate": Table(torch.zeros(2))})


def test_what_cannot_be_is_refused(tiny):
    with pytest.raises(UsageError, match="late 2: of 2 blocks, from 1 to 1"):
        build("sherl", tiny, late=2)
    with pytest.raises(UsageError, match="hidden 1"):
        SHERL(hidden=1)
