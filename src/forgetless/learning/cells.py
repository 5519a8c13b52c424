"""The cells of the matrix: which are scored after a lesson, by whose weights, and where the scores lie."""

from __future__ import annotations

import shutil
from pathlib import Path

from forgetless.errors import RunError
from forgetless.learning.session import Session
from forgetless.learning.state import resume
from forgetless.model.identity import check_same
from forgetless.progress import steps
from forgetless.runs.folder import MANIFEST, RunFolder, complete, write_json, write_lines
from forgetless.runs.shapes import PREDICTION, SCORES, UNION, read, read_records, read_run
from forgetless.score.scorers import Scorer, TaskScores, headline, label_counts


def scored_columns(session: Session, number: int) -> list[int]:
    """The tasks that are scored after lesson `number`."""
    every = list(range(len(session.stream.tasks)))
    if session.config.cells == "all" or number == len(session.lessons) - 1:
        return every
    last = session.lessons[number].last_task
    return {"seen": every[: last + 1], "ends": [last], "last": []}[session.config.cells]


def is_scored(session: Session, number: int) -> bool:
    """Whether every wanted cell of a finished lesson has its scores."""
    folder = session.run.task(number + 1, session.lessons[number].name) / "scores"
    return _holds(session, folder, scored_columns(session, number))


def _holds(session: Session, folder: Path, columns: list[int], any_order: bool = False) -> bool:
    """Whether a scores folder has these columns, scored over the union of labels that the stream has now.

    `any_order`: of a stream whose tasks come in another order, too.
    """
    if not columns:
        return True
    if not complete(folder):
        return False
    told = read(folder / "scores.json", SCORES)
    wanted = {session.stream.tasks[j].name for j in columns}
    union, mine = read(folder / "union.json", UNION), list(session.stream.options)
    same = union == mine or (any_order and sorted(union) == sorted(mine))
    return wanted <= told.get("deployed", {}).keys() and same


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
    with session.adapters.disabled():
        views = {"deployed": _score_tasks(session, scorer, columns, "score base")}
    _publish_scores(session, folder, views)


def _check_same_rows(session: Session, known: Path) -> None:
    """RunError where the base's scores in another run are of another base or of other rows."""
    told = read_run(known)
    check_same(told["base"], session.base.identity, RunFolder(known).config)
    theirs = {task["name"]: task["fingerprint"] for task in told["tasks"]}
    for task in session.stream.tasks:
        if theirs.get(task.name, task.fingerprint) != task.fingerprint:
            raise RunError(
                f"{RunFolder(known).config}: its task {task.name} has other rows, options or scoring, so its scores of "
                "the base are not those of this stream; leave base_scores out"
            )


def _copy_scores(session: Session, source: Path, folder: Path) -> None:
    if session.engine.is_main:
        with session.run.publish(folder) as temporary:
            for file in source.iterdir():
                if file.name != MANIFEST:
                    shutil.copyfile(file, temporary / file.name)
            write_json(temporary / "union.json", list(session.stream.options))
    session.engine.wait()


def score_lesson(session: Session, scorer: Scorer, number: int) -> None:
    if is_scored(session, number):
        return
    folder = session.run.task(number + 1, session.lessons[number].name)
    columns = scored_columns(session, number)
    fresh = [j for j in columns if session.method.weights_for(number, j) == number]
    views = {}
    for place, (name, learner) in enumerate(session.method.views().items()):
        label = f"score {folder.name}" + (f", {name} learner" if name != "deployed" else "")
        with learner:
            views["deployed" if place == 0 else name] = _score_tasks(session, scorer, fresh, label)
    for j in sorted(set(columns) - set(fresh)):
        views["deployed"] |= _elsewhere(session, scorer, number, j)
    _publish_scores(session, folder / "scores", views)


def _elsewhere(session: Session, scorer: Scorer, number: int, column: int) -> dict[str, TaskScores]:
    """A cell that other weights than the last lesson's answer: those scores, made now if there are none."""
    source, name = session.method.weights_for(number, column), session.stream.tasks[column].name
    lesson = "base" if source is None else session.lessons[source].name
    folder = session.run.task(0 if source is None else source + 1, lesson)
    if _holds(session, folder / "scores", [column]):
        return {name: _load_scores(folder / "scores", name)}
    if source is None:
        return {}
    resume(session, folder, source)
    found = _score_tasks(session, scorer, [column], f"score {folder.name}")
    resume(session, session.run.task(number + 1, session.lessons[number].name), number)
    return found


def _score_tasks(session: Session, scorer: Scorer, columns: list[int], label: str) -> dict[str, TaskScores]:
    tasks = [session.stream.tasks[j] for j in columns]
    found = {}
    with steps(label, sum(len(task.test) for task in tasks), show=session.engine.is_main) as progress:
        for task in tasks:
            found[task.name] = scorer(task)
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
                for name, scores in tasks_scored.items()
            }
            for view, tasks_scored in views.items()
        }  # fmt: skip
        records = [
            {"view": view, "task": name} | record
            for view, tasks_scored in views.items()
            for name, scores in tasks_scored.items()
            for record in scores.predictions
        ]
        with session.run.publish(folder) as temporary:
            write_json(temporary / "scores.json", told)
            write_json(temporary / "union.json", list(session.stream.options))
            write_lines(temporary / "predictions.jsonl", records)
            (temporary / "HOLDS_ANSWERS").write_text("predictions.jsonl holds answers to test rows.\n")
    session.engine.wait()


def _load_scores(folder: Path, task: str) -> TaskScores:
    records = [
        record
        for record in read_records(folder / "predictions.jsonl", PREDICTION)
        if record["task"] == task and record["view"] == "deployed"
    ]
    measures = [name for name, value in records[0].items() if isinstance(value, dict) and "score" in value]
    bare = [{key: value for key, value in record.items() if key not in ("task", "view")} for record in records]
    return TaskScores({name: [float(record[name]["score"]) for record in bare] for name in measures}, bare)
