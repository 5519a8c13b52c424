"""The HTML page of the overlap of adapters: heat maps pair by pair and layer by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from forgetless.report.glossary import OVERLAP_GLOSSARY
from forgetless.report.overlap_words import (
    CAUTION,
    figure,
    level,
    named_pair,
    names_of,
    pairs_first,
    ratio,
    sentences,
    share,
    times,
)  # fmt: skip
from forgetless.report.pieces import cell, heatmap, render, row
from forgetless.report.words import clean

MAP_PAIRS = 28  # that have a column: all pairs of eight adapters
MAP_CELLS = 2_000  # of a map of layers; more layers, fewer pairs
WIDTH, LEFT, TOP = 520, 96, 20  # of a map of layers, its names and its head, in pixels
LABELS = 10  # pixels that the name of a layer needs


@dataclass(frozen=True)
class Unit:
    """How values are written, and how briefly in a cell."""

    written: Callable[[float | None], str]
    brief: str
    nothing: float = 0.0  # sizes below it are 0 in a cell, not -0.00

    def short(self, value: float | None) -> str:
        return "-" if value is None else self.brief.format(0.0 if abs(value) < self.nothing else value)


SHARE, TIMES, FIGURE = Unit(share, "{:.1%}"), Unit(times, "{:.2f}"), Unit(figure, "{:.2f}", 0.005)


@dataclass(frozen=True)
class Measure:
    """One of the maps."""

    heading: str
    anchor: str
    about: str
    value: Callable[[dict, int], float | None]  # of a pair, at a threshold's place
    unit: Unit

    def written(self, value: float | None) -> str:
        return self.unit.written(value)


MEASURES = [
    Measure("Collision rate", "collision-rate", "entries that both change, of all entries",
            lambda one, at: one["collision_rate"][at], SHARE),
    Measure("Collisions over chance", "by-chance", "1×: as often as unrelated updates of these densities",
            ratio, TIMES),
    Measure("Cosine", "inner-product", "of all entries, as two vectors",
            lambda one, at: one["cosine"], FIGURE),
    Measure("Output side", "output-side", "‖ΔW_iᵀ ΔW_j‖ over both norms",
            lambda one, at: one["output_side"]["relative"], FIGURE),
    Measure("Input side", "input-side", "‖ΔW_i ΔW_jᵀ‖ over both norms",
            lambda one, at: one["input_side"]["relative"], FIGURE),
    Measure("Shared output directions", "shared-directions", "of the column spaces, whatever their sizes",
            lambda one, at: one["column_spaces"]["shared"], SHARE),
    Measure("Shared input directions", "shared-directions", "of the row spaces, whatever their sizes",
            lambda one, at: one["row_spaces"]["shared"], SHARE),
]  # fmt: skip


def render_overlap(record: dict) -> str:
    """The page as text."""
    return render("overlap_page.html.jinja", view(record))


def view(record: dict) -> dict:
    """What the template draws: texts, cells and places."""
    at, names = record["thresholds"].index(record["shown_at"]), names_of(record)
    shown = pairs_first(record, max(1, min(MAP_PAIRS, MAP_CELLS // len(record["layers"]))))
    couples = [tuple(one["pair"]) for one in shown]
    return {
        "title": f"How {len(names)} adapters overlap" if len(names) > 2 else f"How {names[0]} and {names[1]} overlap",
        "base": clean(record["base"]),
        "increments": record["increments"],
        "names": names,
        "level": level(record),
        "lines": sentences(record),
        "caution": CAUTION,
        "maps": [_pair_map(record, one, at, names) for one in MEASURES] if len(names) > 2 else [],
        "pairs": _pair_lines(record, at, names) if len(names) == 2 else [],
        "layers": [_layer_map(record, one, at, couples, names) for one in MEASURES],
        "left_out": len(record["pairs"]) - len(shown),
        "shown": len(shown),
        "sweep": _sweep(record, shown, names),
        "adapters": _adapters(record, at, names),
        "notes": [clean(note) for note in record["notes"]],
        "glossary": OVERLAP_GLOSSARY,
        "not_scored": "–",
    }


def _heat(value: float | None, top: float) -> int | None:
    return None if value is None else round(100 * abs(value) / top) if top else 0


def _cell(value: float | None, unit: Unit, top: float, title: str, small: str = "") -> dict:
    """A cell has two digits; the pointer shows three."""
    return cell(None) | {"text": unit.short(value), "heat": _heat(value, top), "between": small, "title": title}


def _top(values: Sequence[float | None]) -> float:
    return max((abs(value) for value in values if value is not None), default=0.0)


def _about(measure: Measure, top: float) -> dict:
    return {"heading": measure.heading, "anchor": measure.anchor, "about": measure.about, "top": measure.written(top)}


# ---- pair by pair ------------------------------------------------------------------------------------


def _pair_map(record: dict, measure: Measure, at: int, names: list[str]) -> dict:
    """Adapters by adapters."""
    values = {tuple(one["pair"]): measure.value(one, at) for one in record["pairs"]}
    top = _top(list(values.values()))

    def drawn(i: int, j: int) -> dict:
        if i == j:
            return cell(None) | {"title": names[i]}
        value = values[min(i, j), max(i, j)]
        return _cell(value, measure.unit, top, f"{names[i]} and {names[j]}: {measure.written(value)}")

    numbers = range(len(names))
    rows = [row(names[i], "", [drawn(i, j) for j in numbers]) for i in numbers]
    return _about(measure, top) | {"matrix": heatmap([{"name": name} for name in names], rows)}


def _pair_lines(record: dict, at: int, names: list[str]) -> list[dict]:
    """The measures of the only pair there is."""
    [one] = record["pairs"]
    return [
        {"heading": each.heading, "anchor": each.anchor, "about": each.about, "text": each.written(each.value(one, at))}
        for each in MEASURES
    ]


def _sweep(record: dict, shown: list[dict], names: list[str]) -> dict:
    """Thresholds by pairs: how often over chance, and the collision rate below it."""
    places = range(len(record["thresholds"]))
    top = _top([ratio(one, at) for one in shown for at in places])
    rows = []
    for at, threshold in enumerate(record["thresholds"]):
        cells = [
            _cell(ratio(one, at), TIMES, top, f"{named_pair(one, names)} at {threshold:g} × rms: collision rate "
                  f"{share(one['collision_rate'][at])}, by chance {share(one['by_chance'][at])}",
                  SHARE.short(one["collision_rate"][at]))
            for one in shown
        ]  # fmt: skip
        rows.append(row(f"{threshold:g} × rms", "", cells))
    return {"matrix": heatmap([{"name": _numbers(one["pair"])} for one in shown], rows), "top": times(top)}


# ---- layer by layer ----------------------------------------------------------------------------------


def _layer_map(record: dict, measure: Measure, at: int, couples: list[tuple], names: list[str]) -> dict:
    """Layers by pairs."""
    layers = record["layers"]
    found = [{tuple(one["pair"]): measure.value(one, at) for one in layer["pairs"]} for layer in layers]
    top = _top([values.get(couple) for values in found for couple in couples])
    high = 16 if len(layers) <= 40 else 9
    wide = min(90.0, (WIDTH - LEFT) / len(couples))
    every = -(-LABELS // high)
    cells = []
    for i, values in enumerate(found):
        for j, couple in enumerate(couples):
            value = values.get(couple)
            pair = named_pair({"pair": couple}, names)
            cells.append({
                "x": round(LEFT + j * wide, 1), "y": TOP + i * high, "heat": _heat(value, top),
                "title": f"{_short(layers[i]['layer'])}, {pair}: {measure.written(value)}",
            })  # fmt: skip
    return _about(measure, top) | {
        "width": round(LEFT + wide * len(couples)) + 4,
        "height": TOP + high * len(layers) + 4,
        "left": LEFT,
        "wide": round(wide - 1, 1),
        "high": high - 1,
        "columns": [
            (round(LEFT + (j + 0.5) * wide, 1), _numbers(couple), named_pair({"pair": couple}, names))
            for j, couple in enumerate(couples)
            if wide > 20 or j % 2 == 0
        ],
        "rows": [
            (TOP + i * high + high - 4 + (high < LABELS), _short(layer["layer"]), clean(layer["layer"]))
            for i, layer in enumerate(layers)
            if i % every == 0
        ],
        "cells": cells,
        "desc": f"{measure.heading} of {len(couples)} pairs in {len(layers)} layers; the largest is "
        f"{measure.written(top)}.",
    }


def _numbers(couple: Sequence[int]) -> str:
    return f"{couple[0] + 1}·{couple[1] + 1}"


def _short(layer: str) -> str:
    """'q_proj 11' of 'model.layers.11.self_attn.q_proj'.

    >>> _short("model.layers.11.self_attn.q_proj"), _short("lm_head")
    ('q_proj 11', 'lm_head')
    """
    numbers = re.findall(r"\.(\d+)(?=\.)", layer)
    return clean(" ".join([layer.rsplit(".", 1)[-1], *numbers[-1:]]))


def _adapters(record: dict, at: int, names: list[str]) -> list[dict]:
    """A line per adapter; bars are shares of the largest."""
    most = max((one["norm"] for one in record["adapters"]), default=0.0)
    return [
        {
            "name": names[i],
            "whole": clean(one["name"]),
            "layers": one["layers"],
            "norm": figure(one["norm"]),
            "norm_share": _heat(one["norm"], most),
            "nuclear_norm": figure(one["nuclear_norm"]),
            "effective_rank": figure(one["effective_rank"]),
            "sparsity": figure(one["generalised_sparsity"]),
            "density": share(one["densities"][at]),
        }
        for i, one in enumerate(record["adapters"])
    ]
