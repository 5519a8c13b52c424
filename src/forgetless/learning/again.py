"""Going on with a run: weeks later, on another machine, with a newer version, with old rows deleted.

A run goes on with a stream of the same beginning. What decides is who the base is and what the tasks are, not where
they lie; precision, threads, machine and versions may change, and `history` in run.json says from which lesson on.
"""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from forgetless import __version__
from forgetless.data.tasks import Stream, Task
from forgetless.errors import DataError, RunError
from forgetless.learning.session import Session
from forgetless.model.identity import check_same
from forgetless.report.words import difference
from forgetless.runs.folder import TIMES, RunFolder
from forgetless.runs.shapes import read_run
from forgetless.versions import versions

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")
LEFT_OUT = "the stream leaves it out"
REMEDY = "A run goes on with a longer stream of the same beginning; for anything else give another output_dir."
SPLITS = {"train": "training", "validation": "validation", "test": "test"}


# ------------------------------------------------------------------------------- tasks whose rows are gone


def with_earlier_tasks(stream: Stream, stored: dict | None, run: RunFolder, adopted: list[str]) -> Stream:
    """The stream with every task of the run in its place: those that it leaves out, or has no rows of, as the run knows
    them. In a new run the adopted tasks come first.

    Raises DataError for a task without rows that nobody has learnt.
    """
    earlier = [_known(told) for told in stored["tasks"]] if stored else [_unknown(name) for name in adopted]
    names, given = [task.name for task in earlier], {task.name: task for task in stream.tasks}
    added = [task for task in stream.tasks if task.name not in names]
    left_out = [name for name in names if name not in given]
    if not left_out and not any(task.gone for task in stream.tasks):
        return stream  # what was learnt is verified once, by `check_continues`
    learnt = {*adopted, *_learnt(stored, run)}
    in_order = [*(name for name in names if name in given), *(task.name for task in added)] == [*given]
    if left_out and set(left_out) <= learnt and in_order and (added or names[-1] in given):
        _refuse_renamed(added, left_out, stored, run)
        tasks = [given.get(task.name, task) for task in earlier] + added
    else:
        tasks = list(stream.tasks)  # what does not fit is said by `check_continues`
    known = {task.name: task for task in earlier}
    for task in tasks:
        if task.gone and task.name not in learnt:
            raise DataError(
                f"task {task.name}: {task.gone}, and {run.root} has not learnt it. Bring its rows back, or leave the "
                "task out of the stream."
            )
    return Stream(
        stream.name, tuple(replace(known[task.name], gone=task.gone) if task.gone else task for task in tasks)
    )


def _learnt(stored: dict | None, run: RunFolder) -> list[str]:
    """The tasks of the finished lessons."""
    if stored is None:
        return []
    lessons = stored["lessons"]
    finished = run.finished([told["name"] for told in lessons])
    last = lessons[len(finished) - 1]["last_task"] if finished else -1
    return [told["name"] for told in stored["tasks"][: last + 1]]


def _known(told: dict) -> Task:
    """A task as run.json has it, without its rows."""
    scorers = tuple(one if isinstance(one, str) else one[0] for one in told["scorers"])
    return Task(told["name"], (), (), (), tuple(told["options"]), scorers, told["max_new_tokens"], gone=LEFT_OUT)


def _unknown(name: str) -> Task:
    return Task(name, (), (), (), gone="it is adopted without rows")


def _refuse_renamed(added: list[Task], left_out: list[str], stored: dict | None, run: RunFolder) -> None:
    for told in stored["tasks"] if stored else []:
        for task in added:
            if told["name"] in left_out and told.get("digests") == task.digests:
                raise RunError(
                    f"{run.config}: the rows of task {task.name!r} are those of {told['name']!r}, which this run has "
                    f"learnt: it has another name now. Call it {told['name']!r} again, or give another output_dir."
                )


def described(task: Task, stored: dict | None, headline: str, notes: list[str]) -> dict:
    """A task as run.json keeps it; what is known of one whose rows are gone stays."""
    if task.gone and stored:
        return next(told for told in stored["tasks"] if told["name"] == task.name) | {"gone": task.gone}
    majority = task.majority()
    told = {
        "name": task.name,
        "fingerprint": None if task.gone else task.fingerprint,
        "digests": task.digests,
        **{split: len(rows) for split, rows in task.splits.items()},
        "options": list(task.options),
        "scorers": task.scoring,
        "headline": headline,
        "max_new_tokens": task.max_new_tokens,
        "majority": {"label": majority[0], "share": majority[1]} if majority else None,
        "notes": notes,
    }
    return told | ({"gone": task.gone} if task.gone else {})


# ------------------------------------------------------------------------------- does it go on?


def check_continues(session: Session) -> int:
    """How many lessons are finished; refuses to mix another configuration, stream or base into a run."""
    run = session.run
    if not run.config.exists():
        if run.root.exists() and any(not path.name.startswith(".") for path in run.root.iterdir()):
            raise RunError(f"{run.root}: holds other files and no run.json; give an empty or new output_dir")
        finished, session.stored = 0, None
    else:
        session.stored = read_run(run.root)
        check_same(session.stored["base"], session.base.identity, session.base.folder, run.config)
        _check_options(session, session.stored)
        _check_tasks(session, session.stored)
        finished = len(run.finished([lesson.name for lesson in session.lessons]))
    _check_rows(session, finished)
    _note_history(session, finished)
    return finished


