"""The equations of the methods that shape the update's factors, on worked numbers and against slow twins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_methods import build, same

from forgetless.data.batches import collate
from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.geometry import operators
from forgetless.learning.engine import Engine
from forgetless.learning.state import load_state, save_state
from forgetless.learning.step import TrainSettings, learn_task
from forgetless.methods.clora import controlled, orthonormal
from forgetless.methods.lori import largest
from forgetless.methods.oplora import alignment, leading, projected_off
from forgetless.methods.raclora import bounded, projector
from forgetless.methods.sdlora import direction, gram_of, magnitude
from forgetless.methods.slao import merged, row_basis
from forgetless.methods.spared_inputs import extended, new_directions
from forgetless.model.adapters import Magnitudes, Pair
from forgetless.model.inputs import second_moments

SHORT = TrainSettings(learning_rate=2e-2, max_steps=4, batch_size=4, micro_batch_size=4, weight_decay=0.1)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def examples(method):
    return [method.encoder(Row("The sky is", " blue" + " very blue" * n)) for n in (0, 3, 1)]


def logits(method) -> torch.Tensor:
    part = collate(examples(method), method.encoder.tokenizer.pad_token_id)
    with torch.no_grad():
        return method.logits(part)


def learn(method, task, stream, begin=True):
    """One task; a number past the stream's end learns its tasks again."""
    if begin:
        method.begin_task(task)
    rows = stream.tasks[task % len(stream.tasks)].train
    given = [method.encoder(row) for row in rows]
    learn_task(method, given, SHORT, Engine("cpu", "fp32"), seed=0, task=task, log=lambda record: None)
    method.end_task(task, rows)
    return method


# ---------------------------------------------------------------------------------- a factor that is not trained


@pytest.mark.parametrize("sides", ["A", "B"])
def test_a_factor_that_is_not_trained_is_no_parameter(tiny, two, sides):
    """Weight decay moves whatever an optimizer knows; a past pair, which resets what is trainable, changes nothing."""
    method = build("sequential", tiny)
    method.adapters.train_only(sides)
    method.adapters.finish(1)
    before = method.adapters.snapshot()
    learn(method, 0, two)
    trained = {id(p) for p in method.adapters.parameters()}
    for name, pair in method.adapters.pairs().items():
        for side in "AB":
            tensor = getattr(pair, side)
            assert (id(tensor) in trained) == tensor.requires_grad == (side == sides)
            if side != sides:
                assert torch.equal(tensor, before[f"{name}.{side}"]) and tensor.grad is None


# ------------------------------------------------------------------------------------------------------ SD-LoRA


def test_sdlora_direction_by_hand():
    pair = Pair(tensor([3, 4]), tensor([1], [0]), 2.0)
    for c in (1.0, 7.0):
        D = direction(scaled := Pair(c * pair.A, pair.B, 2.0), magnitude(scaled))
        assert magnitude(scaled) == pytest.approx(5 * c)
        torch.testing.assert_close(D.B @ D.A, tensor([0.6, 0.8], [0, 0]))
    assert magnitude(D) == pytest.approx(1.0)


