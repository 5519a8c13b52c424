"""Between two models: points, bands, barriers, the curve and the plane; the command as a whole on the tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, SIZES
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import Page, opened_in_browser, self_contained
from safetensors.torch import load_file
from test_path import adapter, subject, whole
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetless.cli import main
from forgetless.config import InterpolateConfig
from forgetless.data.batches import Encoder
from forgetless.errors import RunError, UsageError
from forgetless.geometry import interpolate as run
from forgetless.geometry.connectivity import SHOWN, SHOWN_NOT, TaskRows, barrier, concave, linear_cka, peak
from forgetless.geometry.curve import CurveSettings, as_factors, straight_middle, trained_middle
from forgetless.geometry.points import (
    FACTORS,
    PRODUCT,
    Plane,
    check_factors,
    distances,
    in_factors,
    in_product,
    line,
    on_curve,
    on_line,
    weight_distances,
)
from forgetless.learning.engine import Engine
from forgetless.learning.step import TrainSettings, plan
from forgetless.model.adapters import Pair
from forgetless.report.glossary import INTERPOLATE_GLOSSARY
from forgetless.report.interpolation import sentences
from forgetless.score.intervals import band
from forgetless.seeds import generator
from forgetless.subjects import models
from forgetless.subjects.updates import read_update, write_update

LAYERS = ("q", "v")


def corner(seed: int, rank: int = 2, scale: float = 1.0, layers: tuple[str, ...] = LAYERS) -> dict[str, Pair]:
    draw = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return {layer: Pair(drawn(rank, 5), drawn(3, rank), scale) for layer in layers}


def product(pair: Pair) -> torch.Tensor:
    return pair.scale * pair.B @ pair.A


# ---------------------------------------------------------------- points


@settings(max_examples=25, deadline=None)
@given(t=st.floats(0, 1), seed=st.integers(0, 1000), scale=st.floats(0.1, 4))
def test_points_in_factors_have_mixed_terms_and_points_in_the_product_have_none(t, seed, scale):
    a, b = corner(seed, scale=scale), corner(seed + 1, scale=scale)
    for layer in LAYERS:
        (A0, B0, _), (A1, B1, _) = a[layer], b[layer]
        mixed = (1 - t) ** 2 * B0 @ A0 + t * (1 - t) * (B0 @ A1 + B1 @ A0) + t**2 * B1 @ A1
        torch.testing.assert_close(product(in_factors([a, b], on_line(t))[layer]), scale * mixed)
        straight = (1 - t) * product(a[layer]) + t * product(b[layer])
        torch.testing.assert_close(product(in_product([a, b], on_line(t))[layer]), straight)


def test_points_in_the_product_of_other_ranks_scales_and_layers():
    a, b = corner(0, rank=2, scale=3.0), corner(1, rank=4, scale=0.5, layers=("q", "up"))
    found = in_product([a, b], (0.0, 1.0))
    assert {layer: pair.A.shape[0] for layer, pair in found.items()} == {"q": 6, "v": 2, "up": 4}, "ranks stay"
    torch.testing.assert_close(product(found["q"]), product(b["q"]))
    assert not product(found["v"]).any()


@pytest.mark.parametrize("within", [PRODUCT, FACTORS])
def test_an_untrained_curve_is_the_straight_line(within):
    a, b = corner(0, scale=2.0), corner(1, scale=2.0)
    combined = {PRODUCT: in_product, FACTORS: in_factors}[within]
    middle = straight_middle(a, b, within)
    for t in (0.0, 0.3, 0.5, 1.0):
        curve, straight = combined([a, middle, b], on_curve(t)), combined([a, b], on_line(t))
        for layer in LAYERS:
            torch.testing.assert_close(product(curve[layer]), product(straight[layer]))
    again = as_factors(Pair(a["q"].A, 2.0 * a["q"].B, 1.0), 2.0)
    torch.testing.assert_close(again.B, a["q"].B)


def test_what_cannot_be_added_up_in_factors_is_refused():
    one = corner(0)
    check_factors({"one": one, "two": corner(1)})
    for other, message in [
        (corner(1, rank=3), "q: A, B and scale are"),
        (corner(1, scale=2.0), "only equal"),
        (corner(1, layers=("q",)), "v is changed by one of one and two only"),
        ({}, "is changed by one of"),
    ]:
        with pytest.raises(UsageError, match=message):
            check_factors({"one": one, "two": other})


def test_distances_are_those_of_whole_products_and_of_all_entries():
    a, b = corner(0, scale=2.0), corner(1, scale=2.0)
    apart = math.sqrt(sum(float(((product(b[x]) - product(a[x])) ** 2).sum()) for x in LAYERS))
    size = math.sqrt(sum(float((product(a[x]) ** 2).sum()) for x in LAYERS))
    found = distances([a, b], PRODUCT).as_json()
    assert found == pytest.approx({"absolute": apart, "relative": apart / size})
    one, other = (torch.cat([tensor.flatten() for x in LAYERS for tensor in c[x][:2]]) for c in (a, b))
    apart, size = float((one - other).norm()), float(one.norm())
    assert distances([a, b], FACTORS).as_json() == pytest.approx({"absolute": apart, "relative": apart / size})
    size = distances([a, {}], PRODUCT).norm
    assert distances([{}, a], PRODUCT).as_json() == {"absolute": pytest.approx(size), "relative": None}


@given(seed=st.integers(0, 1000), x=st.floats(-2, 2), y=st.floats(-2, 2))
@settings(max_examples=25, deadline=None)
def test_the_plane_goes_through_the_three_and_keeps_distances(seed, x, y):
    thetas = np.random.default_rng(seed).normal(size=(3, 4))
    moves = thetas[1:] - thetas[0]
    plane = Plane.through(moves @ moves.T)
    for theta, place in zip(thetas, plane.corners, strict=True):
        np.testing.assert_allclose(np.array(plane.weights(*place)) @ thetas, theta, atol=1e-6)
    point = np.array(plane.weights(x, y)) @ thetas
    np.testing.assert_allclose(np.linalg.norm(point - thetas[0]), math.hypot(x, y), rtol=1e-6, atol=1e-9)
    xs, ys = plane.grid(5)
    assert all(xs[0] < a < xs[-1] and ys[0] < b < ys[-1] for a, b in plane.corners)


def test_three_models_on_one_line_have_no_plane():
    with pytest.raises(UsageError, match="one line"):
        Plane.through(np.array([[1.0, 2.0], [2.0, 4.0]]))
    with pytest.raises(UsageError, match="one line"):
        Plane.through(np.zeros((2, 2)))


@pytest.mark.parametrize("within", [PRODUCT, FACTORS])
def test_a_step_of_the_curve_follows_the_gradient_of_the_dense_model(within, tiny, tmp_path, sizes):
    """AdamW's first step is -rate times the gradient's sign; the twin adds whole products to whole weights."""
    a, b = (
        read_update(subject(adapter(tiny, tmp_path / name, 2, seed)).adapter).layers for seed, name in enumerate("ab")
    )
    start, combined = straight_middle(a, b, within), {PRODUCT: in_product, FACTORS: in_factors}[within]
    write_update(combined([a, start, b], on_curve(0.0)), tmp_path / "points", tiny)
    engine = Engine("cpu", "fp32")
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny), 128)
    examples = [encoder(row) for row in sizes.train]
    curve = CurveSettings(1, learning_rate=1e-3, max_grad_norm=1e9)
    losses: list[float] = []
    for _, model in models.opened([subject(str(tmp_path / "points"))], torch.float32):
        found = trained_middle(
            model, a, b, within, examples, curve, engine, encoder.tokenizer.pad_token_id, losses.append
        )

    middle = {layer: Pair(*(x.clone().requires_grad_() for x in pair[:2]), pair.scale) for layer, pair in start.items()}
    weights = on_curve(float(torch.rand((), generator=generator("curve", curve.seed))))
    changes = {layer: product(pair) for layer, pair in combined([a, middle, b], weights).items()}
    dense = AutoModelForCausalLM.from_pretrained(tiny)
    changed = {f"{layer}.weight": dense.get_submodule(layer).weight.detach() + x for layer, x in changes.items()}
    batch = next(plan(examples, TrainSettings(batch_size=8, group_by_length=False), "curve", curve.seed))
    nats, tokens = torch.zeros(()), 0
    for one in batch:
        ids = torch.tensor([one.ids])
        logits = torch.func.functional_call(dense, changed, kwargs={"input_ids": ids}).logits[0, :-1]
        answer = torch.tensor(one.answer[1:])
        nats = nats + torch.nn.functional.cross_entropy(logits[answer], ids[0, 1:][answer], reduction="sum")
        tokens += int(answer.sum())
    (nats / tokens).backward()
    assert losses == [pytest.approx(float(nats.detach()) / tokens, rel=1e-5)]
    for layer, pair in middle.items():
        for begun, moved in zip(pair[:2], found[layer][:2], strict=True):
            large = begun.grad.abs() > 1e-5
            assert large.any()
            torch.testing.assert_close((moved - begun)[large], -1e-3 * begun.grad.sign()[large], rtol=0.02, atol=1e-6)


# ---------------------------------------------------------------- what the rows say


def rows(scores: np.ndarray, nats: np.ndarray | None = None, tokens: int = 2) -> TaskRows:
    return TaskRows(np.ones_like(scores) if nats is None else nats, np.full(len(scores), float(tokens)), scores)


def test_a_barrier_by_hand():
    """Two tokens a row: losses 1, 4, 2 nats a token; the line between the ends is 1.5 in the middle."""
    nats = np.tile([2.0, 8.0, 4.0], (12, 1)) + np.linspace(-0.1, 0.1, 12)[:, None] * [0, 1, 0]
    told = barrier([rows(np.zeros((12, 3)), nats)], [0.0, 0.5, 1.0], 0.95)
    assert (told["height"], told["at"], told["found"]) == (pytest.approx(2.5), 0.5, SHOWN)
    assert told["heights"] == pytest.approx([0.0, 2.5, 0.0]) and 2.4 < told["low"] < 2.5 < told["high"] < 2.6
    valley = barrier([rows(np.zeros((12, 3)), 10 - nats)], [0.0, 0.5, 1.0], 0.95)
    assert valley["height"] == pytest.approx(-2.5) and valley["found"] == SHOWN_NOT


def test_a_peak_needs_to_be_above_both_ends():
    draw = np.random.default_rng(0)
    better = (draw.random((400, 5)) < [0.3, 0.5, 0.8, 0.6, 0.5]).astype(float)
    told = peak([rows(better)], line(5), 0.95)
    assert told["at"] == 0.5 and told["found"] == SHOWN and told["low"] < 0.3 < told["high"]
    rising = (draw.random((400, 5)) < [0.1, 0.2, 0.3, 0.4, 0.9]).astype(float)
    assert peak([rows(rising)], line(5), 0.95)["found"] == SHOWN_NOT
    equal = peak([rows(np.ones((50, 5)))], line(5), 0.95)
    assert equal["gain"] == 0 and equal["low"] < 0 < equal["high"], "rows that are all equal still bound something"
    few = peak([rows(better[:9])], line(5), 0.95)
    assert few["low"] is None and few["found"] == "not shown"


def test_a_score_that_bends_downwards_everywhere():
    draw = np.random.default_rng(0)
    hill = (draw.random((3000, 5)) < [0.1, 0.5, 0.7, 0.5, 0.1]).astype(float)
    assert concave([rows(hill)], 0.95) == SHOWN
    assert concave([rows(hill[:20])], 0.95) == "not shown"
    valley = (draw.random((3000, 5)) < [0.7, 0.3, 0.7, 0.75, 0.7]).astype(float)
    assert concave([rows(valley)], 0.95) == SHOWN_NOT


def test_each_task_counts_the_same():
    one, two = np.tile([0.0, 1.0, 0.0], (10, 1)), np.tile([0.0, 0.5, 0.0], (90, 1))
    assert peak([rows(one), rows(two)], [0.0, 0.5, 1.0], 0.95)["gain"] == pytest.approx(0.75)


def test_a_band_holds_all_quantities_together():
    """Of 100 samples of 60 rows with 8 correlated means, all true means lie inside in about 95 %."""
    draw, held = np.random.default_rng(3), 0
    for _ in range(100):
        sums = draw.normal(size=(60, 8)) + draw.normal(size=(60, 1))
        found = band([(sums, np.ones(60))], 0.95)
        held += bool(((found.low <= 0) & (found.high >= 0)).all())
    assert 88 <= held <= 99


def test_cka_by_definition_and_what_it_does_not_see():
    draw = torch.Generator().manual_seed(0)
    X, Y = torch.randn(30, 6, generator=draw), torch.randn(30, 4, generator=draw)
    A, B = X.double() - X.double().mean(0), Y.double() - Y.double().mean(0)
    wanted = float((B.T @ A).norm() ** 2 / ((A.T @ A).norm() * (B.T @ B).norm()))
    assert linear_cka(X, Y) == pytest.approx(wanted)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=draw))[0]
    assert linear_cka(X, 3 * X @ Q + 1) == pytest.approx(1.0, abs=1e-5)
    wide = torch.randn(5, 30, generator=draw)
    C = wide.double() - wide.double().mean(0)
    D = X[:5].double() - X[:5].double().mean(0)
    wanted = float((C.T @ D).norm() ** 2 / ((D.T @ D).norm() * (C.T @ C).norm()))
    assert linear_cka(X[:5], wide) == pytest.approx(wanted), "fewer rows than columns"
    assert linear_cka(X, torch.ones(30, 2)) is None


# ---------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> str:
    """Two tasks of 12 test rows."""
    folder = tmp_path_factory.mktemp("tasks")
    told = []
    for name, table in (("colours", COLOURS), ("sizes", SIZES)):
        found = [
            {"prompt": f"What has the {very}{key}? Answer:", "completion": f" {value}"}
            for very in ("", "very ") for key, value in table.items()
        ]  # fmt: skip
        for split in ("train", "test"):
            (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        told.append({
            "name": name, "train": f"{name}-train.jsonl", "test": f"{name}-test.jsonl", "validation": 1,
            "options": sorted(set(table.values())),
        })  # fmt: skip
    (folder / "tasks.yaml").write_text(json.dumps({"name": "words", "tasks": told}))
    return str(folder / "tasks.yaml")


@pytest.fixture(scope="module")
def three(tiny, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("three")
    return [adapter(tiny, folder / name, 2, seed) for seed, name in enumerate("abc")]


@pytest.fixture(scope="module")
def told(three, tasks, tmp_path_factory) -> dict:
    return run.interpolate(
        InterpolateConfig(
            three[0], three[1], tasks, "sizes", "both", points=3, curve=12, learning_rate=0.02, plane=three[2], grid=2,
            output_dir=str(tmp_path_factory.mktemp("out") / "found"), precision="fp32", device="cpu",
        )
    )  # fmt: skip


def path_of(told: dict, kind: str, within: str) -> dict:
    [found] = [one for one in told["paths"] if (one["kind"], one["within"]) == (kind, within)]
    return found


def test_the_ends_are_the_models_themselves_and_the_paths_differ(told, three):
    ends = []
    for spec in three[:2]:
        session = run.prepare(
            InterpolateConfig(spec, three[2], told["settings"]["tasks"], precision="fp32", device="cpu")
        )
        for _, model in run.opened([subject(spec)], torch.float32, "cpu"):
            scorer = run.Scorer(model, session.encoder, session.engine, (), 4096)
            found = {task.name: run.rows_of(session, model, scorer, task) for task in session.tasks}
            ends.append({name: sum(one["nats"]) / sum(one["tokens"]) for name, one in found.items()})
    for path in told["paths"]:
        for name, group in path["tasks"].items():
            assert group["loss"]["value"][0] == pytest.approx(ends[0][name], rel=1e-4)
            assert group["loss"]["value"][-1] == pytest.approx(ends[1][name], rel=1e-4)
    middles = [path_of(told, "line", within)["groups"]["all"]["loss"]["value"][1] for within in ("product", "factors")]
    assert abs(middles[0] - middles[1]) > 1e-3


def test_a_point_is_the_model_with_the_mixed_weights(told, three, tiny):
    """The middle in the product against the base whose weights were changed by hand."""
    updates = [read_update(subject(spec).adapter).layers for spec in three[:2]]
    session = run.prepare(
        InterpolateConfig(three[0], three[1], told["settings"]["tasks"], precision="fp32", device="cpu")
    )
    for _, model in run.opened([subject(tiny)], torch.float32, "cpu"):
        with torch.no_grad():
            for layer in updates[0]:
                change = sum(0.5 * pair.scale * pair.B @ pair.A for pair in (one[layer] for one in updates))
                model.get_submodule(layer).weight += change
        scorer = run.Scorer(model, session.encoder, session.engine, (), 4096)
        for task in session.tasks:
            found = run.rows_of(session, model, scorer, task)
            loss = path_of(told, "line", "product")["tasks"][task.name]["loss"]["value"][1]
            assert sum(found["nats"]) / sum(found["tokens"]) == pytest.approx(loss, rel=1e-4)


def test_a_trained_curve_has_a_lower_loss_than_the_line(told):
    for within in ("product", "factors"):
        curve, straight = (path_of(told, kind, within)["groups"]["all"] for kind in ("curve", "line"))
        assert curve["loss"]["value"][1] < straight["loss"]["value"][1] - 0.1
        assert curve["loss"]["value"][0] == straight["loss"]["value"][0], "the ends are the same points"


def test_the_plane_has_its_corners_and_groups(told):
    for plane in told["planes"]:
        assert np.array(plane["groups"]["all"]["loss"]).shape == (2, 2)
        assert plane["groups"].keys() == {"old", "new", "all"}
        both = [np.array(plane["groups"][name]["loss"]) for name in ("old", "new")]
        np.testing.assert_allclose(np.mean(both, axis=0), plane["groups"]["all"]["loss"])
    assert told["distances"]["product"]["absolute"] == pytest.approx(told["planes"][0]["corners"][1][0])


def test_finished_points_are_not_measured_again(told, monkeypatch):
    """The same command with more points: only the new ones, and neither ends nor curve."""
    seen, loaded = [], []
    load_base = models.load_base
    monkeypatch.setattr(models, "load_base", lambda *given, **more: loaded.append(given) or load_base(*given, **more))
    rows_of = run.rows_of
    monkeypatch.setattr(run, "rows_of", lambda *given: seen.append(given[-1].name) or rows_of(*given))
    monkeypatch.setattr(run, "trained_middle", lambda *given: pytest.fail("the curve was trained already"))
    known = {name: told["settings"][name] for name in told["settings"] if name in InterpolateConfig.__annotations__}
    again = run.interpolate(InterpolateConfig(**known | {"points": 5}, output_dir=told["path"]))
    assert len(seen) == 2 * 2 * 4, "two tasks at two new points of four paths"
    assert len(loaded) == 1, "the base is loaded once"
    before, after = (path_of(one, "line", "factors")["groups"]["all"]["loss"]["value"] for one in (told, again))
    assert after[::2] == before


def test_between_whole_weights_and_from_the_base(tiny, tasks, tmp_path, capsys):
    one, two = whole(tiny, tmp_path / "one", 0), whole(tiny, tmp_path / "two", 1)
    command = ["interpolate", one, two, "--tasks", tasks, "--points", "3", "--device", "cpu", "--precision", "fp32"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "interpolate.json").read_text())
    [path] = told["paths"]
    assert path["within"] == "weights" and set(path["groups"]) == {"all"}
    printed = capsys.readouterr().out
    assert "Straight line, in the weights" in printed and "interpolate.html" in printed
    one_, two_ = (load_file(f"{folder}/model.safetensors") for folder in (one, two))
    apart = math.sqrt(sum(float((two_[name] - one_[name]).double().pow(2).sum()) for name in one_))
    assert told["distances"]["weights"]["absolute"] == pytest.approx(apart)
    assert weight_distances([subject(one), subject(one)]).as_json()["absolute"] == 0
    assert main([*command, "--curve", "2"]) == 1, "a curve needs adapters"


def test_whole_weights_of_other_configurations_are_refused_by_their_settings(tiny, tasks, tmp_path):
    one, two = whole(tiny, tmp_path / "one", 0), whole(tiny, tmp_path / "two", 1)
    file = tmp_path / "two" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.5, "eos_token_id": 7}))
    config = InterpolateConfig(one, two, tasks=tasks, output_dir=str(tmp_path / "out"))
    with pytest.raises(UsageError, match=r"differ in rms_norm_eps \([0-9.e-]+, not 0.5\), so"):
        run.interpolate(config)


def test_a_loss_that_is_no_number_is_named(three, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "token_losses", lambda logits, targets: torch.full(targets.shape, math.nan))
    config = InterpolateConfig(
        *three[:2], tasks=tasks, output_dir=str(tmp_path), device="cpu", precision="fp32", limit=2
    )
    monkeypatch.setattr(run, "kept", lambda decided_by, compute: compute())
    with pytest.raises(RunError, match="the loss of 2 of 2 rows is no finite number"):
        run.interpolate(config)


def test_the_base_as_either_end(tiny, tasks, tmp_path):
    half = adapter(tiny, tmp_path / "half", 2, 5)
    found = run.interpolate(
        InterpolateConfig(tiny, half, tasks, points=3, output_dir=str(tmp_path / "base"), device="cpu")
    )
    turned = run.interpolate(
        InterpolateConfig(half, tiny, tasks, points=3, output_dir=str(tmp_path / "turned"), device="cpu")
    )
    losses = [one["paths"][0]["groups"]["all"]["loss"]["value"] for one in (found, turned)]
    assert losses[0] == pytest.approx(losses[1][::-1], rel=1e-3)
    assert found["distances"]["product"]["relative"] is None


def test_the_page_opens_in_a_browser(told, tmp_path):
    file = Path(told["path"]) / "interpolate.html"
    self_contained(Page(file.read_text()), file.read_text())
    page = opened_in_browser(file, tmp_path)
    assert "has its peak inside" in page.text or "higher mean score" in page.text
    markdown = (file.parent / "interpolate.md").read_text()
    assert "#### Curve, in the factors" in markdown and "0.5" in markdown


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"after": ""}, "give two models"),
        ({"tasks": None}, "give your tasks"),
        ({"points": 2}, "points must be 3"),
        ({"within": "factor"}, "did you mean 'factors'"),
        ({"new": "size"}, "did you mean 'sizes'"),
    ],
)
def test_what_is_missing_is_said(three, tasks, changed, message):
    with pytest.raises(UsageError, match=message):
        run.prepare(InterpolateConfig(**{"before": three[0], "after": three[1], "tasks": tasks} | changed))


def test_every_word_is_explained_and_used(told):
    root = Path(__file__).parents[1]
    lines = (root / "docs" / "glossary.md").read_text().splitlines()
    rows_ = [line.split("|")[1].strip().lower() for line in lines if line.startswith("| ")]
    terms = {term.strip() for row in rows_ for term in [row, *row.split(",")]}
    assert not [term for term, _ in INTERPOLATE_GLOSSARY.values() if term.lower() not in terms]
    page = (Path(told["path"]) / "interpolate.html").read_text()
    never = {anchor for anchor in INTERPOLATE_GLOSSARY if f'href="#g-{anchor}"' not in page}
    assert not never


def test_sentences_say_no_more_than_was_shown():
    """The same heights and gains, shown, not shown and excluded."""
    group = {
        "score": {"value": [0.5, 0.7, 0.6]}, "concave": SHOWN,
        "peak": {"at": 0.5, "gain": 0.1, "low": 0.02, "high": 0.2, "found": SHOWN},
        "barrier": {"at": 0.5, "height": 0.3, "low": 0.1, "high": 0.5, "found": SHOWN},
    }  # fmt: skip
    path = {"kind": "line", "within": "product", "alphas": [0.0, 0.5, 1.0], "groups": {"all": group}}
    record = {
        "confidence": 0.95,
        "paths": [path],
        "distances": {"product": {"absolute": 2.0, "relative": None}},
        "cka": {"cka": 0.5, "positions": 9, "width": 32},
    }
    first, bends, height, apart, likeness = sentences(record)
    assert first == (
        "Straight line, in the product: the mean score over all tasks has its peak inside: 70 % at λ = 0.5, 10 points "
        "above the better end’s 60 % (95 % interval 2 to 20 points)"
    )
    assert apart == "The ends: the weights of A and B are 2 apart in the product"
    assert "a barrier of loss over all tasks: the highest point lies 0.3 nats per answer token above" in height
    assert bends.endswith("is concave between the ends, at every point") and "too high" in likeness
    group["peak"] |= {"low": -0.02, "found": "not shown"}
    group["barrier"] |= {"low": None, "high": None, "found": "not shown"}
    first, _, height, *_ = sentences(record)
    assert "is not shown: 70 %" in first and "interval −2 to 20 points" in first
    assert "is not shown" in height and "fewer than 10 rows" in height
    group["peak"] |= {"gain": -0.1, "low": -0.3, "high": -0.1, "found": SHOWN_NOT}
    assert "no point between the ends has a higher mean score" in sentences(record)[0]
