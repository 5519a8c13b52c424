"""Learn a stream: task after task, scored after each, into a run folder that can be continued."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from forgetless import __version__
from forgetless.config import LearnConfig
from forgetless.data.tasks import Task
from forgetless.errors import Stopped
from forgetless.learning.adopt import adopt_lesson
from forgetless.learning.again import check_continues, described, log_command, versions_here
from forgetless.learning.borders import is_measured, measure_base, measure_lesson, measure_step
from forgetless.learning.cells import is_scored, score_base, score_lesson
from forgetless.learning.checkpoint import Checkpoints, SaveSettings, fingerprint, refuse_nan
from forgetless.learning.prepare import prepare
from forgetless.learning.session import Session
from forgetless.learning.state import resume, save_state
from forgetless.learning.step import TrainSettings, count_steps, learn_task
from forgetless.methods import Lesson
from forgetless.methods.base import ABOUT, penalty_acts
from forgetless.methods.finding import label_of
from forgetless.model.adapters import named
from forgetless.model.identity import stored_base
from forgetless.model.loading import loaded_as_told
from forgetless.progress import steps
from forgetless.report.files import write_report
from forgetless.report.summary import matrix_record, summarise, summary_record
from forgetless.runs.folder import FORMAT, TIMES, write_json, write_lines
from forgetless.runs.seal import write_sealed
from forgetless.runs.shapes import LEARNED, read
from forgetless.score.scorers import Scorer, headline


@loaded_as_told
def learn(config: LearnConfig, base_scores: Path | None = None, chosen: dict | None = None) -> dict:
    """Learns the stream of `config` and returns the summary that is also in the run folder.

    With budgets (`max_drop`, `max_lost`, `max_kl`) the finished run is blended border by border, and `blends` has each
    border's record. `base_scores`: another run folder with the same base and stream, whose row of the untouched base
    is taken over. `chosen`: of the options those that trials chose, {name: {value, among}}, which the run then tells.
    """
    if not (budgeted := config.as_blend("")):
        return _learnt(config, base_scores, chosen)
    from forgetless.geometry.borders import blend_run, check_budgets

    config.check()
    check_budgets(config)
    summary = _learnt(config, base_scores, chosen)
    return summary | {"blends": blend_run(replace(budgeted, after=summary["path"]))}


def _learnt(config: LearnConfig, base_scores: Path | None, chosen: dict | None) -> dict:
    session = prepare(config)
    session.chosen = chosen or {}
    with session.signals, session.run.locked() if session.engine.is_main else nullcontext():
        return _learn(session, base_scores)


def _learn(session: Session, base_scores: Path | None) -> dict:
    config, run = session.config, session.run
    session.say(f"{config.method} on {session.stream.name}: {', '.join(task.name for task in session.stream.tasks)}")
    session.say(f"{config.model} on {session.engine.told} -> {run.root}")
    for note in session.notes:
        session.say(f"note: {note}")
    finished = check_continues(session)
    session.engine.wait()
    if session.engine.is_main:
        write_sealed(run.config, _describe(session, "running"))
        log_command(run, f"learn: {finished} of {len(session.lessons)} lessons were finished")
    _init_trackers(session)
    scorer = Scorer(
        session.adapters.model, session.encoder, session.engine, session.stream.options, config.score_batch_tokens
    )
    score_base(session, scorer, base_scores)
    measure_base(session)
    for number, lesson in enumerate(session.lessons):
        folder = run.task(number + 1, lesson.name)
        if number < finished:
            if number == finished - 1 or not (is_scored(session, number) and is_measured(session, number)):
                resume(session, folder, number)
            session.say(f"{folder.name}: already learnt")
            session.steps_before.append(read(folder / "learned.json", LEARNED)["steps"])
        elif number < len(session.adopted):
            adopt_lesson(session, number, folder)
            session.steps_before.append(0)
        else:
            _learn_lesson(session, number, lesson, folder)
        if session.engine.is_main:
            run.drop_checkpoints(number + 1, lesson.name)
        score_lesson(session, scorer, number)
        measure_lesson(session, number)
        _finish(session, "running")
    if config.report_to:
        session.engine.accelerator.end_training()
    summary = _finish(session, "complete")
    return (summary or summarise(run.root)) | {"path": str(run.root)}


# ---------------------------------------------------------------------------------------- learning


def _learn_lesson(session: Session, number: int, lesson: Lesson, folder: Path) -> None:
    """Trains one lesson and publishes what it gave."""
    method, engine, config = session.method, session.engine, session.config
    examples = [session.encoder(row) for row in lesson.rows]
    settings = config.part(TrainSettings)
    before = session.run.task(number, session.lessons[number - 1].name) if number else None
    checkpoints = Checkpoints(
        session.run, number + 1, lesson.name, method, engine, config.part(SaveSettings),
        follows=fingerprint(before), signals=session.signals, spending=session.spending, say=session.say,
    )  # fmt: skip
    records = checkpoints.records
    method.begin_task(number)
    total = count_steps(len(examples), settings, lesson.tasks)
    with session.signals.held():
        with steps(f"learn {folder.name}", total, show=engine.is_main, before=len(records)) as progress:

            def log(record: dict) -> None:
                with session.spending.uncounted():
                    measure_step(session, number, record)
                records.append(record)
                progress.advance(record["tokens"], record.get("loss"))
                if "skipped" in record:
                    session.say(f"WARNING: {lesson.name}: a step was skipped. {record['skipped']}")
                if config.report_to:
                    figures = record.keys() - {"step", "skipped"}
                    told = {f"{lesson.name}/{key}": record[key] for key in sorted(figures)}
                    engine.accelerator.log(told, step=sum(session.steps_before) + record["step"])

            learn_task(
                method, examples, settings, engine,
                seed=config.seed, task=number, tasks=lesson.tasks, log=log, checkpoints=checkpoints,
            )  # fmt: skip
        session.steps_before.append(len(records))
        _end_lesson(session, number, lesson, folder, checkpoints)
        if told_to_stop := engine.most(session.signals.received):  # on all processes, at the same place
            raise Stopped(told_to_stop, f"{folder.name} is finished and saved: give the same command again to go on.")


def _end_lesson(session: Session, number: int, lesson: Lesson, folder: Path, checkpoints: Checkpoints) -> None:
    """What the method makes of a finished task, its checks, and all of it on disk."""
    method, engine, config, records = session.method, session.engine, session.config, checkpoints.records
    method.end_task(number, lesson.rows)
    shares = [record["penalty_share"] for record in records if "penalty_share" in record]
    checks = [check.as_json() for check in [*method.checks(), *penalty_acts(shares)]]
    for check in checks:
        if not check["ok"]:
            session.say(
                f"WARNING: {config.method} did not act on {lesson.name}: {check['name']} = {check['value']:.4g} "
                f"({check['meaning']})"
            )
    pairs, state = method.export(), method.state()
    refuse_nan(named(pairs) | state.tensors, folder)
    spent = checkpoints.spent()
    if engine.is_main:
        with session.run.publish(folder) as temporary:
            session.adapters.save(temporary / "adapter", pairs)
            (temporary / "adapter" / "README.md").write_text(_card(session, number), encoding="utf-8")
            save_state(temporary, state)
            write_lines(temporary / "log.jsonl", records)
            write_json(
                temporary / "learned.json",
                {"lesson": lesson.name, "rows": len(lesson.rows), "steps": len(records), "checks": checks},
            )
            write_json(temporary / f"{TIMES}.json", spent)
    engine.wait()


# ---------------------------------------------------------------------------------------- the record


def _describe(session: Session, status: str) -> dict:
    """run.json: all that the numbers depend on."""
    config = session.config.plain()
    adopted = [one.record for one in session.adopted]
    return {
        "format": FORMAT,
        "status": status,
        "stream": session.stream.name,
        "config": config,
        "decides": session.config.decides(),
        "method": {
            "name": label_of(session.config.method),
            "options": session.config.all_method_options(),
            "summary": session.method.summary,
            **{key: getattr(session.method, key) for key in ABOUT},
            "deployed": next(iter(session.method.views())),
        },
        "base": stored_base(session.base.identity, session.base.folder),
        "model": {
            "name": session.base.name,
            "parameters": session.adapters.base_parameters(),
            "trainable": sum(p.numel() for p in session.adapters.parameters()),
        },
        "precision": _precision(session),
        "tasks": [
            described(task, session.stored, headline(task), _notes(session, task)) for task in session.stream.tasks
        ],
        "lessons": [{"name": lesson.name, "last_task": lesson.last_task} for lesson in session.lessons],
        "versions": versions_here(),
        "history": session.history,
    } | {key: told for key, told in (("adopted", adopted), ("chosen", session.chosen)) if told}


def _notes(session: Session, task: Task) -> list[str]:
    return [note for note in session.notes if note.startswith(f"{task.name}: ")]


def _precision(session: Session) -> str:
    return str(session.engine.dtype).removeprefix("torch.")


def _finish(session: Session, status: str) -> dict | None:
    """Writes what is known so far: matrix, summary, report and the adapter to deploy. The main process has a result."""
    run, summary = session.run, None
    if session.engine.is_main:
        write_sealed(run.config, _describe(session, status))
        folders = [run.task(i + 1, lesson.name) for i, lesson in enumerate(session.lessons)]
        last = [folder for folder in folders if folder.exists()][-1]
        with run.publish(run.adapter) as temporary:
            for file in (last / "adapter").iterdir():
                shutil.copyfile(file, temporary / file.name)
        summary = summarise(run.root)
        run.write(run.summary, summary_record(summary))
        run.write(run.matrix, matrix_record(summary))
        write_report([summary], run.root)
    session.engine.wait()
    return summary


def _card(session: Session, number: int) -> str:
    """The model card in the adapter folder."""
    tasks, method, name = session.stream.tasks, session.method, label_of(session.config.method)
    learnt = [task.name for j, task in enumerate(tasks[: session.lessons[number].last_task + 1])
              if method.weights_for(number, j) == number]  # fmt: skip
    use = "Load it with `PeftModel.from_pretrained(base, folder)`" if method.stock_peft else (
        f"It is no stock PEFT adapter: {method.remedy}")  # fmt: skip
    return f"""---
library_name: peft
base_model: {session.base.name}
tags: [peft, {session.adapters.tag}, "base_model:adapter:{session.base.name}", forgetless]
---
{session.adapters.kind} for {", ".join(learnt)}, learnt in this order with `{name}` (forgetless {__version__}).
{use}. {session.base.identity.told()}
"""


def _init_trackers(session: Session) -> None:
    if session.config.report_to:
        flat = {key: value for key, value in session.config.plain().items() if isinstance(value, int | float | str)}
        session.engine.accelerator.init_trackers("forgetless", config=flat)
