"""Which rows of a stream fit the model and the run's options: every row is encoded once, before anything is trained."""

from __future__ import annotations

from dataclasses import replace

from forgetless.data.batches import Encoder
from forgetless.data.tasks import Row, Stream, Task
from forgetless.errors import DataError, quoted
from forgetless.score.rules import check_row, rules_of


def fit_rows(
    stream: Stream, encoder: Encoder, on_bad_row: str = "error", splits: tuple[str, ...] = ("train", "test")
) -> tuple[Stream, list[str]]:
    """Encodes every row once, so that errors come before training; returns the stream without bad rows, and notes.

    Streams made in Python have not gone through the readers' checks, so names, labels and emptiness are checked here.
    """
    names = [task.name for task in stream.tasks]
    if not names:
        raise DataError("the stream has no tasks")
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two tasks are called {name!r}; give each its own name")
    notes: list[str] = []
    tasks = tuple(
        _without_rows(task, notes) if task.gone else _fit_task(task, stream.options, encoder, on_bad_row, splits, notes)
        for task in stream.tasks
    )
    return Stream(stream.name, tasks), notes


def _without_rows(task: Task, notes: list[str]) -> Task:
    notes.append(f"{task.name}: {task.gone}, so it is not scored any more; what is known of it stays")
    return task


def _fit_task(
    task: Task, union: tuple[str, ...], encoder: Encoder, on_bad_row: str, splits: tuple[str, ...], notes: list[str]
) -> Task:
    if "options" in task.scorers and not task.options:
        raise DataError(
            f"task {task.name}: scored by option likelihood but has no options; "
            "give `options: [...]`, or `scorers: [exact_match]`"
        )
    rules = rules_of(task)
    notes += [f"{task.name}: {note}" for note in task.notes]
    kept: dict[str, tuple[Row, ...]] = {}
    for split in splits:
        rows: list[Row] = []
        bad: list[str] = []
        for row in getattr(task, split):
            try:
                encoder(row)
                if task.options and row.label not in task.options:
                    told = f"the answer {quoted(row.label)} is none of the options {task.options}"
                    raise DataError(f"{row.source}: {told}")
                if split == "test":
                    check_row(rules, row)
                rows.append(row)
            except DataError as error:
                if on_bad_row == "error":
                    raise
                bad.append(str(error))
        if bad:
            notes.append(f"{task.name}: {len(bad)} {split} rows left out; first: {bad[0]}")
        if not rows and split != "validation":
            raise DataError(f"task {task.name}: no {split} rows")
        cut = sum(encoder(row).truncated for row in rows)
        if cut:
            notes.append(
                f"{task.name}: {cut} of {len(rows)} {split} rows are longer than max_length={encoder.max_length} and "
                "were cut (prompts and chats lose their beginning, texts their end)"
            )
        kept[split] = tuple(rows)
    if rules:
        first = kept["test"][0]
        encoder.generation_context(first, task.max_new_tokens)
        for rule in rules.values():  # once on a right answer: a function that fails must not fail after the training
            rule.scores(first.label, rule.gold(first))
        long = sum(encoder.answer_length(row) > task.max_new_tokens for row in kept["test"])
        if long:
            notes.append(
                f"{task.name}: {long} of {len(kept['test'])} test rows have a right answer of more than "
                f"max_new_tokens={task.max_new_tokens} tokens; generated ones end there, so raise max_new_tokens"
            )
    if task.options:
        encoder.scoring_splits(kept["test"][0], union)
    return replace(task, **kept)  # type: ignore[arg-type]  # splits of rows
