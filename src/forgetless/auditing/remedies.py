"""What would help? Remedies for a loss, each measured on the model that lost: what it gives back, and what it costs.

    blend         W(α) = (1 - α) W_reference + α W_model                     a point between both
    scaled down   W + α ΔW                                                   the model's adapter, weakened on its base
    repair        the model after a few steps on old rows of what it lost    as `recovery` does them, all tasks at once
    kept apart    the reference answers the tasks that were lost, the model the others: always possible, so it is told
                  beside the others and not counted among what helps

Every remedy answers the rows that the audit looked at, so its gains and costs are paired with the model's own. Which
of them is best was picked on these rows too: what is deployed is to be audited again, or found by `forgetless blend`,
whose promise holds.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from forgetless.auditing import recovery
from forgetless.auditing.measures import REFERENCE
from forgetless.auditing.measuring import Found, Rows, measure_model
from forgetless.auditing.session import JUDGED, AuditSession
from forgetless.auditing.throwaway import repaired
from forgetless.config import AuditConfig
from forgetless.data.tasks import Task
from forgetless.errors import ForgetlessError
from forgetless.geometry.path import AdapterPath, WeightPath, straight_path
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
    command: str = ""  # what applies it, where a command does
    words: str = ""  # how else, or what else there is
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
    yield from _along(session, found, session.reference, subject, BLEND, lost)
    base = recovery.untouched_base(subject)
    if base is not None and session.reference.adapter is not None:
        yield from _along(session, found, replace(base, name=str(base.base)), subject, SCALED, lost)
    yield _repaired(session, found, subject, lost)
    yield _apart(session, found, subject, lost)


def _along(
    session: AuditSession, found: Found, start: Subject, subject: Subject, kind: str, lost: list[str]
) -> Iterator[Remedy]:
    """Points between a model that lost less and this one, up to the first that cannot be measured."""
    engine = session.engine
    try:
        path = straight_path(start, subject)
        with (
            tempfile.TemporaryDirectory(dir=session.folder, prefix=".remedies-") as scratch,
            closing(path.points(ALPHAS, Path(scratch), engine.dtype, engine.device)) as points,
        ):
            for alpha, model in points:
                told = how(session, path, alpha, kind, lost)
                yield Remedy(kind, f"{alpha:g}", *told, *_measured(session, found, subject, model))
    except ForgetlessError as error:
        yield Remedy(kind, "", why=str(error))


def _repaired(session: AuditSession, found: Found, subject: Subject, lost: list[str]) -> Remedy:
    """Throw-away pairs beside the model's layers learn old rows of all that was lost."""
    treatment = recovery.treatment_of(session)
    treatment = replace(treatment, steps=treatment.steps or REPAIR_STEPS)
    tasks = [task for task in session.tasks if task.name in lost]
    rows = [row for task in tasks for row in recovery.old_rows(task, treatment)]
    strength = f"{treatment.steps} steps on {len(rows)} old rows"
    words = (
        f"train on with your trainer: {treatment.steps} steps of {treatment.batch_size} old rows, LoRA r={treatment.r} "
        f"on all linear layers, constant learning rate {treatment.learning_rate:g}"
    )
    if not rows:
        return Remedy(REPAIR, strength, words=words, why="no training rows of what was lost")
    encoder = session.encoder(subject)
    try:
        session.check_time()
        examples = [encoder(row) for row in rows]
        with closing(opened([subject], session.engine.dtype, session.engine.device)) as models:
            _, model = next(models)
            pad = encoder.tokenizer.pad_token_id
            with (
                steps("repair", treatment.steps) as progress,
                repaired(model, examples, treatment, session.engine, pad, progress),
            ):
                return Remedy(REPAIR, strength, "", words, *_measured(session, found, subject, model))
    except ForgetlessError as error:
        return Remedy(REPAIR, strength, words=words, why=str(error))


def _apart(session: AuditSession, found: Found, subject: Subject, lost: list[str]) -> Remedy:
    before, after = found.sides[REFERENCE].rows, found.rows[subject.name]
    scores = {name: (before if name in lost else after).scores[name] for name in after.scores}
    words = f"keep both: {session.reference.name} for {', '.join(lost)}, {subject.name} for the rest"
    return Remedy(APART, "", words=words, rows=Rows(scores, {}))


