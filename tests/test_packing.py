"""Packed rows against padded ones: equal logits, hidden states and gradients, fewer tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_kernels import MODELS, SMALL
from transformers import AutoConfig, AutoModelForCausalLM

from forgetless.data.batches import Example, alike, split
from forgetless.model.answers import logits_at, packs
from forgetless.model.attention import BLOCKED, PACKED, use_blocked_attention, window
from forgetless.model.head import hidden_at
from forgetless.model.packing import pack

PACKING = ("llama", "olmo", "deepseek_v3")


def made(kind: str, precision: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind])).to(precision)
    use_blocked_attention(model)
    return model


@pytest.fixture(scope="module")
def llama():
    return made("llama")


def outcome(model, kept: torch.Tensor, **inputs: torch.Tensor) -> list[torch.Tensor]:
    """Logits, hidden states at tokens and the gradients of a function of both."""
    logits, states = logits_at(model, kept, hidden=True, **inputs)
    told = [state[inputs["attention_mask"].bool()] for state in states]
    loss = logits.log_softmax(-1)[:, 7].sum() + sum((state**2).sum() for state in told)
    return [logits, *told, *torch.autograd.grad(loss, list(model.parameters()))]


def test_the_sequence_by_hand():
    """Two rows begin alike, one is alone; nothing is padded."""
    beginning = list(range(10, 19))
    ids = torch.tensor([[*beginning, 1, 2], [5, 6, 7, *[0] * 8], [*beginning, 3, 0]])
    packed = pack(ids, (ids > 0).long())
    assert packed.ids.tolist() == [[*beginning, 1, 2, 3, 5, 6, 7]]
    assert packed.positions.tolist() == [[*range(9), 9, 10, 9, 0, 1, 2]]
    assert [(group.shared, group.rest) for group in packed.groups] == [(9, 3), (0, 3)]
    assert packed.place[2].tolist() == [*range(9), 11, 0]
    assert packed.groups[0].seen[0, 0].tolist() == [[True] * 10 + [False], [True] * 11]


def test_equal_rows_each_keep_their_last_token():
    ids = torch.arange(3, 15).expand(3, 12)
    assert pack(ids, torch.ones_like(ids)).ids.shape == (1, 11 + 3)


@st.composite
def batches(draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask and kept places of rows with a few common beginnings, of any length and number."""
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    new = lambda n: torch.randint(3, 60, (n,), generator=numbers).tolist()  # noqa: E731
    beginnings = [new(n) for n in draw(st.lists(st.integers(0, 15), min_size=1, max_size=3))]
    sizes = draw(st.lists(st.tuples(st.integers(0, len(beginnings) - 1), st.integers(1, 12)), min_size=1, max_size=6))
    rows = [beginnings[which] + new(size) for which, size in sizes]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    keep = (torch.rand(ids.shape, generator=numbers) < 0.4) & (ids > 0)
    keep[0, 0] = True
    return ids, (ids > 0).long(), keep


