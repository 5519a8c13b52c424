"""An audit in plain words and tables, in the terminal and as Markdown. No row texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from forgetless.auditing.budgets import MAX_DROP, written
from forgetless.auditing.measures import REFERENCE
from forgetless.auditing.recovery import NO_LOSS
from forgetless.auditing.remedies import APART
from forgetless.auditing.verdict import PASS, REGRESSION, WORSE, Finding, Verdict
from forgetless.auditing.where import CERTAINTY, DOCUMENTS, DOMAIN, PLACE, TOKEN_TYPE
from forgetless.forgetting.texts import OWN_ANSWERS
from forgetless.report.markdown import escaped, pipe_table
from forgetless.report.verdict import amount, counted, in_words, named, needed, verdict_markdown
from forgetless.report.words import clean, number, p_value, percent
from forgetless.score.intervals import wilson
from forgetless.subjects import layouts

COLUMNS = 6  # of scores in one table
MOST_CHARACTERS = 60_000  # of the Markdown before it is cut: GitHub takes 65,536 in a comment
PROBLEMS = ("empty", "unfinished", "repeated", "broken_characters", "other_script")
SAID_OF_PROBLEM = {"empty": "empty", "unfinished": "unfinished", "repeated": "one thing repeated",
                   "broken_characters": "broken characters", "other_script": "in another script"}  # fmt: skip
SAID_OF = {DOMAIN: "domain", TOKEN_TYPE: "type of token", PLACE: "place in the document", CERTAINTY: "entropy"}
MOST_GROUPS, MOST_DOCUMENTS = 3, 3  # of one breakdown, and of one text, in a table
LARGE, DENSE = 0.2, 2.0  # a share of the change that is worth a sentence, and how often its share of the tokens it is
COLOURS = {PASS: "green", REGRESSION: "red", None: "bold"}


@dataclass(frozen=True)
class Table:
    """A heading, the columns' names and the cells; the first column names the row."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()  # what stands beneath it
    detail: bool = False  # for the page only, not for a terminal or a pull request


def print_audit(record: dict, verdicts: Mapping[str, Verdict], console: Console) -> None:
    """The verdict on every model in words, then the tables, then what a reader should know."""
    names = short_names(record)
    for name, verdict in verdicts.items():
        style = "yellow" if verdict.waived else COLOURS.get(verdict.outcome, "yellow")
        console.print(Text(f"{names[name]}: {in_words(verdict)}", style=style))
        for line in [*plain(record, name, verdict), *recovery_lines(record, name), *remedy_lines(record, name)]:
            console.print(Text(f"  - {line}"))
        console.print()
    for table in tables(record):
        if table.detail:
            continue
        console.print(rich_table(table))
        for note in table.notes:
            console.print(Text(note, style="dim"))
        console.print()
    for note in dict.fromkeys(record["notes"]):
        console.print(Text(f"note: {clean(note)}", style="dim"))
    if earlier := earlier_audits(record):
        console.print(Text(f"\n{earlier}"))


def audit_markdown(record: dict, verdicts: Mapping[str, Verdict]) -> str:
    """Verdicts, findings, notes and tables, short enough for a pull request; what does not fit is on the page."""
    parts = [f"## What was forgotten, against {escaped(clean(record['reference']['name']))}\n"]
    parts += [verdict_markdown({name: verdict}) for name, verdict in verdicts.items()]
    parts += [f"{earlier_audits(record)}\n"] if record.get("earlier_audits") else []
    told = [
        f"{short}, {line}"
        for name, short in short_names(record).items()
        for line in [*missing_lines(record, name), *recovery_lines(record, name), *remedy_lines(record, name)]
    ]
    parts += [_listed(lines) for lines in (told, map(clean, dict.fromkeys(record["notes"])))]
    parts += [
        "\n".join([f"#### {escaped(table.title)}", "", *pipe_table(table.head, table.rows), "", _listed(table.notes)])
        for table in tables(record)
        if not table.detail
    ]
    return _fitted([part for part in parts if part])


