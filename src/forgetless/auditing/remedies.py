"""What would help? Remedies for a loss, each measured on the model that lost: what it gives back, and what it costs.

    blend         W(α) = (1 - α) W_reference + α W_model                     a point between both
    scaled down   W + α ΔW                                                   the model's adapter, weakened on its base
    repair        the model after a few steps on old rows of what it lost    as `recovery` does them, all tasks at once
    kept apart    the reference answers the tasks that were lost, the model the others: always possible, so it is told
                  beside the others and not counted among what helps

Every remedy answers the rows that the audit looked at, so its gains and costs are paired with the model's own; their
intervals hold for all remedies together (Bonferroni). Still these rows have shown the loss and picked the remedy: what
is deployed is to be audited on others, or found by `forgetless blend`, whose promise holds.
"""

from __future__ import annotations

import math
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from forgetless.auditing import measures, recovery
from forgetless.auditing.budgets import MAX_KL
from forgetless.auditing.measures import REFERENCE
from forgetless.auditing.measuring import Found, Rows, measure_model, moves_of
from forgetless.auditing.session import JUDGED, AuditSession
from forgetless.auditing.throwaway import Treatment, repaired
from forgetless.config import AuditConfig
from forgetless.data.tasks import Task
from forgetless.errors import ForgetlessError
from forgetless.geometry.path import AdapterPath, WeightPath, straight_path
from forgetless.model.loading import LoadSettings
from forgetless.progress import steps
from forgetless.score.intervals import Change, paired_change
from forgetless.score.scorers import headline
from forgetless.subjects.models import Opened, Subject, opened

LOADING = (*(field.name for field in fields(LoadSettings)), "precision", "device")  # options of every command
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
    kl: dict[str, measures.Divergence] | None = None  # to the reference, by text
    why: str = ""


@dataclass(frozen=True)
class Standing:
    """Names of what these rows show of a model against the reference."""

    lost: list[str]  # the user's tasks and scored probes
    moved: list[str]  # texts on which it is over its budget as measured
    gained: list[str]
    neither: list[str]

    @property
    def worse(self) -> list[str]:
        return [*self.lost, *self.moved]


def remedies(session: AuditSession, found: Found) -> dict[str, list[dict]]:
    """Model -> its remedies as JSON; none for a model of which these rows show no loss."""
    told = {}
    for subject in session.models:
        standing = standing_of(session, found, subject.name)
        tried = list(_tried(session, found, subject, standing)) if standing.worse else []
        together = len([one for one in tried if one.rows and one.kind != APART]) * len(standing.worse)
        confidence = 1 - (1 - session.terms.confidence) / max(1, together)
        told[subject.name] = [_as_json(session, found, subject.name, standing, one, confidence) for one in tried]
    return told


def standing_of(session: AuditSession, found: Found, model: str) -> Standing:
    """A task is lost, or gained, where the interval of its change lies below, or above, 0."""
    changes = {
        task.name: paired_change(*_pair(found.sides[REFERENCE].rows, found.rows[model], task), session.terms.confidence)
        for task in session.scored
    }
    limits = {one.name: one.limit for one in session.terms.budgets if one.option == MAX_KL}
    moves = moves_of(session, found, model, REFERENCE)
    moved = [text for text, one in moves.items() if one.mean > limits.get(text, math.inf)]
    return Standing(
        lost=[name for name, one in changes.items() if one.high < 0],
        moved=moved,
        gained=[name for name, one in changes.items() if one.low > 0],
        neither=[name for name, one in changes.items() if one.low <= 0 <= one.high],
    )


def _pair(one: Rows, other: Rows, task: Task) -> tuple[list[float], list[float]]:
    name, measure = task.name, headline(task)
    return one.scores[name].measures[measure], other.scores[name].measures[measure]


# ---------------------------------------------------------------- trying them


def _tried(session: AuditSession, found: Found, subject: Subject, standing: Standing) -> Iterator[Remedy]:
    yield from _along(session, found, session.reference, subject, BLEND, standing)
    base = recovery.untouched_base(subject)
    if base is not None and session.reference.adapter is not None:
        yield from _along(session, found, replace(base, name=str(base.base)), subject, SCALED, standing)
    yield _repaired(session, found, subject, standing.lost)
    yield _apart(session, found, subject, standing)


