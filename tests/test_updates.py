"""Updates as factors against the products written out."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from forgetless.errors import RunError, UsageError
from forgetless.model.adapters import Pair
from forgetless.subjects.updates import compressed, difference, inner, norm, read_update, weighted, write_update

ranks = st.integers(1, 5)


def product(pair: Pair) -> torch.Tensor:
    return pair.scale * pair.B @ pair.A


def drawn(rank: int, seed: int, inside: int = 6, out: int = 5) -> Pair:
    draw = torch.Generator().manual_seed(seed)
    return Pair(torch.randn(rank, inside, generator=draw), torch.randn(out, rank, generator=draw), 0.5 + seed % 3)


@settings(max_examples=40, deadline=None)
@given(ranks, ranks, st.integers(0, 10**6), st.floats(-2, 2), st.floats(-2, 2))
def test_arithmetic_by_factors_is_that_of_the_products(r, s, seed, v, w):
    a, b = drawn(r, seed), drawn(s, seed + 1)
    left, right = product(a).double(), product(b).double()
    assert inner(a, b) == pytest.approx(float((left * right).sum()), abs=1e-4)
    assert norm(a) == pytest.approx(float(left.norm()), abs=1e-4)
    assert difference(a, b) == pytest.approx(float((left - right).norm()), abs=1e-4)
    summed = weighted([{"x": a}, {"x": b, "y": b}], [v, w])
    torch.testing.assert_close(product(summed["x"]), v * product(a) + w * product(b))
    torch.testing.assert_close(product(summed["y"]), w * product(b))


def test_what_weighs_nothing_adds_no_rank():
    a, b = {"x": drawn(2, 0)}, {"x": drawn(3, 1), "y": drawn(3, 2)}
    summed = weighted([a, b], [1.0, 0.0])
    assert summed["x"].A.shape[0] == 2
    assert not product(summed["y"]).any(), "the layer stays, as zero"


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_a_compressed_update_is_the_nearest_of_its_rank(r, kept, seed):
    pair = drawn(r, seed)
    sigma = torch.linalg.svdvals(product(pair))
    short = compressed(pair, kept)
    assert short.A.shape[0] == min(kept, r)
    lost = float(sigma[kept:].square().sum().sqrt())
    assert float((product(short) - product(pair)).norm()) == pytest.approx(lost, abs=1e-3)


def test_folders_of_different_shapes_and_scales(tiny, tmp_path):
    """rsLoRA, ranks and alphas by layer: as PEFT itself computes them; what is written loads in stock PEFT."""
    base = AutoModelForCausalLM.from_pretrained(tiny)
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 3},
        alpha_pattern={"layers.0.self_attn.q_proj": 9}, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    update = read_update(tmp_path / "theirs")
    told = {layer: module.get_delta_weight("default") for layer, module in model.named_modules()
            if hasattr(module, "get_delta_weight")}  # fmt: skip
    assert {f"base_model.model.{layer}" for layer in update.layers} == told.keys()
    for layer, pair in update.layers.items():
        torch.testing.assert_close(product(pair), told[f"base_model.model.{layer}"])
    assert len({pair.scale for pair in update.layers.values()}) == 3

    ids = torch.arange(3, 12).view(1, 9)
    expected = model(ids).logits
    write_update(update.layers, tmp_path / "ours", str(tiny))
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "ours")
    torch.testing.assert_close(stock(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert read_update(tmp_path / "ours").base == str(tiny)


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"use_dora": True}, "DoRA scales whole weights"),
        ({"bias": "all"}, "it trains biases"),
        ({"modules_to_save": ["lm_head"]}, "it brings whole modules"),
        ({"peft_type": "LOHA"}, "is no LoRA adapter"),
    ],
)
def test_what_is_no_product_of_two_factors_is_refused(changed, told, tmp_path):
    write_update({"layer": drawn(2, 0)}, tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changed))
    with pytest.raises(UsageError, match=told):
        read_update(tmp_path)


def test_factors_that_do_not_fit_are_named(tmp_path):
    write_update({"layer": Pair(torch.ones(2, 3), torch.ones(4, 2), math.pi)}, tmp_path, "base")
    assert read_update(tmp_path).layers["layer"].B[0, 0] == pytest.approx(math.pi)
    write_update({"layer": Pair(torch.ones(2, 3), torch.ones(4, 5), 1.0)}, tmp_path, "base")
    with pytest.raises(RunError, match="factors of layer"):
        read_update(tmp_path)
