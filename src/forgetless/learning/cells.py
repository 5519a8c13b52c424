"""The cells of the matrix: which are scored after a lesson, by whose weights, and where the scores lie."""

from __future__ import annotations

import shutil
from collections.abc import Container
from pathlib import Path

from forgetless.data.tasks import Task
from forgetless.errors import RunError
from forgetless.learning.session import Session
from forgetless.learning.state import resume
from forgetless.methods.base import own_answering
from forgetless.model.identity import check_same
from forgetless.progress import steps
from forgetless.runs.folder import MANIFEST, RunFolder, complete, write_json, write_lines
from forgetless.runs.shapes import LABELS, PREDICTION, SCORES, read, read_records, read_run
from forgetless.score.scorers import UNION, Answering, Scorer, TaskScores, headline, label_counts


def scored_columns(session: Session, number: int) -> list[int]:
    """The tasks that are scored after lesson `number`."""
    every = list(range(len(session.stream.tasks)))
    if session.config.cells == "all" or number == len(session.lessons) - 1:
        return every
    last = session.lessons[number].last_task
    return {"seen": every[: last + 1], "ends": [last], "last": []}[session.config.cells]


def is_scored(session: Session, number: int) -> bool:
    """Whether every wanted cell of a finished lesson has its scores, as far as there are rows to score."""
    folder = session.run.task(number + 1, session.lessons[number].name) / "scores"
    return _holds(session, folder, scored_columns(session, number))


def _holds(session: Session, folder: Path, columns: list[int], any_order: bool = False) -> bool:
    """Whether a scores folder needs no more of these columns, over the union of labels that the stream has now.

    `any_order`: of a stream whose tasks come in another order, too.
    """
    wanted = [task for task in (session.stream.tasks[j] for j in columns) if not task.gone]
    if not wanted:
        return True
    if not complete(folder) or not _same_union(session, folder, any_order):
        return False
    told = read(folder / "scores.json", SCORES).get("deployed", {})
    return all(task.name in told and _whole(task, told[task.name]["scores"]) for task in wanted)


def _same_union(session: Session, folder: Path, any_order: bool = False) -> bool:
    union, mine = read(folder / "union.json", LABELS), list(session.stream.options)
    return union == mine or (any_order and sorted(union) == sorted(mine))


def _whole(task: Task, measures: Container[str]) -> bool:
    """Whether nothing of a task's scores was dropped while its rows were gone."""
    return task.gone != "" or "options" not in task.scorers or UNION in measures


def _kept(session: Session, folder: Path) -> dict[str, dict[str, TaskScores]]:
    """{view: {task: scores}} of a scores folder that need not be made again.

    Where the union of labels has grown since, scores over it are made again, and dropped for a task without rows.
    """
    if not complete(folder):
        return {}
    same = _same_union(session, folder)
    tasks = {task.name: task for task in session.stream.tasks}
    rows: dict[tuple[str, str], list[dict]] = {}
    for record in read_records(folder / "predictions.jsonl", PREDICTION):
        rows.setdefault((record.pop("view"), record.pop("task")), []).append(record)
    found: dict[str, dict[str, TaskScores]] = {}
    for (view, name), records in rows.items():
        if name in tasks and (same or tasks[name].gone or not tasks[name].options):
            scores = _from_records(records)
            if not same:
                scores = scores.without(UNION)
            if _whole(tasks[name], scores.measures):
                found.setdefault(view, {})[name] = scores
    return found


def _from_records(records: list[dict]) -> TaskScores:
    measures = [name for name, value in records[0].items() if isinstance(value, dict) and "score" in value]
    return TaskScores({name: [float(record[name]["score"]) for record in records] for name in measures}, records)


def score_base(session: Session, scorer: Scorer, known: Path | None = None) -> None:
    """The untouched base on every task: the bound below. `known`: a run folder that has scored it already."""
    if session.config.cells == "last":
        return
    folder = session.run.task(0, "base") / "scores"
    columns = list(range(len(session.stream.tasks)))
    # the main process decides: another could see its files half way
    if session.engine.agree(_holds(session, folder, columns)):
        return
    source = RunFolder(known).task(0, "base") / "scores" if known else folder
    if known:
        _check_same_rows(session, known)
    if session.engine.agree(_holds(session, source, columns, any_order=True)):
        _copy_scores(session, source, folder)
        return
    views = session.engine.agree(_kept(session, folder))
    scored = views.setdefault("deployed", {})
    with session.adapters.disabled():
        scored |= _score_tasks(session, scorer, _missing(session, columns, scored), "score base")
    _publish_scores(session, folder, views)


