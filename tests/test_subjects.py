"""What a name stands for, which fine-tunes are taken and which refused, and opening them over one base."""

from __future__ import annotations

import doctest
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    CPTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from records import run_record
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetless.errors import RunError, UsageError
from forgetless.model.answers import logits_at
from forgetless.model.identity import identify
from forgetless.runs.folder import RunFolder, write_json
from forgetless.subjects import layouts, models
from forgetless.subjects.layouts import locate, short_names
from forgetless.subjects.models import Subject, compare, find_subjects, opened

IDS = torch.arange(10, 22).unsqueeze(0)  # (1, 12)
QV = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
CONFIGS = {
    "lora": LoraConfig(r=4, **QV),
    "rslora": LoraConfig(r=4, use_rslora=True, **QV),
    "dora": LoraConfig(r=4, use_dora=True, **QV),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa", **QV),
    "lora-head": LoraConfig(r=4, modules_to_save=["lm_head"], **QV),
    "lora-tokens": LoraConfig(r=4, trainable_token_indices=[1, 2], **QV),
    "adalora": AdaLoraConfig(total_step=10, **QV),
    "ia3": IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "oft": OFTConfig(oft_block_size=8, **QV),
    "loha": LoHaConfig(r=4, **QV),
    "vera": VeraConfig(r=4, **QV),
    "norms": LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "cpt": CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1]),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "llama-adapter": AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=2),
}  # fmt: skip
CHANGES_THE_BASE = ("pissa", "lora-head", "llama-adapter")  # PEFT cannot take these off a base again


def base_model(folder: str | Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def make_adapter(base: str | Path, folder: Path, config=None, seed: int = 1, **told) -> torch.Tensor:
    """Saves an adapter that does something; returns its logits for IDS by stock PEFT."""
    torch.manual_seed(seed)
    model = get_peft_model(base_model(base), config or LoraConfig(r=4, **QV))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    edit_config(folder, **told)
    with torch.no_grad():
        return PeftModel.from_pretrained(base_model(base), folder, torch_device="cpu").eval()(IDS).logits


def edit_config(folder: Path, **told) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | told))


def edit_weights(folder: Path, change) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def other_model(tiny: str, folder: Path, **config) -> Path:
    """A model of the same tokenizer, with other weights."""
    torch.manual_seed(9)
    told = AutoModelForCausalLM.from_pretrained(tiny).config
    for name, value in config.items():
        setattr(told, name, value)
    AutoModelForCausalLM.from_config(told).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def one(spec: str | Path, **options) -> Subject:
    (subject,) = find_subjects(str(spec), **options)
    return subject


