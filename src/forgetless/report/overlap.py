"""The overlap of adapters in words and tables: in the terminal, as Markdown, and the files of a folder."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from forgetless.report.audit import Table, print_tables
from forgetless.report.markdown import escaped, pipe_table
from forgetless.report.overlap_page import render_overlap
from forgetless.report.overlap_words import (
    CAUTION,
    TABLE_PAIRS,
    figure,
    level,
    named_pair,
    names_of,
    pairs_first,
    ratio,
    sentences,
    share,
    times,
)
from forgetless.report.words import clean
from forgetless.runs.folder import make_folder, write_json_whole, write_whole

RECORD, PAGE, MARKDOWN = "overlap.json", "overlap.html", "overlap.md"


def write_overlap(record: dict, folder: Path) -> None:
    """overlap.json, overlap.html and overlap.md, each whole or not at all."""
    make_folder(folder, "give another output_dir")
    write_json_whole(folder / RECORD, record)
    write_whole(folder / PAGE, render_overlap(record))
    write_whole(folder / MARKDOWN, overlap_markdown(record))


def print_overlap(record: dict, console: Console) -> None:
    """What stands out in words, then the tables."""
    for line in [*sentences(record), CAUTION]:
        console.print(Text(f"- {line}"))
    print_tables(tables(record), console)
    for note in record["notes"]:
        console.print(Text(f"note: {clean(note)}", style="dim"))


def overlap_markdown(record: dict) -> str:
    """The sentences and the tables."""
    parts = ["## Overlap of adapters\n"]
    parts += [f"- {escaped(line)}" for line in [*sentences(record), CAUTION, *map(clean, record["notes"])]]
    for table in tables(record):
        parts += ["", f"#### {escaped(table.title)}", "", *pipe_table(table.head, table.rows)]
        parts += ["", *(escaped(note) for note in table.notes)]
    return "\n".join(parts) + "\n"


def tables(record: dict) -> list[Table]:
    """Pairs, adapters and thresholds, over all layers together."""
    return [_pairs(record), _adapters(record), _sweep(record)]


def _pairs(record: dict) -> Table:
    at, names = record["thresholds"].index(record["shown_at"]), names_of(record)
    chosen = pairs_first(record, TABLE_PAIRS)
    rows = [
        [
            named_pair(one, names),
            share(one["collision_rate"][at]),
            times(ratio(one, at)),
            figure(one["cosine"]),
            figure(one["output_side"]["relative"]),
            figure(one["input_side"]["relative"]),
            share(one["column_spaces"]["shared"]),
            share(one["row_spaces"]["shared"]),
        ]
        for one in chosen
    ]
    head = ["pair", "collision rate", "over chance", "cosine", "output side", "input side"]
    head += ["shared outputs", "shared inputs"]
    left_out = len(record["pairs"]) - len(chosen)
    more = (f"The {len(chosen)} pairs with the largest cosines; {left_out} more in {RECORD}.",) if left_out else ()
    notes = (
        f"Collisions: entries above {level(record)}. Shared: of the directions of the smaller update.",
        f"Sides: norms of ΔW_iᵀΔW_j and ΔW_iΔW_jᵀ over both norms; {_chance(record)}.",
    )
    return Table("Pairs, over all layers", head, rows, (*notes, *more))


def _chance(record: dict) -> str:
    """What the sides of unrelated updates are, over all pairs."""
    told = []
    for side in ("output_side", "input_side"):
        known = [chance for one in record["pairs"] if (chance := one[side]["by_chance"]) is not None]
        told.append(figure(sum(known) / len(known) if known else None))
    return f"by chance {told[0]} and {told[1]}"


def _adapters(record: dict) -> Table:
    at, names = record["thresholds"].index(record["shown_at"]), names_of(record)
    rows = [
        [
            names[i],
            str(one["layers"]),
            figure(one["norm"]),
            figure(one["nuclear_norm"]),
            figure(one["effective_rank"]),
            figure(one["generalised_sparsity"]),
            share(one["densities"][at]),
        ]
        for i, one in enumerate(record["adapters"])
    ]
    head = ["adapter", "layers", "norm", "nuclear norm", "effective rank", "generalised sparsity", "density"]
    return Table("Adapters", head, rows, ("Effective rank: mean over layers. Nuclear norm: sum.",))


def _sweep(record: dict) -> Table:
    rows = []
    for at, threshold in enumerate(record["thresholds"]):
        densities = [one["densities"][at] for one in record["adapters"]]
        ratios = [found for one in record["pairs"] if (found := ratio(one, at)) is not None]
        rows.append([
            f"{threshold:g} × rms",
            share(sum(densities) / len(densities)),
            share(record["average_collision_rate"][at]),
            share(record["average_by_chance"][at]),
            " to ".join(dict.fromkeys(map(times, (min(ratios), max(ratios))))) if ratios else "-",
        ])  # fmt: skip
    head = ["threshold", "mean density", "average collision rate", "by chance", "over chance, by pair"]
    return Table("The same at every threshold", head, rows)
