"""An audit in plain words and tables, in the terminal and as Markdown. No row texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from forgetless.auditing.budgets import MAX_DROP, written
from forgetless.auditing.measures import REFERENCE
from forgetless.auditing.verdict import PASS, REGRESSION, WORSE, Finding, Verdict
from forgetless.forgetting.texts import OWN_ANSWERS
from forgetless.report.markdown import escaped, pipe_table
from forgetless.report.verdict import SAID, amount, named, needed, verdict_markdown
from forgetless.report.words import clean, number, percent

COLUMNS = 6  # of scores in one table
COLOURS = {PASS: "green", REGRESSION: "red", None: "bold"}


@dataclass(frozen=True)
class Table:
    """A heading, the columns' names and the cells; the first column names the row."""

    title: str
    head: list[str]
    rows: list[list[str]]


def print_audit(record: dict, verdicts: Mapping[str, Verdict], console: Console) -> None:
    """The verdict on every model in words, then the tables, then what a reader should know."""
    names = short_names(record)
    for name, verdict in verdicts.items():
        style = COLOURS.get(verdict.outcome, "yellow")
        console.print(Text(f"{names[name]}: {SAID[verdict.outcome]}", style=style))
        for line in plain(record, name, verdict):
            console.print(Text(f"  - {line}"))
        console.print()
    for table in tables(record):
        console.print(_rich(table))
        console.print()
    for note in dict.fromkeys(record["notes"]):
        console.print(Text(f"note: {clean(note)}", style="dim"))


def audit_markdown(record: dict, verdicts: Mapping[str, Verdict]) -> str:
    """Verdicts, findings and tables, short enough for a pull request."""
    lines = [f"## What was forgotten, against {escaped(clean(record['reference']['name']))}", ""]
    lines += [verdict_markdown(verdicts)]
    for table in tables(record):
        lines += [f"#### {escaped(table.title)}", ""]
        lines += [*pipe_table(table.head, table.rows), ""]
    lines += [f"- {escaped(clean(note))}" for note in dict.fromkeys(record["notes"])]
    return "\n".join(lines) + "\n"


def short_names(record: dict) -> dict[str, str]:
    """The last part of each model's name, where that tells them apart."""
    names = [one["name"] for one in (record["reference"], *record["models"])]
    last = {name: clean(name.rstrip("/").rpartition("/")[2]) for name in names}
    return last if len(set(last.values())) == len(last) else {name: clean(name) for name in names}


# ---------------------------------------------------------------- in words


def plain(record: dict, model: str, verdict: Verdict) -> list[str]:
    """What a model lost in one sentence each: what has a budget, every loss that is shown, and every text."""
    told = next(one for one in record["models"] if one["name"] == model)
    lines = []
    for finding in verdict.findings:
        if finding.option != MAX_DROP:
            lines.append(_moved(record, told, finding))
        elif finding.budget is not None or finding.status == WORSE:
            lines.append(_fell(record, told, finding))
        lines += [text for text in [needed(finding)] if text]
    quiet = sum(finding.option == MAX_DROP and finding.budget is None and finding.status != WORSE
                for finding in verdict.findings)  # fmt: skip
    if quiet:
        lines.append(f"{quiet} more tasks or probes without a budget: no loss that these rows show")
    return lines + [clean(note) for note in verdict.notes]


def _fell(record: dict, told: dict, finding: Finding) -> str:
    if finding.loss is None:
        return f"{named(finding)}: no rows"
    way = "lost" if finding.loss > 0 else "gained"
    size = amount(finding, abs(finding.loss))
    scores = _before_and_after(record, told, finding)
    turned = f"{finding.lost} of {finding.rows:,} rows got worse and {finding.gained} better"
    return f"{named(finding)}: {size} {way}{scores}; {turned}{_judged(record, finding)}"


def _before_and_after(record: dict, told: dict, finding: Finding) -> str:
    measure = next((one["measure"] for one in record["columns"] if one["name"] == finding.name), None)
    if measure is None or finding.against != REFERENCE:
        return ""
    before, after = (scores[finding.name][measure] for scores in (record["reference_scores"], told["scores"]))
    return f" ({percent(before)} before, {percent(after)} now)"


def _moved(record: dict, told: dict, finding: Finding) -> str:
    if finding.against != REFERENCE:
        return f"{named(finding)}: predictions moved by {amount(finding, finding.loss or 0)}{_judged(record, finding)}"
    means = told["divergence"][finding.name]["per_token"]
    noise = next(one["noise"]["kl"] for one in record["texts"] if one["name"] == finding.name)
    small = ", which is within the rounding noise" if means["kl"] <= noise else ""
    return (
        f"{named(finding)}: next-word predictions moved by {means['kl']:.3g} nats/token{small}; the likeliest word is "
        f"the same in {percent(means['agree'])}{_judged(record, finding)}"
    )