def logits_of(subject: Subject) -> torch.Tensor:
    for _, model in opened([subject], torch.float32):
        with torch.no_grad():
            return model(input_ids=IDS).logits
    raise AssertionError


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The folders of the bases that are loaded."""
    loaded: list[str] = []
    real = models.load_base

    def counted(name, *args, **more):
        loaded.append(name)
        return real(name, *args, **more)

    monkeypatch.setattr(models, "load_base", counted)
    return loaded


# ---------------------------------------------------------------------------------------- opening


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_of_any_type_gives_stock_peft_logits_and_leaves_the_base_untouched(tiny, tmp_path, loads, kind):
    wanted = make_adapter(tiny, tmp_path / "a", CONFIGS[kind])
    base = one(tiny)
    subject = one(tmp_path / "a")
    with torch.no_grad():
        plain = base_model(tiny)(IDS).logits
        found = [model(input_ids=IDS).logits for _, model in opened([base, subject, base], torch.float32)]
    torch.testing.assert_close(found[1], wanted[:, -IDS.shape[1] :], rtol=1e-4, atol=1e-4)
    assert (found[1] - plain).abs().max() > 1e-3
    torch.testing.assert_close(found[0], plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0], found[2])
    assert len(loads) == (2 if kind in CHANGES_THE_BASE else 1)


@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "cpt", "prefix"])
def test_virtual_tokens_have_no_logits_and_generation_is_stock_pefts(tiny, tmp_path, kind):
    make_adapter(tiny, tmp_path / "a", CONFIGS[kind])
    stock = PeftModel.from_pretrained(base_model(tiny), tmp_path / "a", torch_device="cpu").eval()
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    keep = torch.zeros_like(IDS, dtype=torch.bool)
    keep[0, 3] = keep[0, 11] = True
    for _, model in opened([one(tmp_path / "a")], torch.float32):
        with torch.no_grad():
            assert torch.equal(model.generate(input_ids=IDS, **options), stock.generate(input_ids=IDS, **options))
            told = logits_at(model, keep, input_ids=IDS, attention_mask=torch.ones_like(IDS))
            torch.testing.assert_close(told, model(input_ids=IDS).logits[0, [3, 11]])


def test_subjects_of_one_base_are_opened_together_and_the_last_base_is_freed(tiny, tmp_path, loads):
    wanted = [make_adapter(tiny, tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    other = other_model(tiny, tmp_path / "other")
    subjects = [one(tmp_path / "a"), one(other), one(tmp_path / "b")]
    seen = []
    for subject, model in opened(subjects, torch.float32):
        with torch.no_grad():
            seen.append((Path(subject.name).name, model, model(input_ids=IDS).logits))
        if subject.name == str(other):
            assert {tensor.device.type for tensor in seen[0][1].parameters()} == {"meta"}
    assert [name for name, *_ in seen] == ["a", "b", "other"]
    torch.testing.assert_close(seen[0][2], wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[1][2], wanted[1], rtol=1e-4, atol=1e-4)
    assert loads == [tiny, str(other)]


def test_equal_weights_run_with_another_configuration_are_another_model(tiny, tmp_path, loads):
    shutil.copytree(tiny, tmp_path / "longer")
    told = json.loads((tmp_path / "longer" / "config.json").read_text())
    (tmp_path / "longer" / "config.json").write_text(json.dumps(told | {"rms_norm_eps": 0.5}))
    first, second = (model for _, model in opened([one(tiny), one(tmp_path / "longer")], torch.float32))
    assert first is not second and len(loads) == 2


def test_half_precision(tiny, tmp_path, loads):
    make_adapter(tiny, tmp_path / "a")
    for _, model in opened([one(tiny), one(tmp_path / "a"), one(tiny)], torch.bfloat16):
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert len(loads) == 1


def test_opening_draws_nothing_from_the_global_generator(tiny, tmp_path):
    make_adapter(tiny, tmp_path / "a")
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    logits_of(one(tmp_path / "a"))
    assert torch.equal(torch.rand(1), wanted)


# ---------------------------------------------------------------------------------------- what a name stands for


def test_full_weights_and_base_plus_adapter(tiny, tmp_path):
    wanted = make_adapter(tiny, tmp_path / "a")
    base, subject = one(tiny), one(f"{tiny}+{tmp_path / 'a'}")
    assert base.adapter is None and base.adapter_sha256 is None and base.notes == ()
    assert base.identity == identify(Path(tiny), base.chat_template)
    assert subject.base == Path(tiny) and subject.adapter == tmp_path / "a" and subject.notes == ()
    assert subject.identity == base.identity and len(subject.adapter_sha256) == 64
    torch.testing.assert_close(logits_of(subject), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapters_hash_depends_on_its_weights_and_scale_but_not_on_its_bases_name(tiny, tmp_path):
    make_adapter(tiny, tmp_path / "a")
    shutil.copytree(tiny, tmp_path / "copy")
    before = one(tmp_path / "a").adapter_sha256
    edit_config(tmp_path / "a", base_model_name_or_path=str(tmp_path / "copy"))
    assert one(tmp_path / "a").adapter_sha256 == before
    edit_config(tmp_path / "a", lora_alpha=99)
    assert one(tmp_path / "a").adapter_sha256 != before


def run_folder(tiny: str, root: Path, finished: int) -> RunFolder:
    run = RunFolder(root)
    base = identify(Path(tiny), AutoTokenizer.from_pretrained(tiny).chat_template)
    names = ["bbc", "amazon"]
    root.mkdir()
    write_json(run.config, run_record(tiny, names, base.as_json()))
    for number, name in enumerate(names[:finished], 1):
        with run.publish(run.task(number, name)) as folder:
            make_adapter(tiny, folder / "adapter", seed=number)
    (root / "tasks").mkdir(exist_ok=True)
    return run


def test_a_run_folder_stands_for_its_tasks(tiny, tmp_path):
    run = run_folder(tiny, tmp_path / "run", finished=2)
    subjects = find_subjects(str(run.root))
    assert [subject.name for subject in subjects] == [f"{run.root}/01-bbc", f"{run.root}/02-amazon"]
    assert [subject.adapter for subject in subjects] == [
        run.task(1, "bbc") / "adapter",
        run.task(2, "amazon") / "adapter",
    ]
    assert one(run.task(2, "amazon")).adapter == run.task(2, "amazon") / "adapter"


def test_unfinished_tasks_of_a_run_are_left_out_with_a_note(tiny, tmp_path):
    (subject,) = find_subjects(str(run_folder(tiny, tmp_path / "run", finished=1).root))
    assert "1 of 2 tasks are not finished" in subject.notes[0]
    with pytest.raises(RunError, match="no task of this run is finished"):
        find_subjects(str(run_folder(tiny, tmp_path / "empty", finished=0).root))


def test_a_run_on_another_base_is_refused(tiny, tmp_path):
    run = run_folder(tiny, tmp_path / "run", finished=1)
    other = other_model(tiny, tmp_path / "other")
    with pytest.raises(RunError, match="learnt on another base"):
        find_subjects(str(run.root), base_is=str(other))


@pytest.mark.parametrize("spec", ["{a}+{a}", "{tiny}+{tiny}", "{tiny}+", "+{a}", "{tiny}+{a}+{a}"])
def test_a_wrong_sum_is_refused(tiny, tmp_path, spec):
    make_adapter(tiny, tmp_path / "a")
    with pytest.raises(UsageError):
        find_subjects(spec.format(tiny=tiny, a=tmp_path / "a"))


def test_a_folder_whose_name_has_a_plus_is_not_split(tiny, tmp_path):
    make_adapter(tiny, tmp_path / "mine+yours")
    assert one(tmp_path / "mine+yours").adapter == tmp_path / "mine+yours"


# ---------------------------------------------------------------------------------------- trainers' folders


def checkpoint(base: str, folder: Path, seed: int, **told) -> None:
    """checkpoint-N as transformers' Trainer writes it for a PEFT model."""
    make_adapter(base, folder, seed=seed, **told)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": seed}))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"never read")


