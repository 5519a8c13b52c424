"""A blend in plain words and a table, in the terminal and as Markdown. No row texts."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from forgetless.auditing.budgets import MAX_KL, MAX_LOST
from forgetless.report.markdown import escaped, pipe_table
from forgetless.report.words import clean, figure, number, percent, signed
from forgetless.subjects.layouts import short_names

BLENDED, WHOLE, TOO_FEW_ROWS, NOT_SHOWN, LEARNS_NOTHING = (
    "blended", "all of it", "too few rows", "not shown", "learns nothing",
)  # fmt: skip
"""How a blend can end; after the last three the old model is kept."""


def print_blend(record: dict, console: Console) -> None:
    """What was chosen and why, then every point that was measured."""
    console.print(Text(headline(record), style="green" if record["chosen"] else "yellow"))
    for line in sentences(record):
        console.print(Text(f"  - {line}"))
    head, rows = points_table(record)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)


def blend_markdown(record: dict) -> str:
    head, rows = points_table(record)
    said = [f"- {escaped(line)}" for line in sentences(record)]
    notes = [f"- {escaped(clean(note))}" for note in record["facts"]["settings"]["notes"]]
    lines = [f"# forgetless: {escaped(title(record))}", "", f"**{escaped(headline(record))}**", "", *said, ""]
    lines += ["## Points", "", *pipe_table(head, rows), "", escaped(promise(record)), ""]
    return "\n".join(lines + (["## Notes", "", *notes, ""] if notes else []))


def title(record: dict) -> str:
    names = [record["before"]["name"], record["after"]["name"]]
    short = short_names(names)
    return "between " + " and ".join(clean(short[name]) for name in names)


def headline(record: dict) -> str:
    """How it ended, in one sentence."""
    confidence = f"{number(100 * record['confidence'])} % confidence"
    if record["outcome"] == WHOLE:
        return f"The model after is within every budget as it is, with {confidence}."
    if record["outcome"] == BLENDED:
        way = f"{number(100 * record['chosen'])} % of the way (alpha {record['chosen']:g})"
        return f"Blended: {way} is within every budget, with {confidence}."
    if record["outcome"] == TOO_FEW_ROWS:
        return "Nothing written, keep the model before: these rows are too few to show the budget."
    if record["outcome"] == LEARNS_NOTHING:
        return "Nothing written, keep the model before: no certified point scores higher on the new tasks."
    return f"Nothing written, keep the model before: no point is shown to be within every budget, with {confidence}."


def promise(record: dict) -> str:
    """What the confidence is about."""
    together = "" if record["borders"] == 1 else f", of {record['borders']} such blends together"
    texts = any(one["budget"]["option"] == MAX_KL for one in record["points"][0]["budgets"])
    clip = f" On texts a document counts as {figure(record['kl_clip'])} nats per token at most." if texts else ""
    chance = number(100 * (1 - record["confidence"]), 2)
    chose = (
        " What it learnt was measured on the rows that chose it, so a little too high." if record["new_tasks"] else ""
    )
    return (
        f"A written model is over one of its budgets with a probability of {chance} % at most{together}, if the rows "
        "are drawn independently from what the budgets are about. Each point is tested at the level "
        f"{record['level']:.4g}, from alpha {record['grid'][0]:g} on, up to the first that is not certified."
        + clip
        + chose
    )


def sentences(record: dict) -> list[str]:
    """What the chosen point learnt and lost, or what stood in the way, and where the path was left."""
    if record["too_few_rows"]:
        return [_too_few(one) for one in record["too_few_rows"]]
    points = record["points"]
    best = next((point for point in points if point["alpha"] == record["chosen"]), None)
    stopped = next((point for point in points if not point["certified"]), None)
    said = []
    if best:
        said += [_learnt(name, told, points[-1]) for name, told in best["learnt"].items()]
        said += [held_words(one) for one in best["budgets"]]
    if stopped:
        failed = [one for one in stopped["budgets"] if not one["shown"]]
        said += [f"alpha {stopped['alpha']:g} is not certified: {held_words(one)}" for one in failed]
    if best and not best["learnt"]:
        said.append("no task without a budget was given, so the largest certified alpha was taken")
    return said


def held_words(one: dict) -> str:
    """`max-drop invoices=2pp: 0.5 pp, at most 1.8 pp (3 of 400 rows worse, 1 better)`."""
    option = one["budget"]["option"]
    told = f"{clean(one['text'])}: {amount(option, one['loss'])}, at most {amount(option, one['high'])}"
    if option == MAX_KL:
        told += f" ({one['rows']} documents)"
    else:
        told += f" ({one['lost']} of {one['rows']} rows worse, {one['gained']} better)"
    if one["clipped"]:
        told += f"; {one['clipped']} documents moved beyond the clip, and nothing bounds the mean"
    elif one["rows_needed"]:
        told += f"; about {one['rows_needed']:,} rows like these would show it"
    return told


def amount(option: str, value: float) -> str:
    return f"{figure(value)} nats/token" if option == MAX_KL else f"{number(100 * value, 2)} pp"


def points_table(record: dict) -> tuple[list[str], list[list[str]]]:
    """The columns' names, and a row for each measured point."""
    budgets = [clean(one["text"]) for one in record["points"][0]["budgets"]]
    head = ["alpha", *(clean(name) for name in record["new_tasks"]), *(f"{one}: lost (at most)" for one in budgets), ""]
    first = record["points"][0]["learnt"]
    rows = [
        ["0 (before)", *(percent(first[name]["before"]) for name in record["new_tasks"]), *("0" for _ in budgets), ""]
    ]
    for point in record["points"]:
        lost = (
            f"{amount(one['budget']['option'], one['loss'])} ({amount(one['budget']['option'], one['high'])})"
            for one in point["budgets"]
        )
        learnt = (percent(point["learnt"][name]["after"]) for name in record["new_tasks"])
        rows.append([f"{point['alpha']:g}", *learnt, *lost, state(record, point)])
    return head, rows


def state(record: dict, point: dict) -> str:
    if point["alpha"] == record["chosen"]:
        return "chosen"
    return "certified" if point["certified"] else "not certified"


def _learnt(name: str, told: dict, last: dict) -> str:
    interval = f"{signed(100 * told['low'])} to {signed(100 * told['high'])} points"
    said = f"{clean(name)}: {percent(told['before'])} before, {percent(told['after'])} now ({interval})"
    return f"{said}, {percent(last['learnt'][name]['after'])} in the model after" if last["alpha"] == 1 else said


def _too_few(one: dict) -> str:
    exact = one["budget"].startswith(MAX_LOST)
    needed = f"{'at least' if exact else 'about'} {one['needed']:,}" if one["needed"] else "no number"
    return f"{clean(one['budget'])}: {one['rows']} rows; {needed} that lose nothing would show it"
