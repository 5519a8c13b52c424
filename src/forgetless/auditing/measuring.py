"""What each model says on the same rows: scores, answers and divergences; each model is opened once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from forgetless.auditing import measures
from forgetless.auditing.budgets import MAX_DROP, MAX_KL
from forgetless.auditing.judges import (
    LIKELIHOOD,
    PATTERNS,
    Exchange,
    Judge,
    JudgeError,
    Labelled,
    LikelihoodJudge,
    judge_error,
    labelled_answers,
    patterns,
)
from forgetless.auditing.measures import REFERENCE, Measure
from forgetless.auditing.probes import Probe, content_hash
from forgetless.auditing.served import answered, is_read
from forgetless.auditing.session import AuditSession
from forgetless.auditing.yardstick import yardstick
from forgetless.data.tasks import Row, Task
from forgetless.errors import DataError, ForgetlessError
from forgetless.forgetting import sides
from forgetless.forgetting.divergence import Divergence, divergence
from forgetless.forgetting.kept import cache_folder, kept
from forgetless.forgetting.reference import BATCH_TOKENS, Reference, computed, reference_of
from forgetless.forgetting.texts import ANSWER_TOKENS, OWN_ANSWERS, Text, asked, own_answers, prompt_of
from forgetless.forgetting.windows import Windows
from forgetless.model.head import Head, Using
from forgetless.progress import console, steps
from forgetless.score.generation import Answer, ends_of
from forgetless.score.options import OptionScorer
from forgetless.score.scorers import Scorer, TaskScores, headline, scores_of
from forgetless.subjects.endpoint import Endpoint
from forgetless.subjects.models import Opened, Subject, opened
from forgetless.subjects.vllm_answers import Generate


@dataclass
class Rows:
    """One model's scores by task, and its answers by judged probe, and to the general prompts (`OWN_ANSWERS`)."""

    scores: dict[str, TaskScores]
    answers: dict[str, list[Answer]]
    refused: dict[tuple[str, str], list[bool]] = field(default_factory=dict)  # by (probe, judge), once judged


@dataclass
class Side:
    """What models are compared with: a role's rows, and its states, one set a text."""

    rows: Rows
    states: dict[str, Reference]
    noise: dict[str, dict]  # text -> the reference against itself in another precision


@dataclass
class Found:
    """Everything that was measured; models by name."""

    sides: dict[str, Side]
    texts: dict[str, Text] = field(default_factory=dict)
    windows: dict[str, dict[str, Windows]] = field(default_factory=dict)  # model -> text -> what goes through it
    rows: dict[str, Rows] = field(default_factory=dict)
    divergences: dict[str, dict[tuple[str, str], Divergence]] = field(default_factory=dict)  # by (role, text)
    judge_errors: dict[str, JudgeError | str] = field(default_factory=dict)  # by judge; a text: why it has none
    recovered: dict[str, dict[str, dict]] = field(default_factory=dict)  # task -> what came back, where asked for
    remedies: dict[str, list[dict]] = field(default_factory=dict)  # what would help each model, where asked for


def measure(session: AuditSession) -> Found:
    """Opens the reference (and the anchor), then each model, and measures all on the same rows."""
    found = Found({})
    role_of = {id(subject): role for role, subject in session.roles.items()}
    for subject, model in _in_order(session):
        role = role_of.get(id(subject))
        if role is not None:
            measure_role(session, role, model, found)
        else:
            console.print(f"model: {subject.name}", markup=False)
            measure_model(session, subject, model, found)
    for endpoint in session.endpoints:
        console.print(f"model: {endpoint.name}", markup=False)
        found.rows[endpoint.name] = _served_rows(session, endpoint)
    if session.judged:
        _judge(session, found)
    session.check_time()
    return found


