"""Loss and score between two models in plain words, in the terminal, as Markdown and as a page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from forgetless.geometry.connectivity import NOT_SHOWN, SHOWN, SHOWN_NOT
from forgetless.report import charts, words
from forgetless.report.glossary import INTERPOLATE_GLOSSARY
from forgetless.report.markdown import escaped, pipe_table
from forgetless.report.pieces import render
from forgetless.report.words import clean, number, percent, points
from forgetless.runs.folder import write_whole
from forgetless.subjects import layouts

PAGE, MARKDOWN = "interpolate.html", "interpolate.md"
KINDS = {"line": "straight line", "curve": "curve"}
SPACES = {"product": "in the product", "factors": "in the factors", "weights": "in the weights"}
CONCAVE = {
    SHOWN: "the mean score over all tasks is concave between the ends, at every point",
    NOT_SHOWN: "that the mean score over all tasks is concave between the ends is neither shown nor excluded",
    SHOWN_NOT: "the mean score over all tasks is not concave between the ends: at one point at least it bends upwards",
}
ANCHORS = {"weights": "product"}  # whole weights are explained there
GROUPS = {"old": "old tasks", "new": "new task", "all": "all tasks"}


def write_interpolation(record: dict, folder: Path) -> None:
    """interpolate.md and interpolate.html from the content of interpolate.json."""
    write_whole(folder / MARKDOWN, interpolation_markdown(record))
    write_whole(folder / PAGE, render("interpolate_page.html.jinja", view(record)))


def print_interpolation(record: dict, console: Console) -> None:
    """What is shown, in words, then a table of each path."""
    console.print(Text(title(record), style="bold"))
    for name, label in short_names(record).items():
        console.print(Text(f"  {name.upper()}: {label}"))
    for heading, lines in said(record):
        console.print(Text(f"{heading}", style="bold"))
        for line in lines:
            console.print(Text(f"  - {line}"))
    for path in record["paths"]:
        head, rows = numbers(path)
        table = Table(title=Text(f"{of_path(path)}", style="bold"), title_justify="left")
        for place, name in enumerate(head):
            table.add_column(Text(name), justify="right" if place else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print()
        console.print(table)
    for note in record["notes"]:
        console.print(Text(f"note: {clean(note)}", style="dim"))


def interpolation_markdown(record: dict) -> str:
    """Sentences, tables and notes, without the planes, which only the page draws."""
    parts = [f"## {escaped(title(record))}", ""]
    parts += [f"- {name.upper()}: {escaped(label)}" for name, label in short_names(record).items()]
    parts += [f"- {escaped(line)}" for line in sentences(record)]
    for path in record["paths"]:
        parts += ["", f"#### {of_path(path)}", "", *pipe_table(*numbers(path))]
    parts += ["", *(f"- {escaped(clean(note))}" for note in record["notes"])]
    return "\n".join(parts).rstrip() + "\n"


# ---------------------------------------------------------------- in words


def title(record: dict) -> str:
    names = short_names(record)
    return f"Between {names['a']} and {names['b']}"


def short_names(record: dict) -> dict[str, str]:
    """What tables call the models a, b and c."""
    told = {name: one["name"] for name, one in record["models"].items()}
    found = layouts.short_names(list(told.values()))
    return {name: clean(found[long]) for name, long in told.items()}


def of_path(path: dict) -> str:
    """`Straight line, in the product`."""
    kind = KINDS[path["kind"]]
    return f"{kind[0].upper()}{kind[1:]}, {SPACES[path['within']]}"


def sentences(record: dict) -> list[str]:
    """What is said, each line with what it is said of."""
    return [f"{heading}: {line}" for heading, lines in said(record) for line in lines]


def said(record: dict) -> Iterator[tuple[str, list[str]]]:
    """Peak, shape and barrier of every path; then how far apart and how alike the ends are."""
    confidence = number(100 * record["confidence"])
    for path in record["paths"]:
        group = path["groups"]["all"]
        yield of_path(path), [
            _peak(path, group, confidence), CONCAVE[group["concave"]], _barrier(group["barrier"], confidence)
        ]  # fmt: skip
    yield "The ends", [*map(_distance, *zip(*record["distances"].items(), strict=True)), _alikeness(record["cka"])]


def _distance(within: str, told: dict) -> str:
    relative = "" if told["relative"] is None else f", {told['relative']:.3g} of A’s own size"
    return f"the weights of A and B are {told['absolute']:.3g} apart {SPACES[within]}{relative}"


def _alikeness(told: dict) -> str:
    few = ", fewer than their width, which makes it too high" if told["positions"] < told["width"] else ""
    value = "cannot be computed, one side is constant" if told["cka"] is None else f"{told['cka']:.3f}"
    return f"linear CKA of their last hidden states: {value} ({told['positions']:,} answer tokens{few})"


def _peak(path: dict, group: dict, confidence: str) -> str:
    peak, scores = group["peak"], group["score"]["value"]
    better = max(scores[0], scores[-1])
    at, best = peak["at"], scores[path["alphas"].index(peak["at"])]
    side = "above" if peak["gain"] >= 0 else "below"
    distance = f"{points(peak['gain'])} {side}" if peak["gain"] else "level with"
    told = f"{percent(best)} at λ = {at:.3g}, {distance} the better end’s {percent(better)}"
    between = _between(peak, confidence, 100, " points")
    if peak["found"] == SHOWN:
        return f"the mean score over all tasks has its peak inside: {told} ({between})"
    if peak["found"] == NOT_SHOWN:
        return f"that the mean score over all tasks has its peak inside is not shown: {told} ({between})"
    return f"no point between the ends has a higher mean score than the better end: {told} ({between})"


def _barrier(barrier: dict, confidence: str) -> str:
    side = "above" if barrier["height"] > 0 else "below"
    told = (
        f"the highest point lies {abs(barrier['height']):.3g} nats per answer token {side} the straight line between "
        f"the ends’ losses, at λ = {barrier['at']:.3g} ({_between(barrier, confidence, 1, '')})"
    )
    if barrier["found"] == SHOWN:
        return f"a barrier of loss over all tasks: {told}"
    if barrier["found"] == NOT_SHOWN:
        return f"a barrier of loss over all tasks is not shown: {told}"
    return f"no barrier of loss over all tasks: {told}"


def _between(told: dict, confidence: str, scale: float, unit: str) -> str:
    """`95 % interval 1 to 3 points`; of the largest of all points."""
    if told["low"] is None:
        return "no interval: a task has fewer than 10 rows"
    low, high = (f"{scale * told[end]:.3g}".replace("-", "−") for end in ("low", "high"))
    return f"{confidence} % interval {low} to {high}{unit}"


def numbers(path: dict) -> tuple[list[str], list[list[str]]]:
    """A table with a row for each point and a column for each group's score and loss."""
    groups = path["groups"]
    head = ["λ", *(f"score, {GROUPS[name]}" for name in groups), *(f"loss, {GROUPS[name]}" for name in groups)]
    rows = [
        [
            _end(i, path["alphas"]),
            *(percent(group["score"]["value"][i]) for group in groups.values()),
            *(f"{group['loss']['value'][i]:.3f}" for group in groups.values()),
        ]
        for i in range(len(path["alphas"]))
    ]
    return head, rows