def _judged(record: dict, finding: Finding) -> str:
    if finding.budget is None:
        return ""
    high = amount(finding, finding.high)
    sure = f"{number(100 * record['confidence'])} %"
    limit = written(finding.option, finding.budget)
    return f"; at most {high} with {sure} confidence, budget {limit}: {finding.status}{' (waived)' * finding.waived}"


# ---------------------------------------------------------------- in tables


def tables(record: dict) -> list[Table]:
    """All tables of a record, those without rows left out."""
    names = short_names(record)
    found = [*_scores(record, names), _texts(record, names), _agreement(record, names)]
    found += [_refusals(record, names), *_sanity(record, names)]
    found += [_weights(model, names) for model in record["models"]]
    return [table for table in found if table.rows]


def _scores(record: dict, names: dict[str, str]) -> Iterator[Table]:
    """The matrix: one row a model, one column a task or probe."""
    columns = record["columns"]
    everyone = [(record["reference"]["name"], record["reference_scores"])]
    everyone += [(model["name"], model["scores"]) for model in record["models"]]
    for start in range(0, len(columns), COLUMNS):
        part = columns[start : start + COLUMNS]
        rows = [
            [names[name], *(percent(scores[one["name"]][one["measure"]]) for one in part)] for name, scores in everyone
        ]
        yield Table("Scores", ["", *(f"{clean(one['name'])} ({one['rows']:,})" for one in part)], rows)


def _texts(record: dict, names: dict[str, str]) -> Table:
    head = ["", "text", "tokens", "cross-entropy", "entropy", "KL", "KL by document", "same word", "noise (KL)"]
    rows = []
    for model in record["models"]:
        for text in record["texts"]:
            told = model["divergence"][text["name"]]
            means, documents = told["per_token"], told["per_document"]
            rows.append(
                [
                    names[model["name"]], clean(text["name"]), f"{text['tokens']:,}",
                    *(f"{means[key]:.3f}" for key in ("cross_entropy", "entropy")), f"{means['kl']:.3g}",
                    f"{documents['kl']:.3g}", percent(means["agree"]), f"{text['noise']['kl']:.2g}",
                ]
            )  # fmt: skip
    return Table("Predictions against the reference's own, nats per token", head, rows)


def _agreement(record: dict, names: dict[str, str]) -> Table:
    told = [one["name"] for one in record["columns"]]
    told = [name for name in told if any(model["agreement"][name] is not None for model in record["models"])]
    rows = [[names[one["name"]], *(_share(one["agreement"][name]) for name in told)] for one in record["models"]]
    return Table("Same answer as the reference, right or wrong", ["", *map(clean, told)], rows if told else [])


def _refusals(record: dict, names: dict[str, str]) -> Table:
    told = list(record["reference_refusals"])
    everyone = [(record["reference"]["name"], record["reference_refusals"])]
    everyone += [(model["name"], model["refusals"]) for model in record["models"]]
    rows = [[names[name], *(percent(shares[one]) for one in told)] for name, shares in everyone]
    return Table("Answers that refuse", ["", *map(clean, told)], rows if told else [])


def _sanity(record: dict, names: dict[str, str]) -> Iterator[Table]:
    kinds = ("answers", "empty", "unfinished", "repeated", "broken_characters", "other_script")
    everyone = [(record["reference"]["name"], record["reference_sanity"])]
    everyone += [(model["name"], model["sanity"]) for model in record["models"]]
    for prompts in record["reference_sanity"]:
        rows = [[names[name], *(str(told[prompts].get(kind, 0)) for kind in kinds)] for name, told in everyone]
        title = "general prompts" if prompts == OWN_ANSWERS else clean(prompts)
        yield Table(f"Answers to {title}", ["", *(kind.replace("_", " ") for kind in kinds)], rows)


def _weights(model: dict, names: dict[str, str]) -> Table:
    head = ["module", "layers", "norm", "relative", "nuclear norm", "effective rank", "intruders"]
    rows = [
        [
            clean(one["module"]), str(one["layers"]), f"{one['norm']:.3g}", _share(one["relative_norm"]),
            f"{one['nuclear_norm']:.3g}", f"{one['effective_rank']:.1f}",
            "-" if one["intruders"] is None else str(one["intruders"]),
        ]
        for one in model["weights"]
    ]  # fmt: skip
    return Table(f"Weights: the update of {names[model['name']]}", head, rows)


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)


def _rich(table: Table) -> RichTable:
    drawn = RichTable(title=Text(table.title, style="bold"), title_justify="left")
    for place, name in enumerate(table.head):
        drawn.add_column(Text(name), justify="left" if place == 0 else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn
