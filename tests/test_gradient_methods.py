"""EWC, LwF, GEM, A-GEM, OGD, general replay: equations on worked numbers, and fast paths against slow twins."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import get_total_norm

from forgetless.data.batches import Encoder, collate
from forgetless.errors import RunError, UsageError
from forgetless.forgetting.texts import PROMPTS, general_prompts, own_prompts
from forgetless.learning import gradients, step
from forgetless.learning.engine import Engine
from forgetless.learning.general_rows import own_answers
from forgetless.learning.gradients import each_gradient, flat, mean_gradient, shaped, step_gradient
from forgetless.learning.state import load_state, save_state
from forgetless.learning.step import TrainSettings, learn_task
from forgetless.methods import METHODS, agem, gem
from forgetless.methods.ewc import drawn, joined, quadratic
from forgetless.methods.lwf import distilled
from forgetless.methods.ogd import answer_logit, orthonormal, outside, share_within
from forgetless.model.adapters import Adapters, LoraSettings, Pair
from forgetless.model.base import load_base

SHORT = TrainSettings(learning_rate=5e-3, max_steps=3, batch_size=4, micro_batch_size=2)


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def build(name, tiny, lora=None, **options):
    base = load_base(tiny, torch.float32)
    base.model.eval()
    method = METHODS[name](**options)
    method.start(Adapters(base.model, lora or LoraSettings(r=4), tiny, 0), Encoder(base.tokenizer, 64), 0)
    return method


def learn(method, stream, tasks, settings=SHORT):
    records = []
    for number in tasks:
        rows = stream.tasks[number].train
        method.begin_task(number)
        examples = [method.encoder(row) for row in rows]
        learn_task(method, examples, settings, Engine("cpu", "fp32"), seed=0, task=number, log=records.append)
        method.end_task(number, rows)
    return records


def check(method, name):
    return next(one for one in method.checks() if one.name == name)


def row_gradient(method, row, value):
    """The obvious form: one row without padding, all logits, `backward`; value(logits of the answer, its tokens)."""
    example = method.encoder(row)
    places = [i for i, answer in enumerate(example.answer) if answer]
    method.adapters.model.zero_grad()
    logits = method.adapters.model(torch.tensor([example.ids])).logits[0, [i - 1 for i in places]]
    value(logits, torch.tensor([example.ids[i] for i in places])).backward()
    found = torch.cat([parameter.grad.flatten() for parameter in method.adapters.parameters()])
    method.adapters.model.zero_grad()
    return found


def nll(logits, targets):
    return -logits.log_softmax(-1)[range(len(targets)), targets].sum()


# -------------------------------------------------------------------------------- gradients on rows


@pytest.fixture(scope="module")
def learnt(tiny, two):
    """A model with an adapter that is not zero, and dropout, which no extra gradient may see."""
    method = build("sequential", tiny, LoraSettings(r=4, lora_dropout=0.3))
    learn(method, two, [0])
    return method


def test_mean_gradient_is_the_mean_over_answer_tokens_in_any_split(learnt, two):
    rows = (*two.tasks[0].train[:3], *two.tasks[1].train[:2])
    answers = sum(learnt.encoder(row).answers for row in rows)
    expected = sum(row_gradient(learnt, row, nll) for row in rows) / answers
    learnt.adapters.model.train()
    before = [torch.ones_like(p) for p in learnt.adapters.parameters()]
    for parameter, gradient in zip(learnt.adapters.parameters(), before, strict=True):
        parameter.grad = gradient.clone()
    for size in (1, 2, 5):
        found = mean_gradient(learnt.adapters, learnt.encoder, rows, size)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert learnt.adapters.model.training
    assert all(bool((p.grad == 1).all()) for p in learnt.adapters.parameters())
    learnt.adapters.model.eval()


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_rows(learnt, two, monkeypatch, count):
    """Each process's own part, put together by hand, is what one process finds."""
    rows = two.tasks[0].train[:4]
    whole = mean_gradient(learnt.adapters, learnt.encoder, rows, 4)
    each = list(each_gradient(learnt.adapters, learnt.encoder, rows, lambda *told: nll(*told[1:])))
    parts, columns = [], []
    for rank in range(count):
        monkeypatch.setattr(gradients, "rank_and_count", lambda rank=rank: (rank, count))
        parts.append(mean_gradient(learnt.adapters, learnt.encoder, rows, 4))
        monkeypatch.setattr(gradients, "gathered", lambda found: [found] * count)
        columns.append(list(each_gradient(learnt.adapters, learnt.encoder, rows, lambda *told: nll(*told[1:]))))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-6)
    for i, expected in enumerate(each):
        torch.testing.assert_close(columns[i % count][i], expected, rtol=1e-4, atol=1e-6)


