"""Between the model before and the model after, the point that learns most while forgetting stays in its budgets.

    W(α) = (1 - α) W_before + α W_after,   α = 1/n, 2/n, ..., 1

Every point answers the same held-out rows, from the safest on, up to the first that is not shown to keep all budgets
(`promise`). Of the certified points the one with the best mean score on the new tasks is written, ready to load:

    adapter/ or model/   the chosen point: a plain PEFT adapter, or full weights; absent where the old model is kept
    blend.json           points, bounds and the choice
    blend.html           learning against forgetting, on one page
    blend.md             the same in a table
    points/0.100000.json what was measured at each point; the same command goes on after the last of them
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from forgetless.auditing.budgets import MAX_KL, Budget, flag_budgets, resolve
from forgetless.auditing.measures import REFERENCE, Divergence, Measure, Scores
from forgetless.auditing.measuring import Found, measure_model, measure_role, measures_of
from forgetless.auditing.session import AuditSession, drop_names, prepare
from forgetless.auditing.verdict import check_clip
from forgetless.config import BlendConfig
from forgetless.data.tasks import Task
from forgetless.errors import RunError, UsageError, nearest
from forgetless.geometry.path import AdapterPath, WeightPath, straight_path
from forgetless.geometry.promise import Held, can_be_shown, certified, chosen, held, is_shown, least_rows, more_rows
from forgetless.model.identity import json_digest, other_settings
from forgetless.model.loading import loaded_as_told
from forgetless.progress import console
from forgetless.report.blend import BLENDED, LEARNS_NOTHING, NOT_SHOWN, TOO_FEW_ROWS, WHOLE, blend_markdown
from forgetless.report.blend_page import render_blend
from forgetless.runs.folder import RunFolder, make_folder, write_json_whole, write_whole
from forgetless.runs.seal import read_sealed, write_sealed
from forgetless.score.intervals import paired_change
from forgetless.subjects.models import Opened

RECORD, MARKDOWN, PAGE = "blend.json", "blend.md", "blend.html"
ADAPTER, MODEL = PLACES = ("adapter", "model")  # where the chosen point is written, by its kind
FORMAT = 1
WRITTEN, KEPT = 0, 3  # exit codes


@dataclass(frozen=True)
class Point:
    """What was measured at α."""

    alpha: float
    measures: tuple[Measure, ...]

    def of(self, budget: Budget) -> Measure:
        return self.divergence(budget.name) if budget.option == MAX_KL else self.scores(budget.name)

    def scores(self, name: str) -> Scores:
        return next(one for one in self.measures if isinstance(one, Scores) and one.name == name)

    def divergence(self, name: str) -> Divergence:
        return next(one for one in self.measures if isinstance(one, Divergence) and one.name == name)


@loaded_as_told
def blend_pair(config: BlendConfig) -> dict:
    """Finds and writes the point between two models; gives the content of blend.json, with `path` and `exit_code`.

    Raises a ForgetlessError for models without a path between them, and for what cannot be read.
    """
    config.check()
    session, budgets = _prepared(config)
    path = straight_path(session.reference, session.models[0])
    folder = RunFolder(session.folder)
    _check_places(session)
    if isinstance(path, WeightPath) and (differing := other_settings(path.after.base, path.before.base)):
        session.notes.append(f"the configurations differ in {differing}; every blend has that of the model after")
        console.print(f"note: {session.notes[-1]}", markup=False)
    with folder.locked():
        record = _measured(config, session, budgets, path)
        _check_places(session)
        _write(folder, path, record)
    return record | {"path": str(session.folder), "exit_code": WRITTEN if record["chosen"] else KEPT}


def level_of(config: BlendConfig) -> float:
    """δ: the chance that a blend is over a budget, at most."""
    return (1 - config.confidence) / config.borders


# ---------------------------------------------------------------------------------------- what is to be kept


def _prepared(config: BlendConfig) -> tuple[AuditSession, tuple[Budget, ...]]:
    """Models, rows and budgets, checked; nothing is computed yet."""
    session = prepare(config.as_audit())
    if len(session.models) > 1:
        names = ", ".join(one.name for one in session.models)
        raise UsageError(f"{config.after!r}: a run folder of {len(session.models)} models; give one of them ({names})")
    if session.judged:
        names = ", ".join(probe.task.name for probe in session.judged)
        raise UsageError(f"probes {names}: a judge reads their answers; blend takes probes with right answers")
    if not config.max_kl:
        session.prompts = ()
    session.tasks = _wanted(config, session.tasks)
    if not config.output_dir:
        session.folder = session.folder.with_name("blend" + session.folder.name.removeprefix("audit"))
    told = flag_budgets(config.max_drop, config.max_kl, config.max_lost)
    budgets = resolve(told, drop_names(session), session.text_names)
    check_clip(budgets, session.kl_clip)
    budgeted = {budget.name for budget in budgets}
    for probe in session.probes:
        if probe.task.name not in budgeted:
            raise UsageError(f"probe {probe.task.name}: has no budget; give --max-drop {probe.task.name}=2pp")
    return session, budgets


def _wanted(config: BlendConfig, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
    """The tasks with a budget and the new ones; where none is called new, all."""
    names = [task.name for task in tasks]
    budgeted = {one.name: one for one in flag_budgets(config.max_drop, (), config.max_lost)}
    for name in config.new:
        if name not in names:
            raise UsageError(f"new: no task {name!r}{nearest(name, names)}")
        if name in budgeted:
            raise UsageError(f"new: {name} has a budget ({budgeted[name]}); a task is either learnt or kept")
    return tuple(task for task in tasks if not config.new or task.name in budgeted or task.name in config.new)


def _new_tasks(session: AuditSession, budgets: Sequence[Budget]) -> list[str]:
    """The user's tasks without a budget: what is learnt."""
    budgeted = {budget.name for budget in budgets if budget.option != MAX_KL}
    return [task.name for task in session.tasks if task.name not in budgeted]


def _check_places(session: AuditSession) -> None:
    """UsageError where a blend would replace or remove what no blend wrote, or a model that it is about."""
    given = [
        Path(place).resolve()
        for one in (session.reference, session.models[0])
        for place in (*one.name.split("+"), one.base, one.adapter)
        if place
    ]
    for place in (session.folder / kind for kind in PLACES):
        if not place.exists():
            continue
        if not (session.folder / RECORD).is_file():
            raise UsageError(f"{place}: no blend wrote it, and it would be replaced; give another output_dir")
        if any(one.is_relative_to(place.resolve()) for one in given):
            raise UsageError(f"{place}: is one of the models to be blended, or their base; give another output_dir")


# ---------------------------------------------------------------------------------------- measuring


def _measured(
    config: BlendConfig, session: AuditSession, budgets: tuple[Budget, ...], path: AdapterPath | WeightPath
) -> dict:
    """The record: points up to the first that is not certified, and which of them is chosen."""
    alphas = [number / config.points for number in range(1, config.points + 1)]
    level = level_of(config)
    points: list[Point] = []
    shown: list[list[Held]] = []
    with closing(_points(session, path, alphas)) as measured:
        for point in measured:
            points.append(point)
            shown.append([held(point.of(one), one, level) for one in budgets])
            console.print(_said(point, shown[-1]), markup=False)
            short = _short(point, budgets, level, session.kl_clip)
            if short or not (config.whole_path or all(one.shown for one in shown[-1])):
                break
    new, good = _new_tasks(session, budgets), list(certified(all(one.shown for one in told) for told in shown))
    learnt = _learnt(points, new) if new else None
    best = 0.0 if short else chosen([point.alpha for point in points], good, learnt)
    return {
        "format": FORMAT,
        "before": session.reference.as_json(),
        "after": session.models[0].as_json(),
        "kind": ADAPTER if isinstance(path, AdapterPath) else MODEL,
        "confidence": config.confidence,
        "borders": config.borders,
        "level": level,
        "grid": alphas,
        "kl_clip": session.kl_clip,
        "new_tasks": new,
        "learnt": learnt,
        "points": [
            _point_json(point, told, one, new, config) for point, told, one in zip(points, shown, good, strict=True)
        ],
        "too_few_rows": short,
        "chosen": best,
        "outcome": _outcome(best, short, any(good)),
        "facts": session.facts({}),
    }


def _outcome(best: float, short: list[dict], any_certified: bool) -> str:
    if best:
        return WHOLE if best == 1 else BLENDED
    return TOO_FEW_ROWS if short else LEARNS_NOTHING if any_certified else NOT_SHOWN


def _learnt(points: Sequence[Point], new: Sequence[str]) -> list[float]:
    """The mean score on the new tasks, each task alike: before, and at each point."""

    def mean(point: Point, side: str) -> float:
        return float(np.mean([np.mean(getattr(point.scores(name), side)) for name in new]))

    return [mean(points[0], "before"), *(mean(point, "after") for point in points)]


