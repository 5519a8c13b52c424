"""Lost or hidden? How much of a loss comes back after a few training steps on a few of the task's old rows.

A skill that a fine-tune only hid (another form of answers, another beginning of them) is back after a few steps; one
that is gone must be learnt anew ("spurious forgetting", Zheng et al. 2025, arXiv 2501.13453). So three models get
the same steps on the same rows, and are scored on the same test rows: the audited one; the reference, the healthy
control, which shows what the steps do to a model that lost nothing; and, where the reference is an adapter, its
untouched base, which shows how fast these rows teach the skill from nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from forgetless.auditing.contamination import contamination
from forgetless.auditing.measures import REFERENCE
from forgetless.auditing.measuring import Found, scorer_of
from forgetless.auditing.session import AuditSession
from forgetless.auditing.throwaway import Scores, Treatment, treated
from forgetless.data.streams import sample
from forgetless.data.tasks import Row, Task
from forgetless.errors import DataError, RunError
from forgetless.model.base import load_config
from forgetless.progress import Steps, seconds_of, steps
from forgetless.report.words import number, percent, points
from forgetless.score.intervals import paired_change, ratio_of_means
from forgetless.score.scorers import headline
from forgetless.subjects.models import Opened, Subject, opened

HIDDEN = "hidden"  # comes back, and faster than the base learns it
UNDECIDED = "hidden or learnt anew"  # comes back, and is not shown to be faster than the base
COMES_BACK = "comes back"  # with no model to compare with that never had the skill
STAYS_AWAY = "does not come back"  # as far as the test rows show
NO_LOSS, NOT_TRIED = "no loss", "not tried"

Curve = list[Scores]  # the test rows' scores at each checkpoint


@dataclass(frozen=True)
class Case:
    """A task that a model may have lost: the old rows, and the test rows' scores under the reference and the model."""

    subject: Subject
    task: Task
    rows: tuple[Row, ...]
    before: Scores
    after: Scores


@dataclass(frozen=True)
class Curves:
    """The same steps on the same rows: the audited model, the reference, and its untouched base if it has one."""

    model: Curve
    control: Curve
    base: Curve | None


def treatment_of(session: AuditSession) -> Treatment:
    return Treatment(session.config.recover, session.config.recover_rows)


def recoveries(session: AuditSession, found: Found) -> dict[str, dict[str, dict]]:
    """Model -> task of the user -> what comes back of its loss, as JSON.

    Only a loss that the test rows show is treated; of the others the entry says that there is none.
    """
    treatment, confidence = treatment_of(session), session.terms.confidence
    reference, base = session.reference, untouched_base(session.reference)
    cases = _cases(session, found, treatment)
    lost = [case for case in cases if case.rows and shown_above(case.after, case.before, confidence)]
    once = {case.task.name: case for case in lost}.values()
    healthy = [replace(case, subject=one) for one in (reference, base) if one for case in once]
    curves = _all_treated(session, treatment, [*healthy, *lost])
    told: dict[str, dict[str, dict]] = {one.name: {} for one in session.models}
    for case in cases:
        found_here = [curves.get((id(one), case.task.name)) for one in (case.subject, reference, base)]
        told[case.subject.name][case.task.name] = _entry(case, found_here, treatment, confidence)
    return told


def old_rows(task: Task, treatment: Treatment) -> tuple[Row, ...]:
    """Training rows, none of which stands in the test rows, exactly or nearly; the same ones for every model."""
    out = contamination(task.train, task.test)
    kept = [row for i, row in enumerate(task.train) if i not in {*out.exact, *out.near}]
    return sample(kept, treatment.rows, seed=treatment.seed, name=task.name, purpose="recovery")


def untouched_base(reference: Subject) -> Subject | None:
    """What the reference's adapter was put on, asked in the reference's tokens; None where it does not know them."""
    if reference.adapter is None:
        return None
    known = load_config(reference.base).get_text_config().vocab_size
    return replace(reference, adapter=None, adapter_sha256=None) if known == reference.vocabulary else None


