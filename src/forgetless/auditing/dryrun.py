"""What an audit would measure and cost, and how many rows its budgets need: the plan of `audit --dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from rich.table import Table

from forgetless.auditing.budgets import Budget
from forgetless.auditing.measuring import ask
from forgetless.auditing.recovery import seconds_of_steps, treatment_of, untouched_base
from forgetless.auditing.served import is_read
from forgetless.auditing.session import AuditSession, prepare
from forgetless.auditing.verdict import plan
from forgetless.config import AuditConfig
from forgetless.data.tasks import Row
from forgetless.errors import quoting
from forgetless.forgetting.reference import BATCH_TOKENS, hidden_states
from forgetless.forgetting.texts import ANSWER_TOKENS, OWN_ANSWERS, asked
from forgetless.forgetting.windows import Windows
from forgetless.model.loading import loaded_as_told
from forgetless.progress import out, seconds_of
from forgetless.score.scorers import Scorer
from forgetless.subjects.models import Opened, opened

TRIED = 8  # rows of each task, probe and text that are timed
PASSES = 3  # over a text by a role: the model, and the yardstick in another precision, which is slower


@loaded_as_told
def plan_audit(config: AuditConfig) -> None:
    """Prints rows, the rows that each budget needs, and minutes, from a few rows of each kind; writes nothing.

    The rows needed are those that show a loss to be within its budget if none is lost, and if half of the budget is.
    """
    with quoting(config.show_text):
        _print_plan(prepare(config))


def _print_plan(session: AuditSession) -> None:
    rows = _rows(session)
    seconds = _seconds_a_row(session)
    table = Table("", "rows", "seconds a model")
    for name, count in rows.items():
        table.add_row(name, f"{count:,}", f"{count * seconds[name]:.0f}")
    out.print(table)
    if session.terms.budgets or session.terms.anchor_budgets:
        out.print(_budgets(session, rows))
    roles, models = len(session.roles), len(session.models)
    texts = {name: rows[name] * seconds[name] for name in session.text_names}
    scored = sum(rows[name] * seconds[name] for name in rows if name not in texts)
    total = (roles + models) * scored + (roles * PASSES + models * roles) * sum(texts.values())
    roles_told = ", ".join(session.roles)
    out.print(f"models: {len(session.audited)}, compared with {roles_told} on {session.engine.told}", markup=False)
    out.print(f"time: about {_minutes(total)}, less where the reference was measured before", markup=False)
    for one in session.endpoints:
        asked = sum(len(task.test) for task in session.rows_of if task not in session.scored or is_read(task))
        out.print(f"{one.name}: {asked + len(session.prompts):,} requests, whose time is the server's", markup=False)
    if session.config.recover:
        most = _seconds_of_recovery(session, rows, seconds)
        out.print(f"recovery: at most {_minutes(most)} more, if every model lost every task", markup=False)
    for note in dict.fromkeys(session.notes):
        out.print(f"note: {note}", markup=False, soft_wrap=True)


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds / 60))} min"


def _rows(session: AuditSession) -> dict[str, int]:
    """Rows of every task, probe and text, under the name that its budget has."""
    scored = {task.name: len(task.test) for task in session.scored}
    judged = {name: len(probe.task.test) for probe in session.judged for name in session.judged_names(probe).values()}
    texts = {text.name: len(text.rows) for text in session.texts}
    return scored | judged | ({OWN_ANSWERS: len(session.prompts)} if session.prompts else texts)


def _budgets(session: AuditSession, rows: dict[str, int]) -> Table:
    table = Table("budget", "rows", "needed if nothing is lost", "needed if half of it is lost and nothing gained")
    held = [(budget, "") for budget in session.terms.budgets]
    held += [(budget, " (against the anchor)") for budget in session.terms.anchor_budgets]
    for budget, against in held:
        needed = (_needed(session, budget, lost) for lost in (0.0, budget.limit / 2))
        table.add_row(f"{budget}{against}", f"{rows[budget.name]:,}", *needed)
    return table


def _needed(session: AuditSession, budget: Budget, lost: float) -> str:
    found = plan(budget, session.terms.confidence, lost=lost, clip=session.kl_clip)
    return "no number would do" if found is None else f"{found:,}"


def _seconds_a_row(session: AuditSession) -> dict[str, float]:
    """Measured with the reference on a few rows; own answers are generated and then read."""
    seconds: dict[str, float] = {}
    for subject, model in opened([session.reference], session.engine.dtype, session.engine.device):
        scorer = Scorer(model, session.encoder(subject), session.engine, (), BATCH_TOKENS)
        for task in session.scored:
            few = task.test[:TRIED]
            seconds[task.name] = seconds_of(partial(scorer, task, few)) / len(few)
        for probe in session.judged:
            spent = _time_answers(session, model, probe.task.test[:TRIED], probe.task.max_new_tokens)
            names = session.judged_names(probe).values()
            seconds |= dict.fromkeys(names, spent / len(names))
        if session.prompts:
            prompts = [asked(prompt, "", session.chat) for prompt in session.prompts[:TRIED]]
            seconds[OWN_ANSWERS] = _time_answers(session, model, prompts, ANSWER_TOKENS)
        for text in session.texts:
            few = text.rows[:TRIED]
            windows = session.windows_of(replace(text, rows=few), session.reference)
            seconds[text.name] = seconds_of(partial(_read, session, model, windows)) / len(few)
    return seconds


def _seconds_of_recovery(session: AuditSession, rows: dict[str, int], seconds: dict[str, float]) -> float:
    """All models, the reference and its base, every task: the steps, and the test rows at each checkpoint."""
    subjects = len(session.models) + 1 + (untouched_base(session.reference) is not None)
    checkpoints = len(treatment_of(session).checkpoints)
    for _, model in opened([session.reference], session.engine.dtype, session.engine.device):
        trained = sum(seconds_of_steps(session, model, task) for task in session.tasks)
    scored = sum(rows[task.name] * seconds[task.name] for task in session.tasks)
    return subjects * (trained + checkpoints * scored)


def _time_answers(session: AuditSession, model: Opened, rows: Sequence[Row], length: int) -> float:
    return seconds_of(partial(ask, session, session.reference, model, rows, length)) / len(rows)


def _read(session: AuditSession, model: Opened, windows: Windows) -> None:
    for _ in hidden_states(model, windows, using=session.engine.autocast):
        pass