def test_magnitudes_multiply_the_frozen_pairs(tiny):
    """Against frozen pairs that are multiplied beforehand: logits, what is exported, gradients of the trained pair."""
    torch.manual_seed(0)
    one, other = build("sequential", tiny), build("sequential", tiny)
    pairs = one.adapters.pairs()
    past = {n: Pair(torch.randn(5, p.A.shape[1]) / 6, torch.randn(p.B.shape[0], 5) / 6, p.scale)
            for n, p in pairs.items()}  # fmt: skip
    values = torch.randn(len(pairs), 2)
    one.adapters.set_past(past)
    one.adapters.magnify(magnitudes := Magnitudes(torch.nn.Parameter(values), (2, 3)))
    weight = [v.repeat_interleave(torch.tensor([2, 3])) for v in values]
    other.adapters.set_past({n: Pair(p.A, p.B * w, p.scale) for (n, p), w in zip(past.items(), weight, strict=True)})
    part = collate(one.batch(examples(one), 0), one.encoder.tokenizer.pad_token_id)
    for method in (one, other):
        method.loss(part).backward()
    torch.testing.assert_close(logits(one), logits(other))
    for a, b in zip(one.adapters.parameters(), other.adapters.parameters(), strict=False):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    for name, pair in one.export().items():
        torch.testing.assert_close(pair.B, other.export()[name].B)
    assert one.adapters.parameters()[-1] is magnitudes.values
    nudged = values.clone()
    nudged[3, 1] += 1e-2
    slope = magnitudes.values.grad[3, 1]
    losses = []
    for step in (nudged, 2 * values - nudged):
        magnitudes.values.data.copy_(step)
        losses.append(float(one.loss(part).detach()))
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(slope), rel=2e-2, abs=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_sdlora_freezes_directions_and_trains_their_magnitudes(tiny, two, shared):
    method = learn(build("sdlora", tiny, {"shared": shared}), 0, two)
    before, trained = logits(method), sum(p.numel() for p in method.adapters.parameters())
    method.begin_task(1)
    torch.testing.assert_close(logits(method), before, rtol=1e-4, atol=1e-5)
    layers = 1 if shared else len(method.adapters.layers())
    assert method.a.shape == (layers, 1)
    assert sum(p.numel() for p in method.adapters.parameters()) == trained + layers
    norms = [float(magnitude(pair)) for pair in method.adapters.past().values()]
    if shared:  # one norm for all layers: they keep their sizes relative to each other
        assert math.fsum(n * n for n in norms) / len(norms) == pytest.approx(1.0, rel=1e-5)
    else:
        assert norms == pytest.approx([1.0] * len(norms), rel=1e-5)
    directions = {name: (p.A.clone(), p.B.clone()) for name, p in method.adapters.past().items()}
    start = method.a.detach().clone()
    learn(method, 1, two, begin=False)
    assert all(check.ok for check in method.checks()) and not torch.equal(method.a, start)
    assert {"magnitude_1"} == method.told().keys()
    method.begin_task(2)
    for name, pair in method.adapters.past().items():
        assert torch.equal(pair.A[:4], directions[name][0]) and torch.equal(pair.B[:, :4], directions[name][1])


def test_sdlora_rank_reduction(tiny, two):
    method = build("sdlora", tiny, {"rank_reduction": True})
    method.adapters.settings = type(method.adapters.settings)(r=10)
    assert [method._rank(task) for task in (0, 3, 4, 7, 8, 20)] == [10, 10, 8, 8, 6, 6]
    method = build("sdlora", tiny, {"rank_reduction": True})  # r = 4
    method.task, method._trained = 3, False
    learn(method, 4, two)
    for pair in method.adapters.pairs().values():
        assert int((pair.A.norm(dim=1) > 0).sum()) == 4  # 0.8 * 4, rounded up
    method._trained = False
    learn(method, 8, two)
    for pair in method.adapters.pairs().values():
        assert pair.A.norm(dim=1).gt(0).tolist() == [True] * 3 + [False]
        assert pair.B.norm(dim=0).gt(0).tolist() == [True] * 3 + [False]
    method.begin_task(9)
    assert method.ranks == (3,) and all(pair.A.shape[0] == 3 for pair in method.adapters.past().values())


@pytest.mark.parametrize("shared", [False, True])
def test_sdlora_folds_a_direction_that_is_not_new(tiny, two, shared):
    """1/2 D_1 becomes a_1 + 1/2; what has a part outside stays a direction of its own."""
    method = learn(build("sdlora", tiny, {"fold": 0.01, "shared": shared}), 0, two)
    method.begin_task(1)
    method._trained = True
    with torch.no_grad():
        for name, pair in method.adapters.pairs().items():
            pair.A.copy_(method.adapters.past()[name].A)
            pair.B.copy_(0.5 * method.adapters.past()[name].B)
    before, a = logits(method), method.a.detach().clone()
    method.end_task(1, two.tasks[1].train)
    torch.testing.assert_close(method.a.detach(), a + 0.5)
    torch.testing.assert_close(logits(method), before, rtol=1e-4, atol=1e-5)
    assert method.folded == pytest.approx(1.0) and all(check.ok for check in method.checks())
    method.begin_task(2)
    assert method.ranks == (4,)
    learn(method, 2, two, begin=False)  # another direction
    assert method.folded == 0.0
    method.begin_task(3)
    assert method.ranks == (4, 4)


