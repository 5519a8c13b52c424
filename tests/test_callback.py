"""Forgetting measured while transformers' Trainer and TRL train."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainerState, TrainingArguments

from forgetless import ForgettingCallback
from forgetless.auditing import callback as module
from forgetless.errors import UsageError

TEXT = ["The sky is blue. What colour has the sky?", "The dog is bark."]
LORA = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


def obvious(reference, model, tokenizer, text=TEXT) -> dict[str, float]:
    """What is logged, the obvious way: whole distributions of both models at every position but the last."""
    ids = [tokenizer(document, return_tensors="pt").input_ids for document in text]
    with torch.no_grad():
        p, q = (
            torch.cat([one.eval()(input_ids=row).logits[0, :-1].double() for row in ids]).log_softmax(-1)
            for one in (reference, model)
        )
    entropy, cross_entropy = (-(p.exp() * log).sum(-1).mean().item() for log in (p, q))
    agree = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    return {"kl": cross_entropy - entropy, "cross_entropy": cross_entropy, "entropy": entropy, "agree": agree}


def trainer(tiny, folder, model=None, **options) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer("What size has the whale? Answer: large", return_tensors="pt").input_ids[0]
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}] * 4
    told = {"max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant"} | options
    arguments = TrainingArguments(
        output_dir=str(folder), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=2, seed=1, **told,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny) if model is None else model
    return Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)


def logged(run: Trainer) -> dict[int, float]:
    """The measured values in the trainer's log, by step."""
    return {record["step"]: record["forgetting/kl"] for record in run.state.log_history if "forgetting/kl" in record}