@settings(max_examples=25, deadline=None)
@given(batches())
def test_packed_rows_compute_what_padded_ones_do(llama, batch):
    ids, mask, keep = batch
    found = {}
    for name in (PACKED, BLOCKED):
        llama.set_attn_implementation(name)
        found[name] = outcome(llama, keep, input_ids=ids, attention_mask=mask)
    whole = max(
        float(one.detach().norm()) for one in found[BLOCKED]
    )  # a gradient that is 0 is so up to rounding of the others
    for one, other in zip(*found.values(), strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6 * whole
    packed = pack(ids, mask)
    assert torch.equal(packed.ids[0, packed.place][mask.bool()], ids[mask.bool()])
    assert packed.ids.shape[1] == sum(group.shared + group.rest for group in packed.groups) <= int(mask.sum())


@pytest.mark.parametrize("kind", PACKING)
def test_each_architecture_computes_the_same(kind):
    model, drawn = made(kind), torch.Generator().manual_seed(1)
    assert model.config._attn_implementation == PACKED
    ids = torch.randint(3, 50, (7, 30), generator=drawn)
    ids[:3, :12], ids[4:6, :10] = ids[0, :12], ids[4, :10]
    mask = (torch.arange(30) < torch.tensor([30, 25, 14, 20, 22, 12, 9])[:, None]).long()
    keep = (torch.rand(7, 30, generator=drawn) < 0.3) & mask.bool()
    fast = outcome(model, keep, input_ids=ids * mask, attention_mask=mask)
    assert pack(ids * mask, mask).ids.shape[1] == int(mask.sum()) - 2 * 12 - 10
    model.set_attn_implementation("eager")
    for one, other in zip(fast, outcome(model, keep, input_ids=ids * mask, attention_mask=mask), strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_where_torchs_attention_computes_rows_are_packed_too(monkeypatch):
    """As on a GPU: with shared beginnings, the logits, states and gradients of padded rows."""
    import forgetless.model.attention as attention

    monkeypatch.setattr(attention, "_tried", {})
    monkeypatch.setattr(attention, "BLOCKED_ON", ())
    monkeypatch.setattr(attention, "_weights", None)  # nothing of the attention for CPUs is called
    assert made("mistral").config._attn_implementation == "sdpa"
    model = made("llama")
    assert packs(model)
    ids = torch.tensor([[*range(5, 17), 3, 4, 5], [*range(5, 17), 6, 0, 0], [9, 8, 7, *[0] * 12]])
    mask = (ids > 0).long()
    fast = outcome(model, mask.bool(), input_ids=ids, attention_mask=mask)
    assert pack(ids, mask).ids.shape[1] == int(mask.sum()) - 12
    model.set_attn_implementation("eager")
    for one, other in zip(fast, outcome(model, mask.bool(), input_ids=ids, attention_mask=mask), strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_branches_of_a_row_share_no_more_than_what_comes_before_them(llama):
    """Two rows of equal tokens: 9 of context, then two options of two tokens that do not see each other."""
    llama.set_attn_implementation(PACKED)
    ids = torch.arange(5, 18).expand(2, 13).clone()
    positions = torch.tensor([[*range(9), 9, 10, 9, 10]]).expand(2, 13)
    segment = torch.tensor([0] * 9 + [1, 1, 2, 2])
    sees = torch.ones(13, 13).tril().bool() & ((segment == 0) | (segment == segment[:, None]))
    sees, keep = sees.expand(2, 1, 13, 13), torch.ones(2, 13, dtype=torch.bool)
    packed = pack(ids, keep.long(), positions, sees)
    assert [group.shared for group in packed.groups] == [10], "the first option goes on as a row does"
    logits = logits_at(llama, keep, input_ids=ids, attention_mask=keep.long(), position_ids=positions, sees=sees)
    alone = torch.cat([ids[:1, :9], ids[:1, 11:]], dim=1)
    told = logits_at(llama, keep[:1, :11], input_ids=alone, attention_mask=keep[:1, :11].long())
    torch.testing.assert_close(logits.view(2, 13, -1)[1, 11:], told[9:], rtol=1e-4, atol=1e-4)


def test_models_that_cannot_are_given_padded_rows(llama, monkeypatch):
    import forgetless.model.attention as attention

    assert made("mistral").config._attn_implementation == BLOCKED, "a sliding window"
    assert made("falcon").config._attn_implementation == "sdpa", "an attention of its own"
    assert made("llama", torch.bfloat16).config._attn_implementation == PACKED
    wrong = attention.pack
    monkeypatch.setattr(attention, "_tried", {})
    monkeypatch.setattr(attention, "pack", lambda ids, mask: wrong(ids, mask, torch.zeros_like(ids)))
    assert made("llama").config._attn_implementation == BLOCKED, "other positions, other logits"
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    base.set_attn_implementation(PACKED)
    virtual = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert packs(base) and not packs(virtual), "virtual tokens stand before each row"
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    base.set_attn_implementation(PACKED)
    invoked = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    assert not packs(get_peft_model(base, invoked)), "the adapter begins at its last invocation in each row"


def test_micro_batches_hold_rows_that_begin_alike():
    def row(begin: int, length: int) -> Example:
        return Example((begin,) * 8 + tuple(range(length)), (True,) * (8 + length))

    rows = [row(1, 3), row(2, 9), row(1, 5), row(3, 7), row(2, 1), row(1, 4)]
    told = [[(one.ids[0], len(one.ids) - 8) for one in part] for part in split(rows, 3)]
    assert told == [[(1, 5), (1, 4), (1, 3)], [(2, 9), (2, 1), (3, 7)]]


def partitions(places: list[int]):
    """Every way to put them into groups."""
    if not places:
        yield []
        return
    first, *others = places
    for rest in partitions(others):
        yield [[first], *rest]
        for i, group in enumerate(rest):
            yield [*rest[:i], [first, *group], *rest[i + 1 :]]


def spared(rows: list[tuple[int, ...]], group: list[int]) -> int:
    shared = 0
    while all(len(rows[i]) > shared and rows[i][shared] == rows[group[0]][shared] for i in group):
        shared += 1
    return (len(group) - 1) * shared if shared >= 8 else 0


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_other_groups_spare_more_tokens(data):
    """Against every partition of five rows that part at a few places."""
    rows: list[tuple[int, ...]] = []
    for _ in range(data.draw(st.integers(1, 5))):
        kept = data.draw(st.integers(0, 30))
        source = data.draw(st.sampled_from(rows)) if rows else ()
        rows.append((*source[:kept], *data.draw(st.lists(st.integers(1, 2), min_size=0, max_size=20))))
    found = alike(rows)
    assert sorted(i for group in found for i in group.rows) == list(range(len(rows)))
    assert all(group.spared == spared(rows, group.rows) for group in found)
    best = max(sum(spared(rows, group) for group in groups) for groups in partitions(list(range(len(rows)))))
    assert sum(group.spared for group in found) == best


def test_two_system_prompts_behind_one_header_are_each_computed_once():
    header, prompts = [7] * 10, ([8] * 490, [9] * 490)
    for many in (4, 7):
        rows = [(*header, *prompts[i >= many], *range(10 + i, 70 + i)) for i in range(8)]
        ids = torch.tensor(rows)
        packed = pack(ids, torch.ones_like(ids))
        # 8 rows of 60 tokens, and each prompt once
        assert packed.ids.shape[1] == 2 * 500 + 8 * 60
        mixed = [Example(row, (True,) * len(row)) for row in (rows[0], rows[7], *rows[1:7])]
        sizes = [{one.ids[10] for one in part} for part in split(mixed, many)]
        assert len(sizes[0]) == 1


def test_rows_of_two_prompts_compute_what_padded_ones_do(llama):
    rows = [(*[7] * 9, *[prompt] * 12, *range(20 + i, 24 + i)) for i, prompt in enumerate((8, 9, 8, 9, 8))]
    ids = torch.tensor(rows)
    mask, kept = torch.ones_like(ids), torch.zeros_like(ids).bool()
    kept[:, -4:-1] = True
    inputs = {"input_ids": ids, "attention_mask": mask}
    for told, own in zip(outcome(llama, kept, **inputs, pack_rows=False), outcome(llama, kept, **inputs), strict=True):
        torch.testing.assert_close(own, told, rtol=1e-4, atol=1e-4)


def test_chunked_attention_is_given_padded_rows():
    """Llama 4 cuts rows into chunks that do not see one another; packed, a chunk would begin elsewhere."""
    more = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "pad_token_id": 0}
    told = SMALL | more | {"head_dim": 8, "attention_chunk_size": 20}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **told))
    use_blocked_attention(model)
    assert window(model) == 20 and not packs(model)


def test_what_the_head_reads_is_the_same_packed(llama):
    rows = [(*range(30, 42), *range(3, 3 + n)) for n in (4, 9, 1)]
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask = (ids > 0).long()
    packed = hidden_at(llama, mask.bool(), input_ids=ids, attention_mask=mask)
    llama.set_attn_implementation(BLOCKED)
    try:
        told = hidden_at(llama, mask.bool(), input_ids=ids, attention_mask=mask)
    finally:
        llama.set_attn_implementation(PACKED)
    torch.testing.assert_close(packed, told, rtol=1e-4, atol=1e-4)


def test_a_long_beginning_leaves_a_row_to_a_short_one():
    rows = [(1,) * length for length in (8, 10, 17, 17)]
    assert [(group.rows, group.shared) for group in alike(rows)] == [([0, 1], 8), ([2, 3], 17)]
