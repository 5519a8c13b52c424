"""A method's penalty and step hooks in transformers' Trainer, and in TRL's where it is installed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from forgetless import MethodCallback
from forgetless.data.batches import Encoder, collate, weigh
from forgetless.data.readers import read_rows
from forgetless.errors import UsageError
from forgetless.methods import METHODS
from forgetless.methods.ewc import EWC
from forgetless.methods.ilora import ILoRA
from forgetless.methods.nlora import NLoRA
from forgetless.methods.olora import OLoRA, overlap
from forgetless.model.adapters import Attached

LORA = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
TEXTS = [f"What size has the {thing}? Answer: {size}" for thing, size in
         (("whale", "large"), ("ant", "small"), ("tower", "large"), ("very very small seed", "small"))]  # fmt: skip


def peft_model(tiny, seed=0, **lora) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(**LORA | lora))


@pytest.fixture(scope="module")
def earlier(tiny, tmp_path_factory) -> str:
    """An adapter of an earlier task."""
    folder = tmp_path_factory.mktemp("earlier")
    model = peft_model(tiny, seed=5)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.normal_(std=0.1)
    model.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def old_rows(tmp_path_factory) -> str:
    """Training rows of an earlier task."""
    file = tmp_path_factory.mktemp("rows") / "train.jsonl"
    pairs = (("sky", "blue"), ("leaf", "green"), ("rose", "red"))
    lines = [json.dumps({"prompt": f"What colour has the {thing}?", "completion": f" {is_}"}) for thing, is_ in pairs]
    file.write_text("\n".join(lines))
    return str(file)


def make(tiny, folder, rows=4, accumulate=1, **options) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    data = []
    for text in TEXTS * 2:
        ids = tokenizer(text).input_ids[:12]
        data.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)})
    told = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "max_grad_norm": 0.5} | options
    arguments = TrainingArguments(
        output_dir=str(folder), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=1,
        per_device_train_batch_size=rows, gradient_accumulation_steps=accumulate, **told,
    )  # fmt: skip

    def pad(batch):
        length = max(len(one["input_ids"]) for one in batch)
        fill = {"input_ids": tokenizer.pad_token_id, "labels": -100, "attention_mask": 0}
        return {
            key: torch.tensor([one[key] + [value] * (length - len(one[key])) for one in batch])
            for key, value in fill.items()
        }

    return Trainer(peft_model(tiny), arguments, train_dataset=data, data_collator=pad, processing_class=tokenizer)


def trained(run: Trainer, *arguments, **options) -> tuple[dict[str, torch.Tensor], MethodCallback]:
    callback = MethodCallback(run, *arguments, **options)
    run.add_callback(callback)
    run.train()
    return weights(run), callback


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in run.model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("method", [lambda: OLoRA(lam=5.0), lambda: NLoRA(lam=0.01), lambda: EWC(lam=100.0)])
def test_accumulation_does_not_change_the_step(tiny, earlier, old_rows, tmp_path, method):
    """8 rows at once, or 2 rows four times: the penalty's gradient is added once a step, before clipping."""
    of_old = {"old_rows": old_rows} if isinstance(method(), EWC) else {"past": [earlier]}
    ends = []
    for rows, accumulate in ((8, 1), (2, 4)):
        end, callback = trained(make(tiny, tmp_path, rows, accumulate), method(), **of_old)
        assert all(check.ok for check in callback.checks), callback.checks
        assert len(callback.shares) == 3
        ends.append(end)
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-6)
    plain = make(tiny, tmp_path, 8)
    plain.train()
    assert any(not torch.allclose(ends[0][name], tensor, atol=1e-4) for name, tensor in weights(plain).items())


def test_the_gradient_is_the_obvious_one(tiny, earlier, tmp_path):
    """One SGD step without clipping: what the penalty moves is the rate times its gradient."""
    lam, rate = 3.0, 0.1
    options = {
        "max_steps": 1,
        "learning_rate": rate,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
    }
    plain = make(tiny, tmp_path, 2, 4, **options)
    start = weights(plain)
    plain.train()
    end, _ = trained(make(tiny, tmp_path, 2, 4, **options), OLoRA(lam=lam), past=[earlier])
    old = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), earlier).state_dict()
    for name, tensor in weights(plain).items():
        fresh = start[name].requires_grad_()
        if "lora_A" in name:
            (gradient,) = torch.autograd.grad(lam * overlap([old[name]], [fresh]), [fresh])
            torch.testing.assert_close(tensor - end[name], rate * gradient, rtol=1e-3, atol=1e-6)
        else:
            torch.testing.assert_close(tensor, end[name], rtol=1e-4, atol=1e-6)


