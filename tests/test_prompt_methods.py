"""Methods that train virtual tokens: what stands before a row, who sees it, and what each method makes of it."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from forgetless.config import LearnConfig
from forgetless.data.batches import Encoder, collate, weigh
from forgetless.data.tasks import Row
from forgetless.errors import RunError, UsageError
from forgetless.learning.dryrun import plan_run
from forgetless.learning.stream import learn
from forgetless.methods import METHODS
from forgetless.methods.base import overrides
from forgetless.methods.finding import find_method
from forgetless.methods.l2p import nearest
from forgetless.model.adapters import LoraSettings
from forgetless.model.answers import logits_at
from forgetless.model.base import load_base
from forgetless.model.prompted import before_answers, encoded
from forgetless.model.prompts import Prompts
from forgetless.model.tables import Table
from forgetless.runs.folder import read_json
from forgetless.score.generation import generate
from forgetless.score.options import OptionScorer

ROWS = [Row("The sky is", " blue" + " very blue" * n) for n in (0, 3, 1)]


def build(name: str, tiny: str, **options):
    base, kind = load_base(tiny, torch.float32), METHODS[name]
    method = kind(**(kind.example | options))
    method.start(kind.adapter_class(base.model, LoraSettings(r=4), tiny, 0), Encoder(base.tokenizer, 64), 0)
    method.begin_task(0)
    return method


def config(tiny, stream, folder, **changes) -> LearnConfig:
    settings = {"model": tiny, "stream": stream, "output_dir": str(folder), "learning_rate": 0.2, "device": "cpu"}
    settings |= {"precision": "fp32", "num_train_epochs": 2, "max_length": 64, "forgetting_prompts": 0}
    return LearnConfig(**(settings | changes))


def by_hand(method, ids: torch.Tensor) -> torch.Tensor:
    """base([P; E(x)]) of one row (length,), without the virtual tokens' logits."""
    base, P = method.adapters.base, method.before(ids[None], torch.ones(1, len(ids), dtype=torch.bool))[0]
    whole = torch.cat([P, base.get_input_embeddings()(ids)])
    return base(inputs_embeds=whole[None]).logits[0, len(P) :]


# ------------------------------------------------------------------------------------- virtual tokens


@torch.no_grad()
def test_logits_are_those_of_the_base_behind_the_prompt(tiny):
    """Padded rows together, logits at answers only, and all logits: each as by hand."""
    method = build("prompt_tuning", tiny)
    model, examples = method.adapters.model, [method.encoder(row) for row in ROWS]
    part = collate(examples, method.encoder.tokenizer.pad_token_id)
    found = logits_at(model, part.keep, input_ids=part.ids, attention_mask=part.mask)
    whole = model(part.ids, part.mask, output_hidden_states=True)
    assert whole.hidden_states[-1].shape[:2] == part.ids.shape
    told = [by_hand(method, torch.tensor(example.ids)) for example in examples]
    for logits, example, row in zip(told, examples, whole.logits, strict=True):
        assert torch.allclose(row[: len(example.ids)], logits, atol=1e-5)
    expected = torch.cat([logits[keep[: len(logits)]] for logits, keep in zip(told, part.keep, strict=True)])
    assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
def test_options_that_share_a_prompt_score_as_one_by_one(tiny):
    method = build("prompt_tuning", tiny)
    scorer = OptionScorer(method.adapters.model, method.encoder, torch.device("cpu"))
    options = ("very blue", "very very green", "blue")
    together = scorer(ROWS[:1], options)
    assert scorer.shared
    scorer.shared = False
    assert together[0] == pytest.approx(scorer(ROWS[:1], options)[0], abs=1e-3)


@torch.no_grad()
def test_generation_with_padding_is_the_greedy_answer_by_hand(tiny):
    method = build("prompt_tuning", tiny)
    tokenizer = method.encoder.tokenizer
    contexts = [tokenizer(text).input_ids for text in ("The sky is", "What colour has the grass? It is")]
    found = generate(method.adapters.model, tokenizer, contexts, 6, torch.device("cpu"))
    for context, text in zip(contexts, found, strict=True):
        ids = list(context)
        while len(ids) < len(context) + 6 and (len(ids) == len(context) or ids[-1] != tokenizer.eos_token_id):
            ids.append(int(by_hand(method, torch.tensor(ids))[-1].argmax()))
        assert text == tokenizer.decode(ids[len(context) :], skip_special_tokens=True)


def test_the_context_ends_where_the_answer_begins(tiny):
    keep = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    assert before_answers(keep, mask).long().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    base = load_base(tiny, torch.float32).model
    ids, left = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 0, 5, 6, 7]])
    plain = encoded(base, ids, torch.ones_like(ids).bool())
    hidden = base(ids, output_hidden_states=True).hidden_states[-1].detach()
    assert torch.allclose(plain, hidden.mean(1), atol=1e-5)
    assert torch.allclose(plain, encoded(base, left, left > 0), atol=1e-5)


def test_without_its_prompt_the_base_answers(tiny):
    method, ids = build("prompt_tuning", tiny), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), method.adapters.disabled():
        assert torch.equal(method.adapters.model(ids).logits, method.adapters.base(ids).logits)


def test_a_damaged_prompt_is_named(tiny, tmp_path):
    method = build("prompt_tuning", tiny)
    method.adapters.save(tmp_path, {"prompt": Table(torch.ones(4, 32))})
    assert torch.equal(method.adapters.load(tmp_path)["prompt"].P, torch.ones(4, 32))
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"num_virtual_tokens": 4', '"num_virtual_tokens": 5'))
    with pytest.raises(RunError, match="no prompt of the shape"):
        method.adapters.load(tmp_path)


# ------------------------------------------------------------------------------------- Progressive Prompts


def test_progressive_prompts_stand_newest_first(tiny):
    """P_1 = [1, 2], P_2 = [3, 4], one token each: [[3, 4], [1, 2]] before a row of the second task."""
    method = build("progressive_prompts", tiny, tokens=1)
    first, second = (torch.tensor([[*numbers, *[0.0] * 30]]) for numbers in ([1.0, 2.0], [3.0, 4.0]))
    method.adapters.set_current({"prompt": Table(first)})
    method.begin_task(1)
    method.adapters.set_current({"prompt": Table(second)})
    assert method.before(torch.zeros(2, 5), torch.ones(2, 5))[1, :, :2].tolist() == [[3, 4], [1, 2]]
    assert method.export()["prompt"].P[:, :2].tolist() == [[3, 4], [1, 2]]
    method.before(torch.zeros(1, 5), torch.ones(1, 5)).sum().backward()
    assert [parameter.grad.shape for parameter in method.adapters.parameters()] == [(1, 32)]


def test_a_stream_of_prompts_forgets_nothing_and_peft_loads_them(tiny, two, tmp_path):
    folder = tmp_path / "run"
    summary = learn(config(tiny, two, folder, method="progressive_prompts", method_options={"tokens": 3}))
    first, last = summary["headline"]["matrix"]
    assert first[0] == last[0]
    adapter = folder / "adapter"
    assert "Soft prompt for" in (adapter / "README.md").read_text()
    loaded = PeftModel.from_pretrained(load_base(tiny, torch.float32).model, adapter)
    assert loaded.active_peft_config.num_virtual_tokens == 6
    assert learn(config(tiny, two, folder, method="progressive_prompts", method_options={"tokens": 3})) == summary


def test_forgetting_and_an_estimate_are_measured_behind_the_prompt(tiny, two, tmp_path, capsys):
    told = {"method": "l2p", "method_options": dict(METHODS["l2p"].example), "forgetting_prompts": 2}
    learn(config(tiny, two, tmp_path, num_train_epochs=1, **told))
    files = sorted(tmp_path.glob("tasks/*/forgetting/forgetting.json"))
    assert len(files) == 2 and all(read_json(file)["per_token"]["kl"] > 0 for file in files)
    plan_run(config(tiny, two, tmp_path / "never", method="progressive_prompts"))
    assert "640 parameters in prompt (20, 32)" in capsys.readouterr().out