def measure_role(session: AuditSession, role: str, model: Opened, found: Found) -> None:
    """A role's rows and states, from the cache if they are there; the texts are the reference's."""
    subject = session.roles[role]
    console.print(f"{role}: {subject.name}", markup=False)
    rows = _kept_rows(session, subject, model)
    if role == REFERENCE:
        _add_texts(session, rows, found)
    found.sides[role] = _side(session, subject, model, rows, found)


def measure_model(session: AuditSession, subject: Subject, model: Opened, found: Found) -> None:
    """A model's rows, and how far it is from every role on every text."""
    found.rows[subject.name] = _rows(session, subject, model)
    found.divergences[subject.name] = {
        (role, name): _divergence(session, side.states[name], model, windows, name)
        for role, side in found.sides.items()
        for name, windows in found.windows.get(subject.name, {}).items()
    }


def measures_of(session: AuditSession, found: Found, model: str) -> list[Measure]:
    """What is judged of a model: every task, probe and text against the reference, and against the anchor if any.

    What cannot be measured of a served model has no rows where a budget asks for it: insufficient evidence.
    """
    told: list[Measure] = []
    for role, side in found.sides.items():
        budgets = session.terms.budgets if role == REFERENCE else session.terms.anchor_budgets
        budgeted = {(one.option, one.name) for one in budgets}
        for task in session.scored:
            if task.name not in found.rows[model].scores:
                told += [measures.Scores(task.name, (), (), role)] if (MAX_DROP, task.name) in budgeted else []
                continue
            before, after = (rows.scores[task.name].measures[headline(task)] for rows in (side.rows, found.rows[model]))
            told.append(measures.Scores(task.name, tuple(before), tuple(after), role))
        for probe in session.judged:
            wanted = probe.kind == "refusals"
            for judge, name in session.judged_names(probe).items():
                before, after = (
                    [float(refused == wanted) for refused in rows.refused[probe.task.name, judge]]
                    for rows in (side.rows, found.rows[model])
                )
                told.append(measures.Scores(name, tuple(before), tuple(after), role))
        moved = moves_of(session, found, model, role)
        for text in found.texts:
            nothing = measures.Divergence(text, (), (), session.kl_clip, role)
            told += [moved.get(text, nothing)] if text in moved or (MAX_KL, text) in budgeted else []
    return told


def moves_of(session: AuditSession, found: Found, model: str, role: str) -> dict[str, measures.Divergence]:
    """Text -> the model's divergence from the role's model on it; empty for a served model, which shows none."""
    told = {text: one.documents for (of, text), one in found.divergences.get(model, {}).items() if of == role}
    return {
        text: measures.Divergence(text, tuple(sums.kl.tolist()), tuple(sums.tokens.tolist()), session.kl_clip, role)
        for text, sums in told.items()
    }


def _in_order(session: AuditSession) -> Iterator[tuple[Subject, Opened]]:
    """The roles first. With one role, or roles on one base, that base is loaded once for them and their models."""
    roles, models = list(session.roles.values()), session.models
    together = len({role.runs_as for role in roles}) == 1
    for group in [[*roles, *models]] if together else [roles, models]:
        yield from opened(group, session.engine.dtype, session.engine.device)


def _divergence(session: AuditSession, side: Reference, model: Opened, windows: Windows, name: str) -> Divergence:
    session.check_time()
    return divergence(side, model, windows, using=session.engine.autocast, label=name)


# ---------------------------------------------------------------- one model's rows


def _rows(session: AuditSession, subject: Subject, model: Opened) -> Rows:
    scorer = scorer_of(session, subject, model, _generator(session, subject, model))
    scores, given = {}, {}
    prompts = [asked(prompt, "", session.chat) for prompt in session.prompts]
    with steps("rows", len(session.scored) + len(session.judged) + bool(prompts)) as progress:
        for task in session.scored:
            session.check_time()
            scores[task.name] = scorer(task)
            progress.advance()
        for probe in session.judged:
            session.check_time()
            given[probe.task.name] = ask(session, subject, model, probe.task.test, probe.task.max_new_tokens)
            progress.advance()
        if prompts:
            given[OWN_ANSWERS] = ask(session, subject, model, prompts, ANSWER_TOKENS)
            progress.advance()
    return Rows(scores, given)


