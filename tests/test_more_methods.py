"""Dropout, task-wise factors and other updates: the equations on worked numbers and against slow twins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from test_learn import config
from test_methods import build

from forgetless.data.batches import Encoder, collate, weigh
from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.learning.engine import Engine
from forgetless.learning.step import TrainSettings, learn_task
from forgetless.learning.stream import learn as learn_stream
from forgetless.methods import METHODS
from forgetless.methods.duallora_reconstructed import projected, shared_directions
from forgetless.methods.finding import find_method
from forgetless.methods.hiddenkey import between
from forgetless.methods.hyplora import exponential, logarithmic
from forgetless.methods.mtllora import mixed
from forgetless.methods.spared_inputs import extended
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.answers import logits_at
from forgetless.model.base import load_base
from forgetless.model.dropping import Drop, dropping
from forgetless.seeds import generator
from forgetless.subjects.updates import read_update

SHORT = TrainSettings(learning_rate=2e-2, max_steps=4, batch_size=4, micro_batch_size=4, weight_decay=0.1)


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


def test_under_a_method_that_cannot_be_switched_off():
    """Without the part under it, it is that method."""
    kind = find_method("hiddenkey+inflora")
    assert kind.off == {"key_drop": 0.0, "hidden_drop": 0.0} and kind.plain is METHODS["inflora"]


# ------------------------------------------------------------------------------------------------------ MTL-LoRA


def test_mtllora_mixture_by_hand():
    w = torch.tensor([0.1, 0.2, 0.0])
    B = torch.eye(3)[:, :, None]  # B_i = e_i: the mixture shows its shares
    expected = torch.tensor([0.244728, 0.665241, 0.090031])
    torch.testing.assert_close(mixed(B, w, 0.1)[:, 0], expected, rtol=0, atol=1e-6)


def fill(tensors):
    torch.manual_seed(0)
    for one in tensors:
        one.copy_(0.3 * torch.randn_like(one))


def test_mtllora_with_one_projection_and_the_identity_is_lora(tiny):
    method, plain = build("mtllora", tiny, {"n": 1}), build("sequential", tiny)
    fill(method.trained)
    method.begin_task(0)  # Λ = I
    for name, pair in plain.adapters.pairs().items():
        pair.B.data.copy_(method.B[name][0])
    with torch.no_grad():
        part = part_of(method)
        torch.testing.assert_close(method.logits(part), plain.logits(part))
        start = build("mtllora", tiny).logits(part)
        with method.adapters.disabled():
            assert torch.equal(method.logits(part), start)  # B = 0: the base


def test_mtllora_rows_of_a_mixed_batch_go_by_their_own_task(tiny, two):
    """Three rows at once, replayed and current, against each by itself with its task's plain pair."""
    method = learn(build("mtllora", tiny), 0, two)
    first = {name: (pair.A.detach().clone(), pair.B.detach().clone()) for name, pair in method.export().items()}
    method.begin_task(1)
    fill(method.trained)
    for name, pair in method.adapters.pairs().items():
        shared = mixed(method.B[name], method.finished[0][1][method.layer[name]], method.tau)
        first[name] = (pair.A, shared @ method.finished[0][0][method.layer[name]])
    old = [method.encoder(two.tasks[0].train[i]) for i in (0, 4)]
    new = [method.encoder(Row("The sky is", " blue very blue"))]  # no task's: the current one's
    method.prepare([method.encoder(row) for row in two.tasks[1].train])
    pad = method.encoder.tokenizer.pad_token_id
    batch = weigh([*old, *new], 1.0)
    assert method._tasks(collate(batch, pad)) == [0, 0, 1]
    with torch.no_grad():
        together = method.loss(collate(batch, pad))
        alone = method.loss(collate(batch[2:], pad))
        for i in (0, 1):
            plain = build("sequential", tiny)
            for name, pair in plain.adapters.pairs().items():
                pair.A.data.copy_(first[name][0])
                pair.B.data.copy_(first[name][1])
            alone = alone + plain.loss(collate(batch[i : i + 1], pad))
    torch.testing.assert_close(together, alone)