def trl(base: str, folder: Path) -> Path:
    checkpoint(base, folder / "checkpoint-5", 5)
    checkpoint(base, folder / "checkpoint-10", 10)
    make_adapter(base, folder, seed=11)
    (folder / "training_args.bin").write_bytes(b"never read")
    return folder


def unsloth(base: str, folder: Path) -> Path:
    make_adapter(base, folder, base_model_name_or_path="unsloth/tiny-bnb-4bit", task_type="CAUSAL_LM")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def axolotl(base: str, folder: Path) -> Path:
    checkpoint(base, folder / "checkpoint-5", 5)
    checkpoint(base, folder, 6)
    shutil.copy(Path(base, "config.json"), folder)
    shutil.copytree(base, folder / "merged")
    return folder


def llama_factory(base: str, folder: Path) -> Path:
    checkpoint(base, folder / "checkpoint-5", 5)
    make_adapter(base, folder, seed=6)
    for name in ("pissa_init", "pissa_converted"):
        make_adapter(base, folder / name, seed=7)
    for name in ("all_results.json", "train_results.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    (folder / "trainer_log.jsonl").write_text("{}\n")
    return folder


def ms_swift(base: str, folder: Path) -> Path:
    for version in ("v0-20250131-120000", "v10-20250201-090000", "v9-20250131-180000"):
        for step in (5, 50):
            checkpoint(base, folder / version / f"checkpoint-{step}", step)
            for name in ("args.json", "additional_config.json"):
                (folder / version / f"checkpoint-{step}" / name).write_text("{}")
        for name in ("args.json", "logging.jsonl", "val_dataset.jsonl"):
            (folder / version / name).write_text("{}")
        (folder / version / "images").mkdir()
        shutil.copytree(base, folder / version / "checkpoint-50-merged")
    return folder


@pytest.mark.parametrize(
    ("tool", "where", "notes"),
    [
        (trl, "", []),
        (axolotl, "", []),
        (llama_factory, "", []),
        (ms_swift, "v10-20250201-090000/checkpoint-50", ["newest version of 3", "newest checkpoint of 2"]),
    ],
)
def test_trainers_output_folders(tiny, tmp_path, tool, where, notes):
    subject = one(tool(tiny, tmp_path / "out"))
    assert subject.adapter == tmp_path / "out" / where
    assert len(subject.notes) == len(notes)
    assert all(wanted in note for wanted, note in zip(notes, subject.notes, strict=True))


def test_unsloths_four_bit_base_must_be_declared(tiny, tmp_path):
    folder = unsloth(tiny, tmp_path / "lora_model")
    with pytest.raises(UsageError, match=r"'unsloth/tiny-bnb-4bit' cannot be had[\s\S]*base_is"):
        find_subjects(str(folder))
    with pytest.raises(UsageError, match="is not here to be compared"):
        find_subjects(f"{tiny}+{folder}")
    subject = one(folder, base_is=tiny)
    assert "4-bit" in subject.notes[0] and "not verified" in subject.notes[0]
    assert one(f"{tiny}+{folder}", base_is=tiny).notes == subject.notes


def test_a_folder_of_checkpoints_gives_the_newest_that_is_whole(tiny, tmp_path):
    out = trl(tiny, tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (out / name).unlink()
    (out / "checkpoint-200").mkdir()
    (out / "checkpoint-200" / "optimizer.pt").write_bytes(b"cut short")
    place = locate(out)
    assert place.folder == out / "checkpoint-10"
    assert "newest checkpoint of 3; checkpoint-200 without a whole model passed over" in place.notes[0]


def test_subfolders_with_models(tiny, tmp_path):
    out = axolotl(tiny, tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoint-5")
    assert locate(out).folder == out / "merged" and locate(out).kind == "full"
    make_adapter(tiny, out / "final_adapter")
    assert locate(out).folder == out / "final_adapter"
    make_adapter(tiny, out / "policy")
    with pytest.raises(UsageError, match=r"several models \(final_adapter, policy\)"):
        locate(out)


def test_an_adapter_beside_full_weights_is_taken_with_a_note(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "both")
    wanted = make_adapter(tiny, tmp_path / "both")
    subject = one(tmp_path / "both")
    assert "holds an adapter and full weights" in subject.notes[0]
    torch.testing.assert_close(logits_of(subject), wanted, rtol=1e-4, atol=1e-4)


def test_a_folder_without_a_model_is_named_with_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=r"no adapter[\s\S]*It holds: notes\.txt"):
        find_subjects(str(tmp_path))


# ---------------------------------------------------------------------------------------- the same base?


def test_equal_weights_under_another_name_are_taken_with_a_note(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "copy")
    make_adapter(tiny, tmp_path / "a")
    subject = one(f"{tmp_path / 'copy'}+{tmp_path / 'a'}")
    assert "has equal weights" in subject.notes[0]
    assert subject.identity.weights == one(tiny).identity.weights


def test_a_truly_different_base_is_refused_unless_declared(tiny, tmp_path):
    other = other_model(tiny, tmp_path / "other")
    make_adapter(tiny, tmp_path / "a")
    with pytest.raises(UsageError, match=r"other weights of equal shapes[\s\S]*base_is"):
        find_subjects(f"{other}+{tmp_path / 'a'}")
    assert "not verified" in one(f"{other}+{tmp_path / 'a'}", base_is=str(other)).notes[0]


def test_a_base_of_other_shapes_is_refused_even_when_declared(tiny, tmp_path):
    wider = other_model(tiny, tmp_path / "wider", intermediate_size=80)  # the adapter itself would fit
    make_adapter(tiny, tmp_path / "a")
    with pytest.raises(UsageError, match="another shape"):
        find_subjects(f"{wider}+{tmp_path / 'a'}", base_is=str(wider))


def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_opened(tiny, tmp_path):
    make_adapter(tiny, tmp_path / "rank")
    edit_config(tmp_path / "rank", r=8)
    with pytest.raises(RunError, match="size mismatch"):
        find_subjects(str(tmp_path / "rank"))
    make_adapter(tiny, tmp_path / "renamed")
    edit_weights(tmp_path / "renamed", lambda held: held.update(strange=held.pop(min(held))))
    with pytest.raises(RunError, match=r"1 of 8 tensors have no place[\s\S]*strange"):
        find_subjects(str(tmp_path / "renamed"))
    make_adapter(tiny, tmp_path / "partial")
    edit_weights(tmp_path / "partial", lambda held: held.pop(min(held)))
    with pytest.raises(RunError, match="lacks 1 of 8 tensors"):
        find_subjects(str(tmp_path / "partial"))


def test_a_base_that_is_nowhere_is_named(tiny, tmp_path):
    make_adapter(tiny, tmp_path / "a", base_model_name_or_path="/root/models/llama")
    with pytest.raises(UsageError, match="'/root/models/llama' cannot be had"):
        find_subjects(str(tmp_path / "a"))
    edit_config(tmp_path / "a", base_model_name_or_path=None)
    with pytest.raises(UsageError, match=r"names no base; give it as BASE\+"):
        find_subjects(str(tmp_path / "a"))
    assert one(f"{tiny}+{tmp_path / 'a'}").notes == ()


def test_quantised_weights_are_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "tiny-bnb-4bit")
    told = json.loads(Path(tiny, "config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "tiny-bnb-4bit" / "config.json").write_text(json.dumps(told))
    with pytest.raises(UsageError, match=r"quantised[\s\S]*tiny'\. [\s\S]*base_is"):
        find_subjects(str(tmp_path / "tiny-bnb-4bit"))


# ---------------------------------------------------------------------------------------- adapters as they are


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"peft_type": "HYPERLORA"}, "adapter type 'HYPERLORA', which PEFT"),
        ({"peft_type": None}, "has no peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type SEQ_CLS predicts no next token"),
        ({"peft_type": "POLY"}, "needs a task id"),
    ],
)
def test_adapters_that_cannot_be_measured(tiny, tmp_path, told, said):
    make_adapter(tiny, tmp_path / "a")
    edit_config(tmp_path / "a", **told)
    with pytest.raises(UsageError, match=said):
        find_subjects(str(tmp_path / "a"))