def test_flat_and_shaped_are_inverse():
    tensors = [torch.randn(2, 3), torch.randn(4), torch.randn(1, 1)]
    for one, other in zip(tensors, shaped(flat(tensors), tensors), strict=True):
        assert torch.equal(one, other)


# --------------------------------------------------------------------------------------------- EWC


def test_ewc_penalty():
    theta, anchor, F = vector(1.1, 2.2), vector(1, 2), vector(4, 1)
    assert 400 / 2 * float(quadratic(theta, F, anchor)) == pytest.approx(16.0)


entries = st.floats(0, 10) | st.just(0.0)


@settings(deadline=None, max_examples=40)
@given(*[st.lists(entries, min_size=3, max_size=3) for _ in range(2)], st.integers(0, 99))
def test_ewc_two_anchors_are_one(F, G, seed):
    draw = torch.Generator().manual_seed(seed)
    theta, a, b = torch.randn(3, 3, generator=draw, dtype=torch.float64)
    F, G = vector(*F), vector(*G)
    H, middle, constant = joined(F, a, G, b)
    assert float(quadratic(theta, H, middle)) + constant == pytest.approx(
        float(quadratic(theta, F, a) + quadratic(theta, G, b)), rel=1e-9, abs=1e-9
    )


def test_ewc_draws_answers_as_often_as_the_model_gives_them():
    logits, draw = vector(0.75, 0.25).log().repeat(4000, 1), torch.Generator().manual_seed(0)
    share = float((drawn(logits, draw) == 0).float().mean())
    assert abs(share - 0.75) < 5 * (0.75 * 0.25 / 4000) ** 0.5


def test_ewc_fisher_is_the_mean_of_squared_row_gradients(tiny, two):
    """Not the square of a mean: two copies of a row have the Fisher of one."""
    method = build("ewc", tiny, fisher_rows=99)
    start = method.information(0, two.tasks[0].train[:2])
    sizes = [p.numel() for p in method.adapters.parameters()]
    assert all(float(F.sum()) == 0 for F in start.split(sizes)[0::2])  # B = 0: nothing depends on A yet
    assert all(float(F.sum()) > 0 for F in start.split(sizes)[1::2])
    learn(build_on(method), two, [0])
    rows = two.tasks[1].train[:3]
    expected = torch.stack([row_gradient(method, row, nll) for row in rows]).square().mean(0)
    torch.testing.assert_close(method.information(1, rows), expected, rtol=1e-3, atol=1e-9)
    one, copies = method.information(1, rows[:1]), method.information(1, rows[:1] * 4)
    torch.testing.assert_close(one, copies)
    method.fisher = "true"
    true = method.information(1, rows)
    assert torch.equal(true, method.information(1, rows)) and not torch.allclose(true, expected)


def build_on(method):
    """Plain fine-tuning of another method's adapters."""
    plain = METHODS["sequential"]()
    plain.start(method.adapters, method.encoder, method.seed)
    return plain


def test_ewc_pulls_back_to_the_anchor_and_goes_on_from_files(tiny, two, tmp_path):
    method = build("ewc", tiny, lam=50.0, fisher_rows=3)
    learn(method, two, [0])
    method.begin_task(1)
    assert method.penalty() == 0  # at its anchor
    held = method.F > 0
    assert check(method, "fisher").ok and held.any()
    method.adapters.save(tmp_path / "adapter", method.export())
    save_state(tmp_path, method.state())
    with torch.no_grad():
        for parameter in method.adapters.parameters():
            parameter.add_(0.1)
    penalty = method.penalty()
    assert float(penalty.detach()) == pytest.approx(50 / 2 * 0.01 * float(method.F.sum()), rel=1e-3)
    gradient = flat(torch.autograd.grad(penalty, method.adapters.parameters()))
    torch.testing.assert_close(gradient, 50 * method.F * 0.1, rtol=1e-3, atol=1e-9)
    fresh = build("ewc", tiny, lam=50.0, fisher_rows=3)
    fresh.resume(fresh.adapters.load(tmp_path / "adapter"), load_state(tmp_path), 0)
    assert torch.equal(fresh.F, method.F) and torch.equal(fresh.anchor, method.anchor)


