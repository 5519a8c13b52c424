"""What a merge cost, in a short table: the content of merge.json as Markdown and for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from forgetless.report.markdown import escaped, pipe_table
from forgetless.report.words import clean, percent

ROUNDING = 1e-7  # nats; what equal models differ by, of either sign
MOST_LAYERS = 10  # that Markdown names, those with the largest error first


def merge_markdown(record: Mapping) -> str:
    """A heading, what was measured of each adapter, of the whole and of the worst layers, and the notes."""
    lines = [f"# {escaped(headline(record))}", ""]
    for head, rows in _tables(record):
        lines += [*pipe_table(head, rows), ""]
    lines += [f"- {escaped(clean(line))}" for line in _sentences(record)]
    if rows := _layers(record):
        lines += ["", "## Layers with the largest error", "", *pipe_table(["layer", "rank", "‖ΔW‖", "error"], rows)]
    lines += ["", *(f"- note: {escaped(clean(note))}" for note in record["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def print_merge(record: Mapping, console: Console) -> None:
    """The same without the layers."""
    console.print(headline(record), style="bold", markup=False)
    for head, rows in _tables(record):
        table = Table(*map(clean, head), box=None, pad_edge=False)
        for row in rows:
            table.add_row(*map(clean, row))
        console.print(table, "")
    for line in [*_sentences(record), *(f"note: {note}" for note in record["notes"])]:
        console.print(f"- {clean(line)}", markup=False)


def headline(record: Mapping) -> str:
    labels = ", ".join(one["label"] for one in record["sources"])
    if record["into"] == "base":
        return f"{labels} merged into its base"
    return f"{labels} merged into one adapter ({record['how']['method']})"


def _tables(record: Mapping) -> list[tuple[list[str], list[list[str]]]]:
    tables = [_costs(record)]
    if record["scores"]:
        tables.append(_scores(record["scores"]))
    return tables


def _costs(record: Mapping) -> tuple[list[str], list[list[str]]]:
    several = record["into"] != "base"
    head = [
        "adapter",
        *(["weight", "distance"] if several else []),
        "text",
        "KL to merged",
        "95 %",
        "agree",
        "KL to base",
    ]
    rows = []
    for one in record["sources"]:
        for text, found in one["kl"].items():
            how = [f"{one['weight']:g}", f"{one['distance']:.3g}"] if several else []
            base = _nats(one["kl_of_base"][text]["kl"])
            rows.append([one["label"], *how, text, _nats(found["kl"]), _interval(found), percent(found["agree"]), base])
    return head, rows


def _scores(scores: Mapping) -> tuple[list[str], list[list[str]]]:
    tasks = list(next(iter(scores.values())))
    cells = {
        model: [f"{percent(one['score'])} ({percent(one['low'])} to {percent(one['high'])})" for one in found.values()]
        for model, found in scores.items()
    }
    return ["score", *tasks], [[model, *row] for model, row in cells.items()]


def _interval(found: Mapping) -> str:
    return "fewer than 10 documents" if found["low"] is None else f"{_nats(found['low'])} to {_nats(found['high'])}"


def _nats(value: float) -> str:
    """Less than rounding leaves is not told apart from 0."""
    return f"{value:.3g}" if value >= ROUNDING else f"below {ROUNDING:g}"


def _sentences(record: Mapping) -> list[str]:
    told = ["KL in nats per token, of the adapter's own predictions; KL to base is what leaving the adapter out costs."]
    total = record["total"]["error"]
    if record["into"] == "base":
        told.append(f"Rounding to the stored precision took {total:.3g} of the update's norm (‖W' - (W + ΔW)‖ / ‖ΔW‖).")
        for text, one in record["logits"].items():
            told.append(
                f"Logits on {text}, loaded from what was written, against base + adapter: largest difference "
                f"{one['largest']:.3g}, mean {one['mean']:.3g}, where logits are of size {one['size']:.3g}."
            )
        return told
    if record["compression"] is None:
        return [*told, "Nothing was re-compressed: the ranks are those that the method gives."]
    told.append(f"Re-compression to rank {_ranks(record)} lost {total:.3g} of the update's norm (‖ΔW - ΔW'‖ / ‖ΔW‖).")
    for text, one in record["compression"].items():
        told.append(f"KL(before || after re-compression) on {text}: {_nats(one['kl'])} ({_interval(one)}).")
    return told


def _ranks(record: Mapping) -> str:
    ranks = sorted({one["rank"] for one in record["layers"].values()})
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _layers(record: Mapping) -> list[list[str]]:
    worst = sorted(record["layers"].items(), key=lambda item: -item[1]["error"])[:MOST_LAYERS]
    return [
        [layer, str(one.get("rank", "")), f"{one['norm']:.3g}", f"{one['error']:.3g}"]
        for layer, one in worst
        if one["error"]
    ]
