"""The HTML page of an audit: what audit.json and its evidence say, as sentences, drawings and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from forgetless.auditing.budgets import MAX_DROP, MAX_KL, written
from forgetless.auditing.evidence import FORMAT, verdict_of
from forgetless.auditing.measures import REFERENCE
from forgetless.auditing.verdict import (
    INSUFFICIENT,
    OVER,
    PASS,
    REGRESSION,
    UNCLEAR,
    WITHIN,
    WORSE,
    Finding,
    Verdict,
)  # fmt: skip
from forgetless.errors import RunError, UsageError
from forgetless.forgetting.texts import OWN_ANSWERS
from forgetless.report import charts, contents, words
from forgetless.report.audit import (
    PROBLEMS,
    earlier_audits,
    other_measures,
    outside,
    rate,
    remedies_table,
    remedy_lines,
    sentences,
    short_names,
    tables,
    updated,
)
from forgetless.report.glossary import AUDIT_GLOSSARY, OF_METRIC
from forgetless.report.pieces import LONGEST_TEXT, MOST_TEXTS, bar, cell, forest, heatmap, place, render, row
from forgetless.report.verdict import amount, bounds, finding_cells, finding_head, in_words, named
from forgetless.report.words import clean, number, percent, signed
from forgetless.runs.folder import read_lines, write_whole
from forgetless.runs.seal import own_hash, read_sealed
from forgetless.score.intervals import wilson
from forgetless.score.scorers import RIGHT_OR_WRONG

PAGE = "audit.html"
BADGES = {PASS: "good", REGRESSION: "bad", INSUFFICIENT: "unsure", None: "none"}
SIGNS = {OVER: "bad", WORSE: "bad", UNCLEAR: "unsure", WITHIN: "good"}
FIRST, FIRST_OF_MANY = 6, 3  # sentences of a model that are not folded away; the second for more than two models
MOST_NAMED = 3  # tasks of one budget
MOST_GROUPS = 8  # of a way of grouping tokens that are drawn; the table beneath has them all

WHERE = {
    "domain": ("By domain", "domain", "what the document is about"),
    "token_type": ("By kind of token", "token-type", "what the next token is"),
    "place": ("By place", "place", "how far into its document the token stands"),
    "certainty": ("By the reference's certainty", "certainty", "how sure the reference was of the next word"),
    "documents": ("By document", "document", "the documents whose predictions moved most"),
}
"""Way of grouping the tokens of a text -> heading, glossary anchor, what it tells."""
AGAIN = "restore it from a copy, or run the audit again"


def render_audit(record: dict, evidence: dict, texts: Sequence[dict] = ()) -> str:
    """The page as text; `texts`: the turned rows with their texts, for show_text only."""
    return render("audit_page.html.jinja", view(record, evidence, texts))


def redraw(folder: Path, output_dir: Path | None = None, show_text: bool = False) -> Path:
    """Draws the page of an audit's folder again. Raises where the folder's files are not of one audit."""
    record, evidence = (read_sealed(folder / name, AGAIN, reads=FORMAT) for name in ("audit.json", "evidence.json"))
    if record["evidence"] != own_hash(evidence):
        raise RunError(f"{folder}: audit.json and evidence.json are not of the same audit; run the audit again")
    if show_text and not (folder / "texts.jsonl").exists():
        raise UsageError(f"{folder}: no texts.jsonl; run the audit again with --show-text")
    file = (output_dir or folder) / PAGE
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, render_audit(record, evidence, read_lines(folder / "texts.jsonl") if show_text else ()))
    return file


def view(record: dict, evidence: dict, texts: Sequence[dict] = ()) -> dict:
    """What the template draws: texts, cells and places."""
    names = short_names(record)
    verdicts = {one["name"]: verdict_of(one) for one in evidence["models"]}
    findings = [(i, one) for i, model in enumerate(record["models"]) for one in verdicts[model["name"]].findings]
    return {
        "title": _title(record, names),
        "reference": names[record["reference"]["name"]],
        "confidence": number(100 * record["confidence"]),
        "earlier": earlier_audits(record),
        "budgets": _budgets(findings),
        "models": [_model(record, one, verdicts[one["name"]], names, i) for i, one in enumerate(record["models"])],
        "cards": _cards(record, findings, names),
        "losses": [one for option in (MAX_DROP, MAX_KL) for one in _losses(record, findings, names, option)],
        "matrix": _matrix(record, names),
        "turned": _turned(record, findings, names),
        "texts": [
            _text(record, text, names)
            for text in record["texts"]
            if any(text["name"] in one["divergence"] for one in record["models"])
        ],
        "where": [part for text in record["texts"] for part in [_where(record, text["name"], names)] if part["charts"]],
        "refusals": _refusals(record, names),
        "judges": _judges(record),
        "sanity": [_sanity(record, prompts, names) for prompts in record["reference_sanity"]],
        "weights": _weights(record, names),
        "recovery": _recovery(record, names),
        "remedies": _remedies(record, names),
        "notes": [clean(note) for note in dict.fromkeys(record["notes"])],
        "rows": [_turned_texts(record, texts, column, names) for column in record["columns"]] if texts else [],
        "metrics": _metrics(record),
        "probes": record["probes"],
        "sources": record["texts"],
        "tables": [_numbers(table.head, table.rows, table.title) for table in tables(record)],
        "facts": _facts(record, evidence),
        "glossary": AUDIT_GLOSSARY,
    }


def _title(record: dict, names: dict[str, str]) -> str:
    models = [names[one["name"]] for one in record["models"]]
    who = models[0] if len(models) == 1 else " and ".join(models) if len(models) == 2 else f"{len(models)} models"
    return f"What {who} forgot"


# ---- in plain words --------------------------------------------------------------------------------


def _model(record: dict, model: dict, verdict: Verdict, names: dict[str, str], i: int) -> dict:
    """A model's verdict and sentences, what is over its budget first."""
    badge, _, rest = in_words(verdict).partition(": ")
    told = sorted(sentences(record, model["name"], verdict), key=lambda one: _rank(one[0]))
    lines = [_sentence(*one) for one in told]
    first = FIRST if len(record["models"]) <= 2 else FIRST_OF_MANY
    return {
        "label": names[model["name"]],
        "slot": i % charts.COLOURS,
        "badge": badge if rest else "no verdict",
        "sign": "unsure" if verdict.waived else BADGES[verdict.outcome],
        "verdict": f"{_capital(rest or badge)}. {_lead(verdict)}".strip(),
        "lines": lines[:first],
        "more": lines[first:],
    }


