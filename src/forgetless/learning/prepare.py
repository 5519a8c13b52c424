"""Loads and checks everything that learning a stream needs, before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from forgetless.config import LearnConfig
from forgetless.data.batches import Encoder
from forgetless.data.streams import load_stream
from forgetless.data.tasks import Stream
from forgetless.errors import UsageError
from forgetless.forgetting.texts import Text, general_prompts, own_prompts, read_text
from forgetless.learning.adopt import check_adopted, read_adopted
from forgetless.learning.again import with_earlier_tasks
from forgetless.learning.engine import Engine
from forgetless.learning.fit import fit_rows
from forgetless.learning.session import Session
from forgetless.learning.sharding import shard_base
from forgetless.learning.spending import Spending
from forgetless.learning.step import check_optimizer
from forgetless.methods import Method
from forgetless.methods.finding import label_of
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.base import load_base, transformer
from forgetless.model.encoder_decoder import refuse_encoder_decoder
from forgetless.runs.folder import RunFolder
from forgetless.runs.shapes import read_run
from forgetless.score.rules import rules_of


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
    splits = ("train", "test", *(["validation"] if config.forgetting_every else []))  # which measures on them
    stream, notes = fit_rows(stream, encoder, config.on_bad_row, splits)
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
    spending = Spending(engine.device, transformer(adapters.model).get_input_embeddings(), adapters.comes_back)
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