def test_it_is_logged_and_the_trainer_left_as_it_was(tiny, earlier, tmp_path):
    run = make(tiny, tmp_path)
    step = run.training_step
    _, callback = trained(run, OLoRA(), past=[earlier])
    assert run.training_step == step
    records = [record for record in run.state.log_history if "method/penalty" in record]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(record["method/penalty_share"] > 0 for record in records)
    assert len([record for record in run.state.log_history if "loss" in record]) == 3
    assert "overlap" in [check.name for check in callback.checks]


def test_a_slow_learner_follows_and_is_what_is_saved(tiny, tmp_path):
    """θ_l = λ θ_l + (1 - λ) θ_w after each optimizer step, not after each micro-batch."""
    lam, states = 0.5, []

    class Watched(ILoRA):
        def after_step(self, optimizer):
            states.append(self.adapters.snapshot())
            super().after_step(optimizer)

    run = make(tiny, tmp_path, 2, 4)
    method = Watched(lam=lam, gamma=0.0, memory=0)
    start = {name.replace(".default", ""): tensor for name, tensor in weights(run).items()}
    _, callback = trained(run, method)
    assert len(states) == 3
    for name, slow in method.slow.items():
        layer, side = name.rsplit(".", 1)
        expected = start[f"base_model.model.{layer}.lora_{side}.weight"]
        for fast in states:
            expected = lam * expected + (1 - lam) * fast[name]
        torch.testing.assert_close(slow, expected)
    callback.save(tmp_path / "slow")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "slow")
    for name, pair in Attached(stock, [], 0).pairs().items():
        assert torch.equal(pair.A, method.slow[f"{name}.A"]) and torch.equal(pair.B, method.slow[f"{name}.B"])


def test_several_earlier_adapters_are_joined_with_their_scales(tiny, earlier, tmp_path):
    other = peft_model(tiny, seed=6, lora_alpha=32)
    with torch.no_grad():
        for name, tensor in other.named_parameters():
            if "lora_B" in name:
                tensor.fill_(0.1)
    other.save_pretrained(str(tmp_path))
    both = Attached(peft_model(tiny), [earlier, tmp_path], 0)
    single = [Attached(peft_model(tiny), [folder], 0).past() for folder in (earlier, tmp_path)]
    for name, pair in both.past().items():
        sums = sum(one[name].scale * one[name].B @ one[name].A for one in single)
        torch.testing.assert_close(pair.scale * pair.B @ pair.A, sums)


def test_what_cannot_be_is_refused(tiny, earlier, tmp_path):
    run = make(tiny, tmp_path)
    with pytest.raises(UsageError, match="makes nothing of old rows"):
        MethodCallback(run, OLoRA(), old_rows="rows.jsonl")
    for method, past, said in (
        (OLoRA(), [], "nothing to do; give what it needs of earlier tasks"),
        (EWC(), [earlier], "nothing to do; give what it needs of earlier tasks"),
        (OLoRA(), [str(tmp_path)], "no LoRA adapter on the 4 layers"),
        (Restarts(), [], "begins tasks with adapters of its own"),
        (OneFactor(), [], "trains B alone"),
    ):
        run = make(tiny, tmp_path)
        run.add_callback(MethodCallback(run, method, past=past))
        with pytest.raises(UsageError, match=said):
            run.train()
    run.model = AutoModelForCausalLM.from_pretrained(tiny)
    with pytest.raises(UsageError, match="give the trainer a PEFT model"):
        MethodCallback(run, OLoRA())


class Restarts(NLoRA):
    def begin_task(self, task):
        super().begin_task(task)
        self.adapters.reset(task)


class OneFactor(NLoRA):
    def start(self, adapters, encoder, seed):
        super().start(adapters, encoder, seed)
        adapters.train_only("B")