def _check_options(session: Session, stored: dict) -> None:
    """Options that decide the result are as they were; one that an older version did not have is at its default."""
    then, now = _flat(stored["decides"]), _flat(session.config.decides())
    untouched = _flat(type(session.config)(stream="-", method=session.config.method).decides())
    for option in dict.fromkeys((*then, *now)):
        before, after = then.get(option, untouched.get(option)), now.get(option)
        if before != after:
            raise RunError(
                f"{session.run.config}: this run was begun with {option}={before!r}, now it is {after!r}; "
                "give the old value, or another output_dir"
            )


def _flat(decides: dict) -> dict[str, Any]:
    own = {f"method.{name}": value for name, value in decides["method_options"].items()}
    return {name: value for name, value in decides.items() if name != "method_options"} | own


def _check_tasks(session: Session, stored: dict) -> None:
    """The tasks of the run are the first of the stream, in their order, with their rows, options and scorers."""
    place, names = session.run.config, [told["name"] for told in stored["tasks"]]
    now = [task.name for task in session.stream.tasks]
    for number, told in enumerate(stored["tasks"]):
        found = now[number] if number < len(now) else "gone"
        if found != told["name"]:
            order = "; the order has changed" if found in names and told["name"] in now else ""
            raise RunError(
                f"{place}: task {number + 1} of this run is {told['name']!r}, now it is {found!r}{order}. {REMEDY}"
            )
        task = session.stream.tasks[number]
        if not task.gone and told["fingerprint"] not in (None, task.fingerprint):
            raise RunError(
                f"{place}: task {number + 1} ({task.name}) has changed: {'; '.join(_changes(told, task))}. {REMEDY}"
            )
    lessons = [(lesson.name, lesson.last_task) for lesson in session.lessons]
    for before, after in zip(stored["lessons"], lessons, strict=False):
        if (before["name"], before["last_task"]) != after:
            raise RunError(
                f"{place}: {session.config.method} learns all its tasks together, so with another task it begins anew: "
                "give another output_dir"
            )


def _changes(told: dict, task: Task) -> list[str]:
    """What of a task is not as run.json has it, in words."""
    now = {"options": list(task.options), "scorers": task.scoring, "max_new_tokens": task.max_new_tokens}
    found = [f"{key} were {told[key]}, are now {value}" for key, value in now.items() if told[key] != value]
    for split, rows in task.splits.items():
        if told.get("digests", {}).get(split) != task.digests[split]:
            found.append(f"its {SPLITS[split]} rows have changed ({told[split]} then, {len(rows)} now)")
    return found


def _check_rows(session: Session, finished: int) -> None:
    """Every lesson that is still to be learnt has its rows; adopted ones need none here."""
    tasks = session.stream.tasks
    for lesson in session.lessons[max(finished, len(session.adopted)) :]:
        for task in tasks[lesson.last_task + 1 - lesson.tasks : lesson.last_task + 1]:
            if task.gone:
                raise DataError(
                    f"{session.config.method} needs the rows of {task.name} to learn {lesson.name}: {task.gone}. "
                    "Bring them back, or choose a method that does not need them."
                )


# ------------------------------------------------------------------------------- what it was learnt with


def versions_here() -> dict[str, str]:
    return {"forgetless": __version__, "python": platform.python_version()} | versions(*PACKAGES)


def facts(session: Session) -> dict:
    """What equal runs share beside their options: with the same facts, one process on a CPU gives the same bytes."""
    engine = session.engine
    on_gpu = engine.device.type == "cuda"
    return {
        "precision": str(engine.dtype).removeprefix("torch."),
        "machine": torch.cuda.get_device_name(engine.device)
        if on_gpu else f"{platform.machine()} cpu, {torch.backends.cpu.get_cpu_capability()}",
        "threads": 0 if on_gpu else torch.get_num_threads(),
        "processes": engine.processes,
        "versions": versions_here(),
    }  # fmt: skip


def _note_history(session: Session, finished: int) -> None:
    """`session.history`: from which lesson on (numbered from 1) what was used; a new entry where something differs.

    One that begins inside a lesson has the `step` after which it holds. What was noted for later work, which was not
    kept, is dropped.
    """
    history = list(session.stored.get("history", [])) if session.stored else []
    now, to_learn = facts(session), max(finished, len(session.adopted))
    if to_learn < len(session.lessons):
        name = session.lessons[to_learn].name
        step = session.run.steps_saved(to_learn + 1, name)
        here = {"from": to_learn + 1} | ({"step": step} if step else {})
        history = [entry for entry in history if (entry["from"], entry.get("step", 0)) < (to_learn + 1, step)]
        last = {key: value for key, value in history[-1].items() if key not in ("from", "step")} if history else None
        if last != now:
            history.append(here | now)
            if last:
                session.say(f"note: {name} is learnt with {difference(now, last)}")
    session.history = history


def log_command(run: RunFolder, what: str) -> None:
    """A line in times.jsonl: when a command worked in this folder. Nothing depends on it."""
    place = run.root / f"{TIMES}.jsonl"
    try:
        with place.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": datetime.now(UTC).isoformat(timespec="seconds"), "did": what}) + "\n")
    except OSError as error:
        raise RunError(f"{place}: cannot be written ({error.strerror}); {run.elsewhere}") from error
