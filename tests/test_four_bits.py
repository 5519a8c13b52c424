"""Bases in 4 bits: learning, auditing, blending and merging, with what cannot be exact named; needs bitsandbytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from forgetless.auditing.run import audit
from forgetless.cli import main
from forgetless.config import AuditConfig, BlendConfig, InterpolateConfig, LearnConfig, MergeConfig
from forgetless.data.tasks import Stream
from forgetless.errors import UsageError
from forgetless.forgetting.texts import OWN_ANSWERS
from forgetless.geometry.borders import blend
from forgetless.geometry.interpolate import interpolate
from forgetless.geometry.merging import merge
from forgetless.learning.checkpoint import load_optimizer, optimizer_state
from forgetless.learning.engine import Engine
from forgetless.learning.step import TrainSettings, check_optimizer, optimizer_for
from forgetless.learning.stream import learn
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.answers import logits_at, packs
from forgetless.model.base import load_base
from forgetless.model.loading import LoadSettings, four_bits, loading
from forgetless.subjects.models import find_subjects, opened

IN_4BIT = LoadSettings(load_in="4bit")
IDS = torch.tensor([[*range(5, 21), 30, 31], [*range(5, 21), 40, 0]])
MASK = (IDS > 0).long()


@pytest.fixture(scope="module", autouse=True)
def needs_bitsandbytes():
    pytest.importorskip("bitsandbytes", reason="pip install 'forgetless[qlora]'")


@pytest.fixture(scope="module")
def wide(tokenizer, tmp_path_factory) -> str:
    """A random model like the tiny one, whose layers' inputs are multiples of a block of 64 weights."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    made = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def stored(wide, tmp_path_factory) -> Path:
    """The tiny model as save_pretrained writes it in 4 bits."""
    folder = tmp_path_factory.mktemp("tiny-bnb-4bit")
    shutil.copytree(wide, folder, dirs_exist_ok=True)
    with loading(IN_4BIT):
        load_base(wide, torch.float32).model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(wide, two, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    learn(config(wide, two, folder))
    return folder


def config(model, stream: Stream, folder: Path, **more) -> LearnConfig:
    usual = {"r": 4, "batch_size": 6, "learning_rate": 1e-2, "max_length": 64, "device": "cpu", "precision": "fp32",
             "load_in": "4bit", "forgetting_prompts": 2, "max_steps": 4, "method": "incremental"}  # fmt: skip
    return LearnConfig(stream=stream, model=str(model), output_dir=str(folder), **(usual | more))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()].float()


def test_linear_layers_are_nf4_with_double_quantisation_and_compute_in_the_precision(wide):
    from bitsandbytes.functional import dequantize_4bit

    dense = load_base(wide, torch.bfloat16).model
    with loading(IN_4BIT):
        model = load_base(wide, torch.bfloat16).model
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit" and layer.compute_dtype == torch.bfloat16
    assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
    assert model.lm_head.weight.dtype == torch.bfloat16
    W = dense.model.layers[0].mlp.up_proj.weight.float()
    error = (dequantize_4bit(layer.weight.data, layer.weight.quant_state).float() - W).norm() / W.norm()
    assert 0.03 < error < 0.15, "a NormalFloat of 4 bits is about 9 % away in the root mean square of normal weights"
    assert 0 < (logits(model) - logits(dense)).norm() / logits(dense).norm() < 0.3
    before = layer.weight.data.clone()
    logits(model)
    assert torch.equal(layer.weight.data, before), "a pass without gradients leaves the layout"
    settings = four_bits(torch.bfloat16)
    assert settings.bnb_4bit_use_double_quant and settings.bnb_4bit_compute_dtype == torch.bfloat16


def test_a_folder_in_4_bits_loads_as_it_says(wide, stored):
    with loading(IN_4BIT):
        told = logits(load_base(wide, torch.float32).model)
    torch.testing.assert_close(logits(load_base(str(stored), torch.float32).model), told)
    [subject] = find_subjects(str(stored))
    assert subject.load_in == "4bit" and "4-bit" in subject.notes[0]
    for _, model in opened([subject], torch.float32):
        torch.testing.assert_close(logits(model), told)


