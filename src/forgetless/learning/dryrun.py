"""What a run would do and cost, without training: the plan of `learn --dry_run`."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from operator import mul

import torch
from rich.table import Table

from forgetless.config import LearnConfig
from forgetless.data.batches import Example, collate, split
from forgetless.forgetting.reference import hidden_states
from forgetless.forgetting.sides import answers_of, longest
from forgetless.learning.borders import NO_ONE_MODEL
from forgetless.learning.cells import scored_columns
from forgetless.learning.prepare import prepare
from forgetless.learning.session import Session
from forgetless.learning.step import TrainSettings, count_steps, optimizer_for, plan
from forgetless.methods import Lesson
from forgetless.methods.base import own_answering
from forgetless.model.encoder_decoder import decoder_start
from forgetless.model.loading import loaded_as_told
from forgetless.progress import out, seconds_of
from forgetless.score.scorers import Scorer

TRIED = 8  # documents of the text that forgetting is measured on


@loaded_as_told
def plan_run(config: LearnConfig) -> None:
    """Prints tasks, rows, tokens, steps, trainable parameters, time, memory and disk.

    Time is measured, not guessed: a few whole steps on real rows with a learning rate of 0, and the scoring of a few
    real rows, on this machine; nothing is trained and nothing is written.
    """
    session = prepare(config)
    table = Table("lesson", "rows", "tokens a pass", "steps", "validation", "test", "options")
    tasks = session.stream.tasks
    for lesson in _trained(session):
        examples = [session.encoder(row) for row in lesson.rows]
        steps = count_steps(len(examples), config.part(TrainSettings), lesson.tasks)
        task = next((task for task in tasks if task.name == lesson.name), None)
        table.add_row(
            lesson.name,
            f"{len(examples):,}",
            f"{sum(len(e.ids) for e in examples):,}",
            f"{steps:,}",
            str(len(task.validation)) if task else "",
            str(len(task.test)) if task else "",
            str(len(task.options)) if task else "",
        )
    out.print(table)
    costs = estimate(session)
    forgetting = costs.forgetting(config.part(TrainSettings))
    steps_of = costs.steps(config.part(TrainSettings))
    training = costs.training(config.part(TrainSettings))
    total_steps, learners = sum(steps_of), len(session.method.views())
    trainable = sum(parameter.numel() for parameter in session.adapters.parameters())
    facts = {
        "method": f"{config.method} {config.method_options or ''}: {session.method.summary}",
        "model": f"{config.model}, {session.adapters.base_parameters():,} parameters, "
                 f"on {session.engine.told}",
        "trainable": f"{trainable:,} parameters in {session.adapters.described()}",
        "scored": f"{len(_cells(session))} cells of the matrix (cells={config.cells}), {costs.scored_rows:,} rows",
        "forgetting": _forgetting(session),
        "time": f"about {minutes(training + costs.scoring + forgetting)}: "
                f"{total_steps} steps x {training / max(total_steps, 1):.2f} s + {costs.scored_rows:,} rows x "
                f"{costs.row_seconds:.3f} s" + (f" x {learners} learners" if learners > 1 else "")
                + (f" + {minutes(forgetting)} for forgetting" if forgetting else ""),
        "memory": f"peak so far {_peak_gib(session):.1f} GiB, steps and one scoring batch included",
        "disk": f"about {costs.disk / 2**20:.0f} MiB in {session.run.root}",
    }  # fmt: skip
    for name, fact in facts.items():
        out.print(f"{name:>10}  {fact}", markup=False, soft_wrap=True)
    for note in session.notes:
        out.print(f"      note  {note}", markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Estimate:
    """What a run would cost on this machine. Seconds are measured; adapters' bytes are exact, predictions' a guess."""

    rows: list[int]  # of each lesson that is trained
    tasks: list[int]  # in each lesson
    step_seconds: list[float]  # of a step of each lesson
    scored_rows: int
    row_seconds: float
    scoring: float  # seconds
    answering: float  # seconds of the base's answers to what forgetting is measured on
    measuring: float  # seconds of one measure of forgetting
    every: int  # steps between measures inside a lesson; 0: at borders only
    disk: float  # bytes

    def steps(self, settings: TrainSettings) -> list[int]:
        """Of each lesson, under these settings."""
        return [count_steps(rows, settings, tasks) for rows, tasks in zip(self.rows, self.tasks, strict=True)]

    def training(self, settings: TrainSettings) -> float:
        """Seconds of all steps."""
        return sum(map(mul, self.steps(settings), self.step_seconds))

    def seconds(self, settings: TrainSettings) -> float:
        """Of the whole run."""
        return self.training(settings) + self.scoring + self.forgetting(settings)

    def forgetting(self, settings: TrainSettings) -> float:
        """Seconds of all measures: of the base, at every border, and inside lessons."""
        inside = sum(steps // self.every for steps in self.steps(settings)) if self.every else 0
        return self.answering + self.measuring * (1 + len(self.rows) + inside)


def estimate(session: Session) -> Estimate:
    """Times a few steps and rows, and adds up; the session is used up by it."""
    step_seconds, row_seconds = _time_steps(session), _time_scoring(session)
    scored_rows = sum(len(session.stream.tasks[j].test) for _, j in _cells(session))
    answering, measuring = _time_forgetting(session)
    return Estimate(
        rows=[len(lesson.rows) for lesson in _trained(session)],
        tasks=[lesson.tasks for lesson in _trained(session)],
        step_seconds=step_seconds,
        scored_rows=scored_rows,
        row_seconds=row_seconds,
        scoring=scored_rows * row_seconds * len(session.method.views()),
        answering=answering,
        measuring=measuring,
        every=session.config.forgetting_every,
        disk=_disk(session),
    )


def _trained(session: Session) -> list[Lesson]:
    """The lessons that need training in this run: adopted ones, and those whose rows are gone, do not."""
    return [lesson for lesson in session.lessons[len(session.adopted) :] if lesson.rows]


def _time_steps(session: Session) -> list[float]:
    """For each lesson the median seconds of real steps; from the second on as a second task, which replays."""
    config, method, engine = session.config, session.method, session.engine
    settings = config.part(TrainSettings)
    session.adapters.model.train()
    optimizer = optimizer_for(session.adapters.parameters(), replace(settings, learning_rate=0.0))

    def step(number: int, examples: list[Example]) -> None:
        for chosen in split(method.batch(examples, number), settings.micro_batch_size):
            with engine.autocast():
                loss = method.loss(collate(chosen, session.encoder.tokenizer.pad_token_id, engine.device))
            engine.backward(loss)
        penalty = method.penalty()
        if penalty is not None:
            engine.add_gradient(penalty, session.adapters.parameters())
        method.after_backward()
        optimizer.step()
        optimizer.zero_grad()

    medians = []
    for number, lesson in enumerate(_trained(session)):
        if number < 2:
            method.begin_task(number)
        batches = plan([session.encoder(row) for row in lesson.rows], settings, config.seed, 0)
        seconds = [seconds_of(partial(step, i, batch)) for i, batch in zip(range(4), batches, strict=False)]
        medians.append(statistics.median(seconds[1:] or seconds))  # the first warms up
        if number == 0:
            method.end_task(0, lesson.rows)
    session.adapters.model.eval()
    return medians


def _time_scoring(session: Session) -> float:
    """Seconds a test row, over a few rows of each task."""
    size = session.config.score_batch_tokens
    scorer = Scorer(session.adapters.model, session.encoder, session.engine, session.stream.options, size)
    seconds, rows = 0.0, 0
    for task in session.stream.tasks:
        sample = task.test[:16]  # none where a task's rows are gone
        seconds += seconds_of(partial(scorer, task, sample, own_answering(session.method)))
        rows += len(sample)
    return seconds / max(rows, 1)


def _forgetting(session: Session) -> str:
    """On what forgetting is measured, and how often."""
    if session.text is None or session.method.task_id:
        return "not measured" + (f": {NO_ONE_MODEL}" if session.text else "")
    return (
        f"after each of {len(session.lessons)} lessons on {len(session.text.rows):,} documents: {session.text.source}"
    )


def _time_forgetting(session: Session) -> tuple[float, float]:
    """Seconds for the base's answers, if it is to answer, and for reading the text once."""
    text, model, using = session.text, session.adapters.model, session.engine.autocast
    if text is None or session.method.task_id:
        return 0.0, 0.0
    few, tokenizer, max_length = replace(text, rows=text.rows[:TRIED]), session.base.tokenizer, longest(model)
    began = time.monotonic()
    if few.open:
        few = few.answered(answers_of(model, tokenizer, few, max_length, using))
    answering = time.monotonic() - began
    windows = few.windows(tokenizer, max_length, decoder_start=decoder_start(model.config))
    reading = seconds_of(lambda: list(hidden_states(model, windows, using=using)))
    whole = len(text.rows) / len(few.rows)
    return answering * whole, reading * whole