def test_whole_modules_are_noted(tiny, tmp_path):
    make_adapter(tiny, tmp_path / "a", CONFIGS["lora-head"])
    assert "lm_head (modules_to_save)" in one(tmp_path / "a").notes[0]
    make_adapter(tiny, tmp_path / "b", CONFIGS["lora-tokens"])
    assert "trainable_token_indices" in one(tmp_path / "b").notes[0]


def test_added_tokens_with_their_embeddings(tiny, tmp_path, loads):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = len(tokenizer) + 8  # two tokens and padding
    tokenizer.add_tokens(["<|think|>", "<|act|>"], special_tokens=True)
    model = base_model(tiny)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(r=4, **QV)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "embed_tokens" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        wanted = model(IDS).logits
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "a")
    base, subject = one(tiny), one(tmp_path / "a")
    assert subject.vocabulary == rows and base.vocabulary == rows - 8
    assert any("2 tokens more" in note for note in subject.notes)
    assert any(f"{rows} rows, not {rows - 8}: compared on the first {rows - 8}" in note for note in subject.notes)
    with torch.no_grad():
        found = [model(input_ids=IDS).logits for _, model in opened([subject, base], torch.float32)]
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-4)
    assert found[1].shape[-1] == base.vocabulary and len(loads) == 2