def _rank(finding: Finding | None) -> int:
    """What decides the verdict comes first, then losses without a budget, then what is well."""
    order = (OVER, UNCLEAR, WORSE, WITHIN)
    return order.index(finding.status) if finding and finding.status in order else len(order)


def _lead(verdict: Verdict) -> str:
    """The largest loss of a score, in words."""
    drops = [one for one in verdict.findings if one.option == MAX_DROP and one.loss is not None]
    shown = [one for one in drops if one.low > 0]
    if not shown:
        return "No loss of a score is shown." if drops else ""
    worst = max(shown, key=lambda one: one.loss or 0.0)
    return f"The largest: {named(worst)} lost {words.points(worst.loss or 0.0)}."


def _sentence(finding: Finding | None, said: str) -> dict:
    """A sentence parted into the name of what it tells of and the rest."""
    head = named(finding) if finding and said.startswith(f"{named(finding)}:") else ""
    return {"name": head, "text": said[len(head) :], "sign": SIGNS.get(finding.status, "") if finding else ""}


def _budgets(findings: list[tuple[int, Finding]]) -> list[str]:
    """Each limit with its unit and the names that it holds for, once for all models."""
    limits: dict[tuple[str, float], dict[str, None]] = {}
    for _, one in findings:
        if one.budget is not None:
            limits.setdefault((one.option, one.budget), {})[named(one)] = None
    return [_budget(option, limit, list(names)) for (option, limit), names in limits.items()]


def _budget(option: str, limit: float, names: list[str]) -> str:
    what, unit = ("tasks and probes", "") if option == MAX_DROP else ("texts", " nats/token")
    who = ", ".join(names) if len(names) <= MOST_NAMED else f"each of {len(names)} {what}"
    return f"{written(option, limit)}{unit} for {who}"


