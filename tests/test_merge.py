"""Merging: into the base the same function up to rounding, several into one as the equations and PEFT say."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetless import MergeConfig, merge
from forgetless.cli import main
from forgetless.data.batches import Encoder
from forgetless.errors import ForgetlessError, RunError, UsageError
from forgetless.geometry import merging, whole
from forgetless.geometry.fisher import fisher
from forgetless.geometry.operators import combined, combined_products, fisher_mean, of_product, product, slao
from forgetless.geometry.whole import write_merged
from forgetless.model.adapters import Pair
from forgetless.runs.folder import read_json
from forgetless.subjects.models import find_subjects
from forgetless.subjects.updates import compressed, read_update, write_update

IDS = torch.arange(10, 22).unsqueeze(0)  # (1, 12)
QV = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
TYPES = {
    "lora": LoraConfig(r=4, **QV),
    "dora": LoraConfig(r=4, use_dora=True, **QV),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa", **QV),
    "tied head": LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["lm_head"]),
    "whole head": LoraConfig(r=4, modules_to_save=["lm_head"], **QV),
    "tokens": LoraConfig(r=4, trainable_token_indices=[1, 2], **QV),
    "ia3": IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "loha": LoHaConfig(r=4, **QV),
}  # fmt: skip


def drawn(rank: int, seed: int, inside: int = 6, out: int = 5) -> Pair:
    draw = torch.Generator().manual_seed(seed)
    return Pair(torch.randn(rank, inside, generator=draw), torch.randn(out, rank, generator=draw), 0.5 + seed % 3)


def adapter(base: str, folder: Path, seed: int, config=None) -> str:
    """One that does something, saved by stock PEFT."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config or LoraConfig(r=4, lora_alpha=6, **QV))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def plain(folder: str | Path):
    return AutoModelForCausalLM.from_pretrained(folder)


def stock(base: str, folder: str | Path) -> PeftModel:
    return PeftModel.from_pretrained(plain(base), folder, torch_device="cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "colours.txt"
    file.write_text("\n\n".join(f"The {one} is blue, and the {one} is red." for one in ("sky", "sea", "rose")))
    return str(file)


@pytest.fixture(scope="module")
def pair_of(tiny, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    return [adapter(tiny, folder / "one", 1), adapter(tiny, folder / "two", 2)]


def run(models: list[str], text: str, folder: Path, **told) -> dict:
    options = {"text": [text], "precision": "fp32", "device": "cpu"} | told
    return merge(MergeConfig(models=models, output_dir=str(folder), **options))


# ------------------------------------------------------------------------------------------ operators


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6), st.floats(-2, 2), st.floats(-2, 2))
def test_a_sum_is_exact(r, s, seed, v, w):
    a, b = drawn(r, seed), drawn(s, seed + 1)
    found = combined([{"x": a}, {"x": b}], "sum", [v, w])
    torch.testing.assert_close(product(found["x"]), v * product(a) + w * product(b))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_the_error_of_rank_r_is_the_tail_of_the_singular_values(r, kept, seed):
    exact = combined([{"x": drawn(r, seed)}, {"x": drawn(r, seed + 1)}], "sum", [1, 1])["x"]
    sigma = torch.linalg.svdvals(product(exact).double())
    found = merging._layer(exact, compressed(exact, kept))
    assert found["norm"] == pytest.approx(float(sigma.norm()))
    assert found["error"] == pytest.approx(float(sigma[kept:].norm() / sigma.norm()), abs=1e-6)


def test_the_total_error_is_that_of_all_layers_together():
    layers = {"a": {"norm": 3.0, "error": 0.5}, "b": {"norm": 4.0, "error": 0.0}}
    assert merging._total(layers) == {"norm": 5.0, "error": pytest.approx(0.3)}


@pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="PEFT's own operators were others before 0.21")
@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("form", ["", "_svd"])
def test_operators_are_pefts(method, form, tiny, pair_of, monkeypatch):
    """Factor by factor, or the products; DARE with the same draws."""
    if method == "linear" and form:
        pytest.skip("the weighted sum of products is `sum`")
    weights, density = [0.7, -0.4], 0.6
    model = PeftModel.from_pretrained(plain(tiny), pair_of[0], adapter_name="one", torch_device="cpu")
    model.load_adapter(pair_of[1], adapter_name="two", torch_device="cpu")
    inject = model.base_model.inject_adapter

    def injected(*given):
        inject(*given)  # draws a start for the new adapter
        torch.manual_seed(3)

    monkeypatch.setattr(model.base_model, "inject_adapter", injected)
    model.add_weighted_adapter(
        ["one", "two"], weights, "both", combination_type=method + form, density=density, svd_rank=8
    )
    theirs = {
        name.removeprefix("base_model.model."): module.get_delta_weight("both")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    told = ([read_update(Path(one)).layers for one in pair_of], method + form, weights, density)
    ours = dict(combined_products(*told, seed=3)) if form else combined(*told, seed=3)
    assert ours.keys() == theirs.keys()
    for layer, found in ours.items():
        pair = of_product(found) if form else found
        torch.testing.assert_close(product(compressed(pair, 8)), theirs[layer], atol=1e-5, rtol=1e-4)


def test_slao_by_hand():
    """B 1, 2, 3 give 1, 1 + 1/√2, and that plus (3 - it)/√3; the last A; scales go into B."""
    updates = [{"x": Pair(torch.full((1, 1), 10.0 * b), torch.full((1, 1), b / 2), 2.0)} for b in (1.0, 2.0, 3.0)]
    for many, expected in ((1, 1.0), (2, 1.7071), (3, 2.4536)):
        found = slao(updates[:many])["x"]
        assert found.scale * float(found.B) == pytest.approx(expected, abs=1e-4)
        assert float(found.A) == 10.0 * many


def test_methods_by_factors_need_one_rank():
    with pytest.raises(UsageError, match="ranks 2, 3"):
        slao([{"x": drawn(2, 0)}, {"x": drawn(3, 1)}])
    with pytest.raises(UsageError, match="ranks 2, 3"):
        combined([{"x": drawn(2, 0)}, {"x": drawn(3, 1)}], "linear", [1, 1])
    with pytest.raises(UsageError, match="same layers"):
        slao([{"x": drawn(2, 0)}, {"y": drawn(2, 1)}])


def test_fisher_weights_entry_by_entry():
    """F = 3 and 1: three quarters of the first; a layer that only one has counts as 0 in the other."""
    one = {"x": of_product(torch.tensor([[4.0, 8.0]])), "y": of_product(torch.tensor([[2.0]]))}
    two = {"x": of_product(torch.tensor([[8.0, 4.0]]))}
    F = [
        {"x": torch.tensor([[3.0, 1.0]]), "y": torch.tensor([[1.0]])},
        {"x": torch.tensor([[1.0, 3.0]]), "y": torch.tensor([[3.0]])},
    ]
    found = dict(fisher_mean([one, two], F, [1, 1]))
    torch.testing.assert_close(found["x"], torch.tensor([[5.0, 5.0]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(found["y"], torch.tensor([[0.5]]), atol=1e-4, rtol=0)
    equal = {layer: torch.zeros_like(tensor) for layer, tensor in F[0].items()}
    torch.testing.assert_close(dict(fisher_mean([one, two], [equal, equal], [1, 3]))["x"], torch.tensor([[7.0, 5.0]]))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_a_product_is_a_pair(out, inside, seed):
    matrix = torch.randn(out, inside, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(product(of_product(matrix)), matrix)


def test_fisher_is_the_mean_of_squared_gradients(tiny, pair_of, colours):
    """Against autograd's own gradient of the merged weight, row by row."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    examples = [Encoder(tokenizer, 64)(row) for row in colours.train[:3]]
    layers = list(read_update(Path(pair_of[0])).layers)
    model = stock(tiny, pair_of[0]).eval()
    found = fisher(model, layers, examples, tokenizer.pad_token_id)

    full = stock(tiny, pair_of[0]).merge_and_unload().eval()
    full.requires_grad_(True)
    expected = {layer: torch.zeros_like(full.get_submodule(layer).weight) for layer in layers}
    for example in examples:
        ids, answer = torch.tensor([example.ids]), torch.tensor(example.answer)
        log_p = full(input_ids=ids).logits[0, :-1].log_softmax(-1)[torch.arange(len(answer) - 1), ids[0, 1:]]
        full.zero_grad()
        log_p[answer[1:]].sum().backward()
        for layer in layers:
            expected[layer] += full.get_submodule(layer).weight.grad.square() / len(examples)
    for layer in layers:
        assert expected[layer].max() > 0
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-3, atol=1e-9)
    assert not any(module._forward_hooks for module in model.modules()), "the hooks are gone"


# -------------------------------------------------------------------------------------- into the base


@pytest.mark.parametrize("kind", TYPES)
def test_into_the_base_is_the_same_function(kind, tiny, tmp_path):
    """fp32: stock transformers gives the logits that stock PEFT gives; the base is left as it was."""
    one = adapter(tiny, tmp_path / "one", 1, TYPES[kind])
    before = {file.name: file.read_bytes() for file in Path(tiny).iterdir()}
    (tmp_path / "whole").mkdir()
    write_merged(*find_subjects(one), tmp_path / "whole")
    expected = logits(stock(tiny, one))
    torch.testing.assert_close(logits(plain(tmp_path / "whole")), expected, atol=1e-4, rtol=1e-4)
    assert (expected - logits(plain(tiny))).abs().max() > 0.01
    config, stored = read_json(tmp_path / "whole" / "config.json"), read_json(Path(tiny) / "config.json")
    changed = {name for name in config | stored if config.get(name) != stored.get(name)}
    assert changed == ({"tie_word_embeddings"} if kind in ("tied head", "whole head") else set())
    assert before == {file.name: file.read_bytes() for file in Path(tiny).iterdir()}


def test_what_was_written_is_checked(tiny, pair_of, text, tmp_path):
    """By loading it: the logits' differences and the KL, and what leaving the adapter out would have cost."""
    record = run(pair_of[:1], text, tmp_path / "whole")
    found = record["logits"]["colours"]
    assert 0 < found["mean"] <= found["largest"] < 1e-3 < found["size"]
    [source] = record["sources"]
    assert abs(source["kl"]["colours"]["kl"]) < 1e-6 < source["kl_of_base"]["colours"]["kl"]
    assert source["kl"]["colours"]["agree"] == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").chat_template
    assert "largest difference" in (tmp_path / "whole" / "merge.md").read_text()


def test_a_wrong_merge_would_show(tiny, pair_of, text, tmp_path, monkeypatch):
    """The same with a base that was not merged: the error is that of leaving the adapter out."""
    monkeypatch.setattr(whole, "_merged", lambda model, subject: model.unload())
    record = run(pair_of[:1], text, tmp_path / "whole")
    [source] = record["sources"]
    assert source["kl"]["colours"]["kl"] == pytest.approx(source["kl_of_base"]["colours"]["kl"], rel=1e-4)
    assert record["logits"]["colours"]["largest"] > 0.1


def test_precision_shards_and_other_tensors_are_the_bases(tiny, text, tmp_path):
    base = tmp_path / "base"
    plain(tiny).to(torch.bfloat16).save_pretrained(base, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(base)
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) > 1
    one = adapter(str(base), tmp_path / "one", 1)
    record = run([one], text, tmp_path / "whole")
    update, layers = read_update(Path(one)).layers, record["layers"]
    assert set(layers) == {f"{layer}.weight" for layer in update}
    for shard in shards:
        stored, merged = load_file(shard), load_file(tmp_path / "whole" / shard.name)
        assert stored.keys() == merged.keys()
        for name, tensor in stored.items():
            layer = name.removesuffix(".weight")
            change = product(update[layer]) if layer in update else 0
            assert torch.equal(merged[name], (tensor.float() + change).bfloat16()), name
            if layer in update:
                lost = (merged[name].float() - tensor.float() - change).norm() / change.norm()
                assert layers[name]["error"] == pytest.approx(float(lost), rel=1e-3)
    index = "model.safetensors.index.json"
    assert read_json(tmp_path / "whole" / index)["weight_map"] == read_json(base / index)["weight_map"]
    assert 0 < record["total"]["error"] < 0.1
    assert plain(tmp_path / "whole").dtype == torch.bfloat16


def test_what_cannot_be_merged_is_refused(tiny, pair_of, text, tmp_path, monkeypatch):
    prompt = adapter(tiny, tmp_path / "prompt", 1, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UsageError, match="virtual tokens"):
        run([prompt], text, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing half-written"
    with pytest.raises(UsageError, match="whole weights, no adapter"):
        run([tiny], text, tmp_path / "out")
    monkeypatch.setattr(merging, "find_subjects", lambda spec, **told: find_subjects(pair_of[0]) * 2)
    with pytest.raises(UsageError, match=r"a run of 2 tasks, .* give may/adapter, which it deploys"):
        run(["may/"], text, tmp_path / "out")
    monkeypatch.undo()
    for method in ("ties", "linear", "slao"):
        with pytest.raises(UsageError, match=f"{method} merges several adapters, and there is one"):
            run([pair_of[0]], text, tmp_path / "out", method=method)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="no merge wrote"):
        run(pair_of, text, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    for folder in (".", str(tmp_path.parent)):
        with pytest.raises(UsageError, match="the folder you are in, or above it"):
            run(pair_of, text, folder)
    with pytest.raises(ForgetlessError, match="are not numbers"):
        run(pair_of, text, tmp_path / "out", weights=[1e39, 1])
    other = tmp_path / "other"
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(plain(tiny).config).save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(other)
    with pytest.raises(UsageError, match="another base"):
        run([pair_of[0], adapter(str(other), tmp_path / "far", 1)], text, tmp_path / "out")
    quantised = tmp_path / "quantised"
    plain(tiny).save_pretrained(quantised)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(quantised)
    config = read_json(quantised / "config.json") | {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
    }
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="its weights lie there in 4 bits, and merging into them needs them in full"):
        run([f"{quantised}+{pair_of[0]}"], text, tmp_path / "out")


@pytest.mark.parametrize(
    "told, says",
    [
        ({"method": "tiess"}, "did you mean 'ties'"),
        ({"density": 0.5}, "density is for"),
        ({"weights": [1.0]}, "1 for 2 adapters"),
        ({"rows": ["x.jsonl"]}, "rows are for"),
        ({"method": "fisher"}, "needs rows"),
        ({"method": "slao", "weights": [1.0, 2.0]}, "by their order"),
        ({"weights": [1.0, math.nan]}, "weights must be numbers"),
        ({"rank": 0}, "rank must be"),
        ({"kl_by_layer": True}, "give a rank"),
        ({"method": "fisher", "rows": ["nowhere.jsonl"] * 2}, "nowhere.jsonl"),
    ],
)
def test_options_that_do_not_fit_are_named(told, says, pair_of, text, tmp_path):
    with pytest.raises(ForgetlessError, match=says):
        run(pair_of, text, tmp_path / "out", **told)


def test_texts_of_one_name_are_refused(pair_of, text, tmp_path):
    with pytest.raises(UsageError, match="same name"):
        merge(MergeConfig(pair_of, str(tmp_path / "out"), text=[text, text], device="cpu"))


def test_an_adapter_of_a_4_bit_base_is_warned_of(tiny, text, tmp_path):
    one = Path(adapter(tiny, tmp_path / "one", 1))
    told = read_json(one / "adapter_config.json") | {"base_model_name_or_path": "someone/tiny-bnb-4bit"}
    (one / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(UsageError, match="base_is"):
        run([str(one)], text, tmp_path / "whole")
    config = MergeConfig([str(one)], str(tmp_path / "whole"), text=[text], base_is=tiny, device="cpu")
    notes = merging._prepare(config).notes
    assert any("4-bit; rounding that the adapter learnt to undo is not there" in note for note in notes)


# ------------------------------------------------------------------------------------ several into one


def test_a_sum_of_two_says_what_it_costs_each(tiny, pair_of, text, colours, tmp_path):
    """A plain adapter: both updates; KL against each adapter, with the base beside it; scores where tasks are given."""
    stream = tmp_path / "tasks.yaml"
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": row.prompt, "completion": row.answer}) + "\n" for row in colours.test)
    )
    options = json.dumps(list(colours.options))
    stream.write_text(f"name: t\ntasks:\n - {{name: c, train: rows.jsonl, test: rows.jsonl, options: {options}}}\n")
    record = run(pair_of, text, tmp_path / "both", tasks=str(stream))
    found = logits(stock(tiny, tmp_path / "both"))
    weights = plain(tiny)
    for one in pair_of:
        for layer, pair in read_update(Path(one)).layers.items():
            weights.get_submodule(layer).weight.data += product(pair)
    torch.testing.assert_close(found, logits(weights), atol=1e-4, rtol=1e-4)
    assert record["total"]["error"] == 0 and record["compression"] is None
    assert {one["rank"] for one in record["layers"].values()} == {8}
    first, second = record["sources"]
    assert [first["label"], second["label"]] == ["one", "two"]
    both = [product(read_update(Path(one)).layers["model.layers.0.self_attn.q_proj"]) for one in pair_of]
    assert all(
        one["kl"]["colours"]["kl"] > 1e-4 and one["kl_of_base"]["colours"]["kl"] > 1e-4 for one in (first, second)
    )
    assert first["distance"] > 0 and both[0].shape == both[1].shape
    assert set(record["scores"]) == {"one", "two", merging.BASE, merging.MERGED}
    assert all(0 <= one["c"]["low"] <= one["c"]["score"] <= one["c"]["high"] <= 1 for one in record["scores"].values())
    told = (tmp_path / "both" / "merge.md").read_text()
    assert "| one | 1 |" in told and merging.MERGED in told
    assert read_json(tmp_path / "both" / "merge.json")["sources"] == record["sources"]


def test_the_kl_to_each_adapter_is_its_own(tiny, pair_of, text, tmp_path):
    """Weights 1 and 0: nothing is lost of the first; of the second KL(second || first), as written out here."""
    record = run(pair_of, text, tmp_path / "first", weights=[1.0, 0.0])
    first, second = record["sources"]
    assert first["kl"]["colours"]["kl"] == pytest.approx(0, abs=1e-7)
    assert first["distance"] == pytest.approx(0, abs=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    models = [stock(tiny, one).eval() for one in pair_of]
    nats: list[torch.Tensor] = []
    for part in Path(text).read_text().split("\n\n"):
        ids = tokenizer(part, return_tensors="pt").input_ids
        with torch.no_grad():
            q, p = (model(input_ids=ids).logits[0, :-1].log_softmax(-1) for model in models)
        nats += (p.exp() * (p - q)).sum(-1)
    assert second["kl"]["colours"]["kl"] == pytest.approx(float(torch.stack(nats).mean()), rel=1e-3)
    assert second["kl"]["colours"]["tokens"] == len(nats)


def test_a_rank_says_what_it_lost_by_layer_and_in_all(pair_of, text, tmp_path):
    record = run(pair_of, text, tmp_path / "short", rank=3, kl_by_layer=True)
    exact = combined([read_update(Path(one)).layers for one in pair_of], "sum", [1, 1])
    short = read_update(tmp_path / "short").layers
    squared = []
    for layer, found in record["layers"].items():
        sigma = torch.linalg.svdvals(product(exact[layer]).double())
        assert found["error"] == pytest.approx(float(sigma[3:].norm() / sigma.norm()), rel=1e-4)
        assert found["rank"] == short[layer].A.shape[0] == 3
        assert found["kl"]["colours"] > 0
        squared.append((float(sigma[3:].square().sum()), float(sigma.square().sum())))
    lost, size = map(sum, zip(*squared, strict=True))
    assert record["total"]["error"] == pytest.approx(math.sqrt(lost / size), rel=1e-4)
    assert record["compression"]["colours"]["kl"] > max(one["kl"]["colours"] for one in record["layers"].values()) / 10


def test_one_layer_alone_is_what_is_measured(tiny, pair_of, text, tmp_path):
    """An adapter of one layer: the layer's KL is the total's."""
    update = read_update(Path(pair_of[0])).layers
    layer = "model.layers.1.self_attn.q_proj"
    write_update({layer: update[layer]}, tmp_path / "single", tiny)
    record = run([str(tmp_path / "single")], text, tmp_path / "short", rank=2, kl_by_layer=True)
    assert record["layers"][layer]["kl"]["colours"] == pytest.approx(record["compression"]["colours"]["kl"], rel=1e-3)
    assert record["compression"]["colours"]["kl"] > 0


def test_products_are_merged_one_layer_at_a_time(pair_of, text, tmp_path, monkeypatch):
    """When one is made, none is left but the one before it."""
    alive: list[weakref.ref] = []

    def watched(matrix: torch.Tensor) -> Pair:
        assert not any(one() is not None for one in alive[:-1])
        alive.append(weakref.ref(matrix))
        return of_product(matrix)

    monkeypatch.setattr(merging, "of_product", watched)
    record = run(pair_of, text, tmp_path / "both", method="ties_svd", rank=4)
    assert len(alive) == len(record["layers"]) == 4 and record["compression"]["colours"]["kl"] > 0


def test_the_uncompressed_update_is_what_peft_computes(tiny, pair_of):
    update, base = read_update(Path(pair_of[0])).layers, plain(tiny)
    without = logits(base)
    with merging._updated(base, update.__getitem__, update):
        torch.testing.assert_close(logits(base), logits(stock(tiny, pair_of[0])))
    assert torch.equal(logits(base), without)


@pytest.mark.parametrize("method", ["ties", "fisher"])
def test_every_method_writes_an_adapter_that_loads(method, tiny, pair_of, text, colours, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": r.prompt, "completion": r.answer}) + "\n" for r in colours.train[:4]))
    told = {"rows": [str(rows)] * 2, "precision": "bf16"} if method == "fisher" else {}
    record = run(pair_of, text, tmp_path / "both", method=method, **told)
    assert logits(stock(tiny, tmp_path / "both")).isfinite().all()
    assert {one["rank"] for one in record["layers"].values()} == {8 if method == "fisher" else 4}
    assert (record["compression"] is not None) == (method == "fisher") == (record["total"]["error"] > 0)


def test_own_answers_and_the_command(pair_of, tmp_path, capsys):
    """Without --text, each adapter's own answers to prompts."""
    command = ["merge", *pair_of, "--output-dir", str(tmp_path / "both"), "--limit", "2", "--device", "cpu"]
    assert main([*command, "--precision", "fp32"]) == 0
    told = capsys.readouterr().out
    assert "merge.json" in told and "own-answers" in told and "fewer than 10 documents" in told


def test_an_earlier_merge_is_replaced_only_by_a_whole_one(pair_of, text, tmp_path, monkeypatch):
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / merging.RECORD).write_text("earlier")
    with monkeypatch.context() as patched:
        patched.setattr(merging, "divergence", lambda *a, **k: (_ for _ in ()).throw(RunError("no room")))
        with pytest.raises(RunError, match="no room"):
            run(pair_of, text, folder)
    assert [file.read_text() for file in folder.iterdir()] == ["earlier"] and len(list(tmp_path.iterdir())) == 1
    run(pair_of, text, folder)
    assert read_json(folder / merging.RECORD)["total"]["error"] == 0


def test_layers_that_no_row_reached_are_named(pair_of, monkeypatch):
    """An expert that no token was sent to has no gradient: it counts as 0, and is told."""
    one, two = (read_update(Path(folder)) for folder in pair_of)
    idle, *others = one.layers
    monkeypatch.setattr(merging, "fisher", lambda model, layers, *more: {layer: torch.ones(1) for layer in others})
    monkeypatch.setattr(merging, "opened", lambda sources, *more: iter([(source, None) for source in sources]))
    tokenizer = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    session = SimpleNamespace(
        engine=SimpleNamespace(dtype=None, device=None, autocast=None), sources=[1, 2], rows=[[], []], notes=[],
        labels=["one", "two"], encoder=lambda subject: tokenizer,
    )  # fmt: skip
    found, _ = merging._fishers(session, [one, two])
    assert found[idle].shape == product(one.layers[idle]).shape and not found[idle].any()
    assert session.notes[0] == f"one: its rows reach none of {idle}; there it weighs next to nothing"