def _listed(lines: Iterable[str]) -> str:
    return "".join(f"- {escaped(line)}\n" for line in lines)


def _fitted(parts: list[str]) -> str:
    """The parts one after another; of one that does not fit any more the first line, which says what it is."""
    text, cut = "", 0
    for part in parts:
        fits = len(text) + len(part) < MOST_CHARACTERS
        text += f"{part if fits else part.splitlines()[0]}\n"
        cut += not fits
    return f"{text}- {cut} parts are cut to their first line, for length: audit.html has them\n" if cut else text


def earlier_audits(record: dict) -> str:
    """How often one of these models was audited in this folder before, and how that ended; '' for the first time."""
    told = [one["outcome"] or "no verdict" for one in record.get("earlier_audits", [])]
    return (
        f"Earlier audits of these models in this folder: {len(told)}, the last {', '.join(told[-3:])}" if told else ""
    )


def short_names(record: dict) -> dict[str, str]:
    """What tables call the models."""
    found = layouts.short_names([one["name"] for one in (record["reference"], *record["models"])])
    return {name: clean(short) for name, short in found.items()}


# ---------------------------------------------------------------- in words


def plain(record: dict, model: str, verdict: Verdict) -> list[str]:
    """What a model lost in one sentence each: what has a budget, every loss that is shown, and every text."""
    return [sentence for _, sentence in sentences(record, model, verdict)]


def sentences(record: dict, model: str, verdict: Verdict) -> Iterator[tuple[Finding | None, str]]:
    """The sentences of `plain`, each with the finding that it tells of, if it is one."""
    about = next(one for one in record["models"] if one["name"] == model)
    quiet = 0
    for finding in verdict.findings:
        if finding.loss is None:
            pass  # `needed` says so
        elif finding.option != MAX_DROP:
            yield finding, _moved(record, about, finding)
            for sentence in _concentrated(record, about, finding):
                yield None, sentence
        elif finding.budget is not None or finding.status == WORSE:
            yield finding, _fell(record, about, finding)
        else:
            quiet += 1
        if needed(finding):
            yield finding, needed(finding)
    if quiet:
        yield None, f"{quiet} more tasks or probes without a budget: no loss that these rows show"
    for sentence in missing_lines(record, model):
        yield None, sentence
    for note in verdict.notes:
        yield None, clean(note)
    for sentence in _broken(record, about):
        yield None, sentence


def _broken(record: dict, told: dict) -> Iterator[str]:
    """Answers that are no answers, where there are more than chance would give: their intervals lie apart."""
    for prompts, counts in told["sanity"].items():
        before = record["reference_sanity"][prompts]
        for kind in PROBLEMS:
            was, now = (one.get(kind, 0) for one in (before, counts))
            if now > was and wilson(now, counts["answers"])[0] > wilson(was, before["answers"])[1]:
                said = "general prompts" if prompts == OWN_ANSWERS else clean(prompts)
                yield (
                    f"{now} of {counts['answers']} answers to {said} are {SAID_OF_PROBLEM[kind]}; the reference has "
                    f"{was} of {before['answers']}"
                )


def missing_lines(record: dict, model: str) -> list[str]:
    """What nobody could measure of a served model."""
    missing = next((one.get("not_measured") for one in record["models"] if one["name"] == model), None)
    return [f"not measured, since a server gives answers only: {clean(', '.join(missing))}"] if missing else []


def recovery_lines(record: dict, model: str) -> list[str]:
    """What comes back of each task's loss; nothing for what was not lost."""
    told: dict = next((one for one in record["models"] if one["name"] == model), {})
    entries = told.get("recovery", {})
    return [f"{clean(task)}: {told['sentence']}" for task, told in entries.items() if told["found"] != NO_LOSS]