def test_mtllora_finished_tasks_keep_their_own_part(tiny, two):
    """Replayed rows train the shared factors, not an earlier task's Λ and w."""
    method = find_method("replay+mtllora")(memory=6)
    plain = build("sequential", tiny)
    method.start(plain.adapters, plain.encoder, 0)
    learn(method, 0, two)
    kept = [one.clone() for one in method.last.finished[0]]
    shared = {name: B.detach().clone() for name, B in method.last.B.items()}
    learn(method, 1, two)
    assert all(torch.equal(one, other) for one, other in zip(kept, method.last.finished[0], strict=True))
    assert not any(torch.equal(B.detach(), shared[name]) for name, B in method.last.B.items())
    assert [method.weights_for(1, task) for task in (0, 1, 2)] == [0, 1, None]


# ------------------------------------------------------------------------------------------------------- HypLoRA


ONE = torch.tensor(1.0)


def test_hyplora_maps_by_hand():
    """At K = s = 1 they undo one another: arccosh √(sinh² a + 1) = a."""
    x = torch.tensor([1.8, 2.4])
    torch.testing.assert_close(exponential(x, ONE, ONE), x / 3 * torch.sinh(torch.tensor(3.0)))
    torch.testing.assert_close(logarithmic(exponential(x, ONE, ONE), ONE), x)
    # ||x|| = 15 is cut to 12
    torch.testing.assert_close(logarithmic(exponential(5 * x, ONE, ONE), ONE), 4 * x)


