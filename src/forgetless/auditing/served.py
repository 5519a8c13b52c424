"""What a served model answers on the rows of an audit. Its predictions, likelihoods and weights are not to be had."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from forgetless.data.scoring import SCORERS, name_of
from forgetless.data.tasks import Row, Task
from forgetless.forgetting.kept import cache_folder
from forgetless.model.identity import json_digest
from forgetless.runs.folder import make_folder
from forgetless.runs.seal import SHA256, own_hash, sealed
from forgetless.score.generation import Answer
from forgetless.score.rules import rules_of
from forgetless.subjects.endpoint import Endpoint

FRESH = 86_400.0  # seconds for which an audit that was cut off goes on from its answers: a server's model may change


def is_read(task: Task) -> bool:
    """Whether the task's headline is read from an answer, so that a server can be scored."""
    return name_of(task.scorers[0]) in rules_of(task)


def answers_only(task: Task, notes: list[str]) -> Task:
    """The task by its scorers of answers alone, where it has any: all models are then scored alike."""
    left_out = [name_of(one) for one in task.scorers if name_of(one) not in rules_of(task) and name_of(one) in SCORERS]
    if not left_out or len(left_out) == len(task.scorers):
        return task
    notes.append(f"{task.name}: {', '.join(left_out)} left out for all models, since a server gives answers only")
    return replace(task, scorers=tuple(one for one in task.scorers if name_of(one) not in left_out))


def answered(
    endpoint: Endpoint, rows: Sequence[Row], max_new_tokens: int, check: Callable[[], None] = lambda: None
) -> list[Answer]:
    """The endpoint's answers; those of an audit that was cut off within the last day are not asked for again.

    `check` is called after each answer; what it raises ends the asking.
    """
    asked = [json_digest([endpoint.decided_by, *endpoint.request(row, max_new_tokens)]) for row in rows]
    file = cache_folder() / "served" / f"{json_digest(asked)[:32]}.jsonl"
    found = _begun(file)
    missing = [i for i, key in enumerate(asked) if key not in found]
    make_folder(file.parent, "set FORGETLESS_CACHE")
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as lines:

        def keep(number: int, answer: Answer) -> None:
            key = asked[missing[number]]
            found[key] = answer
            print(json.dumps(sealed({"asked": key} | asdict(answer))), file=lines, flush=True)
            check()

        endpoint.answers([rows[i] for i in missing], max_new_tokens, keep)
    file.unlink()  # an audit of tomorrow asks anew
    return [found[key] for key in asked]


def _begun(file: Path) -> dict[str, Answer]:
    if not file.exists() or time.time() - file.stat().st_mtime > FRESH:
        file.unlink(missing_ok=True)
        return {}
    found = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            told = json.loads(line)
            if told.pop(SHA256) != own_hash(told):
                continue
            key = told.pop("asked")
            found[key] = Answer(**told)
        except (ValueError, LookupError, AttributeError, RecursionError, TypeError):  # cut off in the middle
            continue
    return found