def shown_above(one: Sequence[float], other: Sequence[float], confidence: float) -> bool:
    """Do these rows show that the other mean is above the one?"""
    return paired_change(one, other, confidence).low > 0


# ---------------------------------------------------------------- the same steps for every model


def _cases(session: AuditSession, found: Found, treatment: Treatment) -> list[Case]:
    """Every model with every task."""
    rows = {task.name: old_rows(task, treatment) for task in session.tasks}
    return [
        Case(one, task, rows[task.name], *(side.scores[task.name].measures[headline(task)] for side in sides))
        for one in session.models
        for sides in [(found.sides[REFERENCE].rows, found.rows[one.name])]
        for task in session.tasks
    ]


def _all_treated(session: AuditSession, treatment: Treatment, cases: list[Case]) -> dict[tuple[int, str], Curve | str]:
    """(id of the model, task) -> its curve, or why there is none. Each model is opened once."""
    curves: dict[tuple[int, str], Curve | str] = {}
    subjects = list({id(case.subject): case.subject for case in cases}.values())
    with steps("recovery", len(cases) * treatment.steps) as progress:
        for subject, model in opened(subjects, session.engine.dtype, session.engine.device):
            scorer = scorer_of(session, subject, model)
            for case in cases:
                if case.subject is subject:
                    task = replace(case.task, scorers=case.task.scorers[:1])
                    score = partial(_headlines, scorer, task)
                    curves[id(subject), task.name] = _curve_or_why(session, treatment, case, model, score, progress)
    return curves


def _headlines(scorer: Callable, task: Task) -> Scores:
    return scorer(task).measures[headline(task)]


def _curve_or_why(
    session: AuditSession, treatment: Treatment, case: Case, model: Opened, score: Callable[[], Scores],
    progress: Steps,
) -> Curve | str:  # fmt: skip
    """An audit that is measured by now is not lost to a probe that cannot be done."""
    try:
        session.check_time()
        return _curve(session, treatment, case, model, score, progress)
    except (DataError, RunError) as error:
        return str(error)
    except torch.OutOfMemoryError:
        return f"not enough memory for a training step on {session.engine.device}"


def _curve(
    session: AuditSession, treatment: Treatment, case: Case, model: Opened, score: Callable[[], Scores],
    progress: Steps,
) -> Curve:  # fmt: skip
    encoder = session.encoder(case.subject)
    examples = [encoder(row) for row in case.rows]
    return treated(model, examples, treatment, session.engine, encoder.tokenizer.pad_token_id, score, progress)


def seconds_of_steps(session: AuditSession, model: Opened, task: Task) -> float:
    """How long the steps on a task's old rows take with the reference, from one of them; scoring comes on top."""
    treatment = treatment_of(session)
    one = replace(treatment, steps=1)
    case = Case(session.reference, task, old_rows(task, one), [], [])
    with steps("", 1, show=False) as progress:
        return treatment.steps * seconds_of(partial(_curve, session, one, case, model, list, progress))


# ---------------------------------------------------------------- what it shows


def _entry(case: Case, curves: list[Curve | str | None], treatment: Treatment, confidence: float) -> dict:
    """`curves`: of the model, of the reference and of its base; a text says why there is none."""
    told: dict = {"reference": _mean(case.before), "model": _mean(case.after), "rows": len(case.rows)}
    none: dict = told | {"steps": [], "recovered": [], "control": [], "base": None}
    if not shown_above(case.after, case.before, confidence):
        return none | {"found": NO_LOSS, "sentence": "no loss that the test rows show, so nothing to bring back"}
    if not case.rows:
        return none | {"found": NOT_TRIED, "sentence": "not tried: every training row stands in the test rows"}
    model, control, base = curves
    if isinstance(model, list) and isinstance(control, list):
        told |= judged(case.before, Curves(model, control, base if isinstance(base, list) else None), confidence)
        told["steps"] = treatment.checkpoints
        return told | {"sentence": sentence(told, confidence)}
    return none | {"found": NOT_TRIED, "sentence": f"not tried: {model if isinstance(model, str) else control}"}