@given(st.floats(0.1, 5), st.floats(0.5, 9), st.floats(0, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_hyplora_maps_are_those_of_the_definition(K, s, length, seed):
    """In fp64, through arccosh of the time part; both together are x / s."""
    x = torch.randn(5, generator=generator("test", seed), dtype=torch.float64)
    x, K, s = length * x / x.norm(), torch.tensor(K).double(), torch.tensor(s).double()
    y = exponential(x, K, s)
    if length > 1e-2:
        a = x.norm() / (s * K.sqrt())
        torch.testing.assert_close(y, K.sqrt() * torch.sinh(a.clamp_max(12)) * x / x.norm(), rtol=1e-6, atol=0)
        t = (y.square().sum() + K).sqrt()
        torch.testing.assert_close(logarithmic(y, K), K.sqrt() * torch.arccosh(t / K.sqrt()) * y / y.norm())
    if length / (s * K.sqrt()) < 12:
        torch.testing.assert_close(logarithmic(y, K), x / s, rtol=1e-6, atol=1e-9)


def test_hyplora_is_0_at_0_with_a_gradient():
    """At the start B = 0, so y = 0: no NaN, and B gets a gradient; an input of 0 gives 0."""
    for f in (lambda v: exponential(v, ONE, ONE), lambda v: logarithmic(v, ONE)):
        v = torch.zeros(3, requires_grad=True)
        out = f(v)
        out.sum().backward()
        assert not out.any() and torch.allclose(v.grad, torch.ones(3))


def test_hyplora_starts_as_the_base_and_keeps_small_gradients_of_k(tiny, two):
    method = build("hyplora", tiny)
    part = part_of(method)
    with torch.no_grad():
        start = method.logits(part)
        with method.adapters.disabled():
            assert torch.equal(method.logits(part), start)
    method.begin_task(0)
    method.k.grad = torch.full_like(method.k, 3.0)
    method.after_backward()
    assert torch.equal(method.k.grad, torch.full_like(method.k, 0.01))
    method.k.grad = None
    k, s = method.curved[0].clone(), method.curved[1].clone()
    learn(method, 0, two)
    assert bool((method.k != k).all()) and bool((method.s != s).all())
    assert all(check.ok for check in method.checks())


def test_hyplora_is_not_taken_for_lora(tiny, tmp_path):
    """PEFT refuses the folder by its type; the method's own way back gives the same answers."""
    method = build("hyplora", tiny)
    fill([pair.B.data for pair in method.adapters.pairs().values()])
    method.adapters.save(tmp_path, method.export())
    with pytest.raises(KeyError, match="HYPLORA"):
        PeftModel.from_pretrained(build("sequential", tiny).adapters.model.get_base_model(), tmp_path)
    method.curved = [one + 0.3 for one in method.curved]
    again = build("hyplora", tiny)
    again.resume(again.adapters.load(tmp_path), method.state(), 0)
    part = part_of(method)
    with torch.no_grad():
        assert torch.equal(again.logits(part), method.logits(part))


def test_a_run_says_that_hyplora_is_no_stock_adapter(tiny, two, tmp_path):
    learn_stream(config(tiny, two, tmp_path, method="hyplora", cells="last"))
    card = (tmp_path / "tasks" / "02-sizes" / "adapter" / "README.md").read_text()
    assert "no stock PEFT adapter" in card and "from_pretrained" not in card
    with pytest.raises(UsageError, match="learnt by hyplora"):
        read_update(tmp_path / "adapter")


# --------------------------------------------------------------------------------------------- late layers only


def kept_bytes(model, part):
    """Bytes that autograd keeps for the backward pass while each block computes, and between blocks (None)."""
    kept, now = {}, [None]

    def pack(tensor):
        kept[now[0]] = kept.get(now[0], 0) + tensor.numel() * tensor.element_size()
        return tensor

    hooks = []
    for i, block in enumerate(model.get_decoder().layers):
        hooks.append(block.register_forward_pre_hook(lambda _, __, i=i: now.__setitem__(0, i)))
        hooks.append(block.register_forward_hook(lambda *_: now.__setitem__(0, None)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits_at(model, part.keep, input_ids=part.ids, attention_mask=part.mask)
    for hook in hooks:
        hook.remove()
    return kept


def test_adapters_on_late_layers_keep_no_activations_of_early_ones(tiny):
    base = load_base(tiny, torch.float32)
    encoder = Encoder(base.tokenizer, 64)
    part = collate([encoder(Row("The sky is", " blue"))], base.tokenizer.pad_token_id)
    late = Adapters(base.model, LoraSettings(r=4, target_modules=r".*layers\.1\..*_proj"), tiny, 0)
    assert len(late.pairs()) == 7
    kept = kept_bytes(late.model.get_base_model(), part)
    assert 0 not in kept and kept[1] > 0
    everywhere = build("sequential", tiny).adapters.model.get_base_model()
    assert kept_bytes(everywhere, part)[0] > 0


# ------------------------------------------------------------------------------------- DualLoRA, reconstructed


def test_duallora_projections_by_hand():
    e1 = torch.eye(2)[:1]
    A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    torch.testing.assert_close(projected(A, e1.T, e1.T), torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
    torch.testing.assert_close(projected(A, e1.T, torch.zeros(2, 0)), torch.tensor([[0.0, 2.0], [0.0, 4.0]]))
    C = torch.diag(torch.tensor([6.0, 3.0, 1.0]))
    U = torch.eye(3)[:, 1:]  # the task's leading direction was never read before
    torch.testing.assert_close(shared_directions(C, U, 1).abs(), torch.eye(3)[:, 1:2])
    assert not shared_directions(C, U, 3)[:, 2].any()  # U has two


@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_duallora_projections_are_projections(width, old, seed):
    draw = generator("test", seed)
    X, Y = torch.randn(width, min(old, width), generator=draw), torch.randn(width, 9, generator=draw)
    U = extended(X @ X.T, None, 1.0)
    V = shared_directions(Y @ Y.T, U, 2)
    once = projected(torch.randn(4, width, generator=draw), U, V)
    torch.testing.assert_close(projected(once, U, V), once, rtol=0, atol=1e-4)
    torch.testing.assert_close(U @ (U.T @ V), V, rtol=0, atol=1e-4)  # the residual part reads old directions only
    assert float((once[:2] @ X).norm()) < 2e-2 * float(X.norm())


def test_duallora_orthogonal_part_answers_old_inputs_as_before(tiny, two):
    """At every step, weight decay included; without a residual part the whole update leaves old inputs alone."""
    method = learn(build("duallora_reconstructed", tiny, {"energy": 0.5}), 0, two)
    project, worst = method.after_step, []

    def after_step(optimizer):
        project(optimizer)
        worst.append(max(max(method._astray(name, pair)) for name, pair in method.adapters.pairs().items()))

    method.after_step = after_step
    learn(method, 1, two)
    assert len(worst) == 4 and max(worst) < 1e-4
    assert all(check.ok for check in method.checks())
    alone = learn(build("duallora_reconstructed", tiny, {"energy": 0.5, "residual": 0.0}), 0, two)
    M = dict(alone.M)
    learn(alone, 1, two)
    for name, pair in alone.adapters.pairs().items():
        A, B = pair.A.detach(), pair.B.detach()
        assert float((B @ A @ M[alone.first[name]]).norm()) < 1e-4 * float(B.norm())