def test_values_stand_in_the_trainers_log_every_n_steps_and_at_the_end(tiny, tmp_path):
    run = trainer(tiny, tmp_path, max_steps=5)
    run.add_callback(ForgettingCallback(run, TEXT, every=2))
    run.train()
    values = logged(run)
    assert list(values) == [2, 4, 5]
    assert values[5] > 1e-3 and all(value > 0 for value in values.values())
    assert [record["step"] for record in run.state.log_history if "loss" in record] == [1, 2, 3, 4, 5]
    last = [record for record in run.state.log_history if "forgetting/kl" in record][-1]
    wanted = obvious(AutoModelForCausalLM.from_pretrained(tiny), run.model, run.processing_class)
    assert {name: last[f"forgetting/{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert "epoch" in last and last["forgetting/agree"] < 1


def test_reporters_see_the_values(tiny, tmp_path):
    class Reporter(TrainerCallback):
        seen: list[dict] = []  # noqa: RUF012

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    run = trainer(tiny, tmp_path, max_steps=2)
    run.add_callback(Reporter())
    run.add_callback(ForgettingCallback(run, TEXT, every=1))
    run.train()
    assert sum("forgetting/kl" in logs for logs in Reporter.seen) == 2


def test_training_without_steps_that_matter_forgets_nothing(tiny, tmp_path):
    run = trainer(tiny, tmp_path, learning_rate=0.0)
    run.add_callback(ForgettingCallback(run, TEXT, every=3))
    run.train()
    assert logged(run) == {3: pytest.approx(0, abs=1e-6), 6: pytest.approx(0, abs=1e-6)}


def test_training_is_the_same_with_and_without_it(tiny, tmp_path):
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(lora_dropout=0.3, **LORA))
        run = trainer(tiny, tmp_path / str(watched), model)
        if watched:
            run.add_callback(ForgettingCallback(run, TEXT, every=1, reference=tiny))
        run.train()
        assert run.model.training
        ends.append(dict(run.model.state_dict()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_reference_of_an_adapter_is_the_base_without_it(tiny, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(init_lora_weights=False, **LORA))
    run = trainer(tiny, tmp_path, model, learning_rate=0.0, max_steps=1)
    run.add_callback(ForgettingCallback(run, TEXT, every=1))
    run.train()
    wanted = obvious(AutoModelForCausalLM.from_pretrained(tiny), run.model, run.processing_class)["kl"]
    assert logged(run)[1] == pytest.approx(wanted, rel=1e-4) and wanted > 1e-3


@pytest.mark.parametrize("by_name", [True, False])
def test_another_reference(tiny, tmp_path, by_name):
    torch.manual_seed(0)
    earlier = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(init_lora_weights=False, **LORA))
    earlier.save_pretrained(tmp_path / "earlier")
    run = trainer(tiny, tmp_path / "out", learning_rate=0.0, max_steps=1)
    reference = str(tmp_path / "earlier") if by_name else earlier
    run.add_callback(ForgettingCallback(run, TEXT, every=1, reference=reference))
    run.train()
    wanted = obvious(earlier, run.model, run.processing_class)["kl"]
    assert logged(run)[1] == pytest.approx(wanted, rel=1e-4) and wanted > 1e-3


def test_by_default_own_answers_in_the_trainers_precision(tiny, tmp_path, monkeypatch):
    """A step that changes nothing: the same bits on both sides in bf16, also when going on from a checkpoint."""
    monkeypatch.setattr(module, "PROMPTS", 2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(**LORA))
    run = trainer(tiny, tmp_path, model, learning_rate=0.0, max_steps=1, bf16=True, gradient_checkpointing=True)
    callback = ForgettingCallback(run)
    callback.on_train_begin(run.args, TrainerState(global_step=3), run.control, model=model)
    run.add_callback(callback)
    run.train()
    assert callback.side is not None and callback.side.windows.documents == 2
    [record] = [record for record in run.state.log_history if "forgetting/kl" in record]
    assert abs(record["forgetting/kl"]) < 1e-6 and record["forgetting/agree"] == 1 and record["forgetting/entropy"] > 1


def test_a_file_and_its_paragraphs_are_the_same_text(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("\n\n".join(TEXT))
    run = trainer(tiny, tmp_path / "out", max_steps=1)
    for text in (TEXT, str(tmp_path / "notes.txt")):
        run.add_callback(ForgettingCallback(run, text))
    run.train()
    one, other = [record["forgetting/kl"] for record in run.state.log_history if "forgetting/kl" in record]
    assert one == other > 0


def test_sharded_weights_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UsageError, match=r"shard the weights.*forgetless audit"):
        ForgettingCallback(trainer(tiny, tmp_path), TEXT)


def test_stops_at_the_budget_only_when_asked(tiny, tmp_path):
    free = trainer(tiny, tmp_path / "free")
    free.add_callback(ForgettingCallback(free, TEXT, every=2))
    free.train()
    values = logged(free)
    budget = (values[2] + values[4]) / 2
    assert free.state.global_step == 6 and values[2] < values[4]
    bound = trainer(tiny, tmp_path / "bound")
    bound.add_callback(ForgettingCallback(bound, TEXT, every=2, max_kl=budget, action="stop"))
    bound.train()
    assert bound.state.global_step == 4


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_lowers_the_rate_for_the_rest_of_the_schedule(tiny, tmp_path, schedule):
    rates = {}
    for action in ("log", "lower_rate"):
        run = trainer(tiny, tmp_path / action, lr_scheduler_type=schedule)
        budget = None if action == "log" else 0.0
        run.add_callback(ForgettingCallback(run, TEXT, every=2, max_kl=budget, action=action))
        run.train()
        rates[action] = [record["learning_rate"] for record in run.state.log_history if "loss" in record]
    ratios = [lowered / plain for plain, lowered in zip(rates["log"], rates["lower_rate"], strict=True) if plain]
    assert ratios[0] == pytest.approx(1) and ratios[2] == pytest.approx(0.5)
    assert ratios[4] == pytest.approx(0.25) and sorted(ratios, reverse=True) == ratios


def test_what_cannot_be_a_reference_is_refused(tiny, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(init_lora_weights="pissa", **LORA))
    run = trainer(tiny, tmp_path / "pissa", model)
    run.add_callback(ForgettingCallback(run, TEXT))
    with pytest.raises(UsageError, match="init_lora_weights='pissa' has moved part of the base"):
        run.train()


def test_a_resumed_run_of_full_weights_needs_a_reference(tiny, tmp_path):
    run = trainer(tiny, tmp_path)
    callback = ForgettingCallback(run, TEXT)
    run.state.global_step = 3
    with pytest.raises(UsageError, match="goes on from a checkpoint"):
        callback.on_train_begin(run.args, run.state, run.control, model=run.model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"action": "pause"}, "action 'pause': one of log, stop, lower_rate"),
        ({"action": "stop"}, "max_kl=None"),
        ({"max_kl": 0.1}, "a budget goes with the action"),
        ({"every": 0}, "every=0"),
        ({"text": "one string"}, "one string: cannot be read"),
        ({"text": ["", " "]}, "a list of documents"),
    ],
)
def test_wrong_options(tiny, tmp_path, options, said):
    run = trainer(tiny, tmp_path)
    with pytest.raises(UsageError, match=said):
        ForgettingCallback(run, **({"text": TEXT} | options))


def test_trls_own_metrics_are_left_to_its_own_records(tiny, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed (pip install trl)")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "What size has the whale?", "completion": " large"}] * 8)
    records = {}
    for watched in (False, True):
        torch.manual_seed(0)
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / str(watched)), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
            per_device_train_batch_size=2, max_steps=4, logging_steps=4, learning_rate=1e-2, bf16=False,
        )  # fmt: skip
        run = trl.SFTTrainer(
            tiny, args=arguments, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(tiny),
            peft_config=LoraConfig(**LORA),
        )  # fmt: skip
        assert isinstance(run.model, PeftModel)
        if watched:
            run.add_callback(ForgettingCallback(run, TEXT, every=1))
        run.train()
        records[watched] = next(record for record in run.state.log_history if "loss" in record)
    assert list(logged(run)) == [1, 2, 3, 4] and logged(run)[4] > 0
    assert records[True]["mean_token_accuracy"] == records[False]["mean_token_accuracy"]
    assert records[True]["loss"] == records[False]["loss"]