def _cards(record: dict, findings: list[tuple[int, Finding]], names: dict[str, str]) -> list[dict]:
    """The figures that people look for first, for each model."""
    own = [[one for j, one in findings if j == i and one.loss is not None] for i in range(len(record["models"]))]
    told: list[tuple[str, str, Callable[[list[Finding], dict], str | None]]] = [
        ("Largest loss shown", "lost", lambda ones, _: _largest_loss(ones)),
        ("Most that may be lost", "bound", lambda ones, _: _most_lost(ones)),
        ("Predictions moved most", "kl", _moved_most),
        ("Likeliest word the same", "agreement", _least_agreement),
    ]
    cards = []
    for name, anchor, value in told:
        values = [value(ones, model) for ones, model in zip(own, record["models"], strict=True)]
        if any(values):
            labels = [names[model["name"]] for model in record["models"]]
            cards.append({"name": name, "anchor": anchor, "values": list(zip(labels, values, strict=True))})
    return cards


def _largest_loss(findings: list[Finding]) -> str | None:
    drops = [one for one in findings if one.option == MAX_DROP]
    shown = [one for one in drops if one.low > 0]
    if not shown:
        return "none" if drops else None
    worst = max(shown, key=lambda one: one.loss or 0.0)
    return f"{amount(worst, worst.loss or 0.0)}: {named(worst)}"


def _most_lost(findings: list[Finding]) -> str | None:
    drops = [one for one in findings if one.option == MAX_DROP]
    worst = max(drops, key=lambda one: one.high, default=None)
    return None if worst is None else f"{amount(worst, worst.high)}: {named(worst)}"


def _moved_most(_: list[Finding], model: dict) -> str | None:
    kl = {name: told["per_token"]["kl"] for name, told in model["divergence"].items()}
    name = max(kl, key=lambda one: kl[one], default=None)
    return None if name is None else f"{kl[name]:.3g} nats/token: {clean(name)}"


def _least_agreement(_: list[Finding], model: dict) -> str | None:
    agree = {name: told["per_token"]["agree"] for name, told in model["divergence"].items()}
    name = min(agree, key=lambda one: agree[one], default=None)
    return None if name is None else f"{percent(agree[name])}: {clean(name)}"


# ---- losses ----------------------------------------------------------------------------------------


def _losses(
    record: dict, findings: list[tuple[int, Finding]], names: dict[str, str], option: str
) -> Iterator[dict]:  # fmt: skip
    """Every loss with its bounds and its budget, all models under one another; one drawing a unit."""
    found = [(i, one) for i, one in findings if one.option == option]
    if not found:
        return
    scale = 100 if option == MAX_DROP else 1
    noise = {one["name"]: one["noise"]["kl"] for one in record["texts"]} if option == MAX_KL else {}
    labels = [names[model["name"]] for model in record["models"]]
    groups = _grouped((named(one), partial(_loss, one, labels[i], i, scale, noise)) for i, one in found)
    ends = [scale * value for _, one in found for value in (one.low, one.high, one.loss or 0.0, one.budget or 0.0)]
    drop = option == MAX_DROP
    table = [[labels[i], *finding_cells(one)] for i, one in found]
    head = ["model", "task or probe" if drop else "text", *finding_head(record["confidence"])[1:]]
    plain = number if drop else words.figure
    yield {
        "heading": "Scores lost" if drop else "Predictions moved",
        "anchor": "lost" if drop else "kl",
        "about": "in points of the mean score; left of 0 is a gain"
        if drop
        else "in nats per token, the mean over documents",
        "forest": forest(
            _headed(groups, labels), ends, "points lost" if drop else "nats/token", lambda tick: _minus(plain(tick))
        ),
        "numbers": _numbers(head, table),
        "budgeted": any(one.budget is not None for _, one in found),
        "noise": bool(noise),
    }


