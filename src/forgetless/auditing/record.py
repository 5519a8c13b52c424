"""What an audit found, as the JSON that tables and reports are made of. No row's text, no answer."""

from __future__ import annotations

from dataclasses import asdict

from forgetless.auditing.judges import LABELLED, JudgeError, rate
from forgetless.auditing.measures import REFERENCE
from forgetless.auditing.measuring import Found, Rows, Side
from forgetless.auditing.probes import agreement
from forgetless.auditing.recovery import treatment_of
from forgetless.auditing.sanity import counted, problems
from forgetless.auditing.session import AuditSession
from forgetless.auditing.weights import by_module, update_of, weight_updates
from forgetless.auditing.where import DOCUMENTS, Breakdown, breakdowns, where
from forgetless.data.tasks import Task
from forgetless.errors import ForgetlessError
from forgetless.forgetting.divergence import Divergence
from forgetless.forgetting.texts import OWN_ANSWERS, Text, prompt_of
from forgetless.score.intervals import paired_change
from forgetless.score.metrics import metrics
from forgetless.score.scorers import TaskScores, headline
from forgetless.subjects.endpoint import Endpoint
from forgetless.subjects.models import Subject

FORMAT = 1


def audit_record(session: AuditSession, found: Found, evidence: dict) -> dict:
    """The content of audit.json."""
    side = found.sides[REFERENCE]
    verdicts = {model["name"]: model for model in evidence["models"]}
    tokenizer = session.reference.tokenizer
    groups = {name: breakdowns(text, side.states[name].windows, tokenizer) for name, text in found.texts.items()}
    return {
        "format": FORMAT,
        "reference": session.reference.as_json(),
        "confidence": evidence["terms"]["confidence"],
        "computed_on": session.engine.told,
        "evidence": evidence["sha256"],
        "outcome": evidence["outcome"],
        "columns": [_column(session, task) for task in session.scored],
        "probes": [probe.about() for probe in session.probes],
        "texts": [_text(found, name, side) for name in found.texts],
        "reference_scores": {name: _means(one) for name, one in side.rows.scores.items()},
        "reference_refusals": _refusals(session, side.rows, evidence),
        "reference_sanity": _sanity(session, side.rows),
        "models": [_model(session, found, one, verdicts[one.name], evidence, groups) for one in session.audited],
        "judges": {name: _judge(error, evidence) for name, error in found.judge_errors.items()},
        "metrics": _metrics(session, found),
        "treatment": asdict(treatment_of(session)) if session.config.recover else None,
        "notes": session.notes,
    }


def _model(
    session: AuditSession, found: Found, subject: Subject | Endpoint, judged: dict, evidence: dict,
    groups: dict[str, dict[str, Breakdown]],
) -> dict:  # fmt: skip
    rows, side = found.rows[subject.name], found.sides[REFERENCE]
    told = found.divergences.get(subject.name, {})
    divergences = {name: one for (role, name), one in told.items() if role == REFERENCE}
    scored = [task for task in session.scored if task.name in rows.scores]
    return subject.as_json() | {
        "outcome": judged["outcome"],
        "findings": judged["findings"],
        "scores": {name: _means(one) for name, one in rows.scores.items()},
        "changes": {task.name: _change(task, side.rows, rows, judged["confidence"]) for task in scored},
        "agreement": {task.name: _agreement(task, side.rows, rows) for task in scored},
        "divergence": {name: _divergence(one) for name, one in divergences.items()},
        "where": {
            name: _where(found.texts[name], one, groups[name], judged["confidence"])
            for name, one in divergences.items()
        },
        "refusals": _refusals(session, rows, evidence),
        "sanity": _sanity(session, rows),
        **_weights(session, subject),
        "recovery": found.recovered.get(subject.name, {}),
        "remedies": found.remedies.get(subject.name) if session.config.remedies else None,
        "not_measured": _not_measured(session, found, rows) if isinstance(subject, Endpoint) else [],
    }


def _not_measured(session: AuditSession, found: Found, rows: Rows) -> list[str]:
    """What a server does not give."""
    likelihoods = [f"likelihoods of {task.name}" for task in session.scored if task.name not in rows.scores]
    return [*likelihoods, *(f"predictions on {text}" for text in found.texts), "weights"]


def _column(session: AuditSession, task: Task) -> dict:
    kind = "task" if task in session.tasks else "probe"
    return {"name": task.name, "kind": kind, "measure": headline(task), "rows": len(task.test)}


def _means(scores: TaskScores) -> dict[str, float | None]:
    return {measure: scores.mean(measure) for measure in scores.measures}


def _change(task: Task, reference: Rows, model: Rows, confidence: float) -> dict:
    """The headline's change with a two-sided interval and McNemar's p (other scores: bootstrap, sign-flip test)."""
    before, after = (rows.scores[task.name].measures[headline(task)] for rows in (reference, model))
    return asdict(paired_change(before, after, confidence))


