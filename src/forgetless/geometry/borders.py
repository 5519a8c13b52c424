"""Two models blended, or a run border by border: after each task what to deploy; the learner went on unblended.

    deployed_t = the certified point between deployed_{t-1} and what the learner had after task t

The budgets of border t are those of the tasks learnt before it, and those of probes and texts. The promise is one a
border; `borders` shares the confidence among several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from forgetless.auditing.budgets import MAX_KL, Budget, flag_budgets, resolve
from forgetless.auditing.measures import KL_CLIP, Scores
from forgetless.auditing.verdict import check_clip
from forgetless.config import BlendConfig, LearnConfig
from forgetless.data.streams import load_stream
from forgetless.data.tasks import Task
from forgetless.errors import DataError, UsageError
from forgetless.forgetting.texts import OWN_ANSWERS
from forgetless.geometry.blend import blend_pair, level_of
from forgetless.geometry.promise import can_be_shown, least_rows
from forgetless.model.adapters import Adapters
from forgetless.progress import console
from forgetless.runs.folder import RunFolder
from forgetless.runs.shapes import read_run

CONFIG = "run.json"


def is_run(name: str) -> bool:
    """Whether this is the folder of a run."""
    return (Path(name) / CONFIG).is_file()


def blend(config: BlendConfig) -> dict:
    """Finds and writes the point between two models (`blend_pair`); of a run folder, at every border.

    Of a run: `blends` has each border's record, `path` is the run's, and `exit_code` the worst.
    """
    config.check()
    if not is_run(config.after):
        return blend_pair(config)
    blends = blend_run(config)
    return {"path": config.after, "blends": blends, "exit_code": max(one["exit_code"] for one in blends)}


def check_budgets(config: LearnConfig) -> None:
    """Before a run is learnt: each budget is about an earlier task or a text, and these rows could show it.

    Raises UsageError or DataError.
    """
    told = config.as_blend("")
    if told is None:
        return
    if PartialState().num_processes > 1:
        raise UsageError(
            "budgets are held to in one process: learn without them, then `forgetless blend MODEL RUN --tasks STREAM "
            "--score_on validation` with them"
        )
    method = config.build_method()
    if method.adapter_class is not Adapters:
        raise UsageError(f"budgets blend LoRA pairs, and {config.method} trains none; leave them out")
    if not method.stock_peft:
        raise UsageError(f"method {config.method}: its adapters cannot be blended: {method.remedy}")
    stream = load_stream(config.stream, on_bad_row=config.on_bad_row, keep_gone=True)
    tasks = {task.name: task for task in stream.tasks}
    *earlier, last = tasks
    budgets = flag_budgets(config.max_drop, config.max_kl, config.max_lost)
    for budget in budgets:
        if budget.name == last:
            raise UsageError(f"{budget}: {last} is the last task, and nothing is learnt after it")
    budgets = resolve(budgets, earlier, [OWN_ANSWERS])
    check_clip(budgets, KL_CLIP)
    for budget in budgets:
        if budget.option != MAX_KL:
            _check_rows(budget, tasks[budget.name], told)
    for task in tasks.values():
        if not task.gone and not getattr(task, config.blend_on):
            raise DataError(f"{stream.name}: task {task.name} has no {config.blend_on} rows, on which to blend")


def _check_rows(budget: Budget, task: Task, config: BlendConfig) -> None:
    """Could the task's rows show the budget if nothing were lost?"""
    if task.gone:
        raise DataError(f"{budget}: {task.name} needs its rows: {task.gone}; leave the budget out")
    rows, level = len(getattr(task, config.score_on)), level_of(config)
    if rows and not can_be_shown(Scores(task.name, (0.0,) * rows, (0.0,) * rows), budget, level):
        needed = least_rows(budget, level, KL_CLIP)
        raise UsageError(
            f"{budget}: {task.name} has {rows} {config.score_on} rows, and at least {needed} are needed to show it "
            "(`validation:` in the stream file cuts them from the training rows)"
        )


def blend_run(config: BlendConfig) -> list[dict]:
    """Blends at each border of the finished tasks, into `blended/NN-TASK` of the run; gives each border's record.

    A border without a budget deploys the learner's own model. What was measured is not measured again.
    """
    run = RunFolder(Path(config.after))
    told = read_run(run.root)
    names = [lesson["name"] for lesson in told["lessons"]]
    _check(config, names, run)
    base, root = config.base_is or told["model"]["name"], Path(config.output_dir or run.root / "blended")
    deployed, records = config.before, []
    for number, folder in enumerate(run.finished(names), start=1):
        name = names[number - 1]
        after, later = f"{base}+{folder / 'adapter'}", set(names[number - 1 :])
        border = replace(
            config, before=deployed, after=after, new=(name,), max_drop=_kept(config.max_drop, later),
            max_lost=_kept(config.max_lost, later), output_dir=str(root / folder.name),
        )  # fmt: skip
        if not (border.max_drop or border.max_lost or border.max_kl):
            deployed = after
            continue
        records.append(blend_pair(border))
        if records[-1]["chosen"]:
            deployed = f"{base}+{Path(records[-1]['path']) / records[-1]['kind']}"
    if len(records) > config.borders:
        console.print(
            f"note: the promise holds for each of the {len(records)} borders by itself; --borders {len(records)} makes "
            "it hold for all together",
            markup=False,
        )
    if not records:
        raise UsageError(
            f"{run.root}: no finished task comes after one with a budget; its tasks, in their order: {', '.join(names)}"
        )
    return records


def _check(config: BlendConfig, names: Sequence[str], run: RunFolder) -> None:
    """UsageError for what would have no effect at any border."""
    if config.new:
        raise UsageError("new: at each border of a run it is the task that was learnt there; leave it out")
    last = len(run.finished(names)) - 1
    for budget in flag_budgets(config.max_drop, (), config.max_lost):
        if budget.name in names[max(0, last) :]:
            raise UsageError(
                f"{budget}: no finished task comes after {budget.name}, so there is no border at which it could be kept"
            )


def _kept(budgets: Sequence[str], later: set[str]) -> tuple[str, ...]:
    """The budgets that are not about this border's task or later ones."""
    return tuple(text for text in budgets if text.rpartition("=")[0].strip() not in later)