def _loss(finding: Finding, who: str, i: int, scale: int, noise: dict[str, float], ticks: list[float]) -> dict:
    low, high = scale * finding.low, scale * finding.high
    stops = [("limit", place(scale * finding.budget, ticks))] if finding.budget is not None else []
    stops += [("noise", place(noise[finding.name], ticks))] if finding.name in noise else []
    loss = "no rows" if finding.loss is None else amount(finding, finding.loss).replace(" nats/token", "")
    budget = "" if finding.budget is None else f", budget {written(finding.option, finding.budget)}"
    return _line(
        who, i, _minus(loss),
        bars=[bar("range", low, high, ticks)],
        at=None if finding.loss is None else place(scale * finding.loss, ticks),
        stops=stops,
        shown=finding.status in SIGNS and finding.status != UNCLEAR,
        between=_minus(bounds(finding)),
        found=finding.status + ", waived" * finding.waived,
        sign=SIGNS.get(finding.status, ""),
        title=f"{who}, {named(finding)}: {loss} lost ({bounds(finding)}){budget}: {finding.status}",
        desc=f"{finding.rows} rows or documents.",
    )  # fmt: skip


def _line(
    who: str, i: int, text: str, *, bars: list[dict], title: str, desc: str = "", at: float | None = None,
    stops: Iterable[tuple[str, float]] = (), shown: bool = True, between: str = "", found: str = "", sign: str = "",
) -> dict:  # fmt: skip
    """One line of a forest: whose it is, what is drawn, what is said beside it."""
    return {
        "who": who, "slot": i % charts.COLOURS, "text": text, "bars": bars, "title": title, "desc": desc, "at": at,
        "stops": list(stops), "shown": shown, "between": between, "found": found, "sign": sign,
    }  # fmt: skip


def _grouped(lines: Iterable[tuple[str, Callable]]) -> list[dict]:
    """Lines under the names that they stand under, in the order in which the names come."""
    groups: dict[str, list[Callable]] = {}
    for name, draw in lines:
        groups.setdefault(name, []).append(draw)
    return [{"name": name, "lines": drawn} for name, drawn in groups.items()]


def _headed(groups: list[dict], models: list[str]) -> list[dict]:
    """Of one model the lines have the groups' names, and stand under no heading."""
    if len(models) > 1:
        return groups
    return [{"name": "", "lines": [partial(_renamed, draw, one["name"]) for one in groups for draw in one["lines"]]}]


def _renamed(draw: Callable[[list[float]], dict], who: str, ticks: list[float]) -> dict:
    return draw(ticks) | {"who": who}


def _minus(text: str) -> str:
    return text.replace("-", "−") if "e-" not in text else text


# ---- scores and turned rows ------------------------------------------------------------------------


def _matrix(record: dict, names: dict[str, str]) -> dict | None:
    """The reference's scores, then each model's, with what became of them."""
    columns = record["columns"]
    if not columns:
        return None
    before = record["reference_scores"]
    rows = [row(names[record["reference"]["name"]], "reference", [_score(record, one, before) for one in columns])]
    for i, model in enumerate(record["models"]):
        cells = [_score(record, one, model["scores"], before, model) for one in columns]
        rows.append(row(names[model["name"]], "", cells, first=i == 0))
    return heatmap([{"name": one["name"], "test": one["rows"]} for one in columns], rows)


def _score(
    record: dict, column: dict, scores: dict, before: dict | None = None, model: dict | None = None
) -> dict:  # fmt: skip
    """A score; of a model with its change against the reference, rows that turned and agreement in the tooltip."""
    name, measure, n = column["name"], column["measure"], column["rows"]
    if name not in scores:
        return cell(None, "", ["not measured"])
    score = scores[name][measure]
    said = [f"{percent(score)} of {n:,} rows by {measure}"]
    if score is not None and measure in RIGHT_OR_WRONG and n:
        low, high = wilson(round(score * n), n, record["confidence"])
        said.append(f"{number(100 * record['confidence'])} % interval {number(100 * low)} to {number(100 * high)}")
    said += [f"{percent(scores[name][other])} by {other}" for other in other_measures(record, column)]
    then = before[name][measure] if before else None
    change = "" if then is None or score is None else f"{signed(100 * (score - then))} pp"
    if model:
        said += [f"{worse} worse, {better} better" for worse, better in [_turns(model, name)] if worse is not None]
        agree = model["agreement"].get(name)
        said += [f"same answer as the reference in {percent(agree)}"] if agree is not None else []
    return cell(score, change, said)