def remedy_lines(record: dict, model: str) -> list[str]:
    """What would help a model that lost: the remedy with the largest net change over all tasks, or that none does."""
    told: dict = next((one for one in record["models"] if one["name"] == model), {})
    tried = told.get("remedies")
    if tried is None and any(one["high"] < 0 for one in told.get("changes", {}).values()):
        return ["what would help? The same command with --remedies tries it"]
    if not tried:
        return []
    apart = [
        f"always possible: {clean(one['words'])}; it needs one adapter a task, and to know the task of a question"
        for one in tried
        if one["kind"] == APART
    ]
    return [_what_helps([one for one in tried if one["kind"] != APART]), *apart]


def _what_helps(tried: list[dict]) -> str:
    helping = [one for one in tried if one["helps"]]
    if not helping:
        names = ", ".join(dict.fromkeys(one["kind"] for one in tried))
        return f"what would help: nothing that was tried ({names}) is shown to give back what was lost"
    best = max(helping, key=lambda one: sum(task["change"] for task in one["tasks"].values()))
    back, costs = gives_back(best), costs_of(best)
    others = f"; on the others: {costs}" if costs else ""
    return (
        f"what would help: {remedy_name(best)} gives back: {back}{others}. {how(best)}. It was picked on these rows: "
        "audit what you deploy on others"
    )


def how(remedy: dict) -> str:
    """The command that applies it, and words beside it or in its place."""
    return "; ".join(clean(part) for part in (remedy["command"], remedy["words"]) if part) or "-"


def remedy_name(remedy: dict) -> str:
    return f"{remedy['kind']} {remedy['strength']}".strip()


def gives_back(remedy: dict) -> str:
    """Changes on what was lost, against the model as it is."""
    return _task_changes(remedy, lost=True) or "-"


def costs_of(remedy: dict) -> str:
    """Changes on everything else."""
    return _task_changes(remedy, lost=False)


def _task_changes(remedy: dict, lost: bool) -> str:
    scores = [
        f"{clean(name)} {100 * one['change']:+.0f} pp ({number(100 * one['low'])} to {number(100 * one['high'])})"
        for name, one in remedy["tasks"].items()
        if one["lost"] == lost
    ]
    texts = [
        f"{clean(name)} {one['change']:+.3g} nats/token ({number(one['low'])} to {number(one['high'])})"
        for name, one in remedy["texts"].items()
        if one["lost"] and lost
    ]
    return ", ".join(scores + texts)


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
        f"{named(finding)}: next-word predictions moved by {amount(finding, finding.loss or 0)} (mean over documents)"
        f"{small}; the likeliest word is the same in {percent(means['agree'])}{_judged(record, finding)}"
    )


def _concentrated(record: dict, told: dict, finding: Finding) -> list[str]:
    """The domain or type of token that holds far more of the change than of the tokens, beyond its interval."""
    if finding.against != REFERENCE or finding.name not in told["divergence"]:
        return []
    dense = [
        (kind, group)
        for kind in (DOMAIN, TOKEN_TYPE)
        for group in _above(record, told, finding.name, kind)
        if group["share_of_kl"] >= max(LARGE, DENSE * group["share_of_tokens"])
    ]
    if not dense:
        return []
    kind, group = max(dense, key=lambda one: one[1]["share_of_kl"])
    name = f"the domain {clean(group['name'])}" if kind == DOMAIN else group["name"]
    change, tokens = percent(group["share_of_kl"]), percent(group["share_of_tokens"])
    return [f"{named(finding)}: {change} of the change in predictions is in {name} ({tokens} of the tokens)"]


def _above(record: dict, told: dict, text: str, kind: str) -> list[dict]:
    """A breakdown's groups that moved more than the text as a whole, beyond their interval, and it beyond noise."""
    mean = told["divergence"][text]["per_token"]["kl"]
    noise = next(one["noise"]["kl"] for one in record["texts"] if one["name"] == text)
    groups = told["where"][text][kind] if mean > max(noise, 0) else []
    return [group for group in groups if group["low"] is not None and group["low"] > mean]