def test_bf16_is_the_same_up_to_rounding(tiny):
    ids, found = torch.tensor([[5, 6, 7, 8, 9]]), []
    for dtype in (torch.float32, torch.bfloat16):
        base, method = load_base(tiny, dtype), METHODS["prompt_tuning"](tokens=4)
        method.start(Prompts(base.model, LoraSettings(), tiny, 0), Encoder(base.tokenizer, 64), 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = method.adapters.model(ids).logits
        logits.float().square().mean().backward()
        assert method.adapters.parameters()[0].grad.dtype == torch.float32
        found.append(logits.detach().float())
    assert (found[0] - found[1]).abs().max() < 0.05 * found[0].abs().max()


def test_what_needs_pairs_is_refused_with_the_reason(tiny, two, tmp_path):
    with pytest.raises(UsageError, match="budgets blend LoRA pairs"):
        learn(config(tiny, two, tmp_path, method="prompt_tuning", max_drop="colours=1pp"))
    with pytest.raises(UsageError, match="lwf is made for LoRA pairs"):
        find_method("lwf+prompt_tuning")
    assert find_method("replay+progressive_prompts").adapter_class is METHODS["prompt_tuning"].adapter_class
    assert overrides(find_method("hiddenkey+mbpa"), "answering") and not overrides(
        find_method("lwf+olora"), "answering"
    )
    with pytest.raises(UsageError, match="than the 128 tokens"):
        build("prompt_tuning", tiny, tokens=100)


# ------------------------------------------------------------------------------------- L2P


def test_l2p_chooses_the_nearest_keys_by_angle():
    """q = [3, 4]: cosines .6, .8, 1, -.6 to [1, 0], [0, 2], [6, 8], [-1, 0]; the pull of the two nearest is .2."""
    keys = torch.tensor([[1.0, 0.0], [0.0, 2.0], [6.0, 8.0], [-1.0, 0.0]])
    cosine, chosen = nearest(torch.tensor([[3.0, 4.0]]), keys, 2)
    assert chosen.tolist() == [[2, 1]]
    assert cosine[0].tolist() == pytest.approx([1.0, 0.8])
    assert float((1 - cosine).sum()) == pytest.approx(0.2)


def test_l2p_loss_is_cross_entropy_and_the_pull(tiny):
    """Each row by hand: its prompts by its own key match before its answer, and 1 - cos by its share of the tokens."""
    method = build("l2p", tiny, pull=0.5)
    base, tables = method.adapters.base, method.adapters.pairs()
    examples = weigh([method.encoder(row) for row in ROWS], 1.0)
    expected = torch.zeros(())
    for one in examples:
        ids, first = torch.tensor(one.ids), one.answer.index(True)
        q = base(ids[None, :first], output_hidden_states=True).hidden_states[-1][0].mean(0)
        cosine = torch.nn.functional.cosine_similarity(q[None], tables["keys"].P)
        order = cosine.argsort(descending=True)[:2]
        P = torch.cat([tables["prompt"].P[2 * m : 2 * m + 2] for m in order])
        whole = torch.cat([P, base.get_input_embeddings()(ids)])
        logp = base(inputs_embeds=whole[None]).logits[0, len(P) :].log_softmax(-1)
        answers = range(first, len(ids))
        expected = expected - one.weight * sum(logp[i - 1, ids[i]] for i in answers)
        expected = expected + 0.5 * one.weight * len(answers) * (1 - cosine[order]).sum()
    part = collate(examples, method.encoder.tokenizer.pad_token_id)
    assert float(method.loss(part).detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_l2p_answers_do_not_choose_the_prompts(tiny):
    method = build("l2p", tiny)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    context = torch.tensor([[1, 1, 1, 0]] * 2).bool()
    before = method.before(ids, context)
    assert torch.equal(before[0], before[1])


# ------------------------------------------------------------------------------------- MbPA++


def test_mbpa_fits_by_the_equation_and_puts_the_weights_back(tiny):
    """One step of Adam moves an entry by its rate against the gradient of λ||θ - θ_0||² - 1/K Σ log p."""
    method = build("mbpa", tiny, neighbours=2, steps=1, rate=1e-3)
    method.memory.rows = ROWS[:2]
    with torch.no_grad():
        for pair in method.adapters.pairs().values():
            pair.B.normal_()
    before, parameters = method.adapters.snapshot(), method.adapters.parameters()
    loss = 0.0
    for row in ROWS[:2]:
        example = method.encoder(row)
        logp = method.adapters.model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        loss = loss - sum(logp[i - 1, example.ids[i]] for i in range(len(example.ids)) if example.answer[i]) / 2
    gradients = torch.autograd.grad(loss, parameters)
    start = [parameter.detach().clone() for parameter in parameters]
    with method.answering([5, 6, 7]):
        moved = [now.detach() - then for now, then in zip(parameters, start, strict=True)]
    for step, gradient in zip(moved, gradients, strict=True):
        clear = gradient.abs() > 1e-4
        assert torch.allclose(step[clear], -1e-3 * gradient[clear].sign(), atol=1e-5)
    assert all(torch.equal(now, before[name]) for name, now in method.adapters.snapshot().items())
    assert all(parameter.grad is None for parameter in parameters)


def test_mbpa_finds_the_row_that_is_asked_for(tiny):
    method = build("mbpa", tiny, neighbours=1)
    questions = ("The sky is", "What size has the whale?", "blood is red and grass")
    method.memory.rows = [Row(text, " blue") for text in questions]
    for row in method.memory.rows:
        assert method.nearest(method.encoder.generation_context(row, 1)) == [row]


def test_mbpa_holds_the_weights(tiny):
    """Slope 1, 2 λ rate = 1: the second gradient is 0, and Adam's second step .09/.19 / √(.000999/.001999) of it."""
    method = build("mbpa", tiny, steps=2, rate=0.01, hold=50.0)
    parameters = method.adapters.parameters()
    method.surprise = lambda rows: sum(parameter.sum() for parameter in parameters)
    start = [parameter.detach().clone() for parameter in parameters]
    method.fit(ROWS)
    for now, before in zip(parameters, start, strict=True):
        assert torch.allclose(now - before, torch.full_like(now, -0.0167006), atol=1e-5)


def test_a_stream_is_answered_row_by_row_with_the_memory(tiny, two, tmp_path, monkeypatch):
    """12 rows after each task, and once a task for the check; none by the untouched base."""
    fitted = []
    monkeypatch.setattr(METHODS["mbpa"], "fit", lambda self, rows: fitted.append((self.task, len(rows))))
    options = {"memory": 4, "neighbours": 2}
    learn(config(tiny, two, tmp_path, method="mbpa", method_options=options, learning_rate=1e-2, num_train_epochs=1))
    assert fitted == [(0, 2)] * (1 + 12) + [(1, 2)] * (1 + 12)


# ------------------------------------------------------------------------------------- LFPT5


def test_lfpt5_loss_by_hand(tiny):
    """CE of the rows, λ_lm CE of [G; x], λ_kl KL(p_old || p_new) of pseudo rows' answers."""
    method = build("lfpt5", tiny, lam_lm=0.5, lam_kl=2.0)
    method.written.rows = [Row("The grass is", " green green"), Row("The sea", " blue")]
    method.begin_task(1)
    examples = [method.encoder(row) for row in ROWS]
    method.prepare(examples)
    method.adapters.set_current({"prompt": Table(method.adapters.pairs()["prompt"].P + 0.1)})
    batch = method.batch(examples, 0)
    pad = method.encoder.tokenizer.pad_token_id

    def logp(rows):
        part = collate(weigh(rows, 1.0), pad)
        return method.logits(part).log_softmax(-1), part.targets

    def entropy(rows):
        found, targets = logp(rows)
        return -found.gather(1, targets[:, None]).mean()

    questions = [method.question[one.ids] for one in examples]
    pseudo = [method.encoder(row) for row in method.written.draw(3, 1, 0)]
    new = logp(pseudo)[0]
    with method.adapters.using(method.old):
        old = logp(pseudo)[0]
    expected = entropy(examples) + 0.5 * entropy(questions) + 2 * (old.exp() * (old - new)).sum(-1).mean()
    assert float(method.loss(collate(batch, pad)).detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert questions[0].ids[-2] == examples[0].ids[examples[0].answer.index(True) - 1]  # no answer in it


def test_lfpt5_keeps_only_what_it_wrote(tiny, two):
    """No row of the stream is in the memory, of training or of test."""
    method = build("lfpt5", tiny)
    method.end_task(0, two.tasks[0].train)
    assert len(method.written.rows) == 3
    real = {row.prompt for task in two.tasks for row in (*task.train, *task.test)}
    assert not real & {row.prompt for row in method.written.rows}
    again = build("lfpt5", tiny)
    again.end_task(0, ())
    assert again.written.rows == method.written.rows
