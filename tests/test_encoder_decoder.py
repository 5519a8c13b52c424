"""Encoder-decoders (T5): loss, likelihoods, answers and divergences against transformers' own; `learn` and `audit`."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_t5
from peft import LoraConfig, PeftModel, get_peft_model
from test_learn import config
from test_methods import build
from test_resume import attributes, interrupted, learn_last
from transformers import BartConfig

from forgetless.auditing.run import audit
from forgetless.config import AuditConfig, InterpolateConfig, MergeConfig
from forgetless.contract.check import HOLDS, judge
from forgetless.contract.clauses import CLAUSES
from forgetless.contract.trial import Bench, Trial
from forgetless.data.batches import Encoder, collate, weigh
from forgetless.data.tasks import Row
from forgetless.errors import DataError, UsageError
from forgetless.forgetting.divergence import divergence
from forgetless.forgetting.reference import reference_of
from forgetless.forgetting.windows import continuation_windows, row_windows
from forgetless.geometry.interpolate import prepare
from forgetless.geometry.merging import merge
from forgetless.learning.dryrun import plan_run
from forgetless.learning.stream import learn
from forgetless.methods import METHODS
from forgetless.model.adapters import LoraSettings
from forgetless.model.answers import logits_at, token_losses
from forgetless.model.base import load_base
from forgetless.model.encoder_decoder import halves, model_class
from forgetless.score.generation import answers
from forgetless.score.options import OptionScorer
from forgetless.subjects.models import compare, find_subjects

CPU = torch.device("cpu")
OPTIONS = ("blue", "very blue", "dark green, almost black", "red")
ROWS = [Row("What colour has the sky? Answer:", " blue"), Row("Rose? Answer:", " red"), Row("Leaf:", " very blue")]


@pytest.fixture
def t5(tokenizer):
    """Random, with a random adapter on all linear layers."""
    model = make_t5(tokenizer).eval()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


def start_of(tokenizer) -> int:
    return tokenizer.pad_token_id


@pytest.fixture
def encode(tokenizer):
    return Encoder(tokenizer, 64, start_of(tokenizer))


def sides(row: Row, tokenizer) -> tuple[list[int], list[int]]:
    """What transformers' own recipe gives encoder and labels: prompt and answer, each with its end token."""
    end = [tokenizer.eos_token_id]
    return tokenizer(row.prompt).input_ids + end, tokenizer(row.label).input_ids + end


def test_a_row_is_the_encoders_tokens_and_then_the_decoders(encode, tokenizer):
    source, labels = sides(ROWS[0], tokenizer)
    example = encode(ROWS[0])
    assert list(example.ids) == [*source, start_of(tokenizer), *labels]
    assert example.answer == (False,) * (len(source) + 1) + (True,) * len(labels)


def test_halves_by_hand():
    ids = torch.tensor([[5, 6, 1, 9, 7, 1], [5, 1, 9, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    keep = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0]]).bool()
    inputs, asked = halves(ids, mask, keep)
    assert inputs["input_ids"].tolist() == [[5, 6, 1], [5, 1, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert inputs["decoder_input_ids"].tolist() == [[9, 7, 1], [9, 8, 0]]
    assert asked.tolist() == [[True, True, False], [True, True, False]]


def test_long_prompts_lose_their_beginning_and_keep_the_border(tokenizer):
    short = Encoder(tokenizer, 12, start_of(tokenizer))
    example = short(Row("word " * 50 + "The sky is", " blue"))
    assert len(example.ids) == 12 and example.truncated
    border = example.answer.index(True)
    assert example.ids[border - 2 : border] == (tokenizer.eos_token_id, start_of(tokenizer))
    with pytest.raises(DataError, match="leaves no room for the prompt"):
        Encoder(tokenizer, 4, start_of(tokenizer))(ROWS[0])
    with pytest.raises(DataError, match="prompt/completion rows"):
        short(Row("", "The sky is blue", source="a.jsonl:3"))


@pytest.mark.parametrize("kind, more", [("t5", {}), ("t5", {"tie_word_embeddings": False}), ("mt5", {}), ("umt5", {})])
def test_our_loss_is_transformers_own(kind, more, tokenizer, encode):
    """Mean over answer tokens; the output embedding's scale is the model's own, whether there is one or not."""
    model = make_t5(tokenizer, kind, **more)
    part = collate(weigh([encode(row) for row in ROWS], 1.0), tokenizer.pad_token_id)
    logits = logits_at(model.eval(), part.keep, input_ids=part.ids, attention_mask=part.mask)
    ours = (part.weights * token_losses(logits, part.targets)).sum()
    padded = tokenizer.pad([{"input_ids": sides(row, tokenizer)[0]} for row in ROWS], return_tensors="pt")
    labels = [torch.tensor(sides(row, tokenizer)[1]) for row in ROWS]
    told = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    assert ours.item() == pytest.approx(model(**padded, labels=told).loss.item(), rel=1e-5)


def slow_likelihood(model, tokenizer, row: Row, option: str) -> float:
    """One sequence at a time, from all logits."""
    source, _ = sides(row, tokenizer)
    tokens = tokenizer(option).input_ids
    given = torch.tensor([[start_of(tokenizer), *tokens]])
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([source]), decoder_input_ids=given).logits[0].log_softmax(-1)
    return sum(float(logp[i, token]) for i, token in enumerate(tokens))


@pytest.mark.parametrize("batch_tokens", [4096, 40])
def test_likelihoods_equal_the_slow_form_and_the_encoder_reads_each_prompt_once(batch_tokens, t5, encode, tokenizer):
    read = []
    handle = t5.get_base_model().encoder.register_forward_hook(lambda encoder, _, out: read.append(len(out[0])))
    found = OptionScorer(t5, encode, CPU, batch_tokens)(ROWS, OPTIONS)
    handle.remove()
    assert sum(read) == len(ROWS)
    for row, values in zip(ROWS, found, strict=True):
        assert values == pytest.approx([slow_likelihood(t5, tokenizer, row, option) for option in OPTIONS], abs=1e-4)


def test_answers_equal_transformers_own_one_at_a_time(t5, encode, tokenizer):
    contexts = [encode.generation_context(row, 6) for row in ROWS]
    found = answers(t5, tokenizer, contexts, 6, CPU)
    for row, answer in zip(ROWS, found, strict=True):
        source = torch.tensor([sides(row, tokenizer)[0]])
        made = t5.generate(input_ids=source, max_new_tokens=6, do_sample=False)[0, 1:]
        assert answer.text == tokenizer.decode(made, skip_special_tokens=True)


def test_divergence_equals_the_slow_form(t5, encode, tokenizer, tmp_path):
    """KL(base || tuned) on the base's own head and states, against all logits of one row after another."""
    base = make_t5(tokenizer).eval()
    windows = row_windows(ROWS, encode)
    found = divergence(reference_of(base, windows, {}, tmp_path), t5, windows)
    slow = []
    for row in ROWS:
        source, labels = sides(row, tokenizer)
        given = {"input_ids": torch.tensor([source]), "labels": torch.tensor([labels])}
        with torch.no_grad():
            p, q = (model(**given).logits[0].double().log_softmax(-1) for model in (base, t5))
        slow += (p.exp() * (p - q)).sum(-1).tolist()
    assert found.kl.tolist() == pytest.approx(slow, abs=1e-5) and min(slow) > 1e-4


def test_plain_text_is_continued_by_the_decoder(tokenizer):
    """Every token behind the first piece once: 7 tokens, windows of 6 (2 and 2 of the text)."""

    class Numbers:
        eos_token_id, bos_token_id = 1, None

        def __call__(self, text, **more):
            return type("Ids", (), {"input_ids": [int(one) for one in text.split()]})

    windows = continuation_windows(["10 11 12 13 14 15 16", "20 21 22", "30"], Numbers(), 0, 6)
    assert [window.ids for window in windows.windows] == [
        (10, 11, 1, 0, 12), (12, 13, 1, 0, 14), (14, 15, 1, 0), (20, 1, 0, 21),
    ]  # fmt: skip
    assert [window.targets for window in windows.windows] == [(12, 13), (14, 15), (16,), (21, 22)]
    assert [window.places for window in windows.windows] == [(2, 3), (4, 5), (6,), (1, 2)]
    assert all(sum(window.measured) == len(window.targets) for window in windows.windows)
    assert windows.notes[0].startswith("1 of 3 texts have fewer than two tokens")
    with pytest.raises(UsageError, match="no stride"):
        continuation_windows(["1 2"], Numbers(), 0, 6, 2)


@pytest.fixture(scope="module")
def bench():
    return Bench(make_t5, LoraSettings(r=4, target_modules=["q", "v", "wo"]))  # not square, and square nowhere


@pytest.mark.parametrize("name", ["olora", "nlora", "replay"])
def test_the_contract_holds_on_t5(name, bench):
    """But for the cost of a step: without a space before them this tokenizer's answers are of unequal length."""
    trial = Trial(name, METHODS[name], bench)
    found = [judge(clause, trial) for clause in CLAUSES if clause != "cost of a step"]
    assert {one.clause: one.why for one in found if one.outcome != HOLDS} == {}


def test_resumed_inside_a_task_equals_uninterrupted(tiny_t5, two, tmp_path):
    whole = learn_last(build("olora", tiny_t5), two, tmp_path / "whole")
    parts = interrupted(build("olora", tiny_t5), tmp_path / "whole", tmp_path / "parts", two)
    assert attributes(parts) == attributes(whole)


@pytest.fixture(scope="module")
def ran(tiny_t5, two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "t5"
    return learn(config(tiny_t5, two, folder, method="olora", forgetting_prompts=2)), folder


def test_a_stream_is_learnt_scored_and_measured(ran, tiny_t5):
    """Answers and likelihoods of every cell, KL to the base at the borders; the adapter is stock PEFT's."""
    summary, folder = ran
    saved = folder / "tasks" / "02-sizes" / "adapter"
    told = json.loads((saved / "adapter_config.json").read_text())
    assert told["task_type"] == "SEQ_2_SEQ_LM" and "lm_head" not in told["target_modules"]
    assert (folder / "report.html").exists() and summary["status"] == "complete"
    stock = PeftModel.from_pretrained(load_base(tiny_t5, torch.float32).model, saved)
    assert len(stock.peft_config["default"].target_modules) >= 6  # q, k, v, o, wi, wo


def test_the_run_is_audited(ran, tiny_t5, tmp_path):
    """Against its base, on the base's own answers and on plain text, with the tasks' rows brought back in no time."""
    text = tmp_path / "words.txt"
    text.write_text("The sky is blue and the grass is green.\n\nWhat size has the whale? The whale is large.\n")
    told = audit(
        AuditConfig(tiny_t5, [str(ran[1])], text=[str(text)], output_dir=str(tmp_path / "a"), precision="fp32")
    )
    assert told


def test_what_cannot_be_had_is_said_at_the_start(ran, tiny, tiny_t5, two, tokenizer, tmp_path):
    for name, options in (("inflora", {}), ("ilora", {"target": "hidden_last"}), ("hiddenkey", {})):
        with pytest.raises(UsageError, match=r"encoder-decoders|Llama-like"):
            build(name, tiny_t5, options)
    with pytest.raises(UsageError, match=r"is a decoder alone, and .* an encoder-decoder"):
        compare(*(find_subjects(one)[0] for one in (tiny_t5, tiny)))
    adapter = ran[1] / "tasks" / "02-sizes" / "adapter"
    with pytest.raises(UsageError, match=r"SEQ_2_SEQ_LM, and .* is of CAUSAL_LM"):
        find_subjects(f"{tiny}+{adapter}", base_is=tiny)
    with pytest.raises(UsageError, match="interpolate looks at the hidden states of decoders alone"):
        prepare(InterpolateConfig(tiny_t5, f"{tiny_t5}+{adapter}", two))
    with pytest.raises(UsageError, match="merging into the base is for decoders alone"):
        merge(MergeConfig([str(adapter)], output_dir=str(tmp_path / "merged")))
    with pytest.raises(UsageError, match="bart: an encoder-decoder of this kind is not known"):
        model_class(BartConfig())


@pytest.mark.parametrize("text", ["", "The sky is blue and the grass is green.\n\nThe whale is large.\n"])
def test_a_dry_run_measures_forgetting_as_the_run_does(text, tiny_t5, two, tmp_path, capsys):
    told = {"forgetting_prompts": 2}
    if text:
        (tmp_path / "words.txt").write_text(text)
        told = {"forgetting_text": str(tmp_path / "words.txt")}
    plan_run(config(tiny_t5, two, tmp_path / "run", **told))
    assert "for forgetting" in capsys.readouterr().out
