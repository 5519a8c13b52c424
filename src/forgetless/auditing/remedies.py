"""What would help? Remedies for a loss, each measured on the model that lost: what it gives back, and what it costs.

    blend         W(α) = (1 - α) W_reference + α W_model                     a point between both
    scaled down   W + α ΔW                                                   the model's adapter, weakened on its base
    repair        the model after a few steps on old rows of what it lost    as `recovery` does them, all tasks at once
    kept apart    the reference answers the tasks that were lost, the model the others

Every remedy answers the rows that the audit looked at, so its gains and costs are paired with the model's own. Which
of them is best was picked on these rows too: what is deployed is to be audited again, or found by `forgetless blend`,
whose promise holds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from forgetless.auditing import recovery
from forgetless.auditing.measures import REFERENCE
from forgetless.auditing.measuring import Found, Rows, measure_model
from forgetless.auditing.session import AuditSession
from forgetless.auditing.throwaway import repaired
from forgetless.data.batches import Example
from forgetless.data.tasks import Task
from forgetless.errors import DataError, RunError, UsageError
from forgetless.geometry.path import straight_path
from forgetless.progress import steps
from forgetless.score.intervals import paired_change
from forgetless.score.scorers import headline
from forgetless.subjects.models import Opened, Subject, opened

ALPHAS = (0.25, 0.5, 0.75)
REPAIR_STEPS = 20  # where the audit asks for no recovery of its own
BLEND, SCALED, REPAIR, APART = "blend", "scaled down", "repair", "kept apart"


@dataclass(frozen=True)
class Remedy:
    """What was measured of one, or why it was not."""

    kind: str
    strength: str  # α, or steps and rows
    command: str  # what applies it
    rows: Rows | None = None
    kl: dict[str, float] | None = None  # to the reference, nats per token, by text
    why: str = ""


def remedies(session: AuditSession, found: Found) -> dict[str, list[dict]]:
    """Model -> its remedies as JSON; none for a model of which these rows show no loss."""
    told = {}
    for subject in session.models:
        lost = lost_tasks(session, found, subject.name)
        tried = _tried(session, found, subject, lost) if lost else ()
        told[subject.name] = [_as_json(session, found, subject.name, lost, one) for one in tried]
    return told


def lost_tasks(session: AuditSession, found: Found, model: str) -> list[str]:
    """The user's tasks and scored probes on which the rows show the model below the reference."""
    confidence = session.terms.confidence
    return [
        task.name
        for task in session.scored
        for before, after in [_pair(found.sides[REFERENCE].rows, found.rows[model], task)]
        if paired_change(before, after, confidence).high < 0
    ]


def _pair(one: Rows, other: Rows, task: Task) -> tuple[list[float], list[float]]:
    name, measure = task.name, headline(task)
    return one.scores[name].measures[measure], other.scores[name].measures[measure]


# ---------------------------------------------------------------- trying them


def _tried(session: AuditSession, found: Found, subject: Subject, lost: list[str]) -> Iterator[Remedy]:
    tasks = f" --tasks {session.config.tasks}" if session.config.tasks else ""
    budget = f"{tasks} --max-drop " + " ".join(f"{name}=2pp" for name in lost)
    blended = f"forgetless blend {session.reference.name} {subject.name}{budget}"
    yield from _along(session, found, session.reference, subject, BLEND, blended)
    base = recovery.untouched_base(subject)
    if base is not None and session.reference.adapter is not None:
        weakened = replace(base, name=str(base.base))
        command = f"forgetless blend {weakened.name} {subject.name}{budget}"
        yield from _along(session, found, weakened, subject, SCALED, command)
    yield _repaired(session, found, subject, lost)
    yield _apart(session, found, subject, lost)


def _along(
    session: AuditSession, found: Found, start: Subject, subject: Subject, kind: str, command: str
) -> Iterator[Remedy]:
    """Points between a model that lost less and this one."""
    engine = session.engine
    try:
        path = straight_path(start, subject)
    except UsageError as error:
        yield Remedy(kind, "", command, why=str(error))
        return
    with (
        tempfile.TemporaryDirectory(dir=session.folder, prefix=".remedies-") as scratch,
        closing(path.points(ALPHAS, Path(scratch), engine.dtype, engine.device)) as points,
    ):
        for alpha, model in points:
            yield Remedy(kind, f"{alpha:g}", command, *_measured(session, found, subject, model))


def _repaired(session: AuditSession, found: Found, subject: Subject, lost: list[str]) -> Remedy:
    """Throw-away pairs beside the model's layers learn old rows of all that was lost."""
    treatment = recovery.treatment_of(session)
    treatment = replace(treatment, steps=treatment.steps or REPAIR_STEPS)
    tasks = [task for task in session.tasks if task.name in lost]
    encoder = session.encoder(subject)
    examples: list[Example] = [encoder(row) for task in tasks for row in recovery.old_rows(task, treatment)]
    strength = f"{treatment.steps} steps on {len(examples)} old rows"
    command = (
        f"train on with your trainer: {treatment.steps} steps of {treatment.batch_size} old rows, LoRA r={treatment.r} "
        f"on all linear layers, constant learning rate {treatment.learning_rate:g}"
    )
    if not examples:
        return Remedy(REPAIR, strength, command, why="no training rows of what was lost")
    pad = encoder.tokenizer.pad_token_id
    with closing(opened([subject], session.engine.dtype, session.engine.device)) as models:
        _, model = next(models)
        try:
            with (
                steps("repair", treatment.steps) as progress,
                repaired(model, examples, treatment, session.engine, pad, progress),
            ):
                return Remedy(REPAIR, strength, command, *_measured(session, found, subject, model))
        except (DataError, RunError) as error:
            return Remedy(REPAIR, strength, command, why=str(error))


def _apart(session: AuditSession, found: Found, subject: Subject, lost: list[str]) -> Remedy:
    before, after = found.sides[REFERENCE].rows, found.rows[subject.name]
    scores = {name: (before if name in lost else after).scores[name] for name in after.scores}
    command = f"keep both: {session.reference.name} for {', '.join(lost)}, {subject.name} for the rest"
    return Remedy(APART, "", command, Rows(scores, {}))


def _measured(session: AuditSession, found: Found, subject: Subject, model: Opened) -> tuple[Rows, dict[str, float]]:
    """The rows and the divergence from the reference of a model in the subject's place."""
    scratch = replace(found, rows={}, divergences={}, sides={REFERENCE: found.sides[REFERENCE]})
    session.check_time()
    measure_model(replace(session, prompts=()), subject, model, scratch)
    told = scratch.divergences[subject.name]
    return scratch.rows[subject.name], {text: one.per_token.kl for (_, text), one in told.items()}


# ---------------------------------------------------------------- what they show


def _as_json(session: AuditSession, found: Found, model: str, lost: list[str], remedy: Remedy) -> dict:
    """Numbers of rows, never their texts; changes are against the model as it is."""
    told = {"kind": remedy.kind, "strength": remedy.strength, "command": remedy.command, "why": remedy.why}
    if remedy.rows is None:
        return told | {"tasks": {}, "kl": {}, "helps": False}
    tasks = {}
    for task in session.scored:
        now, then = _pair(found.rows[model], remedy.rows, task)
        change = paired_change(now, then, session.terms.confidence)
        tasks[task.name] = {
            "score": float(np.mean(then)),
            "change": change.change,
            "low": change.low,
            "high": change.high,
            "lost": task.name in lost,
        }
    helps = any(one["lost"] and one["low"] > 0 for one in tasks.values())
    return told | {"tasks": tasks, "kl": remedy.kl or {}, "helps": helps}