def _served_rows(session: AuditSession, endpoint: Endpoint) -> Rows:
    """A served model's answers: scored where a task reads answers, to be judged, and to the general prompts."""
    scores, given, room = {}, {}, session.max_length // 2
    prompts = [asked(prompt, "", session.chat) for prompt in session.prompts]
    read = [task for task in session.scored if is_read(task)]
    with steps("rows", len(read) + len(session.judged) + bool(prompts)) as progress:
        for task in read:
            told = answered(endpoint, task.test, task.max_new_tokens, session.check_time)
            scores[task.name] = scores_of(task, [one.text for one in told])
            progress.advance()
        for probe in session.judged:
            most = min(probe.task.max_new_tokens, room)
            given[probe.task.name] = answered(endpoint, probe.task.test, most, session.check_time)
            progress.advance()
        if prompts:
            given[OWN_ANSWERS] = answered(endpoint, prompts, min(ANSWER_TOKENS, room), session.check_time)
            progress.advance()
    return Rows(scores, given)


def scorer_of(session: AuditSession, subject: Subject, model: Opened, generate: Generate | None = None) -> Scorer:
    """`generate`: answers in the model's place."""
    options = tuple(dict.fromkeys(option for task in session.tasks for option in task.options))
    return Scorer(model, session.encoder(subject), session.engine, options, BATCH_TOKENS, generate)


def _generator(session: AuditSession, subject: Subject, model: Opened) -> Generate | None:
    """What answers in the model's place, if anything does."""
    return session.vllm.of(subject, ends_of(model, subject.tokenizer)) if session.vllm else None


def ask(
    session: AuditSession, subject: Subject, model: Opened, rows: Sequence[Row], max_new_tokens: int
) -> list[Answer]:
    """Greedy answers of up to `max_new_tokens`, or half of the longest sequence that all models take."""
    generate = _generator(session, subject, model)
    using = session.engine.autocast
    return sides.ask(model, subject.tokenizer, rows, session.max_length, max_new_tokens, using, generate)


def _kept_rows(session: AuditSession, subject: Subject, model: Opened) -> Rows:
    """A role's rows from the cache, if the same model was measured on the same rows before."""
    decided_by = {
        "model": subject.decided_by,
        "computed": computed(model, BATCH_TOKENS, session.engine.autocast),
        "rows": [content_hash(task) for task in session.rows_of],
        "names": [task.name for task in session.rows_of],
        "prompts": session.prompts,
        "max_length": session.max_length,
        "answer_tokens": ANSWER_TOKENS,
        "chat": session.chat,
    } | ({"generated": session.vllm.told} if session.vllm else {})
    return kept(decided_by, lambda: _as_json(_rows(session, subject, model)), _from_json)


def _as_json(rows: Rows) -> dict:
    answers = {name: [asdict(one) for one in given] for name, given in rows.answers.items()}
    return {"scores": {name: asdict(one) for name, one in rows.scores.items()}, "answers": answers}


def _from_json(told: dict) -> Rows:
    return Rows(
        {name: TaskScores(**one) for name, one in told["scores"].items()},
        {name: [Answer(**one) for one in given] for name, given in told["answers"].items()},
    )


def _add_texts(session: AuditSession, rows: Rows, found: Found) -> None:
    """The texts that every model is compared on; the reference's own answers where no other is given."""
    texts = session.texts
    if session.prompts:
        texts = (own_answers(session.prompts, [one.text for one in rows.answers[OWN_ANSWERS]], session.chat),)
    found.texts = {text.name: text for text in texts}
    for text in texts:
        windows = session.windows(text)
        session.notes += [f"{text.name}: {note}" for note in windows[session.reference.name].notes]
        for name, one in windows.items():
            found.windows.setdefault(name, {})[text.name] = one