def test_rows_are_packed_and_the_trainable_gradient_is_that_of_padded_rows(wide):
    with loading(IN_4BIT):
        base = load_base(wide, torch.float32)
    adapters = Adapters(base.model, LoraSettings(r=4), wide, 0)
    keep = MASK.bool() & (IDS >= 30)
    assert packs(adapters.model) and adapters.base_parameters() == sum(
        one.numel() for one in load_base(wide, torch.float32).model.parameters()
    )

    def gradient(pack_rows: bool) -> torch.Tensor:
        found = logits_at(adapters.model, keep, input_ids=IDS, attention_mask=MASK, pack_rows=pack_rows)
        loss = found.log_softmax(-1)[:, 7].sum()
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, adapters.parameters(), materialize_grads=True)]
        )

    one, other = gradient(True), gradient(False)
    assert float(one.norm()) > 0
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_learn_goes_on_as_if_never_stopped(run, wide, two, tmp_path):
    learn(config(wide, Stream("two", two.tasks[:1]), tmp_path / "again"))
    learn(config(wide, two, tmp_path / "again"))
    for task in ("01-colours", "02-sizes"):
        file = Path("tasks") / task / "adapter" / "adapter_model.safetensors"
        assert (tmp_path / "again" / file).read_bytes() == (run / file).read_bytes()
    assert main(["overlap", str(run), "--output_dir", str(tmp_path / "overlap")]) == 0
    [pair] = json.loads((tmp_path / "overlap" / "overlap.json").read_text())["pairs"]
    assert pair["collision_rate"]