def _agreement(task: Task, reference: Rows, model: Rows) -> float | None:
    """The share of rows with the same answer, right or wrong; None where the headline has no answers."""
    before, after = (rows.scores[task.name].predictions for rows in (reference, model))
    if not {"answer", "found"} & before[0][headline(task)].keys():
        return None
    same = agreement(before, after, headline(task))
    return sum(same) / len(same)


def _text(found: Found, name: str, side: Side) -> dict:
    text, windows = found.texts[name], side.states[name].windows
    return {
        "name": name,
        "source": text.source,
        "documents": windows.documents,
        "tokens": windows.positions,
        "windows": dict(windows.settings),
        "sha256": windows.content,
        "noise": side.noise[name],
    }


def _divergence(found: Divergence) -> dict:
    return {"per_token": found.per_token.as_json(), "per_document": found.per_document.as_json(), "words": found.words}


def _where(text: Text, found: Divergence, groups: dict[str, Breakdown], confidence: float) -> dict[str, list[dict]]:
    return {name: [asdict(one) for one in told] for name, told in where(found, text, groups, confidence).items()}


def _refusals(session: AuditSession, rows: Rows, evidence: dict) -> dict[str, dict]:
    """What each judge calls a refusal, as a share of a probe's answers."""
    shares = {}
    for probe in session.judged:
        for judge, measure in session.judged_names(probe).items():
            if refused := rows.refused[probe.task.name, judge]:
                shares[measure] = rate(sum(refused), len(refused), evidence["terms"]["confidence"])
    return shares


def _judge(error: JudgeError | str, evidence: dict) -> dict:
    """How often a judge is wrong, and where that was measured, or why it was not."""
    if isinstance(error, str):
        return {"false_refusals": None, "missed_refusals": None, "on": error}
    return error.rates(evidence["terms"]["confidence"]) | {"on": LABELLED}


def _sanity(session: AuditSession, rows: Rows) -> dict[str, dict[str, int]]:
    """How many answers to generated prompts have each problem, and how many answers there are."""
    prompts = {OWN_ANSWERS: session.prompts} | {
        probe.task.name: [prompt_of(row) for row in probe.task.test] for probe in session.judged
    }
    return {
        name: {"answers": len(given)}
        | counted(problems(answer, prompt) for prompt, answer in zip(prompts[name], given, strict=True))
        for name, given in rows.answers.items()
    }


def _weights(session: AuditSession, subject: Subject | Endpoint) -> dict:
    """The update by kind of module and by layer, and the model that it is an update of."""
    none: dict = {"weights": [], "layers": [], "update_of": None}
    if not session.config.weights or isinstance(subject, Endpoint):
        return none
    try:
        updates = weight_updates(subject, session.reference, session.engine.device)
    except ForgetlessError as error:
        session.notes.append(f"{subject.name}: its update is not summarised: {error}")
        return none
    return {
        "weights": [asdict(one) for one in by_module(updates)],
        "layers": [asdict(one) | {"relative_norm": one.relative_norm} for one in updates],
        "update_of": update_of(subject, session.reference),
    }


def _metrics(session: AuditSession, found: Found) -> dict[str, dict] | None:
    """The metrics of R where model i is the one after task i: as many models as tasks, two or more."""
    if not 2 <= len(session.tasks) == len(session.models):
        return None
    matrix = [_headlines(session, found.rows[one.name]) for one in session.models]
    sizes = [len(task.test) for task in session.tasks]
    base = _headlines(session, found.sides[REFERENCE].rows)
    return {key: one.as_json() for key, one in metrics(matrix, base, sizes).items()}


def _headlines(session: AuditSession, rows: Rows) -> list[float | None]:
    return [rows.scores[task.name].mean(headline(task)) for task in session.tasks]


# ---------------------------------------------------------------- with texts


def turned_texts(session: AuditSession, found: Found) -> list[dict]:
    """The rows whose score changed, with prompt, right answer and both answers."""
    side = found.sides[REFERENCE]
    return [
        {
            "model": model,
            "task": task.name,
            "row": row.content(),
            "before": before,
            "after": after,
        }
        for model, rows in found.rows.items()
        for task in session.scored
        if task.name in rows.scores
        for row, before, after in zip(
            task.test, side.rows.scores[task.name].predictions, rows.scores[task.name].predictions, strict=True
        )
        if before[headline(task)]["score"] != after[headline(task)]["score"]
    ]


def moved_texts(found: Found, record: dict) -> list[dict]:
    """The documents where each model's predictions moved furthest, with their nats per token."""
    rows = {name: {row.source: row for row in text.rows} for name, text in found.texts.items()}
    return [
        {"model": model["name"], "text": text, "document": one["name"], "kl": one["kl"],
         "row": rows[text][one["name"]].content()}
        for model in record["models"]
        for text, told in model["where"].items()
        for one in told[DOCUMENTS]
    ]  # fmt: skip
