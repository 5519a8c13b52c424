"""Dropout, task-wise factors and other updates: the equations on worked numbers and against slow twins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_methods import build

from forgetless.data.batches import collate, weigh
from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.learning.engine import Engine
from forgetless.learning.step import TrainSettings, learn_task
from forgetless.methods.finding import find_method
from forgetless.methods.hiddenkey import between
from forgetless.model.answers import logits_at
from forgetless.model.dropping import Drop, dropping
from forgetless.seeds import generator

SHORT = TrainSettings(learning_rate=2e-2, max_steps=4, batch_size=4, micro_batch_size=4)


def part_of(method, *repeats):
    rows = [method.encoder(Row("The sky is", " blue" + " very blue" * n)) for n in repeats or (0, 3, 1)]
    return collate(weigh(rows, 1.0), method.encoder.tokenizer.pad_token_id)


def learn(method, task, stream):
    method.begin_task(task)
    rows = stream.tasks[task].train
    given = [method.encoder(row) for row in rows]
    learn_task(method, given, SHORT, Engine("cpu", "fp32"), seed=0, task=task, log=lambda record: None)
    method.end_task(task, rows)
    return method


# ----------------------------------------------------------------------------------------------------- HiddenKey


def test_hiddenkey_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert between(p, q) == pytest.approx((0.5108 + 0.3681) / 2, abs=1e-4)
    assert float(between(p, p + 3)) == pytest.approx(0, abs=1e-7)


@given(st.floats(0, 0.95), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_patterns(p, rows, columns, seed):
    column = Drop(p, "column").kept(rows, columns, generator("test", seed))
    assert column.shape == (rows, columns) and torch.equal(column, column[:1].expand(rows, columns))
    span = Drop(p, "span").kept(rows, columns, generator("test", seed))
    gone = min(round(p * columns), columns - 1)
    assert (~span).sum(1).tolist() == [gone] * rows
    inside = (~span).long().diff(dim=1).abs().sum(1)
    assert int(inside.max() if columns > 1 else 0) <= 2  # one run: at most a beginning and an end
    assert Drop(p, "span").rescale(columns) * (columns - gone) == pytest.approx(columns)


@pytest.mark.parametrize("pattern", ["element", "column", "span"])
def test_what_stays_is_rescaled_to_the_same_mean(pattern):
    drop = Drop(0.3, pattern)
    mean = drop.kept(1000, 2000, generator("test")).float().mean() * drop.rescale(2000)
    assert float(mean) == pytest.approx(1, abs=0.05)


class Second(Drop):
    """Drops key 2 of every row."""

    def kept(self, rows, columns, draw):
        return (torch.arange(columns) != 2).expand(rows, columns)


def dropped_logits(method, part, keys, hidden, everywhere=False):
    lengths = part.mask.sum(1).tolist()
    draws = [generator("test", row) for row in range(len(lengths))]
    count, length = part.ids.shape
    sees = torch.ones(length, length, dtype=torch.bool).tril().expand(count, 1, -1, -1)
    keep = part.mask.bool() if everywhere else part.keep
    model = method.adapters.model
    with torch.no_grad(), dropping(model.get_base_model(), draws, lengths, keys, hidden):
        return logits_at(model, keep, input_ids=part.ids, attention_mask=part.mask, sees=sees, pack_rows=False)


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
def test_a_dropped_key_is_seen_by_no_other_token(tiny, attention):
    """In each implementation of attention, and another token in its place changes only its own answer."""
    method, none = build("hiddenkey", tiny), Drop(0.0, "element")
    method.adapters.model.get_base_model().set_attn_implementation(attention)
    part = part_of(method, 2)
    other = part_of(method, 2)
    other.ids[0, 2] = 7
    for keys, alike in ((Second(0.1, "column"), True), (none, False)):
        one, two = (dropped_logits(method, given, keys, none, everywhere=True) for given in (part, other))
        elsewhere = torch.arange(len(one)) != 2
        assert torch.equal(one[elsewhere], two[elsewhere]) == alike and not torch.equal(one[2], two[2])


def test_dropping_logits_is_dropping_weights_and_normalising():
    torch.manual_seed(0)
    scores, stays = torch.randn(4, 6), Drop(0.4, "element").kept(4, 6, generator("test"))
    stays[:, 0] = True
    weights = torch.softmax(scores, -1) * stays
    torch.testing.assert_close(
        torch.softmax(scores.masked_fill(~stays, -torch.inf), -1), weights / weights.sum(-1, keepdim=True)
    )


def test_without_dropout_both_passes_are_one(tiny):
    method, none = build("hiddenkey", tiny), Drop(0.0, "element")
    part = part_of(method)
    with torch.no_grad():
        plain = method.logits(part)
    both = [dropped_logits(method, part, none, none) for _ in range(2)]
    torch.testing.assert_close(both[0], plain)
    assert torch.equal(*both) and not between(*both).any()


def test_hiddenkey_loss_is_the_definition(tiny):
    """Row by row: padding and the other rows of a micro-batch change nothing; each step has masks of its own."""
    method = build("hiddenkey", tiny, {"key_drop": 0.3, "hidden_drop": 0.2, "kl": 0.7})
    method.begin_task(0)
    part, total = part_of(method), 0.0
    with torch.no_grad():
        loss = float(method.loss(part))
        for row in range(3):
            alone = part.only(torch.arange(3) == row)
            n = int(alone.mask.sum())
            alone.ids, alone.mask, alone.keep = alone.ids[:, :n], alone.mask[:, :n], alone.keep[:, :n]
            p, q = (torch.softmax(method._pass(alone, number), -1) for number in (0, 1))
            at = torch.arange(len(alone.targets)), alone.targets
            ce = -(p[at].log() + q[at].log()) / 2
            kl = (p * (p / q).log()).sum(1) / 2 + (q * (q / p).log()).sum(1) / 2
            total += float((alone.weights * (ce + 0.7 * kl)).sum())
        assert loss == pytest.approx(total, rel=1e-5)
        method.after_step(None)
        assert float(method.loss(part)) != pytest.approx(loss, rel=1e-3)
        assert torch.equal(method.logits(part), method.logits(part))  # answering, nothing is dropped


def test_hiddenkey_refuses_what_it_cannot_do(tiny):
    for option, value in {"key_drop": 1.0, "hidden_drop": -0.1, "key_pattern": "row", "kl": -1.0}.items():
        with pytest.raises(UsageError, match=option):
            find_method("hiddenkey")(**{option: value})
    with pytest.raises(UsageError, match="both change loss"):
        find_method("hiddenkey+lwf")
    method = build("hiddenkey", tiny)
    base = method.adapters.model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(UsageError, match="gradient_checkpointing"):
        method.start(method.adapters, method.encoder, 0)
    base.get_decoder().layers[0].self_attn = None
    del base.get_decoder().layers[0].mlp
    with pytest.raises(UsageError, match="self_attn and mlp"):
        method.start(method.adapters, method.encoder, 0)