def _judged(record: dict, finding: Finding) -> str:
    if finding.budget is None:
        return ""
    bound = (
        f"at least {amount(finding, finding.low)}" if finding.clipped else f"at most {amount(finding, finding.high)}"
    )
    sure = f"{number(100 * record['confidence'])} %"
    limit = written(finding.option, finding.budget)
    sure += f" confidence, {counted(finding)}" if finding.clip else " confidence"
    return f"; {bound} with {sure}, budget {limit}: {finding.status}{' (waived)' * finding.waived}"


# ---------------------------------------------------------------- in tables


def tables(record: dict) -> list[Table]:
    """All tables of a record, those without rows left out."""
    names = short_names(record)
    found = [
        *_scores(record, names),
        *_other_scores(record, names),
        _changes(record, names),
        _texts(record, names),
        _agreement(record, names),
    ]
    found += [_refusals(record, names), *_sanity(record, names)]
    for model in record["models"]:
        found += [_where(record, model, names), _furthest(record, model, names), _weights(model, names)]
    found.append(_recovery(record, names))
    found += [remedies_table(model, names) for model in record["models"]]
    return [table for table in found if table.rows]


def _scores(record: dict, names: dict[str, str]) -> Iterator[Table]:
    """The matrix: one row a model, one column a task or probe."""
    columns = [(one["name"], one["measure"], f"{clean(one['name'])} ({one['rows']:,})") for one in record["columns"]]
    yield from _matrix("Scores", columns, record, names)


def _other_scores(record: dict, names: dict[str, str]) -> Iterator[Table]:
    """What was asked for beside the headlines: further scorers of a task, and further measures of one."""
    columns = [
        (one["name"], measure, f"{clean(one['name'])}, {clean(measure)}")
        for one in record["columns"]
        for measure in other_measures(record, one)
    ]
    yield from _matrix("Scores by further measures", columns, record, names, detail=True)


def other_measures(record: dict, column: dict) -> list[str]:
    """The measures of a task or probe beside its headline."""
    return [measure for measure in record["reference_scores"][column["name"]] if measure != column["measure"]]


def _matrix(
    title: str, columns: list[tuple[str, str, str]], record: dict, names: dict[str, str], detail: bool = False
) -> Iterator[Table]:
    """One row a model, one column a (task or probe, measure, head), a few of these in a table."""
    everyone = [(record["reference"]["name"], record["reference_scores"])]
    everyone += [(model["name"], model["scores"]) for model in record["models"]]
    for start in range(0, len(columns), COLUMNS):
        part = columns[start : start + COLUMNS]
        rows = [
            [names[who], *(percent(scores.get(name, {}).get(measure)) for name, measure, _ in part)]
            for who, scores in everyone
        ]
        yield Table(title, ["", *(head for *_, head in part)], rows, detail=detail)


def _changes(record: dict, names: dict[str, str]) -> Table:
    """Every model on every task or probe, row by row against the reference."""
    sure = f"{number(100 * record['confidence'])} % interval"
    rows = [
        [
            names[model["name"]], clean(name), f"{number(100 * one['change'])} pp",
            f"{number(100 * one['low'])} to {number(100 * one['high'])}", str(one["lost"]), str(one["gained"]),
            p_value(one["p"]),
        ]
        for model in record["models"]
        for name, one in model["changes"].items()
    ]  # fmt: skip
    head = ["", "task", "change", sure, "rows worse", "better", "p"]
    notes = (
        "two-sided, each by itself: right-or-wrong rows by Tango's interval and McNemar's exact test, other scores by"
        " a paired bootstrap and a sign-flip test; what decides are the bounds at the top",
    )
    return Table("Change on the same rows", head, rows, notes if rows else ())