def _end(i: int, alphas: list[float]) -> str:
    end = " (A)" if i == 0 else " (B)" if i == len(alphas) - 1 else ""
    return f"{alphas[i]:.3g}{end}"


# ---------------------------------------------------------------- the page


def view(record: dict) -> dict:
    """What the template draws."""
    names = short_names(record)
    return {
        "title": title(record),
        "names": [(name.upper(), label) for name, label in names.items()],
        "confidence": number(100 * record["confidence"]),
        "said": list(said(record)),
        "paths": [_path(path) for path in record["paths"]],
        "planes": [_plane(plane, list(names)) for plane in record["planes"]],
        "tasks": [
            [clean(task["name"]), str(task["rows"]), words.MEASURES.get(task["measure"], clean(task["measure"])),
             "new" if task["new"] else ""]
            for task in record["tasks"]
        ],
        "notes": [clean(note) for note in record["notes"]],
        "facts": {
            "models": [
                (name.upper(), f"{clean(one['name'])}; base {one['identity']['weights'][:12]}, adapter "
                 f"{(one['identity']['adapter'] or 'none')[:12]}")
                for name, one in record["models"].items()
            ],
            "settings": [
                (name, clean(value)) for name, value in sorted(record["settings"].items()) if value is not None
            ],
            "versions": sorted(record["versions"].items()),
        },
        "glossary": INTERPOLATE_GLOSSARY,
    }  # fmt: skip


def _path(path: dict) -> dict:
    named = path | {"groups": {GROUPS[name]: group for name, group in path["groups"].items()}}
    tasks = path | {"groups": {clean(name): group for name, group in path["tasks"].items()}}
    peak, barrier = (path["groups"]["all"][what]["at"] for what in ("peak", "barrier"))
    several = 1 < len(path["tasks"]) <= charts.COLOURS
    head, rows = numbers(path)
    return {
        "name": KINDS[path["kind"]],
        "kind": path["kind"],
        "within": SPACES[path["within"]],
        "anchor": ANCHORS.get(path["within"], path["within"]),
        "charts": [charts.path_chart(named, key, 620, at) for key, at in (("score", peak), ("loss", barrier))],
        "by_task": [charts.path_chart(tasks, key, 620) for key in ("score", "loss")] if several else [],
        "head": head,
        "rows": rows,
    }


def _plane(plane: dict, names: list[str]) -> dict:
    labels = [name.upper() for name in names]
    return {
        "within": SPACES[plane["within"]],
        "anchor": ANCHORS.get(plane["within"], plane["within"]),
        "maps": [
            (heading, charts.landscape(plane, key, "all", labels, 480))
            for key, heading in (("score", "mean score, all tasks"), ("loss", "loss, all tasks"))
        ],
    }