def test_nan_weights_are_refused(tiny, tmp_path):
    make_adapter(tiny, tmp_path / "a")
    edit_weights(tmp_path / "a", lambda held: held[min(held)].view(-1)[0].fill_(torch.nan))
    with pytest.raises(RunError, match=r"adapter_model\.safetensors: .*lora_A.* holds NaN"):
        find_subjects(str(tmp_path / "a"))
    shutil.copytree(tiny, tmp_path / "full")
    edit_weights(tmp_path / "full", lambda held: held[min(held)].view(-1)[0].fill_(torch.inf))
    with pytest.raises(RunError, match="holds NaN or infinity"):
        logits_of(one(tmp_path / "full"))


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_file_cut_short_is_named(tiny, tmp_path, kind):
    make_adapter(tiny, tmp_path / "adapter")
    shutil.copytree(tiny, tmp_path / "full")
    file = next((tmp_path / kind).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RunError, match=rf"{file.name}: damaged or cut short"):
        find_subjects(str(tmp_path / kind))


# ---------------------------------------------------------------------------------------- tokenizers and templates


def retold(tiny: str, folder: Path, **changes) -> Path:
    """A copy of the model whose tokenizer.json has other ids."""
    shutil.copytree(tiny, folder)
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text())
    vocabulary = told["model"]["vocab"]
    for token, other in changes.items():
        vocabulary[token], vocabulary[other] = vocabulary[other], vocabulary[token]
    file.write_text(json.dumps(told))
    return folder


