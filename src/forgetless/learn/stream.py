"""Learn a stream: task after task, scored after each, into a run folder that can be continued."""

from __future__ import annotations

import platform
import shutil
import statistics
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from rich.markup import escape

from forgetless.config import LearnConfig
from forgetless.data.batches import Encoder
from forgetless.data.streams import load_stream
from forgetless.data.tasks import Row, Stream
from forgetless.errors import DataError, RunError, UsageError
from forgetless.learn.engine import Engine
from forgetless.learn.memory import Memory
from forgetless.learn.step import TrainSettings, count_steps, learn_task
from forgetless.methods import Check, Lesson, Method, State
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.base import Base, load_base
from forgetless.model.identity import check_same
from forgetless.progress import console, steps
from forgetless.report.page import write_report
from forgetless.report.summary import summarise
from forgetless.runs.folder import (
    FORMAT,
    TIMES,
    RunFolder,
    complete,
    read_json,
    read_lines,
    write_json,
    write_lines,
)  # fmt: skip
from forgetless.score.scorers import Scorer, TaskScores, headline, label_counts

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")


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


def learn(config: LearnConfig) -> dict:
    """Learns the stream of `config` and returns the summary that is also in the run folder."""
    session = prepare(config)
    if not session.engine.is_main:
        return _learn(session)
    with session.run.locked():
        return _learn(session)


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
            for option in stream.options:
                encoder.scoring_split(task.test[0], option)
        elif "options" in task.scorers:
            raise DataError(
                f"task {task.name}: scored by option likelihood but has no options; "
                "give `options: [...]`, or `scorers: [exact_match]`"
            )
    return notes


def _learn(session: Session) -> dict:
    config, run = session.config, session.run
    session.say(f"{config.method} on {session.stream.name}: {', '.join(task.name for task in session.stream.tasks)}")
    session.say(f"{config.model} on {session.engine.told} -> {run.root}")
    for note in session.notes:
        session.say(f"note: {note}")
    finished = _check_continues(session)
    session.engine.wait()
    if session.engine.is_main:
        run.write(run.config, _describe(session, "running"))
    _init_trackers(session)
    scorer = Scorer(
        session.adapters, session.encoder, session.engine, session.stream.options, config.score_batch_tokens
    )
    _score_base(session, scorer)
    for number, lesson in enumerate(session.lessons):
        folder = run.task(number + 1, lesson.name)
        if number < finished:
            if number == finished - 1 or not _scored(session, number):
                _resume(session, folder, number)
            session.say(f"{folder.name}: already learnt")
        else:
            _learn_lesson(session, number, lesson, folder)
        _score_lesson(session, scorer, number)
        _finish(session, "running")
    return _finish(session, "complete")


# ---------------------------------------------------------------------------------------- learning


def _learn_lesson(session: Session, number: int, lesson: Lesson, folder: Path) -> None:
    """Trains one lesson and publishes what it gave."""
    method, engine, config = session.method, session.engine, session.config
    examples = [session.encoder(row) for row in lesson.rows]
    settings = config.part(TrainSettings)
    records: list[dict] = []
    began = time.monotonic()
    method.begin_task(number)
    with steps(f"learn {folder.name}", count_steps(len(examples), settings), show=engine.is_main) as progress:

        def log(record: dict) -> None:
            records.append(record)
            progress.advance(record["tokens"], record["loss"])
            if config.report_to:
                told = {f"{lesson.name}/{key}": value for key, value in record.items() if key != "step"}
                engine.accelerator.log(told, step=sum(session.steps_before) + record["step"])

        learn_task(method, examples, settings, engine, seed=config.seed, task=number, log=log)
    session.steps_before.append(len(records))
    method.end_task(number, lesson.rows)
    checks = [check.as_json() for check in [*method.checks(), *_penalty_acts(records)]]
    for check in checks:
        if not check["ok"]:
            session.say(
                f"WARNING: {config.method} did not act on {lesson.name}: {check['name']} = {check['value']:.4g} "
                f"({check['meaning']})"
            )
    if engine.is_main:
        with session.run.publish(folder) as temporary:
            session.adapters.save(temporary / "adapter", method.export())
            (temporary / "adapter" / "README.md").write_text(_card(session, number))
            save_state(temporary, method.state())
            write_lines(temporary / "log.jsonl", records)
            write_json(
                temporary / "learned.json",
                {"lesson": lesson.name, "rows": len(lesson.rows), "steps": len(records), "checks": checks},
            )
            write_json(temporary / f"{TIMES}.json", {"seconds": time.monotonic() - began})
    engine.wait()