def _cells(session: Session) -> list[tuple[int, int]]:
    """(row, column) of what will be scored; row 0 is the base; a cell that repeats another is left out."""
    base = [] if session.config.cells == "last" else [(0, j) for j in range(len(session.stream.tasks))]
    return base + [
        (i + 1, j)
        for i in range(len(session.lessons))
        for j in scored_columns(session, i)
        if session.method.weights_for(i, j) == i
    ]


def _disk(session: Session) -> float:
    """Bytes at most: adapters in fp32 (joined ones grow with the task), method state, checkpoints, predictions."""
    pair = 4 * sum(parameter.numel() for parameter in session.adapters.parameters())
    lessons = len(session.lessons)
    joined = bool(session.adapters.past())  # the second task's steps have been timed
    adapters = pair * (lessons * (lessons + 1) / 2 + lessons if joined else lessons + 1)
    more = lessons * sum(tensor.nbytes for tensor in session.method.state().tensors.values())
    rows = sum(len(session.stream.tasks[j].test) for _, j in _cells(session))
    checkpoint = 3 * pair + more / lessons  # the trainable pair, AdamW's two moments, the method's tensors
    config = session.config
    checkpoints = config.save_total_limit + 1 if config.save_steps or config.save_minutes else 0
    return adapters + more + checkpoint * checkpoints + 600 * rows


def _peak_gib(session: Session) -> float:
    if session.engine.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