def _turns(model: dict, name: str) -> tuple[int | None, int | None]:
    """Rows of a task that score less than the reference's, and more."""
    told = (one for one in model["findings"] if (one["name"], one["against"]) == (name, REFERENCE))
    finding = next((one for one in told if one["option"] == MAX_DROP), None)
    return (finding["lost"], finding["gained"]) if finding else (None, None)


def _turned(record: dict, findings: list[tuple[int, Finding]], names: dict[str, str]) -> dict | None:
    """Rows that got worse, to the left, and better, to the right, as shares of a task's rows."""
    told = [(i, one) for i, one in findings if one.option == MAX_DROP and one.against == REFERENCE and one.rows]
    if not told:
        return None
    models = record["models"]
    groups = _grouped((clean(one.name), partial(_turn, one, models[i], names, i)) for i, one in told)
    ends = [sign * (many or 0) * 100 / one.rows for _, one in told for sign, many in ((-1, one.lost), (1, one.gained))]
    return forest(_headed(groups, [one["name"] for one in models]), ends, "% of rows", signed)


def _turn(finding: Finding, model: dict, names: dict[str, str], i: int, ticks: list[float]) -> dict:
    who, lost, gained = names[model["name"]], finding.lost or 0, finding.gained or 0
    agree = model["agreement"].get(finding.name)
    same = "" if agree is None else f"same answer {percent(agree)}"
    return _line(
        who, i, f"{lost:,} worse, {gained:,} better",
        bars=[
            bar("lost", -100 * lost / finding.rows, 0, ticks), bar("gained", 0, 100 * gained / finding.rows, ticks)
        ],
        found=same,
        title=f"{who}, {clean(finding.name)}: {lost} of {finding.rows} rows worse, {gained} better",
        desc=same,
    )  # fmt: skip


def _turned_texts(record: dict, texts: Sequence[dict], column: dict, names: dict[str, str]) -> dict:
    """The texts of a task's rows that turned, model by model."""
    measure, mine = column["measure"], [one for one in texts if one.get("task") == column["name"]]
    parts = []
    for model in record["models"]:
        rows = [one for one in mine if one["model"] == model["name"]]
        for way, sign in (("score lower now", -1), ("score higher now", 1)):
            turned = [one for one in rows if sign * _change(one, measure) > 0]
            if turned:
                parts.append({
                    "heading": f"{names[model['name']]}: {len(turned)} rows {way}",
                    "texts": [_row_text(one, measure) for one in turned[:MOST_TEXTS]],
                    "more": max(0, len(turned) - MOST_TEXTS),
                })  # fmt: skip
    return {"task": clean(column["name"]), "parts": parts}


def _change(one: dict, measure: str) -> float:
    return one["after"][measure]["score"] - one["before"][measure]["score"]


def _row_text(one: dict, measure: str) -> dict:
    row = one["row"]
    turns = [turn for turn in row.get("messages", []) if turn["role"] != "assistant"]
    prompt = contents.shown_prompt(turns or row.get("prompt") or row.get("text", ""))
    before, after = one["before"][measure], one["after"][measure]
    return {
        "row": one["before"]["row"] + 1,
        "prompt": prompt if len(prompt) <= LONGEST_TEXT else prompt[:LONGEST_TEXT] + " …",
        "gold": clean(one["before"].get("gold", "")) or "(empty)",
        "before": _given(before),
        "after": _given(after),
    }


def _given(told: dict) -> str:
    """The answer, or for a share of tokens the score."""
    return contents.shown(told["answer"]) or "(empty)" if "answer" in told else f"score {words.figure(told['score'])}"


# ---- predictions -----------------------------------------------------------------------------------