def _penalty_acts(records: list[dict]) -> list[Check]:
    """A penalty whose gradient is lost beside the loss's changes nothing, whatever it is called."""
    shares = [record["penalty_share"] for record in records if "penalty_share" in record]
    if not shares:
        return []
    share = statistics.median(shares)
    meaning = "median over steps of ||penalty's gradient|| / ||loss gradient||; below 0.001 the penalty does nothing"
    return [Check("penalty share", share, share > 1e-3, meaning)]


def save_state(folder: Path, state: State) -> None:
    """method.safetensors, method.json, and memory/ for kept rows."""
    from safetensors.torch import save_file

    if state.tensors:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        save_file(tensors, folder / "method.safetensors", metadata={"format": "pt"})
    write_json(folder / "method.json", state.values)
    if state.memory is not None:
        (folder / "memory").mkdir()
        (folder / "memory" / "HOLDS_TRAINING_ROWS").write_text(
            "rows.jsonl holds rows of the training data, kept for replay. Do not publish it with the adapter.\n"
        )
        records = [
            {"task": task, "source": row.source} | row.content()
            for row, task in zip(state.memory.rows, state.memory.tasks, strict=True)
        ]
        write_lines(folder / "memory" / "rows.jsonl", records)


def load_state(folder: Path) -> State:
    """What `save_state` wrote."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "method.safetensors") if (folder / "method.safetensors").exists() else {}
    memory = None
    if (folder / "memory").exists():
        memory = Memory(0)
        for record in read_lines(folder / "memory" / "rows.jsonl"):
            turns = tuple((turn["role"], turn["content"]) for turn in record.get("messages", ()))
            answer = record.get("answer", record.get("text", ""))
            if turns:
                answer = [text for role, text in turns if role == "assistant"][-1]
            memory.rows.append(Row(record.get("prompt", ""), answer, turns, record["source"]))
            memory.tasks.append(record["task"])
    return State(tensors, read_json(folder / "method.json"), memory)


def _resume(session: Session, folder: Path, number: int) -> None:
    session.method.task = number
    session.method.resume(session.adapters.load(folder / "adapter"), load_state(folder), number)


def _check_continues(session: Session) -> int:
    """How many lessons are finished; refuses to mix another configuration, stream or base into a run."""
    run = session.run
    if not run.config.exists():
        if run.root.exists() and any(path.name != ".lock" for path in run.root.iterdir()):
            raise RunError(f"{run.root}: holds other files and no run.json; give an empty or new output_dir")
        return 0
    stored = read_json(run.config)
    if stored["format"] != FORMAT:
        raise RunError(f"{run.config}: format {stored['format']}, this version reads {FORMAT}")
    check_same(stored["base"], session.base.identity, run.config)
    mine = session.config.decides()
    for option, value in stored["decides"].items():
        if mine.get(option) != value:
            raise RunError(
                f"{run.config}: this run was begun with {option}={value!r}, now it is {mine.get(option)!r}; "
                "give the old value, or another output_dir"
            )
    for kind, old, new in (
        ("task", [[one["name"], one["fingerprint"]] for one in stored["tasks"]],
         [[task.name, task.fingerprint] for task in session.stream.tasks]),
        ("lesson", [[one["name"], one["last_task"]] for one in stored["lessons"]],
         [[lesson.name, lesson.last_task] for lesson in session.lessons]),
    ):  # fmt: skip
        for number, told in enumerate(old):
            if number >= len(new) or new[number] != told:
                now = repr(new[number][0]) if number < len(new) else "gone"
                raise RunError(
                    f"{run.config}: {kind} {number + 1} of this run is {told[0]!r}, now it is {now} or its "
                    "rows, options or scoring have changed. A run goes on with a longer stream of the "
                    "same beginning; for anything else give another output_dir."
                )
    finished = 0
    while finished < len(session.lessons) and complete(run.task(finished + 1, session.lessons[finished].name)):
        finished += 1
    return finished


# ----------------------------------------------------------------------------------------- scoring


def _columns(session: Session, number: int) -> list[int]:
    """The tasks that are scored after lesson `number`."""
    every = list(range(len(session.stream.tasks)))
    if session.config.cells == "all" or number == len(session.lessons) - 1:
        return every
    return every[: session.lessons[number].last_task + 1] if session.config.cells == "seen" else []


def _scored(session: Session, number: int) -> bool:
    """Whether every wanted cell of a finished lesson has its scores."""
    folder = session.run.task(number + 1, session.lessons[number].name) / "scores"
    wanted = {session.stream.tasks[j].name for j in _columns(session, number)}
    return not wanted or (complete(folder) and wanted <= read_json(folder / "scores.json")["deployed"].keys())


def _score_base(session: Session, scorer: Scorer) -> None:
    """The untouched base on every task: the bound below."""
    if session.config.cells == "last":
        return
    folder = session.run.task(0, "base") / "scores"
    names = {task.name for task in session.stream.tasks}
    done = complete(folder) and names <= read_json(folder / "scores.json")["deployed"].keys()
    if done:
        return
    with session.adapters.disabled():
        views = {"deployed": _score_tasks(session, scorer, list(range(len(names))), "score base")}
    _publish_scores(session, folder, views)


def _score_lesson(session: Session, scorer: Scorer, number: int) -> None:
    if _scored(session, number):
        return
    folder = session.run.task(number + 1, session.lessons[number].name)
    columns = _columns(session, number)
    fresh = [j for j in columns if session.method.weights_for(number, j) == number]
    views = {}
    for place, (name, learner) in enumerate(session.method.views().items()):
        label = f"score {folder.name}" + (f", {name} learner" if name != "deployed" else "")
        with learner:
            views["deployed" if place == 0 else name] = _score_tasks(session, scorer, fresh, label)
    for j in sorted(set(columns) - set(fresh)):
        views["deployed"] |= _elsewhere(session, scorer, number, j)
    _publish_scores(session, folder / "scores", views)


def _elsewhere(session: Session, scorer: Scorer, number: int, column: int) -> dict[str, TaskScores]:
    """A cell that other weights than the last lesson's answer: those scores, made now if there are none."""
    source, name = session.method.weights_for(number, column), session.stream.tasks[column].name
    lesson = "base" if source is None else session.lessons[source].name
    folder = session.run.task(0 if source is None else source + 1, lesson)
    if (folder / "scores").exists() and name in read_json(folder / "scores" / "scores.json")["deployed"]:
        return {name: _load_scores(folder / "scores", name)}
    if source is None:
        return {}
    _resume(session, folder, source)
    found = _score_tasks(session, scorer, [column], f"score {folder.name}")
    _resume(session, session.run.task(number + 1, session.lessons[number].name), number)
    return found


