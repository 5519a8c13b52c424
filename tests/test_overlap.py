"""Overlap of updates: worked numbers, identities, and the streamed counts against whole products."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pages import Page, opened_in_browser, self_contained
from records import run_record

from forgetless.cli import main
from forgetless.errors import UsageError
from forgetless.geometry import collisions
from forgetless.geometry.collisions import count_collisions
from forgetless.geometry.overlap import THRESHOLDS, as_record, compare_layer, compare_updates, increment, overlap
from forgetless.model.adapters import Pair
from forgetless.report.glossary import OVERLAP_GLOSSARY
from forgetless.report.overlap import overlap_markdown, sentences, write_overlap
from forgetless.report.overlap_page import render_overlap
from forgetless.runs.folder import RunFolder
from forgetless.subjects.updates import Update, weighted, write_update

ROOT = Path(__file__).parents[1]
LEVELS = (0.0, 0.1, 1.0)
seeds = st.integers(0, 10**6)


def whole(rows: list[list[float]]) -> Pair:
    """A matrix as a product: itself times 1."""
    matrix = torch.tensor(rows, dtype=torch.float32)
    return Pair(torch.eye(matrix.shape[1]), matrix, 1.0)


def drawn(rank: int, seed: int, inside: int = 7, out: int = 5, zeros: float = 0.0) -> Pair:
    draw = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, inside, generator=draw), torch.randn(out, rank, generator=draw)
    for tensor in (A, B):
        tensor[torch.rand(tensor.shape, generator=draw) < zeros] = 0
    return Pair(A, B, 0.5 + seed % 3)


def product(pair: Pair) -> torch.Tensor:
    return pair.scale * pair.B.double() @ pair.A.double()


def adapters(count: int = 3, layers: int = 2, rank: int = 2) -> list[Update]:
    names = [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(layers) for kind in "qv"]
    return [
        Update(f"runs/{i}-task", "base", {name: drawn(rank + i % 2, 100 * i + j) for j, name in enumerate(names)})
        for i in range(count)
    ]


def record(*matrices: list[list[float]], levels=(0.0,)) -> dict:
    updates = [Update(name, "base", {"layer": whole(rows)}) for name, rows in zip("abcd", matrices, strict=False)]
    return as_record(updates, compare_updates(updates, levels), levels)


# ---------------------------------------------------------------- worked numbers


def test_two_by_two():
    found = record([[1, 0], [0, 2]], [[1, 1], [0, 0]])
    [pair], [one, two] = found["pairs"], found["adapters"]
    assert (pair["collision_rate"], pair["by_chance"]) == ([0.25], [0.25])
    assert one["densities"] == two["densities"] == [0.5]
    assert pair["inner_product"] == pytest.approx(1)
    assert pair["cosine"] == pytest.approx(1 / math.sqrt(5 * 2))
    assert pair["output_side"]["square"] == pytest.approx(2)
    assert pair["output_side"]["norm"] == pytest.approx(1.41421, abs=1e-5)
    # dW1 dW2^T = [[1, 0], [2, 0]]
    assert pair["input_side"]["norm"] == pytest.approx(2.23607, abs=1e-5)
    assert pair["input_side"]["relative"] == pytest.approx(math.sqrt(5) / math.sqrt(5 * 2))
    assert [one["l1"], one["norm"], one["nuclear_norm"]] == pytest.approx([3, 2.23607, 3], abs=1e-5)
    assert [two["l1"], two["norm"], two["nuclear_norm"]] == pytest.approx([2, 1.41421, 1.41421], abs=1e-5)
    assert [one["generalised_sparsity"], two["generalised_sparsity"]] == pytest.approx([0.67082, 0.70711], abs=1e-5)
    assert two["effective_rank"] == pytest.approx(1)
    # columns of dW2 span (1, 0), a part of dW1's; its rows span (1, 1) / √2
    assert pair["column_spaces"]["shared"] == pytest.approx(1)
    assert pair["column_spaces"]["by_chance"] == pytest.approx(1)
    [layer] = found["layers"]
    assert layer["pairs"][0]["row_spaces"]["angles"] == pytest.approx([0], abs=1e-5)


def test_the_average_collision_rate_is_that_of_all_pairs():
    a, b, c = [[1, 0], [0, 1]], [[1, 1], [0, 0]], [[0, 1], [0, 1]]
    found = record(a, b, c)
    assert [pair["collision_rate"][0] for pair in found["pairs"]] == [0.25, 0.25, 0.25]
    found = record([[1, 0], [0, 0]], [[1, 1], [1, 0]], [[0, 1], [1, 0]])
    assert [pair["collision_rate"][0] for pair in found["pairs"]] == [0.25, 0, 0.5]
    assert found["average_collision_rate"] == [0.25]


def test_no_collision_makes_the_inner_product_zero_but_not_the_products():
    [pair] = record([[1, 0], [0, 0]], [[0, 1], [0, 0]])["pairs"]
    assert (pair["collision_rate"], pair["inner_product"]) == ([0], 0)
    assert pair["output_side"]["norm"] == 1, "both write to the first output"
    assert pair["input_side"]["norm"] == 0, "they read different inputs"


def test_the_factors_products_are_those_of_olora():
    """A1 A4^T = [[2, 0], [0, -3]]: 5 in absolute values, 13 in squares."""
    first = Pair(torch.tensor([[1.0, 0, 0], [0, 1, 0]]), torch.eye(2), 1.0)
    other = Pair(torch.tensor([[2.0, 0, 0], [0, -3, 1]]), torch.eye(2), 4.0)
    updates = [Update("a", "base", {"layer": first}), Update("b", "base", {"layer": other})]
    found = as_record(updates, compare_updates(updates, LEVELS), LEVELS)
    told = found["pairs"][0]["factors"]
    assert told == pytest.approx({"A_abs": 5, "A_squares": 13, "B_abs": 2, "B_squares": 2})
    assert found["with_earlier"] == [{"adapter": 1, "A_squares": 13, "output_side_squares": pytest.approx(224)}]


def test_orthogonal_inputs_with_shared_outputs():
    """A_i A_j^T = 0 leaves nothing on the input side, and says nothing of the output side."""
    B = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    one, other = Pair(torch.eye(6)[:2], B, 1.0), Pair(torch.eye(6)[2:4], B, 1.0)
    meeting = compare_layer("x", {0: one, 1: other}, LEVELS).meetings[0, 1]
    assert meeting.input_side == pytest.approx(0, abs=1e-12) and meeting.output_side > 1
    columns, rows = meeting.angles
    assert columns == pytest.approx([0, 0], abs=1e-5) and rows == pytest.approx([90, 90])


# ---------------------------------------------------------------- identities


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), seeds, st.sampled_from([0.0, 0.6]), st.integers(3, 40))
def test_streamed_counts_are_those_of_whole_products(ranks, seed, zeros, inside):
    pairs = [drawn(rank, seed + i, inside=inside, zeros=zeros) for i, rank in enumerate(ranks)]
    whole = torch.stack([(pair.scale * pair.B @ pair.A).abs() for pair in pairs])
    thresholds = np.array([[0.0] * len(pairs), *np.random.default_rng(seed).uniform(0, 2, (2, len(pairs)))])
    close = (whole.double()[None] - torch.from_numpy(thresholds)[:, :, None, None]).abs()[1:] < 1e-5
    assume(not close.any())
    found = count_collisions(pairs, thresholds)
    for t, limits in enumerate(thresholds):
        above = whole > torch.tensor(limits, dtype=torch.float32)[:, None, None]
        if t == 0 and not zeros:
            assert above.all()
        expected = torch.einsum("iab,jab->ij", above.double(), above.double())
        np.testing.assert_array_equal(found.collisions[t], expected.numpy())
    np.testing.assert_allclose(found.l1, whole.sum(dim=(1, 2)).numpy(), rtol=1e-5)


def test_blocks_of_any_size_count_alike(monkeypatch):
    pairs = [drawn(3, seed, inside=70, out=9) for seed in range(3)]
    thresholds = np.full((2, 3), 0.7) * [[0], [1]]
    expected = count_collisions(pairs, thresholds)
    for entries in (1, 3 * 70 * 2, 3 * 70 * 4):
        monkeypatch.setattr(collisions, "BLOCK_ENTRIES", entries)
        found = count_collisions(pairs, thresholds)
        np.testing.assert_array_equal(found.collisions, expected.collisions)
        np.testing.assert_allclose(found.l1, expected.l1, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), seeds, st.sampled_from([0.0, 0.5]))
def test_factor_forms_are_product_forms(r, s, seed, zeros):
    pairs = {0: drawn(r, seed, zeros=zeros), 1: drawn(s, seed + 1, zeros=zeros)}
    left, right = (product(pair) for pair in pairs.values())
    found = compare_layer("x", pairs, LEVELS)
    meeting = found.meetings[0, 1]
    near = {"rel": 1e-5, "abs": 1e-9}
    assert meeting.inner == pytest.approx(float((left * right).sum()), rel=1e-5, abs=1e-6)
    assert meeting.output_side == pytest.approx(float((left.T @ right).square().sum()), **near)
    assert meeting.input_side == pytest.approx(float((left @ right.T).square().sum()), **near)
    for i, dW in enumerate((left, right)):
        assert found.sizes[i].norm == pytest.approx(float(dW.norm()), **near)
        assert found.sizes[i].nuclear_norm == pytest.approx(float(torch.linalg.svdvals(dW).sum()), **near)
        assert found.sizes[i].l1 == pytest.approx(float(dW.abs().sum()), **near)
        assert found.sizes[i].rank == int(torch.linalg.matrix_rank(dW))
    U, V = (torch.linalg.svd(dW) for dW in (left, right))
    k, j = found.sizes[0].rank, found.sizes[1].rank
    for at, (own, others) in enumerate(((U.U[:, :k], V.U[:, :j]), (U.Vh[:k].T, V.Vh[:j].T))):
        assert float(meeting.shared[at]) == pytest.approx(float((own.T @ others).square().sum()), abs=1e-8)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), seeds)
def test_symmetry_and_itself(r, s, seed):
    one, other = drawn(r, seed, zeros=0.4), drawn(s, seed + 1, zeros=0.4)
    there = compare_layer("x", {0: one, 1: other, 2: one}, LEVELS)
    back = compare_layer("x", {0: other, 1: one}, LEVELS)
    np.testing.assert_array_equal(there.meetings[0, 1].collisions, back.meetings[0, 1].collisions)
    np.testing.assert_allclose(there.meetings[0, 1].shared, back.meetings[0, 1].shared, atol=1e-9)
    assert there.meetings[0, 1].inner == pytest.approx(back.meetings[0, 1].inner, abs=1e-9)
    assert there.meetings[0, 1].output_side == pytest.approx(back.meetings[0, 1].output_side, abs=1e-9)
    itself = there.meetings[0, 2]
    np.testing.assert_array_equal(itself.collisions, there.sizes[0].above)
    assert itself.inner == pytest.approx(there.sizes[0].norm ** 2)
    entries, size = there.entries, there.sizes[0]
    if size.norm:
        assert 1 / math.sqrt(entries) - 1e-6 <= size.sparsity <= 1 + 1e-6
        assert itself.shared[0] == pytest.approx(size.rank) == itself.shared[1]


@settings(max_examples=30, deadline=None)
@given(seeds, st.lists(st.booleans(), min_size=20, max_size=20))
def test_disjoint_places_do_not_collide_and_have_no_inner_product(seed, places):
    draw = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(seed))
    mine = torch.tensor(places).view(4, 5)
    pairs = {0: whole((draw[0] * mine).tolist()), 1: whole((draw[1] * ~mine).tolist())}
    meeting = compare_layer("x", pairs, LEVELS).meetings[0, 1]
    assert not meeting.collisions.any()
    assert meeting.inner == pytest.approx(0, abs=1e-12)


def test_independent_places_collide_as_often_as_chance_says():
    draw = torch.Generator().manual_seed(0)
    one, other = ((torch.rand(200, 300, generator=draw) < share).float() for share in (0.3, 0.2))
    meeting = compare_layer("x", {0: whole(one.tolist()), 1: whole(other.tolist())}, (0.0,)).meetings[0, 1]
    assert meeting.by_chance[0] / 60_000 == pytest.approx(0.06, abs=0.005)
    assert meeting.collisions[0] == pytest.approx(meeting.by_chance[0], rel=0.05)


def test_random_directions_share_what_chance_says():
    meetings = [
        compare_layer("x", {0: drawn(2, i, 30, 20), 1: drawn(4, i + 500, 30, 20)}, (1.0,)).meetings[0, 1]
        for i in range(60)
    ]
    shared = [one.shared for one in meetings]
    for square, turned in (("output_side", 1), ("input_side", 2)):
        assert np.mean([getattr(one, square) / one.sizes[turned] for one in meetings]) == pytest.approx(1, rel=0.2)
    columns, rows, random_columns, random_rows, fewest = np.mean(shared, axis=0)
    assert [random_columns, random_rows, fewest] == pytest.approx([8 / 20, 8 / 30, 2])
    assert columns == pytest.approx(random_columns, rel=0.2) and rows == pytest.approx(random_rows, rel=0.2)


def test_totals_are_those_of_all_layers_as_one():
    """An adapter that leaves a layer alone has an update of zero there."""
    updates = adapters()
    del updates[1].layers["model.layers.0.self_attn.q_proj"]
    layers = compare_updates(updates, LEVELS)
    found = as_record(updates, layers, LEVELS)
    flat = []
    for update in updates:
        parts = [
            product(update.layers[one.layer]) if one.layer in update.layers else torch.zeros(one.shape)
            for one in layers
        ]
        flat.append(torch.cat([part.flatten() for part in parts]))
    for pair, (i, j) in zip(found["pairs"], combinations(range(3), 2), strict=True):
        assert pair["pair"] == [i, j] and pair["layers"] == 4 - (1 in (i, j))
        assert pair["cosine"] == pytest.approx(float(torch.cosine_similarity(flat[i], flat[j], dim=0)), abs=1e-6)
        both = (flat[i] != 0) & (flat[j] != 0)
        assert pair["collision_rate"][0] == pytest.approx(float(both.double().mean()))
        assert 0 <= pair["output_side"]["relative"] <= 1
    for one, dW in zip(found["adapters"], flat, strict=True):
        assert one["norm"] == pytest.approx(float(dW.norm()), rel=1e-5)
        assert one["generalised_sparsity"] == pytest.approx(float(dW.abs().sum() / (dW.numel() ** 0.5 * dW.norm())))
        assert one["densities"][0] == pytest.approx(float((dW != 0).double().mean()))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_an_update_of_zero_has_no_angle():
    updates = [
        Update("a", "base", {"x": drawn(2, 0)}),
        Update("b", "base", {"x": Pair(torch.ones(2, 7), torch.zeros(5, 2), 1.0)}),
    ]
    found = made(updates=updates)
    [pair] = found["pairs"]
    assert pair["collision_rate"] == [0, 0, 0] and found["adapters"][1]["densities"] == [0, 0, 0]
    assert pair["cosine"] is None and pair["output_side"]["relative"] is None and pair["row_spaces"]["shared"] is None
    assert found["adapters"][1]["generalised_sparsity"] is None
    assert "None" not in Page(render_overlap(found)).text + overlap_markdown(found)


# ---------------------------------------------------------------- what a task added


def test_an_increment_is_the_pair_that_was_appended_or_the_difference():
    old, added = drawn(2, 0), drawn(3, 1)._replace(scale=drawn(2, 0).scale)
    joined = Pair(torch.cat([old.A, added.A]), torch.cat([old.B, added.B], dim=1), old.scale)
    found = increment(Update("1", "b", {"x": old}), Update("2", "b", {"x": joined})).layers["x"]
    assert torch.equal(found.A, added.A) and torch.equal(found.B, added.B), "to the bit: zeros stay zeros"
    other = drawn(2, 3)
    found = increment(Update("1", "b", {"x": old}), Update("2", "b", {"x": other, "y": added})).layers
    torch.testing.assert_close(product(found["x"]), product(other) - product(old), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product(found["y"]), product(added))
    same = increment(Update("1", "b", {"x": old}), Update("2", "b", {"x": old})).layers["x"]
    assert not product(same).any()


# ---------------------------------------------------------------- folders, files, command


@pytest.fixture
def folders(tmp_path) -> list[str]:
    for i, update in enumerate(adapters()):
        write_update(update.layers, tmp_path / "in" / f"task-{i}", "some/base")
    return [str(tmp_path / "in" / f"task-{i}") for i in range(3)]


def test_the_command_writes_what_the_function_gives(folders, tmp_path, capsys):
    assert main(["overlap", *folders, "--output-dir", str(tmp_path / "out"), "--thresholds", "0", "1", "2"]) == 0
    told = capsys.readouterr().out
    assert "task-0 and task-1" in told and "rms" in told
    found = json.loads((tmp_path / "out" / "overlap.json").read_text())
    assert found == json.loads(json.dumps(overlap(folders, (0, 1, 2))))
    assert found["thresholds"] == [0, 1, 2] and found["base"] == "some/base"
    assert [layer["layer"].split(".", 2)[2] for layer in found["layers"]] == [
        "0.self_attn.q_proj", "1.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.v_proj",
    ]  # fmt: skip
    assert len((tmp_path / "out" / "overlap.md").read_text()) < 10_000


def test_a_run_stands_for_its_finished_tasks_and_increments_for_what_each_added(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    names = ["letters", "tickets", "notes"]
    run.write(run.config, run_record("some/base", names))
    first, second = (update.layers for update in adapters(2))
    for number, update in enumerate([first, weighted([first, second], [1, 1])], 1):
        with run.publish(run.task(number, names[number - 1])) as folder:
            write_update(update, folder / "adapter", "some/base")
    joined, added = overlap([str(run.root)]), overlap([str(run.root)], increments=True)
    assert [one["name"].rsplit("/", 1)[1] for one in joined["adapters"]] == ["01-letters", "02-tickets"]
    assert "1 of 3 tasks are not finished" in joined["notes"][0] and "--increments" in joined["notes"][1]
    assert len(added["notes"]) == 1
    assert [one["rank"] for one in joined["adapters"]] == [8, 20]
    assert [one["rank"] for one in added["adapters"]] == [8, 12]
    expected = as_record(adapters(2), compare_updates(adapters(2), THRESHOLDS), THRESHOLDS)
    assert added["pairs"][0]["cosine"] == pytest.approx(expected["pairs"][0]["cosine"], abs=1e-6)
    assert joined["pairs"][0]["cosine"] > 0.4 > abs(added["pairs"][0]["cosine"])


def test_a_base_that_is_not_here_need_not_be(folders, tmp_path):
    write_update(adapters()[0].layers, tmp_path / "twin", "some/base-bnb-4bit")
    models = [folders[1], str(tmp_path / "twin")]
    with pytest.raises(UsageError, match="--base-is some/base"):
        overlap(models)
    assert "as declared, not verified" in overlap(models, base_is="some/base")["notes"][0]
    assert overlap([f"some/base+{models[1]}", folders[1]])["base"] == "some/base"


@pytest.mark.parametrize(
    "change, told",
    [
        (
            lambda folder: write_update({"mlp.up_proj": drawn(2, 0)}, folder, "some/base"),
            "no two adapters change a layer",
        ),
        (
            lambda folder: write_update({"model.layers.0.self_attn.q_proj": drawn(2, 0, 9)}, folder, ""),
            "adapters of one",
        ),
        (lambda folder: _configured(folder, peft_type="LOHA"), "save_as_lora"),
        (lambda folder: _configured(folder, use_dora=True), "DoRA scales whole weights"),
        (lambda folder: _configured(folder, init_lora_weights="pissa"), "took weight out of the base"),
    ],
)
def test_what_cannot_be_compared_is_named(change, told, folders, tmp_path):
    change(tmp_path / "other")
    with pytest.raises(UsageError, match=told):
        overlap([folders[0], str(tmp_path / "other")])


def _configured(folder: Path, **told) -> None:
    write_update(adapters()[0].layers, folder, "some/base")
    file = folder / "adapter_config.json"
    config = {
        key: value
        for key, value in json.loads(file.read_text()).items()
        if told.get("peft_type", "LORA") == "LORA" or key in ("base_model_name_or_path", "task_type")
    }
    file.write_text(json.dumps(config | told))


def test_too_few_or_the_same(folders, tiny):
    with pytest.raises(UsageError, match="two adapters or more"):
        overlap(folders[:1])
    with pytest.raises(UsageError, match="given twice"):
        overlap([folders[0], folders[0] + "/"])
    with pytest.raises(UsageError, match="full weights, no adapter"):
        overlap([folders[0], tiny])
    with pytest.raises(UsageError, match="multiples of the rms entry"):
        overlap(folders, [-1])


# ---------------------------------------------------------------- words and page


def made(count: int = 3, layers: int = 2, updates: list[Update] | None = None) -> dict:
    updates = updates or adapters(count, layers)
    return {"base": "some/base", "increments": False, "notes": ["a note"]} | as_record(
        updates, compare_updates(updates, LEVELS), LEVELS
    )


@pytest.mark.parametrize("weight, said", [(1.0, "point most the same way"), (-1.0, "are most opposed"), (0.0, "")])
def test_what_stands_out_is_said_with_chance_beside_it(weight, said):
    first, *others, last = adapters()
    last = replace(last, layers=weighted([first.layers, last.layers], [weight, 1.0]))
    found = made(updates=[first, *others, last])
    told = " ".join(sentences(found))
    at, rates, chance = found["thresholds"].index(1), found["average_collision_rate"], found["average_by_chance"]
    assert f"both change {100 * rates[at]:.3g} % of all entries by more than the rms entry" in told
    assert f"unrelated ones would change {100 * chance[at]:.3g} %" in told
    related = found["pairs"][1]
    assert related["pair"] == [0, 2] and related["cosine"] * weight >= 0
    expected = (
        f"0-task and 2-task {said}: cosine {related['cosine']:.3g}." if weight else "No two updates point the same"
    )
    assert expected in told
    for text in (Page(render_overlap(found)).text.replace("\u00a0", " "), overlap_markdown(found)):
        assert "What was forgotten they do not say" in text
        assert all(line in text.replace("\\", "") for line in sentences(found))


@pytest.mark.parametrize("count, layers", [(2, 1), (3, 2), (7, 3)])
def test_the_page_is_whole_and_explains_its_words(count, layers):
    found = made(count, layers)
    text = render_overlap(found)
    page = Page(text)
    self_contained(page, text)
    cells = [attributes for tag, attributes in page.tags if tag == "rect"]
    assert len(cells) == 7 * 2 * layers * math.comb(count, 2)
    unused = {anchor for anchor in OVERLAP_GLOSSARY if f'href="#g-{anchor}"' not in text}
    assert not unused
    lines = (ROOT / "docs" / "glossary.md").read_text().splitlines()
    rows = [line.split("|")[1].strip().lower() for line in lines if line.startswith("| ")]
    terms = {term.strip() for row in rows for term in [row, *row.split(",")]}
    assert not [term for term, _ in OVERLAP_GLOSSARY.values() if term.lower() not in terms]


def test_a_map_of_many_layers_has_fewer_pairs(monkeypatch):
    monkeypatch.setattr("forgetless.report.overlap_page.MAP_CELLS", 8)
    found = made(3)
    assert "These are the 2 pairs with the largest cosines; 1 more" in " ".join(
        Page(render_overlap(found)).text.split()
    )


def test_hostile_names_are_text(folders, tmp_path):
    found = made()
    found["adapters"][0]["name"] = "<script>alert(1)</script>"
    assert "<script>" not in render_overlap(found)


def test_the_page_opens_in_a_browser(tmp_path):
    write_overlap(made(4), tmp_path)
    page = opened_in_browser(tmp_path / "overlap.html", tmp_path)
    assert [tag for tag, _ in page.tags].count("svg") == 7