def test_sdlora_gram_of_directions_is_that_of_the_products():
    pairs = [Pair(torch.randn(2, 5), torch.randn(3, 2), 2.0) for _ in range(3)]
    products = torch.stack([(2.0 * pair.B @ pair.A).flatten() for pair in pairs]).double()
    torch.testing.assert_close(gram_of(pairs), products @ products.T, rtol=1e-5, atol=1e-5)


def test_sdlora_with_shared_magnitudes_goes_on_where_it_stopped(tiny, two, tmp_path):
    whole = build("sdlora", tiny, {"shared": True})
    for task in range(2):
        learn(whole, task, two)
    whole.adapters.save(tmp_path / "adapter", whole.export())
    save_state(tmp_path, whole.state())
    fresh = build("sdlora", tiny, {"shared": True})
    fresh.resume(fresh.adapters.load(tmp_path / "adapter"), load_state(tmp_path), 1)
    assert torch.equal(logits(fresh), logits(whole))
    assert same(learn(fresh, 2, two), learn(whole, 2, two))
    fresh.magnitudes = [2 * whole.a.detach()]  # as a checkpoint inside a task puts them back
    assert torch.equal(fresh.a, 2 * whole.a) and fresh.adapters.parameters()[-1] is fresh.a


# -------------------------------------------------------------------------------------------------------- CLoRA


def test_clora_by_hand():
    assert controlled(torch.eye(2), torch.zeros(3, 2), tensor([1], [0]), tensor([1], [0], [0])) == 0.5
    assert controlled(torch.eye(2), tensor([2, 0], [0, 5]), tensor([1], [0]), tensor([1], [0])) == 0.5 + 2