STEP = "of a step itself"
NOTHING = "neither a penalty nor anything to do after a step"
PAIRS = "draws, merges or scales the pairs itself"
REFUSED = {
    "sequential": NOTHING, "incremental": NOTHING, "per_task": NOTHING, "joint": NOTHING,
    "corda": NOTHING, "loranull": NOTHING,
    "sherl": "trains a side network",
    **dict.fromkeys(("prompt_tuning", "progressive_prompts", "l2p", "lfpt5"), "trains a soft prompt"),
    "raclora": PAIRS, "sdlora": PAIRS, "slao": PAIRS,
}  # fmt: skip
ACT = {"olora": {"lam": 5.0}, "nlora": {"lam": 0.01}, "ewc": {"lam": 100.0}, "clora": {"lam": 1.0, "k": 8}}


@pytest.fixture(scope="module")
def untouched(tiny, tmp_path_factory) -> Trainer:
    """A trainer that no method is to change."""
    return make(tiny, tmp_path_factory.mktemp("untouched"))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_acts_on_a_trainer_or_is_refused(name, tiny, earlier, old_rows, untouched, tmp_path):
    kind = METHODS[name]
    if name not in ACT:
        before, trained_before = weights(untouched), [p.requires_grad for p in untouched.model.parameters()]
        with pytest.raises(UsageError, match=f"{kind.__name__}: .*{REFUSED.get(name, STEP)}.*; learn with"):
            MethodCallback(untouched, kind(**kind.example), past=[earlier])
        assert all(torch.equal(tensor, before[at]) for at, tensor in weights(untouched).items())
        assert [p.requires_grad for p in untouched.model.parameters()] == trained_before
        return
    of_old = {"past": [earlier]} | ({"old_rows": old_rows} if name == "ewc" else {})
    end, callback = trained(make(tiny, tmp_path), kind(**ACT[name]), **of_old)
    assert callback.checks and all(check.ok for check in callback.checks), callback.checks
    assert any(share > 0 for share in callback.shares)
    off, _ = trained(make(tiny, tmp_path), kind(**ACT[name] | {"lam": 1e-12}), **of_old)
    assert any(not torch.allclose(tensor, off[at], atol=1e-4) for at, tensor in end.items())


def test_ewc_takes_its_fisher_of_the_old_rows(tiny, old_rows, tmp_path):
    """F is the mean over old rows of each one's squared gradient, at the weights that training begins with."""
    run = make(tiny, tmp_path, max_steps=1)
    encoder, model = Encoder(run.processing_class, 64), make(tiny, tmp_path).model
    expected = 0.0
    for row in read_rows(old_rows).rows:
        part = collate(weigh([encoder(row)], 1.0), run.processing_class.pad_token_id)
        labels = torch.full_like(part.ids, -100)
        labels[:, 1:][part.keep[:, :-1]] = part.targets
        model.zero_grad()
        (model(part.ids, labels=labels).loss * part.keep.sum()).backward()
        expected += sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) / 3
    method = EWC(lam=1.0)
    _, callback = trained(run, method, old_rows=old_rows)
    assert float(method.F.sum()) == pytest.approx(expected, rel=1e-4) and expected > 0
    assert next(check for check in callback.checks if check.name == "fisher").value == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UsageError, match="checkpoint, which does not hold the method's state"):
        run.state.global_step = 1
        callback.on_train_begin(run.args, run.state, run.control, model=run.model)


def test_a_penalty_that_is_lost_beside_the_loss_is_warned_of(tiny, earlier, tmp_path):
    _, callback = trained(make(tiny, tmp_path), OLoRA(lam=1e-9), past=[earlier])
    share = next(check for check in callback.checks if check.name == "penalty share")
    assert not share.ok and math.isfinite(share.value)


def test_it_goes_with_trl(tiny, earlier, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed (pip install 'forgetless[bench]')")
    from datasets import Dataset

    ends = []
    for rows, accumulate in ((4, 1), (1, 4)):
        config = trl.SFTConfig(
            output_dir=str(tmp_path), report_to=[], save_strategy="no", use_cpu=True, max_steps=2, seed=1, bf16=False,
            per_device_train_batch_size=rows, gradient_accumulation_steps=accumulate, learning_rate=1e-2,
            gradient_checkpointing=False,
        )  # fmt: skip
        run = trl.SFTTrainer(
            peft_model(tiny), config, train_dataset=Dataset.from_dict({"text": TEXTS * 2}),
            processing_class=AutoTokenizer.from_pretrained(tiny),
        )  # fmt: skip
        end, callback = trained(run, OLoRA(lam=5.0), past=[earlier])
        assert all(check.ok for check in callback.checks)
        ends.append(end)
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-3, atol=1e-5)