def _score_tasks(session: Session, scorer: Scorer, columns: list[int], label: str) -> dict[str, TaskScores]:
    tasks = [session.stream.tasks[j] for j in columns]
    found = {}
    with steps(label, sum(len(task.test) for task in tasks), show=session.engine.is_main) as progress:
        for task in tasks:
            found[task.name] = scorer(task)
            for _ in task.test:
                progress.advance()
    return found


def _publish_scores(session: Session, folder: Path, views: dict[str, dict[str, TaskScores]]) -> None:
    if session.engine.is_main:
        tasks = {task.name: task for task in session.stream.tasks}
        told = {
            view: {
                name: {
                    "n": len(scores.predictions),
                    "scores": {measure: scores.mean(measure) for measure in scores.measures},
                    "counts": label_counts(scores, headline(tasks[name]), tasks[name].options)
                    if tasks[name].options else None,
                }
                for name, scores in tasks_scored.items()
            }
            for view, tasks_scored in views.items()
        }  # fmt: skip
        records = [
            {"view": view, "task": name} | record
            for view, tasks_scored in views.items()
            for name, scores in tasks_scored.items()
            for record in scores.predictions
        ]
        with session.run.publish(folder) as temporary:
            write_json(temporary / "scores.json", told)
            write_lines(temporary / "predictions.jsonl", records)
            (temporary / "HOLDS_ANSWERS").write_text("predictions.jsonl holds answers to test rows.\n")
    session.engine.wait()


