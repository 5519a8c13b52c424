"""One contract for all methods, and what each is for, on a tiny model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from forgetless.contract.check import FAILS, check
from forgetless.contract.trial import Bench
from forgetless.data.batches import Encoder, collate
from forgetless.data.tasks import Row, Stream
from forgetless.errors import UsageError
from forgetless.learning.engine import Engine
from forgetless.learning.step import TrainSettings, learn_task
from forgetless.methods import METHODS, Method
from forgetless.model.adapters import Adapters, LoraSettings, named
from forgetless.model.base import load_base

FAST = TrainSettings(learning_rate=2e-2, num_train_epochs=4, batch_size=4, micro_batch_size=4)
every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def bench():
    return Bench()


@every_method
def test_the_contract(name, bench):
    """Every clause of forgetless.contract.clauses, on runs that the clauses share."""
    assert not [one for one in check(name, bench) if one.outcome == FAILS]


@every_method
def test_every_option_is_documented(name):
    page = Path(__file__).parents[1] / "docs" / "methods" / f"{name}.md"
    text, kind = page.read_text(), METHODS[name]
    assert kind.paper in text
    for option in inspect.signature(kind).parameters:
        assert f"`{option}`" in text, f"{page.name} does not explain {option}"


# ---------------------------------------------------------------- methods trained for what they are for


@dataclass
class Trained:
    method: Method
    losses: list[list[float]]


def build(name: str, tiny: str, options: dict | None = None, seed: int = 0) -> Method:
    base, kind = load_base(tiny, torch.float32), METHODS[name]
    method = kind(**(kind.example if options is None else options))
    adapters = kind.adapter_class(base.model, LoraSettings(r=4), tiny, seed)
    method.start(adapters, Encoder(base.tokenizer, 64, base.decoder_start), seed)
    return method


def train(name, tiny, stream, options=None, settings=FAST, seed=0, method=None, start=0) -> Trained:
    method = method or build(name, tiny, options, seed)
    losses = []
    for number, lesson in enumerate(method.lessons(stream)):
        if number < start:
            continue
        method.begin_task(number)
        records: list[dict] = []
        examples = [method.encoder(row) for row in lesson.rows]
        learn_task(method, examples, settings, Engine("cpu", "fp32"), seed=seed, task=number, log=records.append)
        method.end_task(number, lesson.rows)
        losses.append([record["loss"] for record in records])
    return Trained(method, losses)


def same(a: Method, b: Method, tolerance: float = 0.0) -> bool:
    left, right = named(a.export()), named(b.export())
    return left.keys() == right.keys() and all(
        torch.equal(left[k], right[k]) if not tolerance else torch.allclose(left[k], right[k], atol=tolerance)
        for k in left
    )


def _examples(method: Method):
    return [method.encoder(Row("The sky is", " blue" + " very blue" * n)) for n in (0, 3, 1, 5)]


def test_another_seed_gives_other_bytes(tiny, two):
    one = Stream("one", two.tasks[:1])
    assert not same(train("sequential", tiny, one).method, train("sequential", tiny, one, seed=1).method)


@pytest.mark.parametrize("name", ["sequential", "incremental"])
def test_a_new_task_starts_from_the_old_function(name, tiny, two):
    """Until the second task's first step the model answers as it did."""
    one = train(name, tiny, Stream("one", two.tasks[:1])).method
    ids = torch.tensor([_examples(one)[3].ids])
    with torch.no_grad():
        before = one.adapters.model(ids).logits
        one.begin_task(1)
        after = one.adapters.model(ids).logits
    assert torch.allclose(before, after, atol=1e-5)


# ------------------------------------------------------------------- what each method is for, measured


def test_olora_overlap_is_below_incremental(tiny, two):
    plain = train("olora", tiny, two, {"lam": 0.0}).method.overlap()
    kept = train("olora", tiny, two, {"lam": 1.0}).method.overlap()
    assert kept < 0.5 * plain


def test_olora_first_task_has_no_penalty(tiny):
    method = build("olora", tiny)
    method.begin_task(0)
    assert method.penalty() is None


def test_nlora_updates_are_smaller_and_proximal_ones_have_zeros(tiny, two):
    from forgetless.methods.nlora import density, product_l1

    def size(method):
        return sum(float(product_l1(p.B.detach(), p.A.detach())) for p in method.adapters.pairs().values())

    plain, penalised = train("nlora", tiny, two, {"lam": 0.0}).method, train("nlora", tiny, two, {"lam": 3e-3}).method
    assert size(penalised) < 0.8 * size(plain)
    proximal = train("nlora", tiny, two, {"lam": 0.0, "proximal": 0.8}).method
    assert density(list(proximal.adapters.pairs().values()))["exact"] < 0.7
    assert density(list(plain.adapters.pairs().values()))["exact"] > 0.99


def test_nlora_as_released_refuses_layers_that_are_not_square(tiny):
    from forgetless.errors import UsageError

    with pytest.raises(UsageError, match="not square"):
        build("nlora", tiny, {"as_released": True})


def test_ilora_slow_learner_follows_the_closed_form(tiny, two):
    """θ_l = λ^K θ_0 + (1-λ) Σ λ^(K-k) θ_w^k, from the fast learner's recorded states; nothing else moves it."""
    lam, states = 0.9, []
    method = build("ilora", tiny, {"lam": lam, "memory": 6})
    start = {k: v.clone() for k, v in method.slow.items()}
    follow = method.after_step

    def watched(optimizer):
        fast = method.adapters.snapshot()
        states.append(fast)
        follow(optimizer)
        assert all(torch.equal(fast[k], v) for k, v in method.adapters.snapshot().items())  # the average moves only θ_l

    method.after_step = watched
    train("ilora", tiny, two, method=method)
    for key, tensor in method.slow.items():
        expected = lam ** len(states) * start[key]
        for k, fast in enumerate(states, start=1):
            expected = expected + (1 - lam) * lam ** (len(states) - k) * fast[key]
        assert torch.allclose(tensor, expected, atol=1e-5)


def test_ilora_slow_learner_gets_no_gradient(tiny, two):
    method = train("ilora", tiny, two).method
    assert all(not tensor.requires_grad for tensor in method.slow.values())
    trained = {id(p) for p in method.adapters.parameters()}
    assert all(id(tensor) not in trained for tensor in method.slow.values())


@pytest.mark.parametrize("target", ["logits", "hidden_last", "hidden_all"])
def test_ilora_with_equal_learners_is_replay(tiny, two, target):
    """θ_l = θ_w and no dropout: the consistency term is 0 and the loss is replay's."""
    method = train("ilora", tiny, two, {"memory": 6, "target": target}).method
    method.slow = method.adapters.snapshot()
    part = collate(method.batch(_examples(method), 0), method.encoder.tokenizer.pad_token_id)
    assert part.memory.any()
    replay = METHODS["replay"].loss(method, part)
    assert float(method.loss(part).detach()) == pytest.approx(float(replay.detach()), rel=1e-6)


@pytest.mark.parametrize("target", ["logits", "hidden_last", "hidden_all"])
@pytest.mark.parametrize("gated", [False, True])
def test_ilora_consistency_against_the_obvious_form(tiny, two, target, gated):
    """Row by row without padding, by the definition: the mean over layers, replayed positions and width."""
    method = train("ilora", tiny, two, {"memory": 6, "target": target, "gated": gated}).method
    batch = method.batch(_examples(method), 0)
    part = collate(batch, method.encoder.tokenizer.pad_token_id)
    values = []
    for example in (e for e in batch if e.memory):
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            fast = method.adapters.model(ids, output_hidden_states=True)
            with method.adapters.using(method.slow):
                slow = method.adapters.model(ids, output_hidden_states=True)
        if target == "logits":
            places = [i - 1 for i, answer in enumerate(example.answer) if answer]
            pairs = [(fast.logits[0, places], slow.logits[0, places])]
        else:
            chosen = slice(-1, None) if target == "hidden_last" else slice(None)
            pairs = list(zip(fast.hidden_states[chosen], slow.hidden_states[chosen], strict=True))
        for f, s in pairs:
            difference = s - f
            values.append((difference.clamp_min(0) if gated else difference).square().flatten())
    expected = torch.cat(values).mean()
    found = method.loss(part) - METHODS["replay"].loss(method, part)
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-3)


def test_ilora_compares_two_learners_in_bf16_too(tiny, two):
    """Autocast keeps bf16 copies of weights by tensor: swapping the learners must not reuse the other's."""
    method = train("ilora", tiny, two).method
    with torch.autocast("cpu", dtype=torch.bfloat16):
        part = collate(method.batch(_examples(method), 0), method.encoder.tokenizer.pad_token_id)
        loss = method.loss(part)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        expected = method.loss(part)
    assert method.step_consistency > 0
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)


def test_ilora_deploys_the_learner_it_is_told_to(tiny, two):
    fast = train("ilora", tiny, two, {"memory": 6, "deploy": "fast"}).method
    slow = train("ilora", tiny, two, {"memory": 6, "deploy": "slow"}).method
    assert list(fast.views()) == ["fast", "slow"] and list(slow.views()) == ["slow", "fast"]
    assert not same(fast, slow)
    assert all(torch.equal(a, b) for a, b in zip(fast.slow.values(), slow.slow.values(), strict=True))


def test_ilora_as_released_keeps_the_slow_learner_at_the_last_border(tiny, two):
    method = train("ilora", tiny, Stream("one", two.tasks[:1]), {"as_released": True, "memory": 6}).method
    border = method.adapters.snapshot()
    train("ilora", tiny, two, method=method, start=1)
    assert all(torch.equal(border[k], v) for k, v in method.slow.items())


def test_replay_weighs_both_terms_by_half(tiny, two):
    method = train("replay", tiny, Stream("one", two.tasks[:1])).method
    method.begin_task(1)
    batch = method.batch(_examples(method), 0)
    for memory in (False, True):
        assert sum(e.weight * e.answers for e in batch if e.memory == memory) == pytest.approx(0.5)


def test_joint_sees_every_row_once_an_epoch(two, tiny):
    lessons = build("joint", tiny).lessons(two)
    assert len(lessons) == 1 and lessons[0].rows == two.tasks[0].train + two.tasks[1].train
    assert lessons[0].last_task == 1


def test_dropout_is_repeatable(tiny, two):
    def run():
        base = load_base(tiny, torch.float32)
        method = METHODS["sequential"]()
        settings = LoraSettings(r=4, lora_dropout=0.3)
        method.start(Adapters(base.model, settings, tiny, 0), Encoder(base.tokenizer, 64), 0)
        return train("sequential", tiny, two, method=method).method

    torch.manual_seed(1)
    first = run()
    torch.manual_seed(2)
    assert same(first, run())
    assert not same(first, train("sequential", tiny, two).method)


def test_a_slow_learner_that_hardly_follows_is_warned_of(tiny, two):
    def check(**options):
        method = train("ilora", tiny, two, {"memory": 6, **options}).method
        return next(one for one in method.checks() if one.name == "slow learner moved")

    assert check().ok
    assert not check(lam=0.99999).ok


def test_a_proximal_step_that_makes_no_zero_is_warned_of(tiny, two):
    def check(**options):
        method = train("nlora", tiny, two, options).method
        return next(one for one in method.checks() if one.name == "density exact")

    assert check(lam=0.0, proximal=0.5).ok
    assert not check(lam=0.0, proximal=1e-9).ok
    assert check(lam=0.0).ok  # nothing was asked for
    with pytest.raises(UsageError, match="negative"):
        build("nlora", tiny, {"lam": -1.0})
