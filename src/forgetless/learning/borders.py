"""Forgetting at task borders: what the deployed model says of the next word against what the untouched base says.

The text is the base's own answers to general prompts, or the user's. The base's side is computed once and kept in the
cache, so a border costs one forward pass over the text. The main process measures, and the others wait.
"""

from __future__ import annotations

import math

import torch

from forgetless.data.batches import collate, split, weigh
from forgetless.data.tasks import Row
from forgetless.forgetting.divergence import Divergence, Means, divergence
from forgetless.forgetting.reference import Reference
from forgetless.forgetting.sides import kept_side
from forgetless.forgetting.texts import Text
from forgetless.forgetting.windows import Windows
from forgetless.learning.session import Session
from forgetless.model.answers import token_losses
from forgetless.model.identity import config_digest
from forgetless.runs.folder import FORGETTING, complete, write_json
from forgetless.runs.shapes import FORGOTTEN, read
from forgetless.score.intervals import ratio_intervals

NO_ONE_MODEL = "each task has an adapter of its own, chosen by the task's name at test, so no one model is deployed"
DECIMALS = 5  # of nats and shares


def is_measured(session: Session, number: int) -> bool:
    """Whether a finished lesson was measured on the text that is asked for now; also where none is."""
    folder = session.run.task(number + 1, session.lessons[number].name) / FORGETTING
    if session.text is None:
        return True
    return complete(folder) and read(folder / f"{FORGETTING}.json", FORGOTTEN)["asked"] == session.text.content


def measure_lesson(session: Session, number: int) -> None:
    """Publishes what the model after lesson `number`, which is in memory, has forgotten of the base's predictions."""
    # the main process decides: another could see its files half way
    if session.engine.agree(is_measured(session, number)):
        return
    folder = session.run.task(number + 1, session.lessons[number].name) / FORGETTING
    if session.engine.is_main:
        assert session.text is not None
        told = {"not_measured": NO_ONE_MODEL} if session.method.task_id else _measured(session, number, session.text)
        with session.run.publish(folder) as temporary:
            write_json(temporary / f"{FORGETTING}.json", told | {"asked": session.text.content})
    session.engine.wait()


def measure_step(session: Session, number: int, record: dict) -> None:
    """Adds the KL, and the loss on lesson `number`'s validation rows where it has some, to the record of every
    `forgetting_every`-th step and of the last one; the model trains on as it was."""
    every, text, step = session.config.forgetting_every, session.text, record["step"]
    if text is None or session.method.task_id or not every or (step % every and step < record["steps"]):
        return
    if session.engine.is_main:
        model = session.adapters.model
        model.eval()
        record["forgetting/kl"] = _short(_found(session, None).per_token.kl)
        if rows := validation_rows(session, number):
            record["validation_loss"] = _short(mean_loss(session, rows))
        model.train()
    session.engine.wait()


def validation_rows(session: Session, number: int) -> list[Row]:
    """Of all tasks in a lesson."""
    lesson = session.lessons[number]
    tasks = session.stream.tasks[lesson.last_task + 1 - lesson.tasks : lesson.last_task + 1]
    return [row for task in tasks for row in task.validation]


@torch.no_grad()
def mean_loss(session: Session, rows: list[Row]) -> float:
    """-log p of the deployed learner, nats, mean over the answer tokens of these rows."""
    method, engine, pad = session.method, session.engine, session.base.tokenizer.pad_token_id
    parts = split(weigh([session.encoder(row) for row in rows], 1.0), session.config.micro_batch_size)
    total = 0.0
    with next(iter(method.views().values())), engine.autocast():
        for part in (collate(chosen, pad, engine.device) for chosen in parts):
            total += float((part.weights * token_losses(method.logits(part), part.targets)).sum())
    return total


def measure_base(session: Session) -> None:
    """The base's side, where a lesson still needs it: before anything is trained, so that errors come first."""
    needed = not all(is_measured(session, number) for number in range(len(session.lessons)))
    if needed and session.engine.is_main and not session.method.task_id:
        session.side = base_side(session)
    session.engine.wait()


def base_side(session: Session) -> Reference:
    """What the untouched base says on the text, from the cache or computed and put there."""
    assert session.text is not None
    base = session.base
    identity = base.identity.as_json() | {"adapter": None, "config": config_digest(base.folder)}
    with session.adapters.disabled():
        return kept_side(
            session.adapters.model, base.tokenizer, session.text, session.engine.autocast, identity, "forgetting, base"
        )


def _measured(session: Session, number: int, text: Text) -> dict:
    assert session.side is not None
    found = _found(session, f"forgetting after {session.lessons[number].name}")
    return _as_json(found, text, session.side.windows)


def _found(session: Session, label: str | None) -> Divergence:
    """The deployed learner, as it is in memory, against the base."""
    assert session.side is not None
    with next(iter(session.method.views().values())):
        return divergence(session.side, session.adapters.model, using=session.engine.autocast, label=label)


def _as_json(found: Divergence, text: Text, windows: Windows) -> dict:
    """Means in nats and shares, the 95 % interval over documents of the KL per token, and what they were taken on."""
    documents = found.documents
    interval = [_short(float(end[0])) for end in ratio_intervals(documents.kl[:, None], documents.tokens[:, None])]
    return {
        "text": {
            "name": text.name,
            "source": text.source,
            "documents": windows.documents,
            "tokens": windows.positions,
            "sha256": windows.content,
        },
        "per_token": _means(found.per_token),
        "per_document": _means(found.per_document),
        "interval": None if math.isnan(interval[0]) else interval,  # too few documents
        "notes": list(windows.notes),
    }


def _means(means: Means) -> dict[str, float]:
    return {name: _short(value) for name, value in means.as_json().items()}


def _short(value: float) -> float:
    """Five decimals: a model that was loaded again computes the same up to rounding, and is to give the same file."""
    return round(value, DECIMALS)