def _along(
    session: AuditSession, found: Found, start: Subject, subject: Subject, kind: str, standing: Standing
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
                told = how(session, path, alpha, kind, standing)
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
    command = shlex.join(_training(session, subject, treatment, tasks))
    words = (
        f"or train on with your trainer: {treatment.steps} steps of {treatment.batch_size} old rows, LoRA "
        f"r={treatment.r} on all linear layers, constant learning rate {treatment.learning_rate:g}"
    )
    if not rows:
        return Remedy(REPAIR, strength, why="no training rows of what was lost")
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
                return Remedy(REPAIR, strength, command, words, *_measured(session, found, subject, model))
    except ForgetlessError as error:
        return Remedy(REPAIR, strength, command, words, why=str(error))


def _apart(session: AuditSession, found: Found, subject: Subject, standing: Standing) -> Remedy:
    before, after = found.sides[REFERENCE].rows, found.rows[subject.name]
    scores = {name: (before if name in standing.lost else after).scores[name] for name in after.scores}
    words = f"keep both: {session.reference.name} for {', '.join(standing.worse)}, {subject.name} for the rest"
    return Remedy(APART, "", words=words, rows=Rows(scores, {}))


def _measured(
    session: AuditSession, found: Found, subject: Subject, model: Opened
) -> tuple[Rows, dict[str, measures.Divergence]]:
    """The rows and the divergences from the reference of a model in the subject's place."""
    scratch = replace(found, rows={}, divergences={}, sides={REFERENCE: found.sides[REFERENCE]})
    session.check_time()
    measure_model(replace(session, prompts=()), subject, model, scratch)
    return scratch.rows[subject.name], moves_of(session, scratch, subject.name, REFERENCE)


# ---------------------------------------------------------------- how to have them


def how(
    session: AuditSession, path: AdapterPath | WeightPath, alpha: float, kind: str, standing: Standing
) -> tuple[str, str]:
    """The command that writes this very point, and words: how the same path is searched under a budget.

    Of whole weights a search is all there is.
    """
    search = shlex.join(_search(session, path, standing)) if kind == BLEND and _can_search(session, standing) else ""
    if isinstance(path, WeightPath):
        return search, "searches these and further points under budgets; set them to what you allow" if search else ""
    ends = [(path.before, 1 - alpha), (path.after, alpha)]
    adapters = [(one, w) for one, w in ends if one.adapter]
    command = ["forgetless", "merge", *(place_of(one) for one, _ in adapters), "--weights"]
    command += [f"{w:g}" for _, w in adapters] + ["--output_dir", _output(f"{kind} {alpha:g}", path.after)]
    command += ["--text", *map(str, session.config.text)] if session.config.text else []
    command += _options(session, ("base_is", "limit", "allow_pickle", *LOADING))
    return shlex.join(command), f"with a promise, for budgets that you set: {search}" if search else ""


def _training(session: AuditSession, subject: Subject, treatment: Treatment, tasks: Sequence[Task]) -> list[str]:
    """`forgetless learn` of what was lost: a new pair beside the model, as the repair has it, on all rows of a task."""
    file = _task_file(session)
    if not file or not tasks:
        return []
    command = ["forgetless", "learn", "--stream", f"{file}:{','.join(task.name for task in tasks)}"]
    if subject.adapter:
        command += ["--model", str(subject.base), "--from", f"before={place_of(subject)}", "--method", "incremental"]
    else:
        command += ["--model", place_of(subject)]
    steps_each = math.ceil(treatment.steps / len(tasks))
    told = {"max_steps": steps_each, "batch_size": treatment.batch_size, "learning_rate": treatment.learning_rate,
            "lr_scheduler_type": "constant", "r": treatment.r, "lora_alpha": treatment.scale * treatment.r,
            "output_dir": _output(REPAIR, subject)}  # fmt: skip
    command += [word for name, value in told.items() for word in (f"--{name}", f"{value}")]
    return command + _options(session, ("on_bad_row", *LOADING))


def _output(what: str, subject: Subject) -> str:
    return "runs/" + re.sub(r"[^\w.-]+", "-", f"{what} {Path(place_of(subject)).name}")


def _search(session: AuditSession, path: AdapterPath | WeightPath, standing: Standing) -> list[str]:
    """`forgetless blend` between reference and model: what was gained is learnt, and all else has a budget.

    Probes only where one was lost, and then all; texts only where the model is over the budget of one. Rows that the
    audit did not look at where every task has some.
    """
    tasks, scored = _task_file(session), [probe.task.name for probe in session.probes if probe.kind not in JUDGED]
    scored = scored if set(scored) & set(standing.lost) else []
    probes = _probe_sources(session) if scored else []
    own = [task.name for task in session.tasks]
    learnt = [name for name in standing.gained if name in own]
    drops = [name for name in [*standing.lost, *standing.neither] if name in own] + scored
    command = ["forgetless", "blend", place_of(path.before), place_of(path.after)]
    command += ["--tasks", tasks] if tasks else []
    command += ["--new", *learnt] if learnt else []
    command += ["--probes", *probes] if probes else []
    command += ["--max-drop", *(f"{name}=2pp" for name in drops)] if drops else []
    if standing.moved:
        command += ["--text", *map(str, session.config.text)] if session.config.text else []
        command += ["--max-kl", *(f"{one.name}={one.limit:g}" for one in session.terms.budgets if one.option == MAX_KL)]
    if session.config.score_on == "test" and all(task.validation for task in session.tasks):
        command += ["--score_on", "validation"] if tasks else []
    command += _options(session, ("score_on", "on_bad_row", "base_is", "limit", "allow_pickle", *LOADING))
    template = (session.policy or session.config).chat_template
    return command + (["--chat_template", template] if template != AuditConfig.chat_template else [])


def _can_search(session: AuditSession, standing: Standing) -> bool:
    """Whether what is worse can be given to one command; a policy's texts come from several places."""
    if session.policy and standing.moved:
        return False
    return bool(_task_file(session)) or not any(task.name in standing.lost for task in session.tasks)


def _task_file(session: AuditSession) -> str:
    """The file of the user's tasks; empty where there are none, or a policy has them from several."""
    if not session.policy:
        return session.config.tasks if isinstance(session.config.tasks, str) else ""
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
    changed = [(name, value) for name, value in told if value and value != getattr(AuditConfig, name)]
    return [word for name, value in changed for word in _words(name, value)]


def _words(name: str, value: Any) -> list[str]:
    values = [] if value is True else value if isinstance(value, list | tuple) else [value]
    return [f"--{name}", *map(str, values)]


def place_of(subject: Subject) -> str:
    """What a command line takes for this model: a run's task has a name that is no path."""
    if subject.adapter and not Path(subject.name).exists():
        task = subject.adapter.parent
        if task.parent.name == "tasks" and subject.name.endswith(f"/{task.name}") and "+" not in subject.name:
            return str(subject.adapter)
    return subject.name


# ---------------------------------------------------------------- what they show


def _as_json(
    session: AuditSession, found: Found, model: str, standing: Standing, remedy: Remedy, confidence: float
) -> dict:
    """Numbers of rows, never their texts; changes are against the model as it is."""
    told = {key: getattr(remedy, key) for key in ("kind", "strength", "command", "words", "why")}
    if remedy.rows is None:
        return told | {"tasks": {}, "texts": {}, "helps": False}
    tasks, texts = {}, {}
    for task in session.scored:
        now, then = _pair(found.rows[model], remedy.rows, task)
        change = paired_change(now, then, confidence)
        tasks[task.name] = {"score": float(np.mean(then))} | _interval(change) | {"lost": task.name in standing.lost}
    is_now = moves_of(session, found, model, REFERENCE)
    for text, would in (remedy.kl or {}).items():
        then, now = ((one.losses / would.clip).tolist() for one in (would, is_now[text]))
        change = paired_change(now, then, confidence)
        texts[text] = {"kl": would.mean} | _interval(change, would.clip) | {"lost": text in standing.moved}
    back = [one["low"] > 0 for one in tasks.values() if one["lost"]]
    back += [one["high"] < 0 for one in texts.values() if one["lost"]]
    return told | {"tasks": tasks, "texts": texts, "helps": remedy.kind != APART and any(back)}


def _interval(change: Change, unit: float = 1.0) -> dict[str, float]:
    return {"change": unit * change.change, "low": unit * change.low, "high": unit * change.high}
