"""Everything that learning a stream needs, loaded and checked before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.markup import escape

from forgetless.config import LearnConfig
from forgetless.data.batches import Encoder
from forgetless.data.streams import load_stream
from forgetless.data.tasks import Stream
from forgetless.errors import DataError, UsageError
from forgetless.learning.engine import Engine
from forgetless.methods import Lesson, Method
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.base import Base, load_base
from forgetless.progress import console
from forgetless.runs.folder import RunFolder


@dataclass
class Session:
    """Everything that learning a stream needs, loaded and checked."""

    config: LearnConfig
    stream: Stream
    method: Method
    engine: Engine
    base: Base
    encoder: Encoder
    adapters: Adapters
    lessons: list[Lesson]
    notes: list[str]
    run: RunFolder
    steps_before: list[int] = field(default_factory=list)  # of each lesson trained in this session

    def say(self, text: str) -> None:
        if self.engine.is_main:
            console.print(escape(text))


def prepare(config: LearnConfig) -> Session:
    """Loads and checks everything before anything is trained."""
    config.check()
    method = config.build_method()
    stream = config.stream
    if not isinstance(stream, Stream):
        stream = load_stream(stream, on_bad_row=config.on_bad_row)
    folder = Path(config.output_dir or f"runs/{stream.name}-{config.method}-seed{config.seed}")
    engine = Engine(config.device, config.precision, config.report_to, str(folder / "trackers"))
    base = load_base(config.model, engine.dtype, engine.device)
    if base.context and config.max_length > base.context:
        raise UsageError(
            f"max_length {config.max_length} is longer than the {base.context} tokens that "
            f"{config.model} was made for; lower max_length"
        )
    encoder = Encoder(base.tokenizer, config.max_length)
    notes = check_rows(stream, encoder)
    if config.gradient_checkpointing:
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
        base.model.enable_input_require_grads()
    adapters = Adapters(base.model, config.part(LoraSettings), base.name, config.seed)
    method.start(adapters, encoder, config.seed)
    lessons = method.lessons(stream)
    return Session(config, stream, method, engine, base, encoder, adapters, lessons, notes, RunFolder(folder))


def check_rows(stream: Stream, encoder: Encoder) -> list[str]:
    """Encodes every row once: errors come before training, truncation is counted."""
    notes = [f"{task.name}: {note}" for task in stream.tasks for note in task.notes]
    for task in stream.tasks:
        cut = sum(encoder(row).truncated for row in task.train)
        if cut:
            notes.append(
                f"{task.name}: {cut} of {len(task.train)} training rows are longer than "
                f"max_length={encoder.max_length} and were cut (prompts lose their beginning)"
            )
        cut = sum(encoder(row).truncated for row in task.test)
        if cut:
            notes.append(f"{task.name}: {cut} of {len(task.test)} test rows are cut to max_length={encoder.max_length}")
        if "exact_match" in task.scorers:
            encoder.generation_context(task.test[0], task.max_new_tokens)
        if task.options:
            encoder.scoring_splits(task.test[0], stream.options)
        elif "options" in task.scorers:
            raise DataError(
                f"task {task.name}: scored by option likelihood but has no options; "
                "give `options: [...]`, or `scorers: [exact_match]`"
            )
    return notes
