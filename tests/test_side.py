"""SHERL: what the side network makes of the early blocks, where it stands, and what it spares."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from test_more_methods import kept_bytes
from test_prompt_methods import ROWS, build, config
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from forgetless.cli import main
from forgetless.data.batches import Encoder, collate
from forgetless.errors import RunError, UsageError
from forgetless.learning.dryrun import plan_run
from forgetless.learning.stream import learn
from forgetless.methods import METHODS
from forgetless.methods.finding import find_method
from forgetless.methods.sherl import SHERL, consolidated
from forgetless.model.adapters import OWN_KINDS, LoraSettings
from forgetless.model.answers import logits_at
from forgetless.model.base import load_base
from forgetless.model.side import SideNetwork
from forgetless.model.tables import Table
from forgetless.runs.folder import read_json
from forgetless.score.generation import generate
from forgetless.seeds import generator
from forgetless.subjects.models import find_subjects


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


@pytest.fixture(scope="module")
def deep(tiny, tmp_path_factory) -> str:
    """The tiny model with five blocks."""
    folder = tmp_path_factory.mktemp("deep")
    config = AutoConfig.from_pretrained(tiny, num_hidden_layers=5)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
@pytest.mark.parametrize("late", [1, 2, 4])
def test_the_late_blocks_read_what_the_side_network_says(deep, late):
    """By hand: embeddings, early blocks, the equations with loops, late blocks, head."""
    method = build("sherl", deep, late=late)
    spoken(method)
    base, ids = method.adapters.base, torch.tensor([[5, 6, 7, 8]])
    t = {name: table.P for name, table in method.adapters.pairs().items()}
    with method.adapters.disabled():
        h = base(ids, output_hidden_states=True).hidden_states[: 6 - late]
        z = [layer_norm(t["P"][i] @ h[i][0].T + t["b"][i][:, None], t["norm"][:, i]) for i in range(len(h))]
        told = torch.stack([consolidated(one, t["w"], t["c"]) for one in torch.stack(z, 1).permute(2, 1, 0)])
        side = layer_norm(t["W"] @ told.relu().T + t["out_b"][:, None], t["out_norm"]).T
        size = h[-1][0].square().mean(-1, keepdim=True).sqrt()
        replaced = (size * side + (1 + torch.tanh(10 * t["gate"])) * h[-1][0])[None]
        first_late = base.get_decoder().layers[5 - late]
        change = first_late.register_forward_pre_hook(lambda _, given: (replaced, *given[1:]))
        expected = base(ids).logits
        change.remove()
    torch.testing.assert_close(method.adapters.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(h) == len(t["P"]) and method.adapters.comes_back == late / 5


def layer_norm(x: torch.Tensor, gain_and_shift: torch.Tensor) -> torch.Tensor:
    """Over the columns of x (width, tokens)."""
    centred = x - x.mean(0)
    gain, shift = gain_and_shift[:, :, None]
    return centred / (centred.square().mean(0) + 1e-5).sqrt() * gain + shift


def test_bf16_is_near_fp32_and_finite_where_nobody_agrees(tiny):
    ids, found = torch.tensor([[5, 6, 7, 8, 9]]), []
    for dtype in (torch.float32, torch.bfloat16):
        base = load_base(tiny, dtype)
        method = SHERL(hidden=16)
        method.start(SideNetwork(base.model, LoraSettings(), tiny, 0), Encoder(base.tokenizer, 64), 0)
        spoken(method)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            found.append(method.adapters.model(ids).logits.float())
    assert (found[0] - found[1]).abs().mean() < 0.05 * found[0].abs().mean()
    z = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float16)
    assert consolidated(z, torch.ones(2), -torch.ones(1)).tolist() == [1, 1]


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
    """Gradient checkpointing."""

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


def test_nothing_is_held_between_forward_passes(tiny):
    method = build("sherl", tiny)
    held: list[weakref.ref] = []
    early = method.adapters.base.get_decoder().layers[0]
    early.register_forward_hook(lambda block, given, output: held.append(weakref.ref(output)))
    with torch.no_grad():
        method.adapters.model(torch.tensor([[5, 6, 7]]))
        with method.adapters.disabled():
            method.adapters.model(torch.tensor([[5, 6, 7]]))
    assert len(held) == 2 and not any(one() is not None for one in held)


def test_learnt_saved_and_taken_up_again(tiny, two, tmp_path, capsys):
    told = {"method": "replay+sherl", "method_options": {"hidden": 16, "memory": 2}, "learning_rate": 0.01}
    folder = tmp_path / "run"
    summary = learn(config(tiny, two, folder, **told))
    assert summary["warnings"] == [] and "Side network for" in (folder / "adapter" / "README.md").read_text()
    saved = read_json(folder / "adapter" / "adapter_config.json")
    assert (saved["peft_type"], saved["late"], saved["hidden"], saved["from_base"]) == ("SHERL", 1, 16, True)
    times = read_json(folder / "tasks" / "02-sizes" / "times.json")
    assert 0 < times["backward_tokens"] < 0.55 * times["forward_tokens"], "one block of two"
    method = build("sherl", tiny, hidden=16)
    tables = method.adapters.load(folder / "adapter")
    method.adapters.set_current(tables)
    assert method.adapters.moved() > 0
    with pytest.raises(RunError, match="Side network 'gate'"):
        method.adapters.set_current(tables | {"gate": Table(torch.zeros(2))})
    with pytest.raises(RunError, match="was learnt with from_base True, not False"):
        build("sherl", tiny, hidden=16, from_base=False).adapters.load(folder / "adapter")
    assert main(["doctor", str(folder)]) == 0
    assert main(["doctor", str(folder / "adapter"), "--base", tiny]) == 0
    assert "learnt by sherl, no PEFT adapter" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"was learnt by sherl and is no PEFT adapter.*docs/methods/sherl\.md"):
        find_subjects(f"{tiny}+{folder / 'adapter'}")


def test_every_type_that_peft_does_not_know_is_named():
    for name, kind in METHODS.items():
        unknown = not kind.stock_peft and name != "mbpa"  # which deploys plain pairs and answers otherwise
        assert unknown == (name in OWN_KINDS.values())
    assert not set(OWN_KINDS) & set(PEFT_TYPE_TO_CONFIG_MAPPING)


def test_one_step_is_no_reason_to_warn(tiny, two, tmp_path):
    assert not learn(config(tiny, two, tmp_path / "run", method="sherl", max_steps=1))["warnings"]


def test_the_estimate_names_the_tables(tiny, two, tmp_path, capsys):
    plan_run(config(tiny, two, tmp_path / "never", method="sherl"))
    assert "W (32, 64)" in capsys.readouterr().out


def test_what_cannot_be_is_refused(tiny, tiny_t5):
    with pytest.raises(UsageError, match="late 2: of 2 blocks, from 1 to 1"):
        build("sherl", tiny, late=2)
    with pytest.raises(UsageError, match="hidden 1"):
        SHERL(hidden=1)
    with pytest.raises(UsageError, match="side networks are for decoders"):
        build("sherl", tiny_t5)
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=16, n_layer=2, n_head=2, vocab_size=50))
    with pytest.raises(UsageError, match="GPT2LMHeadModel: its blocks are not called `layers`"):
        SideNetwork(gpt2, LoraSettings(), "gpt2", 0).blocks(1)
    with pytest.raises(UsageError, match=r"lwf\+sherl"):
        find_method("lwf+sherl")


def test_blocks_that_pass_on_something_else_are_refused(tiny):
    base = load_base(tiny, torch.float32)
    base.model.get_decoder().layers[0].register_forward_hook(lambda block, given, output: (output,))
    with pytest.raises(UsageError, match="its blocks do not pass on one tensor"):
        SHERL().start(SideNetwork(base.model, LoraSettings(), tiny, 0), Encoder(base.tokenizer, 64), 0)
