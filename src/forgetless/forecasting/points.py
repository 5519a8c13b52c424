"""The points that laws are fitted to: what a run, a trainer's log or a table says of loss and forgetting.

A point is one moment of one training run: tuned parameters (or the rank), steps so far, fine-tuning loss and
forgetting, both in nats per token. One training gives as many points as it was measured at.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from forgetless.errors import DataError, RunError, nearest
from forgetless.runs.folder import FORGETTING, RunFolder, complete, read_json, read_lines, shaped
from forgetless.runs.search import RUN, folders_with
from forgetless.runs.shapes import STEP, numbers_in, read_records, read_run

STATE = "trainer_state.json"
KL, LOSS = "forgetting/kl", "loss"  # as the callback logs them
WINDOW = 10  # steps of which the training loss at a point is the mean
TRAINING = f"training steps (the mean of the last {WINDOW}, each before its update)"
VALIDATION, EVALUATION = "validation rows at that step", "the trainer's evaluation at that step"
VARY = ("seed", "r", "lora_alpha", "learning_rate", "max_steps", "num_train_epochs", "method", "score_on")
"""Of what decides a run, what may differ between points of one law; `lora_alpha` by a rule of its own."""
REPAIR = "repair it there, or make it anew"
CONSTANT = "train with lr_scheduler_type constant"
REQUIRED = ("steps", "loss", "forgetting", "base")
SIZES = ("parameters", "rank")


@dataclass(frozen=True)
class Point:
    """One moment of one training run."""

    parameters: float | None  # tuned ones
    rank: float | None
    steps: float
    loss: float
    forgetting: float  # KL from the base, nats per token; or another measure, the same in a whole table
    base: str
    source: str  # where it was read, for messages
    learning_rate: float | None = None
    dataset: str = ""
    method: str = ""
    run: str = ""  # points of one training run have one name
    text: str = ""  # on which forgetting was measured
    targets: str = ""  # the layers that are tuned
    lora_alpha: float | None = None
    loss_kind: str = ""  # what the loss was taken on
    recipe: Mapping[str, object] = field(default_factory=dict)  # of a run: all else that decides it

    def __post_init__(self) -> None:
        for name in (*SIZES, "steps", "learning_rate", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise DataError(f"{self.source}: {name} is {value:g}; it must be a number above 0")
        for name in ("loss", "forgetting"):
            if not math.isfinite(getattr(self, name)):
                raise DataError(
                    f"{self.source}: {name} is {getattr(self, name)}; leave the point out or measure it again"
                )
        if self.parameters is None and self.rank is None:
            raise DataError(f"{self.source}: give `parameters` (how many are tuned) or `rank`")


class NoPointsError(RunError):
    """A run that has none (yet)."""


def read_points(paths: Iterable[str | Path]) -> tuple[list[Point], list[str]]:
    """Points of tables (.csv, .json, .jsonl), run folders, trainers' output folders, and folders of these; and of each
    run that has none, why.
    """
    left_out: list[str] = []
    places = [Path(path) for path in paths]
    found = [point for path in places for point in _points_of(path, left_out)]
    if not found:
        raise DataError(
            f"{', '.join(map(str, places))}: no points: give a table (.csv, .json), or folders of runs that measured "
            f"forgetting (docs/forecast.md says what a run must record){''.join(f'. {why}' for why in left_out)}"
        )
    return found, left_out


def _points_of(path: Path, left_out: list[str]) -> Iterator[Point]:
    if path.is_file():
        with shaped(path, REPAIR):
            yield from _from_table(path)
        return
    runs, states = folders_with(path, RUN), _trainers(path)
    if not runs and not states:
        raise RunError(f"{path}: holds no {RUN} of `forgetless learn` and no {STATE} of a trainer")
    for read, place in [*((from_run, folder) for folder in runs), *((from_trainer, file) for file in states)]:
        try:
            with shaped(place, REPAIR):
                yield from read(place, left_out)
        except NoPointsError as error:
            left_out.append(str(error))


# ------------------------------------------------------------------------------------------- tables


def _from_table(file: Path) -> Iterator[Point]:
    if file.suffix == ".csv":
        with file.open(encoding="utf-8", newline="") as lines:
            rows = _csv_rows(file, csv.DictReader(lines))
    elif file.suffix == ".jsonl":
        rows = read_lines(file)
    elif file.suffix == ".json":
        told = read_json(file)
        rows = told.get("points", []) if isinstance(told, dict) else told
    else:
        raise DataError(f"{file}: a table is a .csv, .json or .jsonl file")
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: no rows; a table has a line a point, with columns {', '.join((*SIZES, *REQUIRED))}")
    if isinstance(rows, dict):
        raise DataError(f"{file}: a table is a list of points; {REPAIR}")
    for number, row in enumerate(rows, start=1):
        yield _from_row(row, f"{file}: row {number}")


def _csv_rows(file: Path, lines: csv.DictReader) -> list[dict]:
    """The lines as objects; empty cells are left out."""
    try:
        rows = [{key: value for key, value in row.items() if value != ""} for row in lines]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file}: no CSV in UTF-8 ({error}); {REPAIR}") from error
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise DataError(f"{file}: row {number}: has more cells than the header has names; {REPAIR}")
    return rows


def _from_row(row: dict, source: str) -> Point:
    told = dict(row)
    for name, other in (("forgetting", "kl"), ("rank", "r")):
        if name not in told and other in told:
            told[name] = told[other]
    if "forgetting" not in told and {"cross_entropy", "entropy"} <= told.keys():
        # KL(p || q) = H(p, q) - H(p)
        told["forgetting"] = _number(told, "cross_entropy", source) - _number(told, "entropy", source)
    for name in REQUIRED:
        if name not in told:
            raise DataError(f"{source}: no {name!r}{nearest(name, row)}")
    parameters, rank, rate, alpha = (
        _number(told, name, source) if name in told else None
        for name in ("parameters", "rank", "learning_rate", "lora_alpha")
    )
    steps, loss, forgetting = (_number(told, name, source) for name in ("steps", "loss", "forgetting"))
    dataset, method, text, targets = (str(told.get(name, "")) for name in ("dataset", "method", "text", "targets"))
    run = str(told.get("run", f"{rank or parameters or 0:g}/{rate}/{told.get('seed', '')}"))
    return Point(parameters, rank, steps, loss, forgetting, str(told["base"]), source, rate, dataset, method, run, text,
                 targets, alpha)  # fmt: skip


def _number(row: dict, name: str, source: str) -> float:
    try:
        return float(row[name])
    except (TypeError, ValueError):
        raise DataError(f"{source}: {name} is {row[name]!r}, not a number") from None


# ------------------------------------------------------------------------------------------- folders


def from_run(folder: Path, left_out: list[str] | None = None) -> list[Point]:
    """Points of a run of `learn`: its first lesson, which is what begins from the base.

    Each step whose record in log.jsonl has `forgetting/kl`, and the lesson's end from forgetting.json. What is left out
    of a run that has points is added to `left_out`.
    """
    run = RunFolder(folder)
    told = read_run(folder)
    lesson = told["lessons"][0]["name"]
    place = run.task(1, lesson)
    if not complete(place):
        raise NoPointsError(f"{place}: this lesson is not finished; run the same `forgetless learn` again")
    config, records = told["config"], read_records(place / "log.jsonl", STEP)
    losses, measured, validated = (_column(records, name) for name in (LOSS, KL, "validation_loss"))
    text = ""
    if complete(place / FORGETTING):
        border = read_json(place / FORGETTING / f"{FORGETTING}.json")
        if "per_token" in border:
            measured.setdefault(records[-1]["step"], border["per_token"]["kl"])
            text = border["text"]["sha256"]
    if not measured:
        raise NoPointsError(
            f"{place}: forgetting was not measured; run `forgetless learn` without --forgetting_prompts 0"
        )
    common = Point(
        parameters=float(told["model"]["trainable"]), rank=float(config["r"]), steps=1, loss=0, forgetting=0,
        base=told["base"]["weights"], source=str(folder), learning_rate=float(config["learning_rate"]), dataset=lesson,
        method=told["method"]["name"], run=str(folder), text=text, targets=str(config.get("target_modules", "")),
        lora_alpha=float(config["lora_alpha"]) if "lora_alpha" in config else None,
        recipe={name: value for name, value in told["decides"].items() if name not in VARY},
    )  # fmt: skip
    measured = _of_one_schedule(measured, records, records[-1]["step"], common.source, left_out)
    return list(_moments(common, measured, losses, validated, VALIDATION))


def _trainers(path: Path) -> list[Path]:
    """The newest state of each trainer's output folder: a checkpoint's log holds all the steps before it."""
    newest: dict[Path, Path] = {}
    for folder in folders_with(path, STATE):
        home = folder.parent if folder.name.startswith("checkpoint-") else folder
        number = int(folder.name.removeprefix("checkpoint-")) if home != folder else 0
        if home not in newest or number > int(newest[home].parent.name.removeprefix("checkpoint-")):
            newest[home] = folder / STATE
    return list(newest.values())


def from_trainer(file: Path, left_out: list[str] | None = None) -> list[Point]:
    """Points of a trainer with `ForgettingCallback`: each step at which it measured, from the trainer's own log."""
    state, adapter = read_json(file), file.parent / "adapter_config.json"
    log = state["log_history"]
    if not adapter.is_file():
        raise RunError(f"{adapter}: not here, so neither the base nor the rank is known; give a table instead")
    losses, measured, evaluated = (_column(log, name) for name in (LOSS, KL, "eval_loss"))
    if not measured or not (losses or evaluated):
        raise RunError(f"{file}: no {KL} or no loss in its log; train with ForgettingCallback and a logging interval")
    config = read_json(adapter)
    rates = [record["learning_rate"] for record in log if "learning_rate" in record]
    weights = file.parent / "adapter_model.safetensors"
    common = Point(
        parameters=float(numbers_in(weights)) if weights.is_file() else None, rank=float(config["r"]), steps=1, loss=0,
        forgetting=0, base=str(config["base_model_name_or_path"]), source=str(file), run=str(file.parent.parent),
        learning_rate=max(rates, default=0.0) or None, targets=",".join(sorted(config.get("target_modules") or ())),
        lora_alpha=config.get("lora_alpha"),
    )  # fmt: skip
    measured = _of_one_schedule(measured, log, state.get("max_steps"), common.source, left_out)
    return list(_moments(common, measured, losses, evaluated, EVALUATION))


def _column(records: list[dict], name: str) -> dict[int, float]:
    """A figure by its step, where it is recorded."""
    return {record["step"]: record[name] for record in records if record.get(name) is not None}


def _of_one_schedule(
    measured: dict[int, float], records: list[dict], end: int | None, source: str, left_out: list[str] | None
) -> dict[int, float]:
    """Without the steps within a training whose learning rate falls: step 100 of 1,000 is not the end of 100 steps."""
    rates = list(_column(records, "learning_rate").values())
    if all(later >= rate for rate, later in pairwise(rates)):
        return measured
    kept = {step: kl for step, kl in measured.items() if step == end}
    if not kept:
        raise NoPointsError(f"{source}: its learning rate falls and its end was not measured; {CONSTANT}")
    if left_out is not None and len(kept) < len(measured):
        left_out.append(f"{source}: {len(measured) - len(kept)} points before its end: its learning rate falls, and "
                        f"they are not the ends of shorter trainings; {CONSTANT}")  # fmt: skip
    return kept


def _moments(
    common: Point, measured: dict[int, float], losses: dict[int, float], held_out: dict[int, float], kind: str
) -> Iterator[Point]:
    """A point for each step at which forgetting was measured and a loss is known.

    The loss is that on held-out rows (of this `kind`) if all these steps have it: the losses of a law are of one kind.
    """
    steps = sorted(step for step in measured if step > 0)
    judged = held_out.keys() >= set(steps)
    for step in steps:
        near = [loss for at, loss in losses.items() if step - WINDOW < at <= step]
        # a trainer that logs every 50 steps has one value that is their mean
        near = [held_out[step]] if judged else near or [losses[at] for at in sorted(losses) if at <= step][-1:]
        if near:
            yield replace(common, steps=float(step), loss=sum(near) / len(near), forgetting=measured[step],
                          loss_kind=kind if judged else TRAINING)  # fmt: skip