def test_learn_keeps_its_base_in_4_bits(run, wide, three):
    told = json.loads((run / "run.json").read_text())
    assert told["decides"]["load_in"] == "4bit"
    losses = [json.loads(line)["loss"] for line in (run / "tasks/01-colours/log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    with pytest.raises(Exception, match="load_in='4bit', now it is 'as_stored'"):
        learn(config(wide, three, run, load_in="as_stored"))


def test_gradient_checkpointing_changes_no_loss(run, wide, two, tmp_path):
    learn(config(wide, Stream("one", two.tasks[:1]), tmp_path, gradient_checkpointing=True))
    [whole, again] = [
        [json.loads(line) for line in (folder / "tasks/01-colours/log.jsonl").read_text().splitlines()]
        for folder in (run, tmp_path)
    ]
    for one, other in zip(whole, again, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)


@pytest.fixture(scope="module")
def tasks(two, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    told = []
    for task in two.tasks:
        for split in ("train", "test"):
            rows = [{"prompt": row.prompt, "completion": row.answer} for row in getattr(task, split)]
            (folder / f"{task.name}-{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        told.append({"name": task.name, "train": f"{task.name}-train.jsonl", "test": f"{task.name}-test.jsonl",
                     "validation": 0, "options": list(task.options)})  # fmt: skip
    (folder / "tasks.yaml").write_text(json.dumps({"tasks": told}))
    return str(folder / "tasks.yaml")


def test_a_run_learnt_in_4_bits_and_opened_in_full_says_so(run):
    whole = find_subjects(str(run))
    assert any("learnt on its base in 4 bits, and is measured here on it in full" in one.notes[-1] for one in whole)
    with loading(IN_4BIT):
        rounded = find_subjects(str(run))
    assert "4-bit weights here" in rounded[0].notes[0] and len(rounded[0].notes) == 1
    assert rounded[0].decided_by != whole[0].decided_by and rounded[0].runs_as != whole[0].runs_as


@pytest.mark.slow  # two audits
def test_an_audit_measures_the_base_in_4_bits(run, wide, stored, tasks, tmp_path):
    """The reference and an adapter in 4 bits; then what the rounding itself costs, 4 bits against full weights."""
    adapter = str(run / "tasks/02-sizes/adapter")
    same = {"tasks": tasks, "device": "cpu", "precision": "fp32", "limit": 4}

    def audited(name: str, model: str, **more) -> dict:
        audit(AuditConfig(wide, (model,), output_dir=str(tmp_path / name), **same, **more))
        assert main(["audit", "--verify", str(tmp_path / name / "evidence.json")]) == 0
        return json.loads((tmp_path / name / "audit.json").read_text())

    fine_tune = audited("adapter", adapter, load_in="4bit", recover=1, weights=True)
    assert "4-bit weights here" in json.dumps(fine_tune)
    rounding = audited("rounding", str(stored))
    assert json.dumps(rounding).count("4-bit weights here") >= 1
    assert f"{wide}: its linear layers" not in json.dumps(rounding), "the reference is in full"


def test_a_blend_of_adapters_is_measured_in_4_bits_and_whole_weights_are_refused(run, wide, stored, tasks, tmp_path):
    adapter = str(run / "tasks/02-sizes/adapter")
    told = {"tasks": tasks, "max_drop": ["colours=90pp"], "device": "cpu", "precision": "fp32", "load_in": "4bit"}
    record = blend(BlendConfig(wide, adapter, points=2, output_dir=str(tmp_path / "blend"), **told))
    assert "4-bit weights here" in json.dumps(record)
    for after in (wide, str(stored)):
        with pytest.raises(UsageError, match=r"4-bit weights, between which there is no path"):
            blend(BlendConfig(str(stored), after, output_dir=str(tmp_path / "no"), **told))


@pytest.mark.slow  # a merge, measured
def test_a_merge_into_weights_in_full_says_that_it_is_another_model(run, wide, stored, tmp_path):
    adapter = str(run / "tasks/02-sizes/adapter")
    told = {"device": "cpu", "precision": "fp32", "limit": 2}
    record = merge(MergeConfig([adapter], str(tmp_path / "merged"), load_in="4bit", **told))
    assert any("another model than the adapter on the base in 4 bits" in note for note in record["notes"])
    assert record["sources"][0]["kl"][OWN_ANSWERS]["kl"] > 1e-6
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with pytest.raises(UsageError, match=r"in 4 bits, and merging into them needs them in full[\s\S]*base-is"):
        merge(MergeConfig([f"{stored}+{adapter}"], str(tmp_path / "no"), base_is=str(stored), **told))
    with pytest.raises(UsageError, match="interpolate computes with weights in full"):
        interpolate(InterpolateConfig(wide, adapter, tasks="demo", load_in="4bit"))


def test_averages_in_8_bits_go_through_a_checkpoint():
    """The state of the paged optimizer, by its own class on a tensor that is large enough for 8 bits."""
    torch.manual_seed(0)
    start, gradients = torch.randn(64, 128), [torch.randn(64, 128) for _ in range(4)]

    def stepped(optimizer, parameter, chosen):
        for gradient in chosen:
            parameter.grad = gradient.clone()
            optimizer.step()

    def fresh(data):
        parameter = torch.nn.Parameter(data.clone())
        return parameter, optimizer_for([parameter], TrainSettings(optim="paged_adamw_8bit", learning_rate=0.1))

    whole, optimizer = fresh(start)
    stepped(optimizer, whole, gradients[:2])
    moments, counters = optimizer_state(optimizer)
    assert any(tensor.dtype == torch.uint8 for tensor in moments.values()) and counters == {"0": 2.0}
    again, other = fresh(whole.detach())
    load_optimizer(other, {name: tensor.clone() for name, tensor in moments.items()}, counters)
    for parameter, one in ((whole, optimizer), (again, other)):
        stepped(one, parameter, gradients[2:])
    assert torch.equal(whole, again) and not torch.equal(whole, start)


def test_the_paged_optimizer_needs_a_gpu():
    with pytest.raises(UsageError, match="pages the memory of a GPU, and this run is on cpu; use adamw"):
        check_optimizer("paged_adamw_8bit", Engine("cpu", "fp32").device)


def test_layers_that_a_cpu_computes_wrong_are_refused(tiny):
    with loading(IN_4BIT), pytest.raises(UsageError, match=r"q_proj has 32 inputs, no multiple of 64[\s\S]*GPU"):
        load_base(tiny, torch.float32)