def _text(record: dict, text: dict, names: dict[str, str]) -> dict:
    """Cross-entropy as the reference's entropy, which nobody can go below, and what the model added to it."""
    noise = text["noise"]["kl"]
    means = [(i, one, told) for i, one in enumerate(record["models"]) if (told := one["divergence"].get(text["name"]))]
    lines = [partial(_means, names[one["name"]], i, told["per_token"], noise) for i, one, told in means]
    top = [told["per_token"]["cross_entropy"] for *_, told in means]
    head = ["model", "cross-entropy", "entropy", "KL", "KL by document", "same word", "shared words", "other words"]
    rows = [
        [
            names[one["name"]], *(words.figure(told["per_token"][key]) for key in ("cross_entropy", "entropy", "kl")),
            words.figure(told["per_document"]["kl"]), percent(told["per_token"]["agree"]), f"{told['words']:,}",
            percent(outside(told["per_token"])),
        ]
        for _, one, told in means
    ]  # fmt: skip
    return {
        "name": clean(text["name"]),
        "about": f"{text['documents']:,} documents, {text['tokens']:,} tokens",
        "noise": f"{noise:.2g}",
        "forest": forest([{"name": "", "lines": lines}], top, "nats/token", words.figure),
        "numbers": _numbers(head, rows),
    }


def _means(who: str, i: int, told: dict, noise: float, ticks: list[float]) -> dict:
    entropy, kl = told["entropy"], told["kl"]
    size = "within rounding" if kl <= noise else f"{_times(kl / noise)} the rounding" if noise > 0 else ""
    agree = f"same word {percent(told['agree'])}"
    return _line(
        who, i, f"KL {kl:.3g}",
        bars=[bar("floor", 0, entropy, ticks), bar("value", entropy, told["cross_entropy"], ticks)],
        found=", ".join(filter(None, (agree, size))),
        sign="good" if kl <= noise else "",
        title=f"{who}: cross-entropy {told['cross_entropy']:.3g} = entropy {entropy:.3g} + KL {kl:.3g}",
        desc=agree,
    )  # fmt: skip


def _times(factor: float) -> str:
    """How many times, in two digits: a yardstick is no more precise."""
    return f"{float(f'{factor:.2g}'):,.0f} ×" if factor >= 10 else f"{number(factor)} ×"


def _where(record: dict, text: str, names: dict[str, str]) -> dict:
    """In which groups of its tokens the predictions moved."""
    return {"text": clean(text), "charts": list(_where_by(record, text, names))}


def _where_by(record: dict, text: str, names: dict[str, str]) -> Iterator[dict]:
    """KL by group for each way of grouping, the models under one another."""
    for kind, (heading, anchor, meaning) in WHERE.items():
        told = [(i, one.get("where", {}).get(text, {}).get(kind) or []) for i, one in enumerate(record["models"])]
        groups = [(i, group) for i, found in told for group in found]
        if not groups:
            continue
        labels = [names[model["name"]] for model in record["models"]]
        drawn = list(dict.fromkeys(group["name"] for _, group in groups))[:MOST_GROUPS]
        lines = _grouped(
            (clean(one["name"]), partial(_group, one, labels[i], i)) for i, one in groups if one["name"] in drawn
        )
        shown = [group for _, group in groups if group["name"] in drawn]
        ends = [group[side] for group in shown for side in ("kl", "low", "high") if group[side] is not None]
        head = ["group", "model", "tokens", "share of tokens", "share of the KL", "KL", "interval", "same word"]
        yield {
            "heading": heading,
            "anchor": anchor,
            "meaning": meaning,
            "left_out": len({group["name"] for _, group in groups}) - len(drawn),
            "forest": forest(_headed(lines, labels), ends, "nats/token", words.figure),
            "numbers": _numbers(head, [_group_cells(one, labels[i]) for i, one in groups]),
        }


def _group(group: dict, who: str, i: int, ticks: list[float]) -> dict:
    bars = [bar("value", 0, group["kl"], ticks)]
    between = "too few documents for an interval"
    if group["low"] is not None:
        bars.append(bar("whisker", group["low"], group["high"], ticks))
        between = f"{group['low']:.2g} to {group['high']:.2g}"
    return _line(
        who, i, f"{group['kl']:.3g}",
        bars=bars,
        between=between if group["low"] is not None else "",
        found=f"{_share_of_kl(group)} of KL, {percent(group['share_of_tokens'])} of tokens",
        title=f"{who}, {clean(group['name'])}: KL {group['kl']:.3g} ({between}) nats/token",
        desc=f"{group['tokens']} tokens; same word {percent(group['agree'])}.",
    )  # fmt: skip