def _short(point: Point, budgets: Sequence[Budget], level: float, clip: float) -> list[dict]:
    """The budgets that these rows could not show whatever the models answer, and how many rows would."""
    return [
        {"budget": str(one), "rows": len(measure.losses), "needed": least_rows(one, level, clip)}
        for one in budgets
        for measure in [point.of(one)]
        if not (is_shown(measure, one, level) or can_be_shown(measure, one, level))
    ]


def _points(
    session: AuditSession, path: AdapterPath | WeightPath, alphas: Sequence[float]
) -> Generator[Point, None, None]:
    """Each point in turn, from its file if it was measured before; the model before is the first on the path."""
    folder, found = session.folder / "points", Found({})
    scratch = session.folder / ".points"
    make_folder(folder, "give another output_dir")
    todo = [alpha for alpha in alphas if _read(folder, session, alpha) is None]
    engine = session.engine
    try:
        with closing(path.points([0.0, *todo], scratch, engine.dtype, engine.device)) as models:
            for alpha in alphas:
                point = _read(folder, session, alpha)
                if point is None:
                    if not found.sides:
                        measure_role(session, REFERENCE, next(models)[1], found)
                    point = _measure(session, alpha, next(models)[1], found)
                    _keep(folder, session, point)
                yield point
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _measure(session: AuditSession, alpha: float, model: Opened, found: Found) -> Point:
    after = session.models[0]
    measure_model(replace(session, prompts=()), after, model, found)
    return Point(alpha, tuple(measures_of(session, found, after.name)))


def _said(point: Point, budgets: Sequence[Held]) -> str:
    told = ", ".join(f"{one.budget}: {'shown' if one.shown else 'not shown'}" for one in budgets)
    return f"alpha {point.alpha:g}: {told}"


# ---------------------------------------------------------------------------------------- what is kept


def _decided_by(session: AuditSession, alpha: float) -> str:
    """sha256 of all that a point's numbers depend on, budgets not among them."""
    rows = {text.name: text.content for text in session.texts}
    told = session.facts(rows)
    told["settings"] = {name: value for name, value in told["settings"].items() if name != "notes"}
    prompts = json_digest(list(session.prompts))
    return json_digest({"facts": told, "prompts": prompts, "names": drop_names(session), "alpha": alpha})


def _read(folder: Path, session: AuditSession, alpha: float) -> Point | None:
    file = folder / f"{alpha:.6f}.json"
    if not file.exists():
        return None
    try:
        told = read_sealed(file, reads=FORMAT)
    except RunError as error:
        console.print(f"{error}; the point is measured again", markup=False)
        return None
    if told["decided_by"] != _decided_by(session, alpha):
        return None
    kinds = {"scores": Scores, "divergence": Divergence}
    return Point(alpha, tuple(kinds[kind](**fields) for kind, fields in told["measures"]))


def _keep(folder: Path, session: AuditSession, point: Point) -> None:
    told = [["scores" if isinstance(one, Scores) else "divergence", asdict(one)] for one in point.measures]
    kept = {"format": FORMAT, "decided_by": _decided_by(session, point.alpha), "measures": told}
    write_sealed(folder / f"{point.alpha:.6f}.json", kept)


def _point_json(point: Point, budgets: list[Held], good: bool, new: list[str], config: BlendConfig) -> dict:
    """Numbers of rows, never their texts."""
    learnt = {}
    for name in new:
        scores = point.scores(name)
        change = paired_change(scores.before, scores.after, config.confidence)
        learnt[name] = {
            "before": float(np.mean(scores.before)),
            "after": float(np.mean(scores.after)),
            "rows": len(scores.after),
            "low": change.low,
            "high": change.high,
        }
    return {
        "alpha": point.alpha,
        "certified": good,
        "learnt": learnt,
        "budgets": [
            asdict(one)
            | {"text": str(one.budget), "rows_needed": more_rows(point.of(one.budget), one.budget, level_of(config))}
            for one in budgets
        ],
    }


def _write(folder: RunFolder, path: AdapterPath | WeightPath, record: dict) -> None:
    """The chosen point, or none: what an earlier blend in this folder wrote does not stay behind."""
    if record["chosen"]:
        with folder.publish(folder.root / record["kind"]) as new:
            path.write(record["chosen"], new)
            path.after.tokenizer.save_pretrained(new)
    for kind in PLACES:
        if not record["chosen"] or kind != record["kind"]:
            shutil.rmtree(folder.root / kind, ignore_errors=True)
    write_json_whole(folder.root / RECORD, record)
    write_whole(folder.root / MARKDOWN, blend_markdown(record))
    write_whole(folder.root / PAGE, render_blend(record))
