"""Forgetting measured while transformers' Trainer and TRL train."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from forgetless.auditing.callback import ForgettingCallback
from forgetless.errors import UsageError

TEXT = ["The sky is blue. What colour has the sky?", "The dog is bark."]
LORA = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


def measure(reference, tokenizer, text):
    """KL(reference || model) in nats per token, the obvious way."""
    assert not reference.training and not torch.is_grad_enabled()
    encoded = [tokenizer(document, return_tensors="pt").input_ids for document in text]
    kept = [reference(input_ids=ids).logits.log_softmax(-1) for ids in encoded]

    def compare(model):
        assert not model.training and not torch.is_grad_enabled()
        now = [model(input_ids=ids).logits.log_softmax(-1) for ids in encoded]
        kl = [(p.exp() * (p - q)).sum(-1).flatten() for p, q in zip(kept, now, strict=True)]
        return {"kl": float(torch.cat(kl).mean()), "tokens": float(sum(ids.numel() for ids in encoded))}

    return compare


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
    run.add_callback(ForgettingCallback(run, TEXT, measure, every=2))
    run.train()
    values = logged(run)
    assert list(values) == [2, 4, 5]
    assert values[5] > 1e-3 and all(value > 0 for value in values.values())
    assert [record["step"] for record in run.state.log_history if "loss" in record] == [1, 2, 3, 4, 5]
    assert all("epoch" in record and "forgetting/tokens" in record
               for record in run.state.log_history if "forgetting/kl" in record)  # fmt: skip
    with torch.no_grad():
        start = AutoModelForCausalLM.from_pretrained(tiny).eval()
        assert values[5] == pytest.approx(measure(start, run.processing_class, TEXT)(run.model.eval())["kl"], rel=1e-5)


def test_reporters_see_the_values(tiny, tmp_path):
    class Reporter(TrainerCallback):
        seen: list[dict] = []  # noqa: RUF012

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    run = trainer(tiny, tmp_path, max_steps=2)
    run.add_callback(Reporter())
    run.add_callback(ForgettingCallback(run, TEXT, measure, every=1))
    run.train()
    assert sum("forgetting/kl" in logs for logs in Reporter.seen) == 2


def test_training_without_steps_that_matter_forgets_nothing(tiny, tmp_path):
    run = trainer(tiny, tmp_path, learning_rate=0.0)
    run.add_callback(ForgettingCallback(run, TEXT, measure, every=3))
    run.train()
    assert logged(run) == {3: pytest.approx(0, abs=1e-6), 6: pytest.approx(0, abs=1e-6)}


def test_training_is_the_same_with_and_without_it(tiny, tmp_path):
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(lora_dropout=0.3, **LORA))
        run = trainer(tiny, tmp_path / str(watched), model)
        if watched:
            run.add_callback(ForgettingCallback(run, TEXT, measure, every=1, reference=tiny))
        run.train()
        assert run.model.training
        ends.append(dict(run.model.state_dict()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_reference_of_an_adapter_is_the_base_without_it(tiny, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(init_lora_weights=False, **LORA))
    run = trainer(tiny, tmp_path, model, learning_rate=0.0, max_steps=1)
    run.add_callback(ForgettingCallback(run, TEXT, measure, every=1))
    run.train()
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny).eval()
        wanted = measure(base, run.processing_class, TEXT)(run.model.eval())["kl"]
    assert logged(run)[1] == pytest.approx(wanted, rel=1e-4) and wanted > 1e-3


@pytest.mark.parametrize("by_name", [True, False])
def test_another_reference(tiny, tmp_path, by_name):
    torch.manual_seed(0)
    earlier = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(init_lora_weights=False, **LORA))
    earlier.save_pretrained(tmp_path / "earlier")
    run = trainer(tiny, tmp_path / "out", learning_rate=0.0, max_steps=1)
    reference = str(tmp_path / "earlier") if by_name else earlier
    run.add_callback(ForgettingCallback(run, TEXT, measure, every=1, reference=reference))
    run.train()
    with torch.no_grad():
        wanted = measure(earlier.eval(), run.processing_class, TEXT)(run.model.eval())["kl"]
    assert logged(run)[1] == pytest.approx(wanted, rel=1e-4) and wanted > 1e-3


def test_stops_at_the_budget_only_when_asked(tiny, tmp_path):
    free = trainer(tiny, tmp_path / "free")
    free.add_callback(ForgettingCallback(free, TEXT, measure, every=2))
    free.train()
    values = logged(free)
    budget = (values[2] + values[4]) / 2
    assert free.state.global_step == 6 and values[2] < values[4]
    bound = trainer(tiny, tmp_path / "bound")
    bound.add_callback(ForgettingCallback(bound, TEXT, measure, every=2, max_kl=budget, action="stop"))
    bound.train()
    assert bound.state.global_step == 4


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_lowers_the_rate_for_the_rest_of_the_schedule(tiny, tmp_path, schedule):
    rates = {}
    for action in ("log", "lower_rate"):
        run = trainer(tiny, tmp_path / action, lr_scheduler_type=schedule)
        budget = None if action == "log" else 0.0
        run.add_callback(ForgettingCallback(run, TEXT, measure, every=2, max_kl=budget, action=action))
        run.train()
        rates[action] = [record["learning_rate"] for record in run.state.log_history if "loss" in record]
    ratios = [lowered / plain for plain, lowered in zip(rates["log"], rates["lower_rate"], strict=True) if plain]
    assert ratios[0] == pytest.approx(1) and ratios[2] == pytest.approx(0.5)
    assert ratios[4] == pytest.approx(0.25) and sorted(ratios, reverse=True) == ratios


def test_what_cannot_be_a_reference_is_refused(tiny, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(init_lora_weights="pissa", **LORA))
    run = trainer(tiny, tmp_path / "pissa", model)
    run.add_callback(ForgettingCallback(run, TEXT, measure))
    with pytest.raises(UsageError, match="init_lora_weights='pissa' has moved part of the base"):
        run.train()


def test_a_resumed_run_of_full_weights_needs_a_reference(tiny, tmp_path):
    run = trainer(tiny, tmp_path)
    callback = ForgettingCallback(run, TEXT, measure)
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
        ({"text": "one string"}, "a list of documents"),
        ({"text": ["", " "]}, "a list of documents"),
    ],
)
def test_wrong_options(tiny, tmp_path, options, said):
    run = trainer(tiny, tmp_path)
    with pytest.raises(UsageError, match=said):
        ForgettingCallback(run, **({"text": TEXT, "measure": measure} | options))


def test_trls_own_metrics_are_left_to_its_own_records(tiny, tmp_path):
    trl = pytest.importorskip("trl")
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
            run.add_callback(ForgettingCallback(run, TEXT, measure, every=1))
        run.train()
        records[watched] = next(record for record in run.state.log_history if "loss" in record)
    assert list(logged(run)) == [1, 2, 3, 4] and logged(run)[4] > 0
    assert records[True]["mean_token_accuracy"] == records[False]["mean_token_accuracy"]
    assert records[True]["loss"] == records[False]["loss"]