def _group_cells(group: dict, who: str) -> list[str]:
    return [
        clean(group["name"]), who, f"{group['tokens']:,}", percent(group["share_of_tokens"]),
        _share_of_kl(group), words.figure(group["kl"]),
        "-" if group["low"] is None else f"{words.figure(group['low'])} to {words.figure(group['high'])}",
        percent(group["agree"]),
    ]  # fmt: skip


def _share_of_kl(group: dict) -> str:
    return "-" if group["share_of_kl"] is None else percent(group["share_of_kl"])


# ---- answers ---------------------------------------------------------------------------------------


def _everyone(record: dict, key: str, names: dict[str, str]) -> Iterator[tuple[int, str, dict]]:
    """The reference's part and each model's; the reference has a colour of its own."""
    yield -1, names[record["reference"]["name"]], record[f"reference_{key}"]
    for i, model in enumerate(record["models"]):
        yield i, names[model["name"]], model[key]


def _refusals(record: dict, names: dict[str, str]) -> dict | None:
    """What each judge calls a refusal, as a share of a probe's answers."""
    if not record["reference_refusals"]:
        return None
    everyone = list(_everyone(record, "refusals", names))
    groups = [
        {"name": clean(name), "lines": [partial(_refusal, told[name], who, i) for i, who, told in everyone]}
        for name in record["reference_refusals"]
    ]
    return forest(groups, [0, 100], "% refused", number)


def _refusal(told: dict, who: str, i: int, ticks: list[float]) -> dict:
    between = f"{number(100 * told['low'])} to {number(100 * told['high'])}"
    return _line(
        who, i, percent(told["share"]),
        bars=[bar("value", 0, 100 * told["share"], ticks),
              bar("whisker", 100 * told["low"], 100 * told["high"], ticks)],
        between=between,
        found=f"of {told['answers']:,} answers",
        title=f"{who}: {percent(told['share'])} refused",
        desc=between,
    )  # fmt: skip


def _judges(record: dict) -> dict | None:
    """How often each judge errs, where it was measured."""
    if not record.get("judges"):
        return None
    rows = [
        [clean(judge), *(_wrong(told[kind]) for kind in ("false_refusals", "missed_refusals")), clean(told["on"])]
        for judge, told in record["judges"].items()
    ]
    return _numbers(["judge", "answers taken for refusals", "refusals taken for answers", "measured on"], rows)


def _wrong(told: dict | None) -> str:
    return "-" if told is None else f"{rate(told)} of {told['answers']:,}"


def _sanity(record: dict, prompts: str, names: dict[str, str]) -> dict:
    """How many answers have each problem, with each count's share of the answers."""
    lines = []
    for _, who, told in _everyone(record, "sanity", names):
        answers = told[prompts]["answers"]
        counts = [told[prompts].get(problem, 0) for problem in PROBLEMS]
        lines.append((who, answers, [{"many": one, "heat": round(100 * one / max(1, answers))} for one in counts]))
    name = "general prompts" if prompts == OWN_ANSWERS else clean(prompts)
    return {"name": name, "head": [problem.replace("_", " ") for problem in PROBLEMS], "lines": lines}


# ---- weights and recovery --------------------------------------------------------------------------


def _weights(record: dict, names: dict[str, str]) -> list[dict]:
    """Each model's update by kind of module, the bars on one scale for all."""
    kinds = [one for model in record["models"] for one in model["weights"]]
    keys = ("relative_norm", "effective_rank")
    largest = {key: max((one[key] or 0 for one in kinds), default=0) or 1 for key in keys}
    return [
        {
            "label": names[model["name"]],
            "against": updated(model, names),
            "slot": i % charts.COLOURS,
            "rows": [
                one | {"module": clean(one["module"])}
                | {f"{key}_share": round(100 * (one[key] or 0) / top) for key, top in largest.items()}
                for one in model["weights"]
            ],
        }
        for i, model in enumerate(record["models"])
        if model["weights"]
    ]  # fmt: skip


