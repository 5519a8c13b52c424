"""The update of each layer: hand-worked numbers, slow twins, and every adapter type against its merged weights."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from forgetless.auditing.weights import (
    LayerUpdate,
    adapter_updates,
    by_module,
    effective_rank,
    full_updates,
    intruder_dimensions,
    product_singular_values,
    weight_updates,
)
from forgetless.errors import RunError, UsageError
from forgetless.subjects.models import find_subjects

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=ALL, task_type="CAUSAL_LM"),
    "lora rank above the side": LoraConfig(r=40, target_modules=["k_proj"], task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=ALL, task_type="CAUSAL_LM"),
    "ia3": IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM",
        init_ia3_weights=False,
    ),
    "oft": OFTConfig(oft_block_size=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "loha": LoHaConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "vera": VeraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "norms": LNTuningConfig(target_modules=["norm"], task_type="CAUSAL_LM"),
}  # fmt: skip


def adapted(tiny: str, config, seed: int = 1) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def slow_intruders(W: np.ndarray, tuned: np.ndarray, k: int, epsilon: float) -> int:
    """Algorithm 1 of arXiv 2410.21228, line by line, with absolute cosines."""
    U0, _, _ = np.linalg.svd(W, full_matrices=False)
    Ut, _, _ = np.linalg.svd(tuned, full_matrices=False)
    intruders = 0
    for j in range(min(k, Ut.shape[1])):
        if all(abs(U0[:, i] @ Ut[:, j]) < epsilon for i in range(U0.shape[1])):
            intruders += 1
    return intruders


# ---------------------------------------------------------------------------------------- one matrix


def test_hand_worked_numbers():
    assert effective_rank(torch.tensor([3.0, 4.0])) == pytest.approx(
        math.exp(-(3 / 7) * math.log(3 / 7) - (4 / 7) * math.log(4 / 7))
    )
    assert effective_rank(torch.tensor([5.0, 5.0, 5.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([2.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    A, B = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert product_singular_values(A, B, 2.0).tolist() == pytest.approx([6, 4])  # 2 B A = [[6, 0, 0], [0, 4, 0]]


def test_an_intruder_by_hand():
    """u = (1, ..., 1)/3 has the cosine 1/3 with each axis, which are the singular vectors of a diagonal matrix."""
    W = torch.diag(torch.arange(9.0, 0, -1))
    u = torch.full((9,), 1 / 3)
    tuned = W + 1e6 * torch.outer(u, torch.eye(9)[0])
    assert intruder_dimensions(W, tuned, leading=1, epsilon=0.5) == 1
    assert intruder_dimensions(W, tuned, leading=1, epsilon=0.3) == 0
    assert intruder_dimensions(W, 2 * W) == 0
    assert intruder_dimensions(W, -W) == 0  # a vector's sign means nothing


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 15), st.integers(0, 99))
def test_factors_give_the_singular_values_of_their_product(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=generator).double() for shape in ((rank, columns), (rows, rank)))
    fast, slow = product_singular_values(A, B, 0.7), torch.linalg.svdvals(0.7 * B @ A)
    kept = min(len(fast), len(slow))
    torch.testing.assert_close(fast[:kept], slow[:kept], rtol=1e-9, atol=1e-9)
    assert fast[kept:].abs().sum() < 1e-9 and slow[kept:].abs().sum() < 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 12), st.floats(0.1, 0.9), st.integers(0, 99))
def test_intruders_are_those_of_the_algorithm(rows, columns, leading, epsilon, seed):
    generator = torch.Generator().manual_seed(seed)
    W, update = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    tuned = W + 2 * update
    wanted = slow_intruders(W.numpy(), tuned.numpy(), leading, epsilon)
    assert intruder_dimensions(W, tuned, leading, epsilon) == wanted


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.floats(0.1, 10))
def test_effective_rank_lies_between_one_and_the_rank_and_knows_no_scale(sigma, scale):
    values = torch.tensor(sigma, dtype=torch.double)
    assert 1 - 1e-9 <= effective_rank(values) <= len(sigma) + 1e-9
    assert effective_rank(scale * values) == pytest.approx(effective_rank(values))


# ---------------------------------------------------------------------------------------- adapters


def assert_same(found: list[LayerUpdate], wanted: list[LayerUpdate]) -> None:
    mine, theirs = ({one.layer: one for one in updates if one.norm > 1e-5} for updates in (found, wanted))
    assert mine.keys() == theirs.keys() and mine
    for layer, one in mine.items():
        other = theirs[layer]
        assert one.shape == other.shape and one.intruders == other.intruders
        for name in ("norm", "base_norm", "nuclear_norm", "effective_rank"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=2e-3), (layer, name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapters_updates_are_those_of_its_merged_weights(tiny, tmp_path, kind):
    """The twin: merge everything, save full weights, subtract file from file."""
    model = adapted(tiny, CONFIGS[kind])
    model.save_pretrained(tmp_path / "a")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = adapter_updates(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_same(found, full_updates(Path(tiny), tmp_path / "merged"))


def test_updates_of_a_subject_by_name(tiny, tmp_path):
    model = adapted(tiny, CONFIGS["lora"])
    model.save_pretrained(tmp_path / "a")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny, name), tmp_path / "merged")
    (base,), (adapter,), (merged,) = (find_subjects(str(name)) for name in (tiny, tmp_path / "a", tmp_path / "merged"))
    assert_same(weight_updates(adapter, base), weight_updates(merged, base))
    shapes = {one.module: one.shape for one in weight_updates(adapter, base)}
    assert shapes["k_proj"] == (16, 32) and shapes["down_proj"] == (32, 64)
    with pytest.raises(UsageError, match="weights are compared with full weights only"):
        weight_updates(merged, adapter)


def test_a_fresh_adapter_changes_nothing(tiny):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), CONFIGS["lora"])
    updates = adapter_updates(model)
    assert len(updates) == 14
    assert {(one.norm, one.nuclear_norm, one.effective_rank, one.intruders, one.relative_norm) for one in updates} == {
        (0, 0, 0, 0, 0)
    }


def test_the_update_has_at_most_the_adapters_rank(tiny):
    updates = adapter_updates(adapted(tiny, CONFIGS["lora"]))
    assert all(1 < one.effective_rank <= 4 + 1e-6 for one in updates)
    assert all(one.norm <= one.nuclear_norm <= 2 * one.norm for one in updates)  # sqrt(4) = 2


def test_whole_modules_and_token_embeddings(tiny):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"], trainable_token_indices=[1, 2],
                        task_type="CAUSAL_LM")  # fmt: skip
    model = adapted(tiny, config)
    updates = {one.layer: one for one in adapter_updates(model)}
    whole = updates["model.layers.1.mlp.down_proj.weight"]
    module = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    difference = module.modules_to_save["default"].weight - module.original_module.weight
    assert whole.norm == pytest.approx(difference.norm().item(), rel=1e-4)
    assert updates["model.embed_tokens.weight"].effective_rank <= 2 + 1e-3  # two rows moved


def test_prompts_change_no_weights(tiny):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert adapter_updates(adapted(tiny, config)) == []


# ---------------------------------------------------------------------------------------- full weights


def changed(tiny: str, folder: Path, change) -> Path:
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_full_weights_against_numpy(tiny, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"  # (64, 32)
    torch.manual_seed(2)
    tuned = changed(tiny, tmp_path / "t", lambda held: held[name].add_(torch.randn(64, 32)))
    updates = {one.layer: one for one in full_updates(Path(tiny), tuned)}
    W, Wt = (load_file(Path(folder) / "model.safetensors")[name].numpy().astype(float) for folder in (tiny, tuned))
    sigma = np.linalg.svd(Wt - W, compute_uv=False)
    p = sigma / sigma.sum()
    one = updates[name]
    assert one.norm == pytest.approx(math.sqrt(((Wt - W) ** 2).sum()), rel=1e-4)
    assert one.relative_norm == pytest.approx(np.linalg.norm(Wt - W) / np.linalg.norm(W), rel=1e-4)
    assert one.nuclear_norm == pytest.approx(sigma.sum(), rel=1e-4)
    assert one.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert one.intruders == slow_intruders(W, Wt, 10, 0.5) > 0
    assert all(other.norm == 0 for layer, other in updates.items() if layer != name)
    assert updates["model.norm.weight"].intruders is None


def test_embeddings_of_another_length_are_compared_on_shared_rows(tiny, tmp_path):
    def grow(held):
        old = held["model.embed_tokens.weight"]
        held["model.embed_tokens.weight"] = torch.cat([old, torch.ones(5, 32)])
        held["lm_head.weight"] = old + 1  # no longer tied

    updates = {one.layer: one for one in full_updates(Path(tiny), changed(tiny, tmp_path / "t", grow))}
    assert updates["model.embed_tokens.weight"].norm == 0
    rows = updates["lm_head.weight"].shape[0]
    assert updates["lm_head.weight"].norm == pytest.approx(math.sqrt(rows * 32))


def test_models_of_another_size_or_architecture_are_refused(tiny, tmp_path):
    def shrink(held):
        held["model.norm.weight"] = torch.ones(31)

    with pytest.raises(RunError, match=r"model\.norm\.weight: has the shape \(31,\), not \(32,\)"):
        full_updates(Path(tiny), changed(tiny, tmp_path / "shrunk", shrink))
    more = changed(tiny, tmp_path / "more", lambda held: held.update(extra=torch.ones(2)))
    with pytest.raises(RunError, match="has no tensor extra"):
        full_updates(Path(tiny), more)


# ---------------------------------------------------------------------------------------- summaries


def test_summary_by_module():
    def update(layer: str, norm: float, base_norm: float, rank: float, intruders: int | None) -> LayerUpdate:
        return LayerUpdate(layer, (2, 2), norm, base_norm, norm, rank, intruders)

    updates = [
        update("model.layers.0.self_attn.q_proj.weight", 3, 6, 1, 1),
        update("model.layers.1.self_attn.q_proj.weight", 4, 8, 2, 2),
        update("model.layers.0.self_attn.q_proj.bias", 1, 0, 1, None),
        update("model.layers.0.mlp.up_proj.weight", 9, 10, 2, 0),
    ]
    up, q, bias = by_module(updates)
    assert (up.module, q.module, bias.module) == ("up_proj", "q_proj", "q_proj.bias")
    assert (q.layers, q.norm, q.relative_norm, q.nuclear_norm, q.effective_rank, q.intruders) == (2, 5, 0.5, 7, 1.5, 3)
    assert bias.relative_norm is None and bias.intruders is None
    assert by_module([]) == []