def _load_scores(folder: Path, task: str) -> TaskScores:
    records = [
        record
        for record in read_lines(folder / "predictions.jsonl")
        if record["task"] == task and record["view"] == "deployed"
    ]
    measures = [name for name, value in records[0].items() if isinstance(value, dict) and "score" in value]
    bare = [{key: value for key, value in record.items() if key not in ("task", "view")} for record in records]
    return TaskScores({name: [float(record[name]["score"]) for record in bare] for name in measures}, bare)


# ---------------------------------------------------------------------------------------- the record


def _describe(session: Session, status: str) -> dict:
    """run.json: all that the numbers depend on."""
    config = session.config.plain()
    parameters = session.adapters.parameters()
    return {
        "format": FORMAT,
        "status": status,
        "stream": session.stream.name,
        "config": config,
        "decides": session.config.decides(),
        "method": {
            "name": session.config.method,
            "options": session.config.method_options,
            "summary": session.method.summary,
            "stock_peft": session.method.stock_peft,
            "deployed": next(iter(session.method.views())),
        },
        "base": session.base.identity.as_json(),
        "model": {
            "name": session.base.name,
            "parameters": session.base.model.num_parameters() - sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters),
        },
        "precision": str(session.engine.dtype).removeprefix("torch."),
        "tasks": [
            {
                "name": task.name,
                "fingerprint": task.fingerprint,
                "train": len(task.train),
                "validation": len(task.validation),
                "test": len(task.test),
                "options": list(task.options),
                "headline": headline(task),
                "majority": dict(zip(("label", "share"), task.majority(), strict=True)) if task.majority() else None,
                "notes": [note for note in session.notes if note.startswith(f"{task.name}: ")],
            }
            for task in session.stream.tasks
        ],
        "lessons": [{"name": lesson.name, "last_task": lesson.last_task} for lesson in session.lessons],
        "versions": {"forgetless": version("forgetless"), "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
    }


def _finish(session: Session, status: str) -> dict:
    """Writes what is known so far: matrix, summary, report and the adapter to deploy."""
    run = session.run
    if session.engine.is_main:
        run.write(run.config, _describe(session, status))
        last = [run.task(i + 1, lesson.name) for i, lesson in enumerate(session.lessons)]
        last = [folder for folder in last if folder.exists()][-1]
        with run.publish(run.adapter) as temporary:
            for file in (last / "adapter").iterdir():
                shutil.copyfile(file, temporary / file.name)
        summary = summarise(run.root)
        run.write(run.summary, {key: value for key, value in summary.items() if key != "folder"})
        run.write(
            run.matrix,
            {key: summary[key] for key in ("learned", "headline", "measures", "metrics")}
            | {"tasks": [task["name"] for task in summary["tasks"]]},
        )
        write_report([summary], run.root)
    session.engine.wait()
    return summarise(run.root) | {"path": str(run.root)}


def _card(session: Session, number: int) -> str:
    """The model card in the adapter folder."""
    learnt = ", ".join(task.name for task in session.stream.tasks[: session.lessons[number].last_task + 1])
    return f"""---
library_name: peft
base_model: {session.base.name}
tags: [peft, lora, "base_model:adapter:{session.base.name}", forgetless]
---
LoRA adapter after learning {learnt} with `{session.config.method}` (forgetless {version("forgetless")}).
Load it with `PeftModel.from_pretrained(base, folder)`. sha256 of the base's weights: {session.base.identity.weights}
"""


def _init_trackers(session: Session) -> None:
    if session.config.report_to:
        flat = {key: value for key, value in session.config.plain().items() if isinstance(value, int | float | str)}
        session.engine.accelerator.init_trackers("forgetless", config=flat)
