"""Everything that learning a stream needs, loaded and checked before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.markup import escape

from forgetless.config import LearnConfig
from forgetless.data.batches import Encoder
from forgetless.data.streams import load_stream
from forgetless.data.tasks import Row, Stream, Task
from forgetless.errors import DataError, UsageError, quoted
from forgetless.forgetting.reference import Reference
from forgetless.forgetting.texts import Text, general_prompts, own_prompts, read_text
from forgetless.learning.adopt import Adopted, check_adopted, read_adopted
from forgetless.learning.again import with_earlier_tasks
from forgetless.learning.engine import Engine
from forgetless.learning.sharding import shard_base
from forgetless.learning.signals import Signals
from forgetless.learning.spending import Spending
from forgetless.learning.step import check_optimizer
from forgetless.methods import Lesson, Method
from forgetless.methods.finding import label_of
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.base import Base, load_base, transformer
from forgetless.model.encoder_decoder import refuse_encoder_decoder
from forgetless.progress import console
from forgetless.runs.folder import RunFolder
from forgetless.runs.shapes import read_run
from forgetless.score.rules import check_row, rules_of


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
    text: Text | None  # on which forgetting is measured at task borders
    spending: Spending
    adopted: list[Adopted] = field(default_factory=list)  # the first lessons, which another trainer learnt
    stored: dict | None = None  # run.json as it was found
    history: list[dict] = field(default_factory=list)  # what it was learnt with, from which lesson on
    steps_before: list[int] = field(default_factory=list)  # of each lesson trained in this session
    side: Reference | None = None  # the base's, once it was needed
    signals: Signals = field(default_factory=Signals)
    chosen: dict = field(default_factory=dict)  # option -> its value and what it was chosen among, by a sweep

    def say(self, text: str) -> None:
        if self.engine.is_main:
            console.print(escape(text))


def prepare(config: LearnConfig) -> Session:
    """Loads and checks everything before anything is trained."""
    config.check()
    method = config.build_method()
    stream = load_stream(config.stream, on_bad_row=config.on_bad_row, keep_gone=True)
    run = RunFolder(Path(config.output_dir or f"runs/{stream.name}-{label_of(config.method)}-seed{config.seed}"))
    run.put_back()
    stored = read_run(run.root) if run.config.exists() else None
    adopted = read_adopted(config, stored, run)
    stream = with_earlier_tasks(stream, stored, run, [one.name for one in adopted])
    here = [task for task in stream.tasks if not task.gone]
    for task in here:  # a wrong pattern or a missing package is said before the model is loaded
        try:
            rules_of(task)
        except UsageError as error:
            place = "stream" if isinstance(config.stream, Stream) else config.stream
            raise UsageError(f"{place}: {error}") from error
    without = [task.name for task in here if not task.validation]
    if config.score_on == "validation" and without:
        raise UsageError(
            f"score_on=validation: no validation rows in {', '.join(without)}; cut some from train in a stream "
            "file (`validation: 10%`), or score on test rows"
        )
    engine = Engine(config.device, config.precision, config.report_to, str(run.root / "trackers"))
    check_optimizer(config.optim, engine.device)
    base = load_base(config.model, engine.dtype, engine.device, in_shards=engine.shards)
    if base.context and config.max_length > base.context:
        raise UsageError(
            f"max_length {config.max_length} is longer than the {base.context} tokens that "
            f"{config.model} was made for; lower max_length"
        )
    if engine.shards:
        refuse_encoder_decoder(base.model, "a base in shards", "launch without FSDP")
    encoder = Encoder(base.tokenizer, config.max_length, base.decoder_start)
    if config.score_on == "validation":
        stream = Stream(stream.name, tuple(replace(task, test=task.validation) for task in stream.tasks))
    stream, notes = fit_rows(stream, encoder, config.on_bad_row)
    if config.gradient_checkpointing:
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
        base.model.enable_input_require_grads()
    if engine.shards and method.adapter_class is not Adapters:
        raise UsageError(f"{config.method}: a base in shards is trained with LoRA pairs only; launch without FSDP")
    adapters = method.adapter_class(base.model, config.part(LoraSettings), base.name, config.seed)
    text = _forgetting_text(config, chat=encoder.takes_chats)
    if engine.shards:
        shard_base(adapters, engine.processes, engine.device)
        engine.repeats = type(method).loss is not Method.loss  # it may make other passes for other micro-batches
        text, notes = None, [*notes, "forgetting of the base's predictions is not measured with the base in shards; "
                                     "`forgetless audit` does it afterwards"]  # fmt: skip
    method.start(adapters, encoder, config.seed)
    lessons = method.lessons(stream)
    spending = Spending(engine.device, transformer(adapters.model).get_input_embeddings())
    session = Session(
        config, stream, method, engine, base, encoder, adapters, lessons, notes, run, text, spending, adopted
    )
    check_adopted(session)
    return session


def _forgetting_text(config: LearnConfig, chat: bool) -> Text | None:
    """The text that is given, or general prompts for the base to answer; None where nothing is measured."""
    if config.forgetting_text:
        return read_text(config.forgetting_text)
    if not config.forgetting_prompts:
        return None
    return own_prompts(general_prompts(config.forgetting_prompts), chat)


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
        if not rows:
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
    return replace(task, train=kept.get("train", task.train), test=kept.get("test", task.test))