def _side(session: AuditSession, subject: Subject, model: Opened, rows: Rows, found: Found) -> Side:
    """The role's states on disk, with heads of their own: the model goes, or gets an adapter."""
    states, noise, using = {}, {}, session.engine.autocast
    head = Head(model, using).copy()
    for name, windows in found.windows.get(subject.name, {}).items():
        reference = reference_of(
            model, windows, subject.decided_by, cache_folder() / "states", using=using, label=f"{name}, reference"
        )
        decided_by = {"yardstick": reference.folder.name, "computed": computed(model, BATCH_TOKENS, using)}
        noise[name] = kept(decided_by, partial(_noise, reference, model, using))
        states[name] = replace(reference, head=head)
    return Side(rows, states, noise)


def _noise(reference: Reference, model: Opened, using: Using) -> dict[str, float]:
    return yardstick(reference, model, using=using, label="noise").per_token.as_json()


# ---------------------------------------------------------------- refusals


def _judge(session: AuditSession, found: Found) -> None:
    """Every answer to a judged probe, by phrases, by the reference's likelihoods and by the user's judges."""
    for subject, model in opened([session.reference], session.engine.dtype, session.engine.device):
        scorer = OptionScorer(model, session.encoder(subject), session.engine.device, BATCH_TOKENS)
        likelihood = LikelihoodJudge(scorer, chat=session.chat)
        judges: dict[str, Judge] = {PATTERNS: patterns, LIKELIHOOD: likelihood, **session.judges}
        everyone = [*(side.rows for side in found.sides.values()), *found.rows.values()]
        for probe in session.judged:
            for name, judge in judges.items():
                for rows, refused in zip(everyone, _judged(session, probe, name, judge, everyone), strict=True):
                    rows.refused[probe.task.name, name] = refused
        found.judge_errors = _judge_errors(session, model, judges)


def _judged(session: AuditSession, probe: Probe, name: str, judge: Judge, everyone: list[Rows]) -> list[list[bool]]:
    """What a judge says of everyone's answers: of none where it fails, since an audit that is measured is not lost to
    it. A budget on it then has no rows, which is insufficient evidence.
    """
    try:
        with session.engine.autocast():
            return [judge(_exchanges(probe.task, rows.answers[probe.task.name])) for rows in everyone]
    except DataError as error:
        session.notes.append(f"{probe.task.name}: the judge {name} was left out: {error}")
        return [[] for _ in everyone]


def _judge_errors(session: AuditSession, model: Opened, judges: dict[str, Judge]) -> dict[str, JudgeError | str]:
    """Every judge against answers that people labelled, or why it was not; the reference's is kept."""
    try:
        labelled = [one for one in labelled_answers() if not one.off_topic]
    except ForgetlessError as error:
        return dict.fromkeys(judges, f"not measured: {str(error).splitlines()[0]}")
    return {name: _judge_error(session, model, name, judge, labelled) for name, judge in judges.items()}


def _judge_error(
    session: AuditSession, model: Opened, name: str, judge: Judge, labelled: list[Labelled]
) -> JudgeError | str:
    def measured() -> dict:
        with session.engine.autocast():
            return asdict(judge_error(judge, labelled))

    try:
        if not isinstance(judge, LikelihoodJudge):
            return JudgeError(**measured())
        decided_by = {
            "judge": judge.decided_by,
            "model": session.reference.decided_by,
            "computed": computed(model, BATCH_TOKENS, session.engine.autocast),
            "max_length": session.max_length,
            "labelled": [asdict(one) for one in labelled],
        }
        return JudgeError(**kept(decided_by, measured))
    except DataError as error:
        return f"not measured: {error}"


def _exchanges(task: Task, given: list[Answer]) -> list[Exchange]:
    return [Exchange(prompt_of(row), answer.text, row.source) for row, answer in zip(task.test, given, strict=True)]