@given(st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_clora_directions(k, seed):
    P = orthonormal(8, k, seed, "A", "layer")
    torch.testing.assert_close(P.T @ P, torch.eye(k))
    assert torch.equal(P, orthonormal(8, k, seed, "A", "layer"))
    assert not torch.equal(P, orthonormal(8, k, seed, "B", "layer"))
    A, B = torch.randn(2, 8), torch.randn(8, 2)
    turned = P @ torch.linalg.qr(torch.randn(k, k)).Q  # another basis of the same space
    torch.testing.assert_close(controlled(A, B, P, P), controlled(A, B, turned, turned))


def test_clora_leaves_each_pair_its_rank(tiny):
    method = build("clora", tiny, {})
    for name, pair in method.adapters.pairs().items():
        P_A, P_B = method.P[name]
        assert P_A.shape == (pair.A.shape[1], pair.A.shape[1] - 4)
        assert P_B.shape == (pair.B.shape[0], pair.B.shape[0] - 4)
    with pytest.raises(UsageError, match="k is 1 or more"):
        build("clora", tiny, {"k": 0})


def test_clora_without_weight_is_told_apart(tiny, two):
    values = {}
    for lam in (0.0, 1.0):
        checks = learn(build("clora", tiny, {"lam": lam, "k": 8}), 0, two).checks()
        values[lam] = [check.value for check in checks if " in P_" in check.name]
    assert all(on < 0.9 * off for on, off in zip(values[1.0], values[0.0], strict=True)), values


# ------------------------------------------------------------------------------------------------------ RAC-LoRA


def test_raclora_projector_by_hand():
    H = projector(tensor([1, 0, 0], [0, 2, 0]))
    torch.testing.assert_close(H, torch.diag(tensor(1, 1, 0)))
    draw = torch.Generator().manual_seed(0)
    each = torch.stack([projector(torch.rand(2, 8, generator=draw) - 0.5) for _ in range(2000)])
    torch.testing.assert_close(each[0] @ each[0], each[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(each.mean(0), 0.25 * torch.eye(8), rtol=0, atol=0.03)


@pytest.mark.parametrize("trains", ["B", "A"])
def test_raclora_blocks(tiny, two, trains):
    """Blocks of 2 steps: at each border the function stays, the optimizer starts anew and a factor is drawn again."""
    method = build("raclora", tiny, {"block_steps": 2, "trains": trains})
    frozen = "B" if trains == "A" else "A"
    follow, seen = method.after_step, []

    def watched(optimizer):
        before, factor = logits(method), method.adapters.snapshot()
        follow(optimizer)
        torch.testing.assert_close(logits(method), before, rtol=1e-4, atol=1e-5)
        new_block = method.steps % 2 == 0
        assert bool(optimizer.state) != new_block
        for name, pair in method.adapters.pairs().items():
            assert torch.equal(getattr(pair, frozen), factor[f"{name}.{frozen}"]) != new_block
            assert bool((getattr(pair, trains) == 0).all()) == new_block
        seen.append(method.adapters.past())

    method.after_step = watched
    learn(method, 0, two)
    assert [next(iter(past.values())).A.shape[0] if past else 0 for past in seen] == [0, 4, 4, 8]
    assert all(check.ok for check in method.checks())
    assert all(pair.A.shape[0] == 8 for pair in method.export().values())  # no empty block


def test_raclora_keeps_its_merged_blocks_as_an_attribute(tiny, two):
    """What a checkpoint inside a task saves and puts back."""
    method = learn(build("raclora", tiny, {"block_steps": 3}), 0, two)
    fresh = build("raclora", tiny, {"block_steps": 3})
    fresh.begin_task(0)
    for name in method.within_task:
        setattr(fresh, name, getattr(method, name))
    fresh.adapters.set_current(method.adapters.pairs())
    assert torch.equal(logits(fresh), logits(method)) and same(fresh, method)
    assert all(check.ok for check in fresh.checks())


def test_raclora_rank_is_bounded_by_the_layers():
    """Layers 3 x 5, 4 x 2: no update needs more than rank 3."""
    torch.manual_seed(0)
    pairs = {"a": Pair(torch.randn(7, 5), torch.randn(3, 7), 2.0), "b": Pair(torch.randn(7, 2), torch.randn(4, 7), 2.0)}
    small = bounded(pairs)
    for name, pair in small.items():
        assert pair.A.shape[0] == pair.B.shape[1] == 3 and pair.scale == 2.0
        torch.testing.assert_close(pair.B @ pair.A, pairs[name].B @ pairs[name].A)
    assert bounded(small) is small


# ------------------------------------------------------------------------------------------------------- InfLoRA


def test_inflora_directions_by_hand():
    C = torch.diag(tensor(6, 3, 1))
    e1, e2, _ = torch.eye(3).split(1)
    torch.testing.assert_close(new_directions(C, None, 1).abs(), e1.T)
    torch.testing.assert_close(new_directions(C, e1.T, 1).abs(), e2.T)
    assert [extended(C, None, energy).shape[1] for energy in (0.1, 0.6, 0.61, 0.9, 0.95)] == [1, 1, 2, 2, 3]
    torch.testing.assert_close(extended(C, e1.T, 0.9).abs(), torch.cat([e1, e2]).T)
    assert torch.equal(extended(C, e1.T, 0.5), e1.T)  # enough is held
    everything = new_directions(C, torch.eye(3), 2)
    assert everything.shape == (3, 2) and not everything.any()  # nothing is left to read


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_inflora_reads_nothing_of_old_inputs(width, old, seed):
    draw = torch.Generator().manual_seed(seed)
    X, Y = torch.randn(width, min(old, width), generator=draw), torch.randn(width, 9, generator=draw)
    M = extended(X @ X.T, None, 1.0)
    torch.testing.assert_close(M.T @ M, torch.eye(M.shape[1]), rtol=0, atol=1e-4)
    A = new_directions(Y @ Y.T, M, 2).T
    assert float((A @ X).norm()) < 2e-2 * float(X.norm())
    both = extended(Y @ Y.T, M, 0.9)
    torch.testing.assert_close(both.T @ both, torch.eye(both.shape[1]), rtol=0, atol=1e-3)
    assert torch.equal(both[:, : M.shape[1]], M)
    assert float((both.T @ Y).square().sum()) >= 0.9 * float(Y.square().sum()) * (1 - 1e-3)


def test_second_moments_are_means_over_tokens(tiny):
    """Against each row by itself, and every layer by itself."""
    method = build("sequential", tiny)
    given = [method.encoder(Row("The sky is", " blue" * n)) for n in (1, 5, 2)]
    found = second_moments(method.adapters, given, method.encoder.tokenizer.pad_token_id)
    for name, layer in method.adapters.layers().items():
        read = []
        hook = layer.register_forward_pre_hook(lambda _, inputs, read=read: read.append(inputs[0][0]))
        for example in given:
            with torch.no_grad():
                method.adapters.model(torch.tensor([example.ids]))
        hook.remove()
        tokens = torch.cat(read)
        torch.testing.assert_close(found.of[found.first[name]], tokens.T @ tokens / len(tokens), rtol=1e-4, atol=1e-5)
    assert len(found.of) == 8  # of 14 layers: q, k, v and gate, up read the same


def test_inflora_old_inputs_are_answered_as_before(tiny, two):
    """A's rows are fixed, of norm 1/√3, orthogonal to M; the joined past and the memory are what a run goes on from."""
    method = learn(build("inflora", tiny, {"energy": 0.5}), 0, two)
    M = dict(method.M)
    learn(method, 1, two)
    for name, pair in method.adapters.pairs().items():
        torch.testing.assert_close(pair.A.norm(dim=1), torch.full((4,), 3**-0.5))
        assert float((pair.A @ M[method.first[name]]).detach().abs().max()) < 1e-4
    assert all(check.ok for check in method.checks())
    assert {name.removesuffix(".M") for name in method.state().tensors} == set(method.first.values())


# -------------------------------------------------------------------------------------------------------- OPLoRA


def test_oplora_by_hand():
    e1 = tensor([1], [0])
    A, B = projected_off(tensor([1, 2], [3, 4]), torch.eye(2), e1, e1)
    torch.testing.assert_close(B @ A, tensor([0, 0], [0, 4]))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_oplora_keeps_the_leading_triples(shape):
    torch.manual_seed(0)
    W, k = torch.randn(*shape), 3
    U, V = leading(W, k)
    left, sigma, right = torch.linalg.svd(W)
    torch.testing.assert_close(U @ U.T, left[:, :k] @ left[:, :k].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(V @ V.T, right[:k].T @ right[:k], rtol=1e-4, atol=1e-5)
    A, B = projected_off(torch.randn(2, shape[1]), torch.randn(shape[0], 2), U, V)
    for i in range(k):
        torch.testing.assert_close((W + B @ A) @ right[i], sigma[i] * left[:, i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close((W + B @ A).T @ left[:, i], sigma[i] * right[i], rtol=1e-4, atol=1e-4)
    assert all(tensor.shape[1] == 0 for tensor in leading(W, 0))


def test_oplora_on_factors_is_the_projection_in_the_forward_pass():
    """AdamW with weight decay, clipped: projected gradients and factors give P_L B A P_R of free factors."""
    torch.manual_seed(0)
    W, target = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    U, V = (tensor.double() for tensor in leading(W, 2))
    A0, B0 = torch.randn(2, 7, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    free = [A0.clone().requires_grad_(), B0.clone().requires_grad_()]
    mine = [one.clone().requires_grad_() for one in projected_off(A0, B0, U, V)]
    optimizers = [torch.optim.AdamW(pair, lr=0.05, weight_decay=0.1) for pair in (free, mine)]
    for _ in range(12):
        A, B = projected_off(*free, U, V)
        (B @ A - target).square().sum().backward()
        (mine[1] @ mine[0] - target).square().sum().backward()
        for one, projected in zip(mine, projected_off(mine[0].grad, mine[1].grad, U, V), strict=True):
            one.grad.copy_(projected)
        for pair, optimizer in zip((free, mine), optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(pair, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for one, projected in zip(mine, projected_off(*mine, U, V), strict=True):
                one.copy_(projected)
        for one, other in zip(mine, projected_off(*free, U, V), strict=True):
            torch.testing.assert_close(one, other)


def test_oplora_update_is_outside_at_every_step(tiny, two):
    method = learn(build("oplora", tiny, {"k": 4}), 0, two)
    assert all(alignment(pair, *method.UV[name]) < 1e-5 for name, pair in method.adapters.pairs().items())
    plain = learn(build("oplora", tiny, {"k": 0}), 0, two).adapters.pairs()
    assert all(alignment(pair, *method.UV[name]) > 0.05 for name, pair in plain.items())


def test_oplora_refuses_weights_that_are_no_numbers(tiny):
    method = build("oplora", tiny, {"k": 4})
    name, layer = next(iter(method.adapters.layers().items()))
    base = layer.get_base_layer()
    base.weight = torch.nn.Parameter(base.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UsageError, match=f"{name}.*quantised"):
        method.adapters.base_weight(name)


# ---------------------------------------------------------------------------------------------------------- LoRI


def test_lori_mask_by_hand():
    mask = largest({"a": tensor([1, 9], [2, 8]), "b": tensor([7, 3])}, 0.5)
    assert mask["a"].tolist() == [[False, True], [False, True]] and mask["b"].tolist() == [[True, False]]
    assert sum(int(one.sum()) for one in largest({"a": torch.ones(7), "b": torch.ones(4)}, 0.1).values()) == 2


@pytest.mark.parametrize("calibration, right", [(0, True), (3, True), (50, False)])
def test_lori_changes_only_the_chosen_entries(tiny, two, calibration, right):
    """Weight decay included; a task that is over before its calibration is cut to the share too, and is warned of."""
    method = learn(build("lori", tiny, {"calibration_steps": calibration}), 0, two)
    after_first = method.adapters.snapshot()
    learn(method, 1, two)
    entries = changed = 0
    for name, pair in method.adapters.pairs().items():
        assert torch.equal(pair.A, after_first[f"{name}.A"])
        differs = after_first[f"{name}.B"] != pair.B
        assert not bool((differs & ~method.mask[name]).any())
        entries, changed = entries + differs.numel(), changed + int(differs.sum())
    assert 0.09 * entries < changed <= math.ceil(0.1 * entries)
    assert all(check.ok for check in method.checks()) == right


# ---------------------------------------------------------------------------------------------------------- SLAO


def test_slao_by_hand():
    B, seen = torch.zeros(1, 1), []
    for i in (1, 2, 3):
        B = merged(B, tensor([i]), i)
        seen.append(round(float(B), 4))
    assert seen == [1, 1.7071, 2.4536]


def test_slao_starts_from_an_orthonormal_basis():
    torch.manual_seed(0)
    A = torch.randn(3, 7)
    Q = row_basis(A)
    torch.testing.assert_close(Q @ Q.T, torch.eye(3))
    torch.testing.assert_close(A @ Q.T @ Q, A)  # the same span
    torch.testing.assert_close(row_basis(Q), Q)  # signs are fixed: what is orthonormal stays
    assert bool(((A @ Q.T).diagonal() > 0).all())


def test_slao_deploys_the_merge_of_its_adapters(tiny, three):
    """The operator of `merge` on the adapters as each task left them."""
    method, left = build("slao", tiny), []
    for task in range(3):
        learn(method, task, three)
        left.append({n: Pair(p.A.detach().clone(), p.B.detach().clone(), p.scale)
                     for n, p in method.adapters.pairs().items()})  # fmt: skip
    expected = operators.slao(left)
    for name, pair in method.export().items():
        torch.testing.assert_close(pair.scale * pair.B, expected[name].scale * expected[name].B)
        assert torch.equal(pair.A, expected[name].A)
    trained = logits(method)
    with method.views()["merged"]:
        assert not torch.allclose(logits(method), trained, atol=1e-4)


def test_what_cannot_be_meant_is_refused(tiny):
    for name, options in {
        "sdlora": {"fold": 1.0}, "raclora": {"trains": "C"}, "inflora": {"energy": 0.0}, "oplora": {"k": -1},
        "lori": {"density": 0.0},
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=next(iter(options))):
            build(name, tiny, options)