def _texts(record: dict, names: dict[str, str]) -> Table:
    head = ["", "text", "tokens", "cross-entropy", "entropy", "KL", "KL by document", "same word", "noise (KL)"]
    rows = []
    for model in record["models"]:
        for text in record["texts"]:
            if (told := model["divergence"].get(text["name"])) is None:
                continue
            means, documents = told["per_token"], told["per_document"]
            rows.append(
                [
                    names[model["name"]], clean(text["name"]), f"{text['tokens']:,}",
                    *(f"{means[key]:.3f}" for key in ("cross_entropy", "entropy")), f"{means['kl']:.3g}",
                    f"{documents['kl']:.3g}", percent(means["agree"]), f"{text['noise']['kl']:.2g}",
                ]
            )  # fmt: skip
    notes = tuple(f"{clean(text['name'])}: {_measured(text)}" for text in record["texts"])
    notes += tuple(
        f"{names[model['name']]}, {clean(text)}: {percent(mass)} of the predictions are words that only one of the two "
        "models has"
        for model in record["models"]
        for text, told in model["divergence"].items()
        if (mass := outside(told["per_token"])) >= 0.001
    )
    return Table("Predictions against the reference's own, nats per token", head, rows, notes)


def outside(means: dict) -> float:
    """The probability of words that only one of the two models has; the other's is 0."""
    return means["outside_reference"] + means["outside_model"]


def _measured(text: dict) -> str:
    told = text["windows"]
    if "stride" not in told:
        return f"at the answers; rows of up to {told['max_length']:,} tokens"
    return f"windows of {told['length']:,} tokens, {told['stride']:,} apart"


def _agreement(record: dict, names: dict[str, str]) -> Table:
    told = [one["name"] for one in record["columns"]]
    told = [name for name in told if any(model["agreement"].get(name) is not None for model in record["models"])]
    rows = [[names[one["name"]], *(_share(one["agreement"].get(name)) for name in told)] for one in record["models"]]
    return Table("Same answer as the reference, right or wrong", ["", *map(clean, told)], rows if told else [])


def _refusals(record: dict, names: dict[str, str]) -> Table:
    told = list(record["reference_refusals"])
    everyone = [(record["reference"]["name"], record["reference_refusals"])]
    everyone += [(model["name"], model["refusals"]) for model in record["models"]]
    rows = [[names[name], *(rate(shares[one]) for one in told)] for name, shares in everyone]
    head = ["", *(f"{clean(name)} ({record['reference_refusals'][name]['answers']:,})" for name in told)]
    notes = tuple(f"{clean(name)}: {_judge_error(judge)}" for name, judge in record["judges"].items())
    return Table("Answers that refuse, by judge", head, rows if told else [], notes)


def _judge_error(judge: dict) -> str:
    false, missed = judge["false_refusals"], judge["missed_refusals"]
    if false is None:
        return f"how often it is wrong was {clean(judge['on'])}"
    return (
        f"calls {rate(false)} of {false['answers']} answers refusals and misses {rate(missed)} of "
        f"{missed['answers']} refusals; on {clean(judge['on'])}"
    )


def rate(told: dict) -> str:
    """A share with its interval: `4 % (2 to 8)`."""
    return f"{percent(told['share'])} ({number(100 * told['low'])} to {number(100 * told['high'])})"


def _sanity(record: dict, names: dict[str, str]) -> Iterator[Table]:
    kinds = ("answers", *PROBLEMS)
    everyone = [(record["reference"]["name"], record["reference_sanity"])]
    everyone += [(model["name"], model["sanity"]) for model in record["models"]]
    for prompts in record["reference_sanity"]:
        rows = [[names[name], *(str(told[prompts].get(kind, 0)) for kind in kinds)] for name, told in everyone]
        title = "general prompts" if prompts == OWN_ANSWERS else clean(prompts)
        yield Table(f"Answers to {title}", ["", *(kind.replace("_", " ") for kind in kinds)], rows)


