"""Each method's equation on hand-worked numbers (docs/methods/<name>.md), and its fast path against a slow twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetless.data.tasks import Row
from forgetless.learning.memory import Memory
from forgetless.methods import nlora
from forgetless.methods.ilora import average, squared_distance, warmed
from forgetless.methods.nlora import density, product_l1, released_l1
from forgetless.methods.olora import overlap
from forgetless.model.adapters import Pair, join


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


# ------------------------------------------------------------------------------------------ O-LoRA

A1 = tensor([1, 0, 0], [0, 1, 0])


@pytest.mark.parametrize(
    "other, squared, absolute",
    [([[0, 0, 1], [0, 0, -2]], 0, 0), ([[1, 1, 0], [0, 0, 1]], 2, 2), ([[2, 0, 0], [0, -3, 1]], 13, 5)],
)
def test_olora_overlap(other, squared, absolute):
    assert overlap([A1], [tensor(*other)]) == squared
    assert overlap([A1], [tensor(*other)], absolute=True) == absolute


def test_olora_joined_past_gives_the_sum_over_tasks():
    torch.manual_seed(0)
    old, new = [torch.randn(2, 5) for _ in range(3)], torch.randn(2, 5)
    assert torch.allclose(overlap([torch.cat(old)], [new]), sum(overlap([A], [new]) for A in old))


@pytest.mark.parametrize("absolute", [False, True])
def test_olora_gradient_is_that_of_the_obvious_form(absolute):
    draw = torch.Generator().manual_seed(1)
    new = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    olds, news = [new(6, 5), new(4, 3)], [new(2, 5).requires_grad_(), new(2, 3).requires_grad_()]
    products = [old @ n.T for old, n in zip(olds, news, strict=True)]
    obvious = sum(p.abs().sum() if absolute else (p**2).sum() for p in products)
    assert torch.isclose(overlap(olds, news, absolute), obvious)
    for one, other in zip(torch.autograd.grad(3 * overlap(olds, news, absolute), news),
                          torch.autograd.grad(3 * obvious, news), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)


def test_zero_overlap_leaves_the_left_products_free():
    """A_i A_tᵀ = 0 gives ΔW_i ΔW_tᵀ = 0, and ΔW_iᵀ ΔW_t may be anything."""
    old, new = Pair(tensor([1, 0]), tensor([1], [0]), 1.0), Pair(tensor([0, 1]), tensor([1], [0]), 1.0)
    before, now = old.B @ old.A, new.B @ new.A
    assert overlap([old.A], [new.A]) == 0
    assert (before @ now.T).abs().sum() == 0
    assert (before.T @ now).abs().sum() > 0


# ------------------------------------------------------------------------------------------ N-LoRA


def obvious_l1(B, A):
    return (B @ A).abs().sum()


def test_nlora_worked_example():
    A, B = tensor([1, 2]).requires_grad_(), tensor([3], [-1]).requires_grad_()
    norm = product_l1(B, A)
    norm.backward()
    assert norm == 12
    assert B.grad.tolist() == [[3], [-3]] and A.grad.tolist() == [[4, 4]]
    assert released_l1(B.detach(), A.detach()) == 1  # what the released code penalises


def test_nlora_is_zero_at_the_start():
    A, B = torch.randn(3, 7).requires_grad_(), torch.zeros(5, 3).requires_grad_()
    norm = product_l1(B, A)
    norm.backward()
    assert norm == 0 and A.grad.abs().sum() == 0


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 200), st.integers(0, 99))
def test_nlora_blockwise_equals_the_obvious_form(out, width, rank, block, seed):
    torch.manual_seed(seed)
    A = torch.randn(rank, width, dtype=torch.float64, requires_grad=True)
    B = torch.randn(out, rank, dtype=torch.float64, requires_grad=True)
    slow = obvious_l1(B, A)
    expected = torch.autograd.grad(slow, (B, A))
    kept, nlora.BLOCK_ENTRIES = nlora.BLOCK_ENTRIES, block
    try:
        fast = product_l1(B, A)
        found = torch.autograd.grad(2 * fast, (B, A))
    finally:
        nlora.BLOCK_ENTRIES = kept
    assert torch.allclose(fast, slow)
    assert all(torch.allclose(f, 2 * e) for f, e in zip(found, expected, strict=True))


def test_rank_one_identity():
    torch.manual_seed(1)
    A, B = torch.randn(1, 6), torch.randn(4, 1)
    assert torch.allclose(product_l1(B, A), B.abs().sum() * A.abs().sum())


def test_density_counts_what_is_not_zero():
    pair = Pair(tensor([1, 0, 0, 1e-7]), tensor([1], [0]), 1.0)  # product: [[1, 0, 0, 1e-7], [0, 0, 0, 0]]
    assert density([pair]) == {"exact": 2 / 8, "absolute": 1 / 8, "relative": 1 / 8}


# ------------------------------------------------------------------------------------------ I-LoRA


def test_ilora_average():
    slow = {"x": torch.tensor([2.0])}
    average(slow, {"x": torch.tensor([10.0])}, 0.25)
    assert slow["x"] == 8
    slow, seen = {"x": torch.tensor([0.0])}, []
    for _ in range(3):
        average(slow, {"x": torch.tensor([1.0])}, 0.25)
        seen.append(float(slow["x"]))
    assert seen == [0.75, 0.9375, 0.984375]


def test_ilora_warmup():
    found = [round(warmed(0.9, k), 4) for k in range(1, 11)]
    assert found == [0.5, 0.6667, 0.75, 0.8, 0.8333, 0.8571, 0.875, 0.8889, 0.9, 0.9]
    assert {warmed(0.25, k) for k in range(1, 11)} == {0.25}


def test_ilora_consistency():
    slow, fast = torch.tensor([1.0, 3, -1]), torch.tensor([2.0, 1, -4])
    assert squared_distance(fast, slow, gated=True).mean() == pytest.approx(13 / 3)
    assert squared_distance(fast, slow, gated=False).mean() == pytest.approx(14 / 3)


# ------------------------------------------------------------------------------- joined pairs, memory


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_joined_pairs_are_the_sum(count, rank, seed):
    torch.manual_seed(seed)
    pairs = [Pair(torch.randn(rank, 6), torch.randn(5, rank), 2.0) for _ in range(count)]
    joined = join(pairs)
    assert joined.A.shape == (count * rank, 6)
    assert torch.allclose(joined.B @ joined.A, sum(pair.B @ pair.A for pair in pairs), atol=1e-5)


def rows(count, name="r"):
    return tuple(Row(f"{name}{i}", " a") for i in range(count))


def test_reservoir_keeps_each_row_equally_often():
    counts, capacity, total, repeats = [0] * 60, 5, 60, 3000
    for seed in range(repeats):
        memory = Memory(capacity, "reservoir", seed)
        memory.add_task(0, rows(20, "a"))
        memory.add_task(1, rows(40, "b"))
        assert len(memory.rows) == capacity
        for row in memory.rows:
            counts[int(row.prompt[1:]) + (20 if row.prompt[0] == "b" else 0)] += 1
    expected = repeats * capacity / total  # 250, standard deviation 15
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts)


def test_rows_left_after_a_task_was_forgotten_are_kept_equally_often():
    """20 of a, 10 of b; a is forgotten; 30 of c, fewer and more than the places that a left: random pairing."""
    for later in (8, 30):
        counts, repeats = [0] * (10 + later), 800
        for seed in range(repeats):
            memory = Memory(5, "reservoir", seed)
            memory.add_task(0, rows(20, "a"))
            memory.add_task(1, rows(10, "b"))
            kept = [(row, task) for row, task in zip(memory.rows, memory.tasks, strict=True) if task]
            memory.rows, memory.tasks = [row for row, _ in kept], [task for _, task in kept]
            memory.seen, memory.forgotten = 10, {"0": 20}
            memory.add_task(2, rows(later, "c"))
            for row in memory.rows:
                counts[int(row.prompt[1:]) + (10 if row.prompt[0] == "c" else 0)] += 1
        expected = sum(counts) / len(counts)
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts), (later, counts)
        assert later < 20 or expected == repeats * 5 / 40  # every place is taken again


def test_reservoir_stores_the_first_rows_in_order():
    memory = Memory(5)
    memory.add_task(0, rows(4))
    assert memory.rows == list(rows(4))


@given(st.integers(0, 30), st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_quota_shares_the_room(capacity, sizes):
    memory = Memory(capacity, "quota")
    for task, size in enumerate(sizes):
        memory.add_task(task, rows(size, f"{task}-"))
        assert len(memory.rows) <= capacity
        kept = [memory.tasks.count(t) for t in range(task + 1)]
        assert all(count <= capacity // (task + 1) + 1 for count in kept)
    assert all(row.prompt.startswith(f"{task}-") for row, task in zip(memory.rows, memory.tasks, strict=True))


def test_percent_keeps_that_share_of_each_task():
    memory = Memory("10%")
    memory.add_task(0, rows(50))
    memory.add_task(1, rows(25, "b"))
    assert memory.tasks == [0] * 5 + [1] * 3


@given(st.integers(1, 20), st.integers(0, 30))
def test_draws_are_distinct_and_repeatable(kept, count):
    memory = Memory(100, rows=list(rows(kept)))
    drawn = memory.draw(count, 1, 7)
    assert len(set(drawn)) == len(drawn) == min(count, kept)
    assert drawn == memory.draw(count, 1, 7)


@pytest.mark.parametrize("bad", ["many", "-1", "120%", "x%"])
def test_a_memory_size_nobody_can_read_is_named(bad):
    from forgetless.errors import UsageError

    with pytest.raises(UsageError, match="a number of rows"):
        Memory(bad)