def test_ewc_online_decays_the_fisher_and_keeps_the_last_anchor(tiny, two):
    method = build("ewc", tiny, fisher_rows=2, online=True, gamma=0.25)
    learn(method, two, [0])
    before = method.F
    learn(method, two, [1])
    torch.testing.assert_close(method.F, 0.25 * before + method.information(1, two.tasks[1].train))
    assert torch.equal(method.anchor, flat(method.adapters.parameters()))


# --------------------------------------------------------------------------------------------- LwF


def test_lwf_distillation():
    old, new = vector(2, 0).unsqueeze(0), vector(1, 0).unsqueeze(0)
    assert float(distilled(old, new, 2.0)) == pytest.approx(0.105378, abs=1e-6)
    assert float(distilled(new, old, 2.0)) == pytest.approx(4 * 0.027955, abs=4e-6)  # the other direction
    assert float(distilled(old, old + 3, 2.0)) == pytest.approx(0, abs=1e-7)


def test_lwf_against_the_obvious_form(tiny, two):
    method = build("lwf", tiny, lam=0.7)
    learn(method, two, [0])
    method.begin_task(1)
    examples = [method.encoder(row) for row in two.tasks[1].train[:3]]
    part = collate(method.batch(examples, 0), method.encoder.tokenizer.pad_token_id)
    plain = METHODS["sequential"].loss(method, part)
    assert float(method.loss(part).detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    learn(build_on(method), two, [1])
    terms, answers = [], sum(example.answers for example in examples)
    for example in examples:
        ids, places = torch.tensor([example.ids]), [i for i, answer in enumerate(example.answer) if answer]
        with torch.no_grad():
            new = method.adapters.model(ids).logits[0, [i - 1 for i in places]]
            with method.adapters.using(method.old):
                old = method.adapters.model(ids).logits[0, [i - 1 for i in places]]
        p, q = (old / 2).softmax(-1), (new / 2).softmax(-1)
        terms += [nll(new, ids[0, places]) / answers, 0.7 * 4 * (p * (p / q).log()).sum() / answers]
    assert float(method.loss(part).detach()) == pytest.approx(float(sum(terms).detach()), rel=1e-4)
    assert method.step_distillation > 0


# ------------------------------------------------------------------------------------- GEM and A-GEM


def test_gem_and_agem_worked_numbers():
    g, reference = vector(1, -2), vector(0, 1)
    assert agem.project(g, reference).tolist() == [1, 0]
    assert gem.project(g, reference.unsqueeze(0)).tolist() == pytest.approx([1, 0])
    assert gem.project(g, reference.unsqueeze(0), margin=3.0).tolist() == pytest.approx([1, 1])  # v = 3, not 2
    assert gem.project(vector(-1, -1), torch.eye(2, dtype=torch.float64)).tolist() == pytest.approx([0, 0], abs=1e-12)
    # only the first is violated; projecting on it alone would violate the second
    G = torch.stack([vector(0, 1), vector(1, -1)])
    assert gem.project(vector(1, -2), G).tolist() == pytest.approx([1, 0])
    assert gem.project(vector(-1, -2), G).tolist() == pytest.approx([0, 0], abs=1e-9)


def nearest_in_cone(g, G):
    """The obvious form: of the projections on all faces, the nearest that keeps every inequality."""
    best = None
    for size in range(len(G) + 1):
        for face in itertools.combinations(range(len(G)), size):
            A = G[list(face)]
            candidate = g - torch.linalg.pinv(A) @ (A @ g) if face else g
            allowed = bool((G @ candidate >= -1e-9 * G.norm(dim=1) * g.norm()).all())
            if allowed and (best is None or (candidate - g).norm() < (best - g).norm()):
                best = candidate
    return best


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(2, 7), st.integers(0, 10_000), st.floats(-6, 6))
def test_gem_finds_the_nearest_gradient_that_no_task_objects_to(tasks, width, seed, scale):
    draw = torch.Generator().manual_seed(seed)
    g = torch.randn(width, generator=draw, dtype=torch.float64)
    G = torch.randn(tasks, width, generator=draw, dtype=torch.float64)
    G[0] *= 10**scale  # tasks whose gradients differ in size by orders of magnitude
    found = gem.project(g, G)
    assert bool((G @ found >= -1e-6 * G.norm(dim=1) * g.norm()).all())
    torch.testing.assert_close(found, nearest_in_cone(g, G), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gem.project(found, G), found, rtol=1e-5, atol=1e-6)
    if bool((G @ g >= 0).all()):
        assert found is g
    pushed = gem.project(g, G, margin=0.5)
    assert bool((G @ pushed >= -1e-6 * G.norm(dim=1) * (g.norm() + G.norm())).all())
    if tasks == 1:
        torch.testing.assert_close(found, agem.project(g, G[0]))