def _check_same_rows(session: Session, known: Path) -> None:
    """RunError where the base's scores in another run are of another base or of other rows.

    A folder without run.json is a sweep's, which names it by its base and rows.
    """
    if not RunFolder(known).config.exists():
        return
    told = read_run(known)
    check_same(told["base"], session.base.identity, session.base.folder, RunFolder(known).config)
    theirs = {task["name"]: task["fingerprint"] for task in told["tasks"]}
    for task in session.stream.tasks:
        if theirs.get(task.name, task.fingerprint) != task.fingerprint:
            raise RunError(
                f"{RunFolder(known).config}: its task {task.name} has other rows, options or scoring, so its scores of "
                "the base are not those of this stream; leave base_scores out"
            )


def _missing(session: Session, columns: list[int], scored: dict[str, TaskScores]) -> list[int]:
    """The columns that have rows and no scores."""
    tasks = session.stream.tasks
    return [j for j in columns if not tasks[j].gone and tasks[j].name not in scored]


def _copy_scores(session: Session, source: Path, folder: Path) -> None:
    if session.engine.is_main:
        with session.run.publish(folder) as temporary:
            for file in source.iterdir():
                if file.name != MANIFEST:
                    shutil.copyfile(file, temporary / file.name)
            write_json(temporary / "union.json", list(session.stream.options))
    session.engine.wait()


def score_lesson(session: Session, scorer: Scorer, number: int) -> None:
    # the main process decides: another could see its files half way
    if session.engine.agree(is_scored(session, number)):
        return
    folder = session.run.task(number + 1, session.lessons[number].name)
    columns = scored_columns(session, number)
    kept, views = session.engine.agree(_kept(session, folder / "scores")), {}
    own = [j for j in columns if session.method.weights_for(number, j) == number]
    for place, (name, learner) in enumerate(session.method.views().items()):
        label = f"score {folder.name}" + (f", {name} learner" if name != "deployed" else "")
        view = "deployed" if place == 0 else name
        scored = views[view] = kept.get(view, {})
        with learner:
            scored |= _score_tasks(
                session, scorer, _missing(session, own, scored), label, own_answering(session.method)
            )
    for j in sorted(set(columns) - set(own)):
        if session.stream.tasks[j].name not in views["deployed"]:
            views["deployed"] |= _elsewhere(session, scorer, number, j)
    _publish_scores(session, folder / "scores", views)


def _elsewhere(session: Session, scorer: Scorer, number: int, column: int) -> dict[str, TaskScores]:
    """A cell that other weights than the last lesson's answer: those scores, made now if there are none."""
    source, name = session.method.weights_for(number, column), session.stream.tasks[column].name
    lesson = "base" if source is None else session.lessons[source].name
    folder = session.run.task(0 if source is None else source + 1, lesson)
    known = _kept(session, folder / "scores").get("deployed", {})
    if name in known:
        return {name: known[name]}
    if source is None or session.stream.tasks[column].gone:
        return {}
    resume(session, folder, source)
    found = _score_tasks(session, scorer, [column], f"score {folder.name}", own_answering(session.method))
    resume(session, session.run.task(number + 1, session.lessons[number].name), number)
    return found


def _score_tasks(
    session: Session, scorer: Scorer, columns: list[int], label: str, answering: Answering | None = None
) -> dict[str, TaskScores]:
    tasks = [session.stream.tasks[j] for j in columns]
    found = {}
    with steps(label, sum(len(task.test) for task in tasks), show=session.engine.is_main) as progress:
        for task in tasks:
            found[task.name] = scorer(task, answering=answering)
            for _ in task.test:
                progress.advance()
    return found


def _publish_scores(session: Session, folder: Path, views: dict[str, dict[str, TaskScores]]) -> None:
    if session.engine.is_main:
        tasks = {task.name: task for task in session.stream.tasks}
        told = {
            view: {
                name: {
                    "n": len(scores.predictions),
                    "scores": {measure: scores.mean(measure) for measure in scores.measures},
                    "counts": label_counts(scores, headline(tasks[name]), tasks[name].options)
                    if tasks[name].options else None,
                }
                for name, scores in _in_order(session, tasks_scored)
            }
            for view, tasks_scored in views.items()
        }  # fmt: skip
        records = [
            {"view": view, "task": name} | record
            for view, tasks_scored in views.items()
            for name, scores in _in_order(session, tasks_scored)
            for record in scores.predictions
        ]
        with session.run.publish(folder) as temporary:
            write_json(temporary / "scores.json", told)
            write_json(temporary / "union.json", list(session.stream.options))
            write_lines(temporary / "predictions.jsonl", records)
            (temporary / "HOLDS_ANSWERS").write_text("predictions.jsonl holds answers to test rows.\n")
    session.engine.wait()


def _in_order(session: Session, scored: dict[str, TaskScores]) -> list[tuple[str, TaskScores]]:
    """In the stream's order, whenever each was scored."""
    return [(task.name, scored[task.name]) for task in session.stream.tasks if task.name in scored]