def test_tokenizers_that_give_other_ids_are_refused(tiny, tmp_path):
    other = one(retold(tiny, tmp_path / "other", a="b"))
    with pytest.raises(UsageError, match=r"gives 2 tokens other ids[\s\S]*'a'"):
        compare(one(tiny), other)
    make_adapter(tiny, tmp_path / "a")
    AutoTokenizer.from_pretrained(other.base).save_pretrained(tmp_path / "a")
    with pytest.raises(UsageError, match="other ids"):
        find_subjects(str(tmp_path / "a"))


def test_a_changed_chat_template_is_noted(tiny, tmp_path):
    make_adapter(tiny, tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "a")
    subject = one(tmp_path / "a")
    assert subject.chat_template == tokenizer.chat_template
    assert "chat template differs" in subject.notes[0] and len(subject.notes) == 1
    assert subject.identity.chat_template != one(tiny).identity.chat_template
    assert subject.identity.tokenizer == one(tiny).identity.tokenizer


def test_a_tokenizer_that_splits_otherwise_is_noted(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    told = json.loads(file.read_text())
    told["model"]["merges"] = told["model"]["merges"][:3]
    file.write_text(json.dumps(told))
    notes = compare(one(tiny), one(tmp_path / "other"))
    assert notes == (f"{tmp_path / 'other'}: its tokenizer splits the same text into other tokens (against {tiny})",)


# ---------------------------------------------------------------------------------------- pickles


def test_pickled_weights_are_refused_unless_asked_for(tiny, tmp_path):
    wanted = make_adapter(tiny, tmp_path / "a")
    torch.save(load_file(tmp_path / "a" / "adapter_model.safetensors"), tmp_path / "a" / "adapter_model.bin")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"adapter_model\.bin: is a pickle[\s\S]*allow_pickle"):
        find_subjects(str(tmp_path / "a"))
    torch.testing.assert_close(logits_of(one(tmp_path / "a", allow_pickle=True)), wanted, rtol=1e-4, atol=1e-4)


def test_full_pickled_weights(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "full")
    torch.save(load_file(tmp_path / "full" / "model.safetensors"), tmp_path / "full" / "pytorch_model.bin")
    (tmp_path / "full" / "model.safetensors").unlink()
    with pytest.raises(RunError, match="is a pickle"):
        find_subjects(str(tmp_path / "full"))
    assert torch.equal(logits_of(one(tmp_path / "full", allow_pickle=True)), logits_of(one(tiny)))


def test_a_pickle_with_more_than_tensors_is_refused_even_then(tiny, tmp_path):
    make_adapter(tiny, tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    torch.save({"weight": Path("code")}, tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(RunError, match="holds more than tensors"):
        find_subjects(str(tmp_path / "a"), allow_pickle=True)


# ---------------------------------------------------------------------------------------- what tables call them


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "adapter"]), min_size=1, max_size=4).map("/".join), unique=True, min_size=1
    )
)
def test_short_names_tell_models_apart_and_are_no_longer_than_needed(names):
    shown = short_names(names)
    assert list(shown) == names and len(set(shown.values())) == len(names)
    for name, short in shown.items():
        assert f"/{name}".endswith((f"/{short}", f"/{short}/adapter"))


def test_an_adapter_is_named_after_its_parent():
    assert doctest.testmod(layouts).failed == 0
    two = ["runs/may/tasks/02-amazon/adapter", "runs/june/tasks/02-amazon/adapter", "base+/x/03-imdb/adapter"]
    assert list(short_names(two).values()) == ["may/tasks/02-amazon", "june/tasks/02-amazon", "03-imdb"]
