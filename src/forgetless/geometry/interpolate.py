"""Loss and score between two models: `interpolate(InterpolateConfig(...))`.

interpolate.json   curves, barriers, peaks, distances, CKA and planes, with the settings and hashes
interpolate.html   one page, in plain words first; interpolate.md the same, short
points.json        the numbers of every row at every point, without texts
curve-*/           the trained middle point of a curve, a plain PEFT adapter

A finished point is kept in the cache in a file of its own, by the hashes of all that decides it: the same command goes
on where it was interrupted.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from forgetless.config import InterpolateConfig
from forgetless.data.batches import Encoder, Example, collate
from forgetless.data.streams import JUDGED_SEED, load_stream, sample
from forgetless.data.tasks import Stream, Task
from forgetless.errors import RunError, UsageError, nearest
from forgetless.forgetting.kept import kept
from forgetless.forgetting.reference import BATCH_TOKENS, computed
from forgetless.forgetting.texts import LONGEST
from forgetless.geometry import points
from forgetless.geometry.connectivity import TaskRows, barrier, concave, linear_cka, losses, peak, scores
from forgetless.geometry.curve import CurveSettings, as_factors, straight_middle, trained_middle
from forgetless.geometry.path import AdapterPath, straight_path
from forgetless.geometry.points import FACTORS, PRODUCT, WHOLE, Corner, Distances, Placed, Plane, Weights
from forgetless.learning.engine import Engine
from forgetless.learning.fit import fit_rows
from forgetless.model.answers import logits_at, token_losses
from forgetless.model.identity import json_digest, other_settings, weights_digest
from forgetless.model.loading import loaded_as_told
from forgetless.progress import steps
from forgetless.report.interpolation import write_interpolation
from forgetless.runs.folder import RunFolder, complete, make_folder, read_json, write_json, write_json_whole
from forgetless.score.scorers import Scorer, headline
from forgetless.subjects.layouts import short_names
from forgetless.subjects.models import Opened, Subject, base_name, compare, dense, find_subjects, opened
from forgetless.subjects.updates import read_update, write_update
from forgetless.versions import versions

A, B, C, MIDDLE = "a", "b", "c", "middle"
LINE, CURVE, PLANE = "line", "curve", "plane"
CKA_POSITIONS = 4096  # answer tokens whose states are compared, at most, whole rows
RECORD, POINTS, SETTINGS = "interpolate.json", "points.json", "curve.json"

Rows = dict[str, dict[str, list]]  # task -> nats, tokens and scores of each row


@dataclass(frozen=True)
class Stage:
    """Points that one model in memory is brought to."""

    kind: str  # LINE, CURVE or PLANE
    within: str  # PRODUCT, FACTORS or WHOLE
    corners: tuple[str, ...]
    weights: tuple[Weights, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.within}"


Opening = tuple[Stage, Opened, Placed, list[Any]]  # a stage, its model, what brings it to points, hashes of corners


@dataclass
class Session:
    """Everything loaded and checked before a model is opened."""

    config: InterpolateConfig
    engine: Engine
    subjects: dict[str, Subject]  # A and B, and C where there is a third
    updates: dict[str, Corner]  # of adapters; empty for whole weights
    within: tuple[str, ...]
    tasks: tuple[Task, ...]
    encoder: Encoder
    notes: list[str]
    folder: Path

    @property
    def hashes(self) -> dict[str, Any]:
        """All that decides each model's predictions."""
        return {name: one.decided_by for name, one in self.subjects.items()}

    @property
    def groups(self) -> dict[str, tuple[Task, ...]]:
        """Old, new and all tasks; without a new one only all."""
        old = tuple(task for task in self.tasks if task.name != self.config.new)
        parts = {"old": old, "new": tuple(task for task in self.tasks if task.name == self.config.new)}
        return ({name: part for name, part in parts.items() if part} if self.config.new else {}) | {"all": self.tasks}