def judged(before: Scores, curves: Curves, confidence: float) -> dict:
    """What the curves show; `before`: the reference's scores. Changes in mean score, with their intervals.

    share = (end - start) / (before - start), of the model's mean scores.
    """
    start, end = curves.model[0], curves.model[-1]
    back, loss = paired_change(start, end, confidence), np.subtract(before, start)
    control = paired_change(before, curves.control[-1], confidence)
    return {
        "recovered": [*map(_mean, curves.model)],
        "control": [*map(_mean, curves.control)],
        "base": None if curves.base is None else [*map(_mean, curves.base)],
        "lost": float(loss.mean()),
        "back": back.change,
        "back_interval": [back.low, back.high],
        "share": back.change / float(loss.mean()),
        "share_interval": ratio_of_means(np.subtract(end, start), loss, confidence),
        "control_change": control.change if control.low > 0 or control.high < 0 else None,  # None: none shown
        "found": _found(before, curves, confidence),
    }


def _found(before: Scores, curves: Curves, confidence: float) -> str:
    """Hidden: over the steps the model is above the base, and gains more than it, so that no head start explains it."""
    if not shown_above(curves.model[0], curves.model[-1], confidence):
        return STAYS_AWAY
    if curves.base is None or not shown_above(curves.base[0], before, confidence):
        return COMES_BACK
    mine, anew = (np.mean(curve[1:], axis=0) for curve in (curves.model, curves.base))
    above = shown_above(anew, mine, confidence)
    gains_more = shown_above(anew - curves.base[0], mine - curves.model[0], confidence)
    return HIDDEN if above and gains_more else UNDECIDED


def sentence(told: dict, confidence: float) -> str:
    """An entry in plain words, from its numbers."""
    spent = f"after {told['steps'][-1]} steps on {told['rows']} old rows"
    if told["found"] == STAYS_AWAY:
        first = f"{percent(told['reference'])} at first, {percent(told['model'])} now, {percent(told['recovered'][-1])}"
        parts = [f"does not come back, as far as these rows show: {first} {spent}"]
    else:
        interval, unit = told["share_interval"] or told["back_interval"], "%" if told["share_interval"] else "points"
        low, high = (number(100 * one) for one in interval)
        share = f"{percent(told['share'])}, {number(100 * confidence)} % interval {low} to {high} {unit}"
        amount = f"{number(100 * told['back'])} of the {points(told['lost'])} lost are back {spent} ({share})"
        parts = [f"{_lead(told)}: {amount}"]
    return "; ".join([*parts, *_base_words(told), _control_words(told)])


def _lead(told: dict) -> str:
    if told["found"] == HIDDEN:
        mostly = told["share_interval"] and told["share_interval"][0] >= 0.5
        return "hidden rather than lost" if mostly else "hidden in part"
    return "comes back, hidden or learnt anew" if told["found"] == UNDECIDED else "comes back"


def _base_words(told: dict) -> list[str]:
    found, moved = told["found"], _from_to(told["base"]) if told["base"] else ""
    if found == HIDDEN:
        return [f"the untouched base learns it less fast from them ({moved})"]
    if found == UNDECIDED:
        return [f"that the untouched base learns it less fast from them ({moved}) is not shown"]
    if found == COMES_BACK and moved:
        return [f"the untouched base has the skill itself ({moved}), so it cannot tell found again from learnt anew"]
    if found == COMES_BACK:
        return ["no model that never had the skill is here to tell found again from learnt anew"]
    return [f"the untouched base goes from {moved}"] if moved else []


def _control_words(told: dict) -> str:
    moved, change = _from_to(told["control"]), told["control_change"]
    if change is None:
        return f"the reference, a healthy control, goes from {moved}"
    if change > 0:
        return f"the reference gains too ({moved}), so a part of this is new learning"
    return f"the steps cost even the reference {points(change)} ({moved}), so they are too harsh here to say much"


def _from_to(curve: Sequence[float]) -> str:
    return f"{percent(curve[0])} to {percent(curve[-1])}"


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)