def test_gem_with_the_same_gradient_twice():
    g, G = vector(1, -2, 0), torch.stack([vector(0, 1, 0)] * 2)
    assert gem.project(g, G).tolist() == pytest.approx([1, 0, 0])
    assert gem.project(g, torch.zeros(2, 3, dtype=torch.float64)) is g


@pytest.mark.parametrize("name, constraints", [("gem", 2), ("agem", 1)])
def test_a_step_keeps_the_inequalities_before_it_is_clipped(tiny, three, name, constraints):
    """On the third task, with fresh gradients of kept rows at the current weights."""
    method = build(name, tiny, memory=6, replay_rows=2)
    learn(method, three, [0, 1])
    seen, project = [], method.after_backward

    def watched():
        before = step_gradient(method.adapters.parameters())
        project()
        after = step_gradient(method.adapters.parameters())
        G = torch.stack([mean_gradient(method.adapters, method.encoder, rows, 4) for rows in method.drawn])
        assert len(G) == constraints
        assert bool((G @ after >= -1e-4 * G.norm(dim=1) * before.norm()).all())
        violated = bool((G @ before < 0).any())
        assert violated != torch.equal(before, after)
        seen.append(violated)

    method.after_backward = watched
    learn(method, three, [2], TrainSettings(learning_rate=2e-2, max_steps=6, batch_size=4, micro_batch_size=2))
    assert any(seen)
    assert check(method, "projected steps").value == sum(seen) / len(seen)
    assert check(method, "gradient changed").value > 0


# --------------------------------------------------------------------------------------------- OGD


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(0, 99))
def test_ogd_projects_out_an_orthonormal_set(count, seed):
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, 8, generator=draw, dtype=torch.float64)
    V = orthonormal(torch.empty(0, 8, dtype=torch.float64), [*vectors, vectors.sum(0), torch.zeros(8).double()])
    assert len(V) == count  # a sum of the others, and zero, add nothing
    torch.testing.assert_close(V @ V.T, torch.eye(count, dtype=torch.float64))
    g = torch.randn(8, generator=draw, dtype=torch.float64)
    left = outside(g, V)
    assert (vectors @ left).abs().max() < 1e-10 * vectors.norm() * g.norm()
    torch.testing.assert_close(outside(left, V), left)
    assert share_within(g, V) ** 2 + float((left.norm() / g.norm()) ** 2) == pytest.approx(1)


def test_ogd_worked_numbers():
    V = orthonormal(torch.empty(0, 2, dtype=torch.float64), [vector(3, 4)])
    assert V.tolist() == [[0.6, 0.8]]
    assert outside(vector(1, 2), V).tolist() == pytest.approx([-0.32, 0.24])
    assert share_within(vector(1, 2), V) == pytest.approx(2.2 / 5**0.5)


@pytest.mark.parametrize("of", ["logit", "loss"])
def test_ogd_directions_are_those_of_single_rows(tiny, two, of):
    method = build("ogd", tiny, directions=99, of=of)
    learn(method, two, [0])
    value = nll if of == "loss" else lambda logits, targets: logits[range(len(targets)), targets].mean()
    for row in two.tasks[0].train[:3]:
        assert share_within(row_gradient(method, row, value), method.V) == pytest.approx(1, abs=1e-4)
    assert check(method, "directions").value == len(method.V) <= len(two.tasks[0].train)


def test_ogd_spares_old_answers_where_a_plain_step_does_not(tiny, two):
    """To first order: one small step of AdamW on the second task, seen in the logits of rows of the first."""
    small = TrainSettings(learning_rate=1e-4, max_steps=1, batch_size=4, micro_batch_size=4)

    def logits(method):
        rows = two.tasks[0].train[:6]
        found = []
        with torch.no_grad():
            for row in rows:
                part = collate([method.encoder(row)], 0)
                found.append(answer_logit(0, method.logits(part), part.targets))
        return torch.stack(found)

    method = build("ogd", tiny, directions=99)
    learn(method, two, [0])
    learnt, V, before, changes = method.export(), method.V, logits(method), {}
    learnt = {name: Pair(pair.A.detach().clone(), pair.B.detach().clone(), pair.scale) for name, pair in learnt.items()}
    method.directions = 0  # none of the second task's
    for project in ("step", "gradient", "nothing"):
        method.adapters.set_current(learnt)
        method.V, method.project = V[:0] if project == "nothing" else V, project
        learn(method, two, [1], small)
        changes[project] = float((logits(method) - before).norm())
    assert changes["step"] < 0.05 * changes["nothing"]
    assert changes["step"] < 0.2 * changes["gradient"]