@loaded_as_told
def interpolate(config: InterpolateConfig) -> dict:
    """Loss and score along paths between two models; gives the content of interpolate.json, with its `path`.

    Raises a ForgetlessError for models without a path between them and for rows that cannot be scored.
    """
    session = prepare(config)
    make_folder(session.folder, "give another output_dir")
    apart = {within: _distances(session, within) for within in session.within}
    planes = {within: Plane.through(one.gram) for within, one in apart.items()} if config.plane else {}
    stages = [*_lines(session), *_curves(session), *_planes(session, planes)]
    found = dict(_measured(session, stages))
    told = _record(session, stages, found, planes) | {"distances": {name: one.as_json() for name, one in apart.items()}}
    write_json_whole(session.folder / POINTS, _all_points(stages, found))
    write_json_whole(session.folder / RECORD, told)
    write_interpolation(told, session.folder)
    return told | {"path": str(session.folder)}


# ---------------------------------------------------------------- what is looked at


def prepare(config: InterpolateConfig) -> Session:
    """Reads and checks everything; errors name what does not fit."""
    config.check()
    specs = {A: config.before, B: config.after} | ({C: config.plane} if config.plane else {})
    subjects = {name: _one(spec, config) for name, spec in specs.items()}
    if both := [one.name for one in subjects.values() if one.decoder_start is not None]:
        raise UsageError(f"{both[0]}: an encoder-decoder; interpolate looks at the hidden states of decoders alone")
    notes = [note for one in subjects.values() for note in one.notes]
    notes += [note for name, one in subjects.items() if name != B for note in compare(subjects[B], one)]
    updates = _updates(subjects)
    within = _within(config, updates, {name: one.name for name, one in subjects.items()})
    max_length = min([LONGEST, *(one.context for one in subjects.values() if one.context)])
    encoder = Encoder(subjects[B].tokenizer, max_length)
    tasks = _tasks(config, encoder, notes)
    engine = Engine(config.device, config.precision)
    if engine.processes > 1:
        raise UsageError("interpolate runs in one process; start it without accelerate launch")
    folder = Path(config.output_dir or _usual_folder(subjects))
    return Session(config, engine, subjects, updates, within, tasks, encoder, notes, folder)


def _one(spec: str, config: InterpolateConfig) -> Subject:
    found = find_subjects(spec, base_is=config.base_is, allow_pickle=config.allow_pickle)
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise UsageError(f"{spec!r}: a run folder of {len(found)} models; give one of its adapters ({names})")
    return dense(found[0], "interpolation")


def _updates(subjects: Mapping[str, Subject]) -> dict[str, Corner]:
    """The updates of adapters on one base; {} where all are whole weights. UsageError where there is no path."""
    found: dict[str, Corner] = {}
    for name in list(subjects)[1:]:
        path = straight_path(subjects[A], subjects[name])
        if isinstance(path, AdapterPath):
            found |= {A: path.start, name: path.end}
    if found and found.keys() != subjects.keys():
        raise UsageError("a plane needs three adapters on one base, or three models with whole weights")
    for one in subjects.values() if not found else ():
        if differing := other_settings(one.base, subjects[B].base):
            raise UsageError(
                f"{one.name} and {subjects[B].name}: the configurations differ in {differing}, so the weights between "
                "them belong to no one model; give both the same configuration"
            )
    return found


def _within(config: InterpolateConfig, updates: Mapping[str, Corner], names: Mapping[str, str]) -> tuple[str, ...]:
    if not updates:
        if config.within == FACTORS or config.curve:
            asked = "a curve is trained between" if config.curve else "factors are those of"
            raise UsageError(f"{asked} two adapters on one base, and {names[A]} and {names[B]} are whole weights")
        return (WHOLE,)
    if config.within == PRODUCT:
        return (PRODUCT,)
    points.check_factors({names[name]: update for name, update in updates.items()})
    return (PRODUCT, FACTORS) if config.within == "both" else (FACTORS,)


def _tasks(config: InterpolateConfig, encoder: Encoder, notes: list[str]) -> tuple[Task, ...]:
    """The tasks with at most `limit` test rows and their headline scorer, every row encoded once."""
    stream = load_stream(config.tasks or "")
    names = [task.name for task in stream.tasks]
    if config.new and config.new not in names:
        raise UsageError(f"new: no task {config.new!r}{nearest(config.new, names)}")
    if config.curve and not any(task.train for task in stream.tasks):
        raise UsageError(f"{config.tasks}: a curve is trained on training rows, and the tasks have none")
    tasks = tuple(
        replace(
            task,
            test=sample(task.test, config.limit, seed=JUDGED_SEED, name=task.name, purpose="test"),
            scorers=task.scorers[:1],
        )
        for task in stream.tasks
    )
    fitted, told = fit_rows(
        Stream(stream.name, tasks), encoder, splits=("train", "test") if config.curve else ("test",)
    )
    notes += told
    return fitted.tasks


def _usual_folder(subjects: Mapping[str, Subject]) -> str:
    """Named by what is compared: the same models again, the same folder."""
    digest = json_digest([one.decided_by for one in subjects.values()])
    short = short_names([subjects[A].name, subjects[B].name])
    names = [re.sub(r"[^\w.-]+", "-", short[subjects[name].name]) for name in (A, B)]
    return f"runs/interpolate-{names[0]}-{names[1]}-{digest[:6]}"


def _lines(session: Session) -> Iterator[Stage]:
    weights = tuple(map(points.on_line, points.line(session.config.points)))
    yield from (Stage(LINE, within, (A, B), weights) for within in session.within)


def _curves(session: Session) -> Iterator[Stage]:
    if session.config.curve:
        weights = tuple(map(points.on_curve, points.line(session.config.points)))
        yield from (Stage(CURVE, within, (A, MIDDLE, B), weights) for within in session.within)


def _planes(session: Session, planes: Mapping[str, Plane]) -> Iterator[Stage]:
    for within, plane in planes.items():
        x, y = plane.grid(session.config.grid)
        yield Stage(PLANE, within, (A, B, C), tuple(plane.weights(one, other) for other in y for one in x))


def _distances(session: Session, within: str) -> Distances:
    if within == WHOLE:
        return points.weight_distances(list(session.subjects.values()))
    return points.distances(list(session.updates.values()), within)


# ---------------------------------------------------------------- measuring


def _measured(session: Session, stages: Sequence[Stage]) -> Iterator[tuple[str, Any]]:
    """(stage's name, the rows of each of its points), and ("cka", ...); the base is loaded once."""
    for number, (stage, model, placed, hashes) in enumerate(_opened(session, stages)):
        union = tuple(dict.fromkeys(option for task in session.tasks for option in task.options))
        scorer = Scorer(model, session.encoder, session.engine, union, BATCH_TOKENS)
        measure = Measure(session, model, scorer, placed, stage, hashes)
        with steps(stage.name.replace("-", ", "), len(stage.weights)) as progress:
            found = []
            for weights in stage.weights:
                found.append(measure.rows(weights))
                progress.advance()
        yield stage.name, found
        if number == 0:
            yield "cka", measure.alikeness()


def _opened(session: Session, stages: Sequence[Stage]) -> Iterator[Opening]:
    """Each stage with a model that can be brought to its points, its corners and their hashes."""
    return _with_adapters(session, stages) if session.updates else _with_weights(session, stages)


def _with_adapters(session: Session, stages: Sequence[Stage]) -> Iterator[Opening]:
    """One adapter a stage on one base."""
    corners, hashes = dict(session.updates), session.hashes
    with tempfile.TemporaryDirectory() as place:
        templates = [_template(session, stage, Path(place) / stage.name) for stage in stages]
        models = opened(templates, session.engine.dtype, session.engine.device)
        for stage, (_, model) in zip(stages, models, strict=True):
            assert isinstance(model, PeftModel)
            if stage.kind == CURVE:
                corners[MIDDLE], hashes[MIDDLE] = _middle(session, stage, model)
            mine = [corners[name] for name in stage.corners]
            yield stage, model, points.PlacedAdapter(model, mine, stage.within), [hashes[one] for one in stage.corners]


def _with_weights(session: Session, stages: Sequence[Stage]) -> Iterator[Opening]:
    """All models in memory as tensors, the last one to be opened also as the model that is changed."""
    order = [session.subjects[name] for name in (A, C, B) if name in session.subjects]
    states: dict[int, dict[str, Tensor]] = {}
    for subject, model in opened(order, session.engine.dtype, session.engine.device):
        states[id(subject)] = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
        for stage in stages if len(states) == len(order) else ():
            mine = [states[id(session.subjects[name])] for name in stage.corners]
            yield stage, model, points.PlacedWeights(model, mine), [session.hashes[one] for one in stage.corners]


def _template(session: Session, stage: Stage, folder: Path) -> Subject:
    """An adapter with the layers and ranks of the stage's points."""
    corners = dict(session.updates)
    if stage.kind == CURVE:
        corners[MIDDLE] = straight_middle(corners[A], corners[B], stage.within)
    combined = points.COMBINED[stage.within]([corners[name] for name in stage.corners], stage.weights[0])
    if not combined:
        raise UsageError("both models are the base itself; there is nothing between them")
    carrier = session.subjects[B] if session.subjects[B].adapter else session.subjects[A]
    write_update(combined, folder, str(carrier.base))
    return replace(session.subjects[B], name=stage.name, adapter=folder)


@dataclass
class Measure:
    """One stage's model on all rows."""

    session: Session
    model: Opened
    scorer: Scorer
    placed: Placed
    stage: Stage
    hashes: list[Any]  # of the corners

    def rows(self, weights: Weights) -> Rows:
        """Every task's rows at a point, or what they gave before."""
        session = self.session
        parts = [(digest, w) for digest, w in zip(self.hashes, weights, strict=True) if w]
        decided_by = self.decided_by | {"weights": parts, "within": self.stage.within if len(parts) > 1 else None}

        def compute() -> Rows:
            self.placed.put(weights)
            return {task.name: rows_of(session, self.model, self.scorer, task) for task in session.tasks}

        return kept(decided_by, compute)

    def alikeness(self) -> dict:
        """Linear CKA between the ends' last hidden states at answer positions; of a line's stage."""
        session = self.session
        examples = _first(session, CKA_POSITIONS)

        def compute() -> dict:
            states = []
            for weights in (self.stage.weights[0], self.stage.weights[-1]):
                self.placed.put(weights)
                states.append(torch.cat(list(last_states(session, self.model, examples))))
            X, Y = states
            return {"cka": linear_cka(X, Y), "positions": X.shape[0], "width": X.shape[1]}

        return kept(self.decided_by | {"cka": self.hashes, "most": CKA_POSITIONS}, compute)

    @cached_property
    def decided_by(self) -> dict:
        """All that the numbers depend on beside the point."""
        session = self.session
        return {
            "interpolate": 1,
            "computed": computed(self.model, BATCH_TOKENS, session.engine.autocast),
            "tokenizer": session.subjects[B].identity.as_json(),
            "max_length": session.encoder.max_length,
            "rows": [
                [task.name, [row.key for row in task.test], task.options, task.scoring, task.max_new_tokens]
                for task in session.tasks
            ],
        }


def rows_of(session: Session, model: Opened, scorer: Scorer, task: Task) -> dict[str, list]:
    """Cross-entropy at a task's answer tokens, as in training, and its headline score, row by row."""
    found = scorer(task).measures[headline(task)]
    examples = [session.encoder(row) for row in task.test]
    nats = [0.0] * len(examples)
    for chosen in _batches(examples):
        part = collate([examples[i] for i in chosen], session.encoder.tokenizer.pad_token_id, session.engine.device)
        with torch.no_grad(), session.engine.autocast():
            logits = logits_at(model, part.keep, input_ids=part.ids, attention_mask=part.mask)
            told = token_losses(logits, part.targets).double().cpu()
        for i, row in zip(chosen, told.split(part.keep.sum(1).tolist()), strict=True):
            nats[i] = float(row.sum())
    if not all(map(math.isfinite, nats)):
        wrong = sum(not math.isfinite(one) for one in nats)
        raise RunError(
            f"task {task.name}: the loss of {wrong} of {len(nats)} rows is no finite number at this point; try "
            "--precision fp32, or a task whose rows both models can read"
        )
    return {"nats": nats, "tokens": [example.answers for example in examples], "scores": found}


def last_states(session: Session, model: Opened, examples: Sequence[Example]) -> Iterator[Tensor]:
    """(answers, width) of each batch: what the output embedding reads at the positions that predict answer tokens."""
    for chosen in _batches(examples):
        part = collate([examples[i] for i in chosen], session.encoder.tokenizer.pad_token_id, session.engine.device)
        with torch.no_grad(), session.engine.autocast():
            _, states = logits_at(model, part.keep, input_ids=part.ids, attention_mask=part.mask, hidden=True)
        yield states[-1][part.keep].float().cpu()


def _batches(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Numbers of examples of like length, a quarter of BATCH_TOKENS at a time: every token may need its logits."""
    batch: list[int] = []
    for i in sorted(range(len(examples)), key=lambda i: -len(examples[i].ids)):
        if batch and (len(batch) + 1) * len(examples[batch[0]].ids) > BATCH_TOKENS // 4:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _first(session: Session, most: int) -> list[Example]:
    """The tasks' first rows, an equal share of `most` answer tokens for each task, one row at least."""
    found: list[Example] = []
    for task in session.tasks:
        room = most // len(session.tasks)
        for i, row in enumerate(task.test):
            example = session.encoder(row)
            room -= example.answers
            if i and room < 0:
                break
            found.append(example)
    return found


# ---------------------------------------------------------------- the curve


def _middle(session: Session, stage: Stage, model: PeftModel) -> tuple[Corner, Any]:
    """The trained middle point and its hash; one that was trained before with the same settings is taken."""
    config, a, b = session.config, session.updates[A], session.updates[B]
    settings = CurveSettings(config.curve, config.learning_rate)
    folder = session.folder / stage.name
    told = {
        "settings": {one.name: getattr(settings, one.name) for one in fields(settings)},
        "ends": [session.subjects[name].decided_by for name in (A, B)],
        "rows": json_digest([[row.key for row in task.train] for task in session.tasks]),
        "computed": computed(model, BATCH_TOKENS, session.engine.autocast),
    }
    if not (complete(folder) and read_json(folder / SETTINGS) == told):
        examples = [session.encoder(row) for task in session.tasks for row in task.train]
        pad = session.encoder.tokenizer.pad_token_id
        with steps(f"train the {stage.name.replace('-', ' in ')}", config.curve) as progress:
            middle = trained_middle(
                model, a, b, stage.within, examples, settings, session.engine, pad,
                lambda loss: progress.advance(loss=loss),
            )  # fmt: skip
        with RunFolder(session.folder).publish(folder) as new:
            write_update(middle, new, base_name(list(session.subjects.values())))
            write_json(new / SETTINGS, told)
    found = read_update(folder).layers
    if stage.within == FACTORS:
        found = {layer: as_factors(pair, a[layer].scale) for layer, pair in found.items()}
    return found, weights_digest([folder / SAFETENSORS_WEIGHTS_NAME])


# ---------------------------------------------------------------- what is told


def _record(session: Session, stages: Sequence[Stage], found: Mapping[str, Any], planes: Mapping[str, Plane]) -> dict:
    config = session.config
    new = {task.name for task in session.groups.get("new", ())}
    return {
        "version": 1,
        "models": {name: one.as_json() for name, one in session.subjects.items()},
        "tasks": [
            {"name": task.name, "rows": len(task.test), "measure": headline(task), "new": task.name in new}
            for task in session.tasks
        ],
        "confidence": config.confidence,
        "paths": [
            _path(session, stage, found[stage.name]) for stage in stages if stage.kind != PLANE
        ],
        "cka": found["cka"],
        "planes": [
            _plane(session, stage, planes[stage.within], found[stage.name]) for stage in stages if stage.kind == PLANE
        ],
        "notes": list(dict.fromkeys(session.notes)),
        "settings": {
            **{one.name: getattr(config, one.name) for one in fields(config) if one.name != "output_dir"},
            "computed_on": session.engine.told,
            "max_length": session.encoder.max_length,
            "batch_tokens": BATCH_TOKENS,
        },
        "versions": versions(),
    }  # fmt: skip


def _path(session: Session, stage: Stage, found: list[Rows]) -> dict:
    """Curves of every task and group with their bounds, barriers, and the groups' peaks."""
    alphas, confidence = points.line(session.config.points), session.config.confidence
    rows = {task.name: task_rows([one[task.name] for one in found]) for task in session.tasks}
    parts = {task.name: [rows[task.name]] for task in session.tasks}
    groups = {name: [rows[task.name] for task in tasks] for name, tasks in session.groups.items()}

    def told(tasks: list[TaskRows]) -> dict:
        bands = {"loss": losses(tasks, confidence), "score": scores(tasks, confidence)}
        return {
            **{name: {"value": _numbers(one.value), "low": _numbers(one.low), "high": _numbers(one.high)}
               for name, one in bands.items()},
            "barrier": barrier(tasks, alphas, confidence),
            "peak": peak(tasks, alphas, confidence),
            "concave": concave(tasks, confidence),
        }  # fmt: skip

    return {
        "kind": stage.kind,
        "within": stage.within,
        "alphas": alphas,
        "groups": {name: told(tasks) for name, tasks in groups.items()},
        "tasks": {name: told(tasks) for name, tasks in parts.items()},
    }


def task_rows(found: Sequence[Mapping[str, list]]) -> TaskRows:
    """One task's rows, a column for each point."""
    return TaskRows(
        np.array([one["nats"] for one in found]).T,
        np.array(found[0]["tokens"], float),
        np.array([one["scores"] for one in found], float).T,
    )


def _numbers(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(one) else float(one) for one in values]


def _plane(session: Session, stage: Stage, plane: Plane, found: list[Rows]) -> dict:
    """The groups' mean loss and score on the grid, rows of it from the lowest y."""
    x, y = plane.grid(session.config.grid)
    shape, groups = (len(y), len(x)), {}
    for name, tasks in session.groups.items():
        rows = [task_rows([one[task.name] for one in found]) for task in tasks]
        loss = np.mean([one.nats.sum(0) / one.tokens.sum() for one in rows], axis=0)
        score = np.mean([one.scores.mean(0) for one in rows], axis=0)
        groups[name] = {"loss": loss.reshape(shape).tolist(), "score": score.reshape(shape).tolist()}
    return {"within": stage.within, "x": x, "y": y, "corners": plane.corners, "groups": groups}


def _all_points(stages: Sequence[Stage], found: Mapping[str, Any]) -> dict:
    return {
        stage.name: [
            {"weights": dict(zip(stage.corners, weights, strict=True)), "tasks": rows}
            for weights, rows in zip(stage.weights, found[stage.name], strict=True)
        ]
        for stage in stages
    }