def _measured(session: AuditSession, found: Found, subject: Subject, model: Opened) -> tuple[Rows, dict[str, float]]:
    """The rows and the divergence from the reference of a model in the subject's place."""
    scratch = replace(found, rows={}, divergences={}, sides={REFERENCE: found.sides[REFERENCE]})
    session.check_time()
    measure_model(replace(session, prompts=()), subject, model, scratch)
    told = scratch.divergences[subject.name]
    return scratch.rows[subject.name], {text: one.per_token.kl for (_, text), one in told.items()}


# ---------------------------------------------------------------- how to have them


def how(
    session: AuditSession, path: AdapterPath | WeightPath, alpha: float, kind: str, lost: list[str]
) -> tuple[str, str]:
    """The command that writes this very point, and words: how the same path is searched under a budget.

    Of whole weights a search is all there is.
    """
    search = shlex.join(_search(session, path, lost)) if kind == BLEND and _can_search(session, lost) else ""
    if isinstance(path, WeightPath):
        return search, "searches these and further points under a budget" if search else ""
    ends = [(path.before, 1 - alpha), (path.after, alpha)]
    adapters = [(one, w) for one, w in ends if one.adapter]
    name = re.sub(r"[^\w.-]+", "-", f"{kind} {alpha:g} {Path(place_of(path.after)).name}")
    command = ["forgetless", "merge", *(place_of(one) for one, _ in adapters), "--weights"]
    command += [f"{w:g}" for _, w in adapters] + ["--output_dir", f"runs/{name}"]
    command += ["--text", *map(str, session.config.text)] if session.config.text else []
    command += _options(session, ("base_is", "limit", "allow_pickle", "precision", "device"))
    return shlex.join(command), f"with a promise: {search}" if search else ""


def _search(session: AuditSession, path: AdapterPath | WeightPath, lost: list[str]) -> list[str]:
    """`forgetless blend` between reference and model, with budgets on what was lost; if a probe was, on all probes."""
    tasks, scored = _task_file(session), [probe.task.name for probe in session.probes if probe.kind not in JUDGED]
    scored = scored if set(scored) & set(lost) else []
    probes = _probe_sources(session) if scored else []
    command = ["forgetless", "blend", place_of(path.before), place_of(path.after)]
    command += ["--tasks", tasks] if tasks else []
    command += ["--probes", *probes] if probes else []
    command += ["--max-drop", *(f"{name}=2pp" for name in dict.fromkeys([*lost, *scored]))]
    command += _options(session, ("score_on", "base_is", "limit", "allow_pickle", "precision", "device"))
    template = (session.policy or session.config).chat_template
    return command + (["--chat_template", template] if template != AuditConfig.chat_template else [])


def _can_search(session: AuditSession, lost: list[str]) -> bool:
    """Whether what was lost can be given to one command."""
    return bool(_task_file(session)) or not any(task.name in lost for task in session.tasks)


def _task_file(session: AuditSession) -> str:
    """The file of the user's tasks; empty where there are none, or a policy has them from several."""
    if not session.policy:
        return str(session.config.tasks or "")
    files = {str(source.path) for source in session.policy.tasks}
    return files.pop() if len(files) == 1 else ""


def _probe_sources(session: AuditSession) -> list[str]:
    """What --probes takes, without those whose answers are judged."""
    judged = {probe.task.name for probe in session.judged}
    if not session.policy:
        return [str(name) for name in session.config.probes if name not in judged]
    return [str(source.path or source.name) for source in session.policy.probes if source.name not in judged]


def _options(session: AuditSession, names: Sequence[str]) -> list[str]:
    """The audit's own options where they are not the usual ones."""
    told = [(name, getattr(session.config, name)) for name in names]
    changed = [(name, value) for name, value in told if value != getattr(AuditConfig, name)]
    return [part for name, value in changed for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def place_of(subject: Subject) -> str:
    """What a command line takes for this model: a run's task has a name that is no path."""
    if subject.adapter and not Path(subject.name).exists():
        task = subject.adapter.parent
        if task.parent.name == "tasks" and subject.name.endswith(f"/{task.name}") and "+" not in subject.name:
            return str(subject.adapter)
    return subject.name


# ---------------------------------------------------------------- what they show


def _as_json(session: AuditSession, found: Found, model: str, lost: list[str], remedy: Remedy) -> dict:
    """Numbers of rows, never their texts; changes are against the model as it is."""
    told = {key: getattr(remedy, key) for key in ("kind", "strength", "command", "words", "why")}
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
    helps = remedy.kind != APART and any(one["lost"] and one["low"] > 0 for one in tasks.values())
    return told | {"tasks": tasks, "kl": remedy.kl or {}, "helps": helps}