def _where(record: dict, model: dict, names: dict[str, str]) -> Table:
    """Of each breakdown the groups with the most of the change, of those that moved more than the text."""
    sure = f"{number(100 * record['confidence'])} % interval"
    head = ["", "by", "text", "tokens", "share of tokens", "share of KL", "KL", sure, "same word"]
    rows = [
        [
            clean(group["name"]), said, clean(text), f"{group['tokens']:,}", percent(group["share_of_tokens"]),
            percent(group["share_of_kl"]), f"{group['kl']:.3g}", f"{group['low']:.3g} to {group['high']:.3g}",
            percent(group["agree"]),
        ]
        for text in model["where"]
        for kind, said in SAID_OF.items()
        for group in sorted(_above(record, model, text, kind), key=lambda one: -one["share_of_kl"])[:MOST_GROUPS]
    ]  # fmt: skip
    return Table(
        f"Where {names[model['name']]} moved more than on the whole text, nats per token", head, rows, detail=True
    )


def _furthest(record: dict, model: dict, names: dict[str, str]) -> Table:
    noise = {one["name"]: one["noise"]["kl"] for one in record["texts"]}
    rows = [
        [
            clean(one["name"].rpartition("/")[2]),
            clean(text),
            str(one["tokens"]),
            f"{one['kl']:.3g}",
            percent(one["agree"]),
        ]
        for text, told in model["where"].items()
        for one in told[DOCUMENTS][:MOST_DOCUMENTS]
        if one["kl"] > noise[text]
    ]
    head = ["", "text", "tokens", "KL", "same word"]
    return Table(f"Documents where {names[model['name']]} moved furthest, nats per token", head, rows, detail=True)


def _recovery(record: dict, names: dict[str, str]) -> Table:
    """Scores over the steps on old rows, of what was lost."""
    told = [
        (names[model["name"]], task, entry)
        for model in record["models"]
        for task, entry in model.get("recovery", {}).items()
        if entry["steps"]
    ]
    rows = [
        [name, clean(task), str(entry["rows"]), *(_curve(entry[who]) for who in ("recovered", "control", "base"))]
        for name, task, entry in told
    ]
    after = ", ".join(map(str, told[0][2]["steps"])) if told else ""
    title = f"Lost or hidden? Scores after {after} steps on old rows"
    return Table(title, ["", "task", "old rows", "this model", "the reference", "its untouched base"], rows)


def remedies_table(model: dict, names: dict[str, str]) -> Table:
    """Every remedy that was tried, what it gives back and costs, and how to have it."""
    rows = [
        [
            remedy_name(one),
            clean(one["why"]) or gives_back(one),
            costs_of(one) or "-",
            ", ".join(f"{clean(text)} {number(told['kl'])}" for text, told in one["texts"].items()) or "-",
            how(one),
        ]
        for one in model.get("remedies") or []
    ]
    head = ["remedy", "gives back", "other tasks", "KL", "how"]
    notes = (
        "changes against the model as it is, on the same rows, with intervals that hold for all of them together; the "
        "best was picked on these rows, so audit what you deploy on others",
    )
    return Table(f"What would help {names[model['name']]}", head, rows, notes)


def _curve(scores: list[float] | None) -> str:
    return " → ".join(map(percent, scores)) if scores else "-"


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
    return Table(f"Weights: the update of {names[model['name']]}{updated(model, names)}", head, rows)


def updated(model: dict, names: dict[str, str]) -> str:
    """' against its own base': what a model's update is an update of, which need not be the reference."""
    told = model.get("update_of")
    return f" against {names.get(told, told)}" if told else ""


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)


def print_tables(tables: Iterable[Table], console: Console) -> None:
    """Each table with its notes below it."""
    for table in tables:
        console.print()
        console.print(rich_table(table))
        for note in table.notes:
            console.print(Text(note, style="dim"))


def rich_table(table: Table) -> RichTable:
    drawn = RichTable(title=Text(table.title, style="bold"), title_justify="left")
    for place, name in enumerate(table.head):
        drawn.add_column(Text(name), justify="left" if place == 0 else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn
