"""A run blended border by border: after each task the model to deploy, while the learner went on unblended.

    deployed_t = the certified point between deployed_{t-1} and what the learner had after task t

The budgets of border t are those of the tasks learnt before it, and those of probes and texts. The promise is one a
border; `borders` shares the confidence among several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from forgetless.auditing.budgets import MAX_KL, flag_budgets
from forgetless.config import BlendConfig
from forgetless.data.streams import load_stream
from forgetless.errors import DataError, UsageError, nearest
from forgetless.geometry.blend import blend
from forgetless.runs.folder import RunFolder
from forgetless.runs.shapes import read_run

CONFIG = "run.json"


def is_run(name: str) -> bool:
    """Whether this is the folder of a run."""
    return (Path(name) / CONFIG).is_file()


def check_stream(config: BlendConfig) -> None:
    """Before a run is learnt: every budget is about a task with held-out rows, and not the last one.

    Raises UsageError or DataError.
    """
    if PartialState().num_processes > 1:
        raise UsageError(
            "budgets are held to in one process: learn without them, then `forgetless blend MODEL RUN --tasks STREAM "
            "--score_on validation` with them"
        )
    tasks = load_stream(config.tasks or "", keep_gone=True).tasks
    names = [task.name for task in tasks]
    budgets = flag_budgets(config.max_drop, config.max_kl, config.max_lost)
    for budget in budgets:
        if budget.option != MAX_KL and budget.name not in names[:-1]:
            last = "; it is the last task, and nothing is learnt after it" if budget.name in names else ""
            raise UsageError(f"{budget}: no earlier task {budget.name!r}{last or nearest(budget.name, names[:-1])}")
    for task in tasks:
        if task.gone and task.name in {budget.name for budget in budgets}:
            raise DataError(
                f"{config.tasks}: a budget on {task.name} needs its rows: {task.gone}; leave the budget out"
            )
        if not task.gone and not getattr(task, config.score_on):
            raise DataError(f"{config.tasks}: task {task.name} has no {config.score_on} rows, on which to blend")


def blend_run(config: BlendConfig) -> list[dict]:
    """Blends at each border of the finished tasks, into `blended/NN-TASK` of the run; gives each border's record.

    A border without a budget deploys the learner's own model. What was measured is not measured again.
    """
    run = RunFolder(Path(config.after))
    told = read_run(run.root)
    names = [lesson["name"] for lesson in told["lessons"]]
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
        records.append(blend(border))
        if records[-1]["chosen"]:
            deployed = f"{base}+{Path(records[-1]['path']) / records[-1]['kind']}"
    if not records:
        raise UsageError(
            f"{run.root}: no finished task comes after one with a budget; its tasks, in their order: {', '.join(names)}"
        )
    return records


def _kept(budgets: Sequence[str], later: set[str]) -> tuple[str, ...]:
    """The budgets that are not about this border's task or later ones."""
    return tuple(text for text in budgets if text.rpartition("=")[0].strip() not in later)
