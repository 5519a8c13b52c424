"""Multiple-choice tasks of lm-evaluation-harness as rows: its own code makes prompts, choices and right answers.

A row's scores are then the harness's: `completion` is its acc and `completion_per_char` its acc_norm, which divides by
a choice's characters without the delimiter. As in `lm_eval.api.model.TemplateLM._encode_pair`, white space at the
prompt's end is scored with the choice. What a task asks for beyond that is refused, since a part of it would be
another task.
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from pathlib import Path
from typing import Any

from forgetless.data.tasks import Row, Task
from forgetless.errors import DataError, DownloadError, UsageError, nearest, short

HARNESS = "lm-eval:"
METRICS = ("acc", "acc_norm")


def harness_task(told: str) -> tuple[Task, str]:
    """The task `lm-eval:NAME` or `lm-eval:./FILE.yaml` with its test (else validation) rows, and where it is from.

    UsageError for a task that cannot be reproduced, DownloadError where its data cannot be had. Rows without exactly
    one right answer, and those with an empty prompt or white space around a choice, are left out and counted.
    """
    task = _load(told, told.removeprefix(HARNESS))
    if reason := _not_reproduced(task.config):
        raise UsageError(f"probe {told}: {reason}; such tasks are not reproduced here, run lm_eval itself")
    name = f"{HARNESS}{task.config.task}"
    found = [_row(task, doc, f"{name}:{number}") for number, doc in enumerate(task.eval_docs)]
    rows = tuple(row for row in found if row is not None)
    if not rows:
        raise DataError(f"probe {told}: none of its {len(found)} rows has one right answer among its choices")
    out = len(found) - len(rows)
    note = f"{out} of {len(found)} rows left out: no one right answer, an empty prompt, or white space around a choice"
    made = Task(name, (), (), rows, scorers=("completions",), notes=(note,) if out else ())
    told_version = (task.config.metadata or {}).get("version", "not stated")
    return made, f"task {task.config.task}, version {told_version}, of lm-eval {version('lm-eval')}"


def _load(told: str, name: str) -> Any:
    """The one task of a registered name or a YAML file; its data are loaded with it."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(f"probe {told}: needs lm-eval; pip install 'forgetless[eval]'") from error
    is_file = Path(name).suffix in (".yaml", ".yml")
    manager = TaskManager(include_defaults=False) if is_file else _registry()
    if is_file and not Path(name).is_file():
        raise UsageError(f"probe {told}: no such file")
    if not is_file and name not in manager.all_tasks:
        raise UsageError(f"probe {told}: lm-eval has no such task{nearest(name, manager.all_tasks)}")
    if name in manager.all_groups or (not is_file and name not in manager.all_subtasks):
        raise UsageError(f"probe {told}: a group of tasks; name one of its tasks")
    try:
        [task] = manager.load(name)["tasks"].values()
    except Exception as error:  # data that cannot be loaded, broken YAML, a task's own code: they share no class
        raise DownloadError(
            f"probe {told}: lm-eval could not load it: {type(error).__name__}: {short(str(error), 300)}; "
            "check the file, or load its data set once where there is a network"
        ) from error
    return task


@functools.cache
def _registry() -> Any:
    """All tasks that the harness has; it reads thousands of files for that."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _not_reproduced(config: Any) -> str | None:
    """What the task asks for that is more than likelihoods of choices after one prompt; None if nothing."""
    metrics = [one["metric"] for one in config.metric_list or ()]
    if config.output_type != "multiple_choice":
        return f"its output_type is {config.output_type}, not multiple_choice"
    if config.num_fewshot:
        return f"it puts {config.num_fewshot} examples before each question"
    if config.filter_list or config.process_results:
        return f"it has a {'filter_list' if config.filter_list else 'process_results'} of its own"
    if others := [str(metric) for metric in metrics if metric not in METRICS]:
        return f"it asks for {', '.join(others)}, not only for {' and '.join(METRICS)}"
    if any(one.get("aggregation", "mean") != "mean" for one in config.metric_list or ()):
        return "its metrics are not means over rows"
    if config.target_delimiter.strip():
        return f"its target_delimiter {config.target_delimiter!r} is more than white space"
    if config.doc_to_image or config.doc_to_audio:
        return "its rows have images or sound"
    return None


def _row(task: Any, doc: dict, place: str) -> Row | None:
    """A question with its choices, each scored as delimiter + choice; None where it has no one right answer."""
    if task.multiple_input or task.multiple_target:
        raise UsageError(f"probe {place}: has several prompts or several right answers a row; run lm_eval itself")
    context = task.fewshot_context(doc, 0, gen_prefix=task.doc_to_prefix(doc))
    choices, right = list(task.doc_to_choice(doc)), task.doc_to_target(doc)
    if isinstance(right, str):
        right = choices.index(right) if right in choices else -1
    whole = all(choice and choice == choice.strip() for choice in choices) and len(set(choices)) == len(choices)
    prompt = context.rstrip()
    if not (whole and prompt and 0 <= right < len(choices)):
        return None
    lead = context[len(prompt) :] + task.config.target_delimiter
    return Row(prompt, f"{lead}{choices[right]}", source=place, options=tuple(choices))