def _recovery(record: dict, names: dict[str, str]) -> dict | None:
    """A small chart a task: the score of a copy that is shown a few old rows, and of the healthy control."""
    told = [(i, one, one.get("recovery") or {}) for i, one in enumerate(record["models"])]
    tasks = list(dict.fromkeys(task for *_, found in told for task in found))
    if not tasks:
        return None
    runs = {
        task: [(i, found[task]) for i, _, found in told if task in found and found[task]["steps"]] for task in tasks
    }
    return {
        "charts": [_recovered(task, found) for task, found in runs.items() if found],
        "sentences": [
            {"model": names[one["name"]], "task": clean(task), "text": clean(found[task]["sentence"])}
            for _, one, found in told
            for task in found
        ],
        "keys": [(names[one["name"]], i % charts.COLOURS) for i, one, found in told if found],
        "numbers": _numbers(
            ["model", "task", "steps", "reference", "model's score", "recovered", "healthy control", "untouched base"],
            [
                [
                    names[one["name"]], clean(task), ", ".join(map(str, run["steps"])), percent(run["reference"]),
                    percent(run["model"]), *(", ".join(map(percent, run[key] or [])) or "-"
                      for key in ("recovered", "control", "base")),
                ]
                for _, one, found in told
                for task, run in found.items()
                if run["steps"]
            ],
        ),
    }  # fmt: skip


def _remedies(record: dict, names: dict[str, str]) -> list[dict]:
    """For each model of which remedies were tried: the best in a sentence, all in a table."""
    return [
        {
            "label": names[model["name"]],
            "slot": i % charts.COLOURS,
            "sentences": remedy_lines(record, model["name"]),
            "numbers": _numbers(table.head, table.rows, table.title),
            "notes": table.notes,
        }
        for i, model in enumerate(record["models"])
        for table in [remedies_table(model, names)]
        if table.rows
    ]


def _recovered(task: str, runs: list[tuple[int, dict]]) -> dict:
    """In the form of the small charts: the copies' lines drawn out, the controls' dashed, the reference a level."""
    last = max((step for _, run in runs for step in run["steps"]), default=0)
    x = charts.scale(0, max(1, last), charts.MINI["left"] + 4, charts.MINI["right"] - 4)
    y = charts.scale(0, 1, charts.MINI["bottom"], charts.MINI["top"])
    lines = []
    for i, run in runs:
        paths = {key: charts.svg_path([(x(s), y(v)) for s, v in zip(run["steps"], run[key], strict=False)])
                 for key in ("recovered", "control")}  # fmt: skip
        points = [
            {"x": x(step), "y": y(score), "learnt": k == 0, "title": f"after {step} steps: {percent(score)}"}
            for k, (step, score) in enumerate(zip(run["steps"], run["recovered"], strict=False))
        ]
        lines.append({
            "slot": i % charts.COLOURS, "path": paths["recovered"], "faint": paths["control"], "points": points
        })  # fmt: skip
    return {
        "name": task,
        "desc": " ".join(clean(run["sentence"]) for _, run in runs),
        "lines": lines,
        "ends": [(i % charts.COLOURS, percent(run["recovered"][-1])) for i, run in runs if run["recovered"]],
        "level": y(runs[0][1]["reference"]),
        "y_ticks": [(y(tick), str(round(100 * tick))) for tick in (0, 0.5, 1)],
    }


# ---- details ---------------------------------------------------------------------------------------


def _metrics(record: dict) -> list[dict]:
    return [
        told | {
            "anchor": OF_METRIC.get(key, ""),
            "text": words.metric_value(key, told["value"]) or words.reason(told),
        }
        for key, told in (record["metrics"] or {}).items()
    ]  # fmt: skip


def _facts(record: dict, evidence: dict) -> dict[str, list[tuple[str, str]]]:
    """Who was compared, on what terms, with which settings, hashes and versions."""
    models = {one["name"]: one["identity"] for one in record["models"]}
    return {
        "what was compared": contents.flat({"reference": record["reference"]["name"]} | record["reference"]["identity"])
        + contents.flat(models),
        "terms": contents.flat(evidence["terms"]),
        "settings": contents.flat(evidence["settings"]),
        "hashes (sha256)": contents.flat(
            {key: evidence[key] for key in ("weights", "data", "policy")} | {"evidence": record["evidence"]}
        ),
        "versions": contents.flat(evidence["versions"]),
    }


def _numbers(head: list[str], rows: list[list[str]], title: str = "") -> dict:
    """A table for the template; the first column names the row."""
    return {"head": head, "rows": rows, "title": title}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