def test_ogd_says_whether_its_steps_stayed_outside_the_span(tiny, two, tmp_path):
    method = build("ogd", tiny, directions=4)
    learn(method, two, [0])
    method.adapters.save(tmp_path / "adapter", method.export())
    save_state(tmp_path, method.state())
    fresh = build("ogd", tiny, directions=4)
    fresh.resume(fresh.adapters.load(tmp_path / "adapter"), load_state(tmp_path), 0)
    assert torch.equal(fresh.V, method.V)
    [*_, last] = learn(method, two, [1])
    assert last["step_within_span"] > 0.01 and last["removed"] > 0
    assert check(method, "change within span").ok and len(method.V) == 8
    leaving = build("ogd", tiny, directions=4, project="gradient")
    learn(leaving, two, [0, 1])
    assert not check(leaving, "change within span").ok


# ------------------------------------------------------------------------------------- general replay


def test_general_replay_weighs_the_text_by_its_share(tiny, two, tmp_path):
    text = tmp_path / "general.txt"
    text.write_text("The sky is blue.\n\nThe sea is large and blue.\n\nA dog is an animal.")
    method = build("general_replay", tiny, share=0.25, text=str(text), general_rows=2)
    method.begin_task(0)
    batch = method.batch([method.encoder(row) for row in two.tasks[0].train[:3]], 0)
    assert [example.memory for example in batch] == [False] * 3 + [True] * 2
    for memory, share in ((False, 0.75), (True, 0.25)):
        chosen = [example for example in batch if example.memory == memory]
        assert sum(example.weight * example.answers for example in chosen) == pytest.approx(share)
        assert len({example.weight for example in chosen}) == 1
    general = [example for example in batch if example.memory]
    assert all(example.answers == len(example.ids) - 1 for example in general)  # every token but the first
    save_state(tmp_path, method.state())
    text.write_text("Another text.")
    other = build("general_replay", tiny, text=str(text))
    with pytest.raises(RunError, match="not the text"):
        other.restore(load_state(tmp_path))


def test_general_replay_asks_the_base_what_is_not_measured(tiny, two):
    method = build("general_replay", tiny, prompts=3)
    first = own_answers(method.adapters, method.encoder, 3)
    learn(build_on(method), two, [0])
    assert own_answers(method.adapters, method.encoder, 3) == first  # the adapter has no say
    measured = {row.messages[0] for row in own_prompts(general_prompts(PROMPTS), chat=True).rows}
    assert first and not {row.messages[0] for row in first} & measured


# --------------------------------------------------------------------------------- refused options


@pytest.mark.parametrize(
    "name, options, told",
    [
        ("ewc", {"lam": -1.0}, "negative"),
        ("ewc", {"fisher": "exact"}, "empirical, true"),
        ("ewc", {"fisher_rows": 0}, "1 or more"),
        ("ewc", {"gamma": 1.5}, "from 0"),
        ("lwf", {"lam": -1.0}, "negative"),
        ("lwf", {"temperature": 0.0}, "above 0"),
        ("gem", {"margin": -0.1}, "0 or more"),
        ("ogd", {"directions": -1}, "0 "),
        ("ogd", {"of": "row"}, "logit, loss"),
        ("ogd", {"project": "both"}, "step, gradient"),
        ("general_replay", {"share": 1.0}, "below 1"),
        ("general_replay", {"general_rows": 0}, "share 0"),
        ("general_replay", {"prompts": 0}, "share 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options, told):
    with pytest.raises(UsageError, match=told):
        METHODS[name](**options)


# ------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("name, norms", [("sequential", 1), ("ogd", 2)])
def test_the_norm_is_taken_once_and_of_what_is_clipped(tiny, two, monkeypatch, name, norms):
    """Once a step; again only where the method has made another gradient of it."""
    taken, steps = [], 2
    method = build(name, tiny)
    learn(method, two, [0])
    monkeypatch.setattr(step, "get_total_norm", lambda grads: taken.append(get_total_norm(grads)) or taken[-1])
    clipped = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: clipped.append(step_gradient(optimized(self))))
    learn(method, two, [1], TrainSettings(max_steps=steps, batch_size=4, micro_batch_size=4, max_grad_norm=1e-3))
    assert len(taken) == norms * steps
    for gradient in clipped:
        assert float(gradient.norm()) == pytest.approx(1e-3, rel=1e-2)


def optimized(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
