"""Methods that begin from the weights themselves: OSF against PEFT's own, CorDA and LoRA-Null on worked numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import OSFConfig, get_peft_model
from test_lowrank_methods import examples, learn, logits, tensor
from test_methods import build

from forgetless.data.batches import collate
from forgetless.errors import UsageError
from forgetless.methods.corda import least_outputs
from forgetless.methods.loranull import unread
from forgetless.model.adapters import Pair, named, whole
from forgetless.model.base import load_base
from forgetless.model.inputs import second_moments

# ------------------------------------------------------------------------------------------- OSF


@pytest.fixture
def osf(tiny):
    method = build("osf", tiny)
    method.begin_task(0)
    return method


def test_osf_by_hand(osf):
    name, low = next(iter(osf.low.items()))
    e1, e2 = torch.eye(2)[:, :1], torch.eye(2)[:, 1:]
    osf.low, osf.high = {name: low._replace(U=e2.clone(), V=e2.T.clone())}, {name: (e1, e1.T)}
    low = osf.low[name]
    low.U.grad, low.V.grad = torch.ones(2, 1), torch.ones(1, 2)
    osf.after_backward()
    assert torch.equal(low.U.grad, e2) and torch.equal(low.V.grad, e2.T)


def test_osf_computes_and_learns_as_pefts_own(tiny, osf):
    """The same function and, before the optimizer, the same gradients as a model that PEFT made of the same base."""
    names = [name.rpartition(".")[2] for name in osf.low]
    base = load_base(tiny, torch.float32).model
    theirs = get_peft_model(base, OSFConfig(effective_rank=0.5, target_modules=sorted(set(names))))
    mine = osf.adapters.model
    for model in (mine, theirs):
        model.train()
    part = collate(examples(osf), osf.encoder.tokenizer.pad_token_id)
    for model in (mine, theirs):
        out = model(part.ids, attention_mask=part.mask).logits
        torch.nn.functional.cross_entropy(out[part.keep], part.targets).backward()
    osf.after_backward()
    for name, low in osf.low.items():
        layer = theirs.base_model.model.get_submodule(name).osf_svd_params["default"]
        for own, other in zip(low, (layer["U_low"], layer["S_low"], layer["V_low"]), strict=True):
            torch.testing.assert_close(own.data, other.data, rtol=0, atol=1e-6)
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_osf_keeps_the_leading_triples_task_after_task(tiny, two):
    method = build("osf", tiny)
    before = logits(method)
    method.begin_task(0)
    torch.testing.assert_close(logits(method), before, rtol=1e-4, atol=1e-5)
    for task in (0, 1):
        W = {name: method.adapters.base_weight(name) + learnt for name, learnt in method.learnt.items()}
        learn(method, task, two)
        assert all(check.ok for check in method.checks())
        for name, (U_h, V_h) in method.high.items():
            now = method.adapters.base_weight(name) + method.learnt[name]
            torch.testing.assert_close(now @ V_h.T, W[name] @ V_h.T, rtol=0, atol=1e-4)
            torch.testing.assert_close(U_h.T @ now, U_h.T @ W[name], rtol=0, atol=1e-4)


def test_osf_takes_over_an_update_and_goes_on_from_it(tiny, two):
    method = build("osf", tiny)
    name, W = next((name, method.adapters.base_weight(name)) for name in method.low)
    given = Pair(torch.randn(3, W.shape[1]), torch.randn(W.shape[0], 3) / 10, 0.5)
    deployed = method.adopt(0, {name: given}, None)
    expected = 0.5 * given.B @ given.A
    torch.testing.assert_close(deployed[name].scale * deployed[name].B @ deployed[name].A, expected)
    before = logits(method)
    method.begin_task(1)
    torch.testing.assert_close(logits(method), before, rtol=1e-3, atol=1e-4)
    with pytest.raises(UsageError, match="above 0 and below 1"):
        build("osf", tiny, {"effective_rank": 1.0})


def test_a_product_as_a_pair():
    for shape in ((2, 3), (3, 2)):
        product = torch.randn(shape)
        pair = whole(product, 4, 2.0)
        assert pair.A.shape == (4, shape[1]) and pair.B.shape == (shape[0], 4)
        assert torch.equal(pair.B @ pair.A, product)


# --------------------------------------------------------------------------- begun as a part of the weights


def test_corda_by_hand():
    A, B = least_outputs(torch.eye(2), torch.diag(torch.tensor([4.0, 1.0])), 1)
    torch.testing.assert_close(B @ A, tensor([0, 0], [0, 1]), rtol=0, atol=1e-5)
    W, X = torch.randn(3, 5), torch.randn(5, 40)
    C = X @ X.T / 40
    A, B = least_outputs(W, C, 3)  # all of them are the weight itself
    torch.testing.assert_close(B @ A, W, rtol=1e-4, atol=1e-4)


def test_loranull_by_hand():
    A, B = unread(tensor([1, 2], [3, 4]), torch.diag(torch.tensor([4.0, 1.0])), 1)
    torch.testing.assert_close(B @ A, tensor([0, 2], [0, 4]), rtol=0, atol=1e-5)
    torch.testing.assert_close(A.square().sum(), B.square().sum())
    A, B = unread(torch.randn(3, 6), torch.diag(torch.tensor([9.0, 5, 3, 2, 0, 0])), 2)
    assert float(A[:, :4].abs().max()) < 1e-6  # it reads nothing that was there


@pytest.mark.parametrize("name, options", [("corda", {}), ("loranull", {}), ("loranull", {"freeze": True})])
def test_it_begins_as_the_base_and_leaves_the_base_as_it_is(tiny, two, name, options):
    method = build(name, tiny, {"prompts": 2} | options)
    untouched = logits(method)
    weights = copy.deepcopy({n: method.adapters.base_weight(n) for n in method.adapters.pairs()})
    method.begin_task(0)
    torch.testing.assert_close(logits(method), untouched, rtol=1e-3, atol=1e-4)
    start = method.adapters.snapshot()
    learn(method, 0, two, begin=False)
    learn(method, 1, two)
    assert all(check.ok for check in method.checks()) and method.reads < 1
    assert all(torch.equal(method.adapters.base_weight(n), W) for n, W in weights.items())
    now = named(method.adapters.pairs())
    assert all(torch.equal(now[key], start[key]) == bool(options and key.endswith(".A")) for key in start)


def test_a_frozen_null_space_pair_answers_what_was_read_as_before(tiny, two):
    """(s B - B_0) A_0 x = 0 for the inputs that the general rows gave, where these leave r directions free."""
    method = build("loranull", tiny, {"freeze": True, "prompts": 1})
    method.begin_task(0)
    rows = method._own_answers()[:1]
    short = [method.encoder(row) for row in rows]
    C = second_moments(method.adapters, short, method.encoder.tokenizer.pad_token_id)
    learn(method, 0, two, begin=False)
    past = method.adapters.past()
    for layer, pair in method.adapters.pairs().items():
        update = pair.B.detach() @ pair.A.detach() + past[layer].B @ past[layer].A
        read = float(((update @ C.of[C.first[layer]]) * update).sum())
        at_random = float(update.square().sum() * C.of[C.first[layer]].trace() / update.shape[1])
        assert read < 0.2 * at_random
