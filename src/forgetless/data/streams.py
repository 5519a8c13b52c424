"""A description of a stream -> the stream: read, cut, sampled and checked.

Every choice of rows is a function of (seed, task, purpose, row number), so adding a task, a machine or a
version of numpy moves nothing. Validation and test rows do not depend on any seed a user sets: all seeds are
judged on the same rows. Test rows choose nothing.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from forgetless.data import benchmarks, catalogue, packages
from forgetless.data.readers import Reading, olora_options, read_options, read_rows
from forgetless.data.scoring import Scoring, read_scorers
from forgetless.data.tasks import Row, Stream, Task
from forgetless.errors import DataError, UsageError, nearest, quoted
from forgetless.runs.folder import is_there
from forgetless.seeds import seed_for

T = TypeVar("T")
JUDGED_SEED = 0  # of the validation cut and of `test_limit`
MOST_VALIDATION_ROWS = 200


@dataclass(frozen=True)
class TaskConfig:
    """One entry of `tasks:`. Paths are relative to the stream's file, or hub:NAME[:CONFIG][#SPLIT]."""

    # The task's name, also of its folder. With `olora:` the data set's name is the default.
    name: str = ""
    # Rows to learn from: .jsonl, .json, .parquet, a folder of datasets' save_to_disk, or hub:NAME.
    train: str | None = None
    # Rows to judge by, of the same kinds.
    test: str | None = None
    # Rows to choose by: a path, or how many are cut from train before anything else, as a number or as "10%"
    # (at least 1, at most 200); 0 for none.
    validation: str | int = "10%"
    # Instead of train and test: a folder of the O-LoRA benchmark, <category>/<data set>.
    olora: str | None = None
    # The same for a data set's folder of TRACE or of LLMCL (I-LoRA's code): train.json, test.json and, where it is
    # there and `validation:` is not given, eval.json for validation. Known names bring the benchmark's scorers.
    trace: str | None = None
    llmcl: str | None = None
    # Columns that hold the prompt and the answer, where they have other names.
    prompt: str | None = None
    answer: str | None = None
    # The label words, or a JSON file with a list of them; without them the answers are free.
    options: list[str] | str | None = None
    # Names, or names with an argument, of docs/tasks.md; the first gives the headline number. "options" and
    # "completions" rank by likelihood, "next_token" needs no answer, the others judge one generated answer.
    # Default: options where there are any, completions where each row has its own, else exact_match (next_token for
    # plain text).
    scorers: list[str | Scoring] | None = None
    # Learn from this many rows, drawn with limit_seed from those that the validation cut left.
    limit: int | None = None
    limit_seed: int = 0
    # Judge by this many test rows, drawn with a fixed seed; all where not given.
    test_limit: int | None = None
    # Length of a generated answer; default 32, and 16 where there are options.
    max_new_tokens: int | None = None
    # "gone": its rows are no longer here. For a task that the run in output_dir has learnt, or that is adopted.
    rows: str | None = None

    @property
    def layout(self) -> tuple[str, str] | None:
        """Whose folder it is, and the folder."""
        return next(((name, told) for name in benchmarks.LAYOUTS if (told := getattr(self, name))), None)


EVAL = "eval"  # `validation:` of a folder that has an eval.json
GONE = "gone"  # the one value of `rows:`
TASK_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,78}[A-Za-z0-9_-])?"  # it names a folder
FIELDS = tuple(field.name for field in dataclasses.fields(TaskConfig))


def load_stream(
    source: str | Path | dict | list | Stream,
    *,
    on_bad_row: str = "error",
    base_dir: str | Path | None = None,
    keep_gone: bool = False,
) -> Stream:
    """The stream of a YAML or JSON file, of a name ("demo", "order-1"), of a dict with `tasks`, or of a list of tasks.
    "demo:bbc" and "support.yaml:topics,intents" are tasks of one. A `Stream` is given back as it is.

    `keep_gone`: tasks marked `rows: gone`, and those whose files are not there, are in the stream without rows
    (`Task.gone`). By default marked tasks are left out, and a missing file is an error.

    >>> load_stream([{"name": "a", "train": "a.jsonl", "test": "a-test.jsonl", "limit": 400}]).tasks[0].name
    'a'
    """
    if isinstance(source, Stream):
        return source
    if isinstance(source, str) and source in NAMED_STREAMS:
        return NAMED_STREAMS[source](on_bad_row)
    if isinstance(source, str) and (parts := _of_a_stream(source)):
        whole = load_stream(parts[0], on_bad_row=on_bad_row, base_dir=base_dir, keep_gone=keep_gone)
        return _some_tasks(whole, parts[1])
    folder = Path(base_dir or ".").expanduser()
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        told, name, place, folder = _file(path), path.stem, str(path), path.parent
    else:
        told, name, place = source, "stream", "stream"
    name, entries = _entries(told, name, place)
    configs = [_config(entry, f"{place}: task {n}", folder) for n, entry in enumerate(entries, start=1)]
    _distinct_names(configs, place)
    gone = {config.name: _gone(config, folder, also_missing=keep_gone) for config in configs}
    tasks = [
        Task(config.name, (), (), (), gone=gone[config.name])
        if gone[config.name] else _load(config, place, on_bad_row, folder)
        for config in configs
    ]  # fmt: skip
    kept = [task for task in tasks if keep_gone or not task.gone]
    if not kept:
        raise DataError(f"{place}: every task is marked `rows: gone`, so there are no rows")
    return Stream(name, tuple(kept))


def _of_a_stream(source: str) -> tuple[str, list[str]] | None:
    """The stream and the tasks of "STREAM:TASK,TASK"; None where no stream is before the colon."""
    stream, colon, names = source.rpartition(":")
    known = stream in NAMED_STREAMS or is_there(Path(stream).expanduser(), Path.is_file)
    return (stream, names.split(",")) if colon and known else None


def _some_tasks(stream: Stream, names: list[str]) -> Stream:
    tasks = {task.name: task for task in stream.tasks}
    for name in names:
        if name not in tasks:
            raise UsageError(f"stream {stream.name}: no task {name!r}{nearest(name, tasks)}")
    return Stream("-".join([stream.name, *names]), tuple(tasks[name] for name in names))


def _load(config: TaskConfig, place: str, on_bad_row: str, folder: Path) -> Task:
    """The task; an error is told with the stream's place, that of a row with its file's own."""
    try:
        return load_task(config, on_bad_row=on_bad_row, base_dir=folder)
    except (UsageError, DataError) as error:
        own = str(error).startswith("task ")
        raise type(error)(f"{place}: {error}" if own else f"{place}: task {config.name}: {error}") from error


def _gone(config: TaskConfig, folder: Path, *, also_missing: bool) -> str:
    """Why a task has no rows here; empty where it has some, or an error will say what is wrong with them."""
    if config.rows == GONE:
        return "the stream says `rows: gone`"
    told = [config.layout[1]] if config.layout else [config.train or "", config.test or ""]
    places = [_path(folder, one) for one in told if not one.startswith("hub:")]
    missing = [str(place) for place in places if not is_there(place)]
    return f"{missing[0]} is not there" if also_missing and missing else ""


def load_task(
    config: TaskConfig,
    *,
    on_bad_row: str = "error",
    base_dir: str | Path = ".",
    read: Callable[[str], Reading] | None = None,
) -> Task:
    """Reads, cuts, samples and checks the rows of one task; `read` gives those of a split where the config does not."""
    name, folder = config.name, Path(base_dir)
    options = _options(config, folder)
    notes: list[str] = []

    def rows(split: str, path: str) -> tuple[Row, ...]:
        reading = read(split) if read else _reading(config, split, path, folder, on_bad_row)
        notes.extend(reading.notes)
        if reading.dropped:
            notes.append(f"{split}: {len(reading.dropped)} bad rows dropped; first: {reading.dropped[0]}")
        return _inside(reading.rows, options, name, split, on_bad_row, notes)

    train, test = rows("train", config.train or ""), rows("test", config.test or "")
    scorers = tuple(config.scorers or usual_scorers(options, test))
    can_be_judged(test, scorers, name)
    if isinstance(config.validation, str) and _share(config.validation) is None:
        validation = rows("validation", config.validation)
    else:
        train, validation = cut_validation(train, config.validation, name)
    for count, there, what in ((config.limit, train, "learns from"), (config.test_limit, test, "is judged by")):
        if count is not None and count < len(there):
            notes.append(f"{what} {count:,} of {len(there):,} rows")
    train = sample(train, config.limit, seed=config.limit_seed, name=name, purpose="train")
    test = sample(test, config.test_limit, seed=JUDGED_SEED, name=name, purpose="test")
    notes += _overlaps(train, validation, test)
    return Task(
        name=name,
        train=train,
        validation=validation,
        test=test,
        options=options,
        scorers=scorers,
        max_new_tokens=config.max_new_tokens or (16 if options else 32),
        notes=tuple(notes),
    )


def sample(rows: Sequence[T], count: int | None, *, seed: int, name: str, purpose: str) -> tuple[T, ...]:
    """`count` of the rows, in their own order; all of them where there are no more, or `count` is None.

    Drawn are the rows whose number i gives the smallest sha256 of (seed, name, purpose, i): the same on every
    machine, and a smaller sample is part of a larger one.
    """
    if count is None or count >= len(rows):
        return tuple(rows)
    drawn = sorted(range(len(rows)), key=lambda i: seed_for(seed, name, purpose, i))[:count]
    return tuple(rows[i] for i in sorted(drawn))


def cut_validation(train: Sequence[Row], validation: str | int, name: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """What is left of the training rows, and the validation rows cut from them."""
    share = _share(str(validation))
    count = int(validation) if share is None else max(1, min(MOST_VALIDATION_ROWS, int(len(train) * share)))
    if count >= len(train):
        raise DataError(
            f"task {name!r}: {count} validation rows are to be cut from train, which has {len(train)} "
            "rows, so none would be left to learn from; lower `validation:` or give it a file"
        )
    chosen = sample(range(len(train)), count, seed=JUDGED_SEED, name=name, purpose="validation")
    inside = set(chosen)
    return tuple(row for i, row in enumerate(train) if i not in inside), tuple(train[i] for i in chosen)


def demo(train: int = 150, validation: int = 50, test: int = 100) -> Stream:
    """Three small real tasks out of packages: film reviews, news topics, exam subjects."""
    builders = (packages.sst2, packages.bbc, packages.mmlu_subject)
    return Stream("demo", tuple(build(train, validation, test) for build in builders))


def benchmark(name: str, on_bad_row: str = "error") -> Stream:
    """A catalogued stream out of the user's copy of its files, whole, under the benchmark's own protocol."""
    named = catalogue.STREAMS[name]
    tasks = []
    for number, data in enumerate(named.tasks):
        said = [named.protocol] * (number == 0) + [benchmarks.check(data), *data.notes]
        config = TaskConfig(
            name=data.name,
            validation=data.validation,
            options=list(data.options) if data.options else None,
            scorers=list(data.scorers),
            max_new_tokens=data.max_new_tokens,
            olora=str(data.path) if data.layout == "olora" else None,  # its labels.json gives the options
        )
        task = load_task(config, on_bad_row=on_bad_row, read=partial(benchmarks.read, data, on_bad_row=on_bad_row))
        tasks.append(dataclasses.replace(task, notes=(*said, *task.notes)))
    return Stream(name, tuple(tasks))


NAMED_STREAMS: dict[str, Callable[[str], Stream]] = {
    "demo": lambda on_bad_row: demo(),
    **{name: partial(benchmark, name) for name in catalogue.STREAMS},
}


# ---------------------------------------------------------------- the description


def _file(path: Path) -> Any:
    if path.is_dir():
        raise UsageError(
            f"{path}: a folder; a stream is a .yaml file with `tasks:`, each with `train:` and "
            "`test:`, or `olora:`, `trace:` or `llmcl:` for a folder of that benchmark"
        )
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 (byte {error.start + 1}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date such as 2026-02-30 is a ValueError
        raise UsageError(f"{path}: not YAML: {error}") from error
    except OSError as error:
        beside = os.listdir(path.parent) if path.parent.is_dir() else []
        near = nearest(path.name, [*NAMED_STREAMS, *(name for name in beside if name.endswith((".yaml", ".json")))])
        raise UsageError(f"no stream {str(path)!r} ({error.strerror}){near}") from error


def _entries(told: Any, name: str, place: str) -> tuple[str, list]:
    if isinstance(told, list):
        told = {"tasks": told}
    if not isinstance(told, dict):
        raise UsageError(f"{place}: expected `tasks:` with a list of tasks, found {type(told).__name__}")
    for key in told:
        if key not in ("name", "tasks"):
            raise UsageError(f"{place}: unknown key {key!r}{nearest(str(key), ('name', 'tasks'))}")
    tasks = told.get("tasks")
    if not isinstance(tasks, list) or not tasks:
        raise UsageError(f"{place}: `tasks:` must be a list with at least one task")
    return str(told.get("name") or name), tasks


def _config(entry: Any, place: str, folder: Path) -> TaskConfig:
    """Checks the keys and values of one task before any of its files is opened."""
    if not isinstance(entry, dict):
        raise UsageError(f"{place}: expected keys such as name, train, test; found {entry!r}")
    for key in entry:
        if key not in FIELDS:
            raise UsageError(f"{place}: unknown key {key!r}{nearest(str(key), FIELDS)}")
    for key in ("name", "train", "test", *benchmarks.LAYOUTS, "prompt", "answer"):
        _require(entry.get(key) is None or isinstance(entry[key], str), place, key, entry, "text")
    for key in ("limit", "test_limit", "max_new_tokens"):
        _require(entry.get(key) is None or _whole(entry[key], least=1), place, key, entry, "a number above 0")
    _require(_whole(entry.get("limit_seed", 0), least=0), place, "limit_seed", entry, "a number, 0 or above")
    _require(
        isinstance(entry.get("validation", ""), str) or _whole(entry["validation"], least=0),
        place,
        "validation",
        entry,
        'a path, a number of rows or a share such as "10%"',
    )
    _require(entry.get("rows") in (None, GONE), place, "rows", entry, f"{GONE!r}, or left out")
    config = TaskConfig(**{key: value for key, value in entry.items() if value is not None})
    if config.layout and not config.name:
        config = dataclasses.replace(config, name=_path(folder, config.layout[1]).resolve().name)
    _sources(config, place)
    return _as_the_benchmark(_words(config, place, folder), folder, told="validation" in entry)


def _as_the_benchmark(config: TaskConfig, folder: Path, *, told: bool) -> TaskConfig:
    """The config with a benchmark's own validation rows and scorers where the user said nothing else."""
    if not config.layout or config.olora:
        return config
    path = _path(folder, config.layout[1])
    if not told and (path / benchmarks.SPLIT_FILES["validation"]).exists():
        config = dataclasses.replace(config, validation=EVAL)
    known = catalogue.SCORERS.get(path.resolve().name)
    if known and not config.scorers and not config.options:
        scorers, options = known
        config = dataclasses.replace(config, scorers=list(scorers), options=list(options) if options else None)
    return config


def _sources(config: TaskConfig, place: str) -> None:
    if not re.fullmatch(TASK_NAME, config.name):
        raise UsageError(
            f"{place}: the name {config.name!r} cannot name a folder; use letters, digits, '-', '_' and "
            "'.', beginning with a letter or digit, at most 80"
        )
    folders = [key for key in benchmarks.LAYOUTS if getattr(config, key)]
    if folders and (len(folders) > 1 or config.train or config.test or config.prompt or config.answer):
        raise UsageError(
            f"{place} ({config.name}): `{folders[0]}:` brings its own train, test and columns; remove the others"
        )
    if not folders and config.rows != GONE and not (config.train and config.test):
        missing = "train" if not config.train else "test"
        raise UsageError(
            f"{place} ({config.name}): `{missing}:` is missing; give `train:` and `test:`, or `olora:`, `trace:` or "
            "`llmcl:`, the folder of a benchmark's data set"
        )


def _words(config: TaskConfig, place: str, folder: Path) -> TaskConfig:
    """The config with its options and scorers checked."""
    where = f"{place} ({config.name})"
    if isinstance(config.options, list):
        for word in config.options:
            if isinstance(word, bool) or not isinstance(word, str | int | float):
                raise UsageError(
                    f"{where}: the option {word!r} is not text; YAML reads yes, no, on and off as truth "
                    "values: put the words in quotes"
                )
        config = dataclasses.replace(config, options=[str(word) for word in config.options])
    elif config.options is not None and not isinstance(config.options, str):
        raise UsageError(f"{where}: `options:` must be a list of words or a JSON file's path, found {config.options!r}")
    if config.scorers is None:
        return config
    try:
        scorers = read_scorers(config.scorers, folder)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    if "options" in scorers and not (config.options or config.olora):
        raise UsageError(f"{where}: the scorer 'options' needs `options:`, the label words")
    return dataclasses.replace(config, scorers=list(scorers))


def _distinct_names(configs: list[TaskConfig], place: str) -> None:
    for name, count in Counter(config.name for config in configs).items():
        if count > 1:
            raise UsageError(f"{place}: {count} tasks are called {name!r}; give each its own `name:`")


def _require(good: bool, place: str, key: str, entry: dict, wanted: str) -> None:
    if not good:
        raise UsageError(f"{place}: `{key}: {entry[key]!r}` must be {wanted}")


def _whole(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _share(validation: str) -> float | None:
    """0.1 for "10%"; None for a path."""
    told = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", validation)
    return float(told[1]) / 100 if told else None


def _path(folder: Path, told: str) -> Path:
    return folder / Path(told).expanduser()


# ---------------------------------------------------------------- rows and checks


def _reading(config: TaskConfig, split: str, path: str, folder: Path, on_bad_row: str) -> Reading:
    if config.layout and (split != "validation" or config.validation == EVAL):
        layout, place = config.layout
        return benchmarks.LAYOUTS[layout](_path(folder, place), split, on_bad_row=on_bad_row)
    source = path if path.startswith("hub:") else _path(folder, path)
    return read_rows(source, prompt=config.prompt, answer=config.answer, split=split, on_bad_row=on_bad_row)


def _options(config: TaskConfig, folder: Path) -> tuple[str, ...]:
    if isinstance(config.options, str):
        options = read_options(_path(folder, config.options))
    elif config.options is not None:
        options = tuple(config.options)
    else:
        options = olora_options(_path(folder, config.olora)) if config.olora else ()
    options = tuple(option.strip() for option in options)
    for option, count in Counter(options).items():
        if count > 1 or not option:
            raise UsageError(
                f"task {config.name!r}: the option {option!r} is {'empty' if not option else 'there twice'}"
            )
    if len(options) == 1:
        raise UsageError(f"task {config.name!r}: one option ({options[0]!r}) leaves nothing to choose; add the others")
    return options


def _inside(
    rows: list[Row], options: tuple[str, ...], name: str, split: str, on_bad_row: str, notes: list[str]
) -> tuple[Row, ...]:
    """The rows whose answer is one of the options; the others are an error, or left out and counted."""
    outside = [row for row in rows if options and row.label not in options]
    if not outside:
        return tuple(rows)
    first = "; ".join(f"{row.source}: {quoted(row.label)}" for row in outside[:3])
    found = f"{len(outside)} of {len(rows)} rows have an answer that is none of the options; first: {first}"
    if on_bad_row == "error":
        raise DataError(
            f"task {name!r}, {split}: {found}\noptions: {', '.join(options)}\n"
            "Add the missing words to `options:`, repair the rows, or leave them out (on_bad_row=skip)"
        )
    kept = tuple(row for row in rows if row.label in options)
    if not kept:
        raise DataError(f"task {name!r}, {split}: no rows are left: {found}")
    notes.append(f"{split}: {found}; dropped")
    return kept


def usual_scorers(options: tuple[str, ...], test: Sequence[Row]) -> tuple[str | Scoring, ...]:
    """Options are ranked, answers compared, plain text predicted token by token."""
    if options:
        return ("options",)
    if test and all(row.options for row in test):
        return ("completions",)
    return ("next_token",) if all(row.shape == "text" for row in test) else ("exact_match",)


def can_be_judged(test: Sequence[Row], scorers: tuple[str | Scoring, ...], name: str) -> None:
    """DataError where a test row has nothing that these scorers could judge by."""
    blind = [row for row in test if row.shape == "text"]
    if blind and set(scorers) != {"next_token"}:
        raise DataError(
            f"task {name!r}, test: {len(blind)} rows are {{'text'}} without a prompt, so no answer "
            f"can be judged; first: {blind[0].source}; give test rows a prompt and an answer, or "
            "`scorers: [next_token]`"
        )
    bare = [row for row in test if not row.options]
    if "completions" in scorers and bare:
        raise DataError(
            f"task {name!r}, test: {len(bare)} rows bring no `options` of their own with the answer among them, which "
            f"the scorer 'completions' ranks; first: {bare[0].source}; add the list, or name another scorer"
        )


def _overlaps(train: Sequence[Row], validation: Sequence[Row], test: Sequence[Row]) -> list[str]:
    """Counted notes on prompts that stand where they should not; the rows stay."""
    notes = []
    for here, rows, there, others in (
        ("test", test, "train", train),
        ("test", test, "validation", validation),
        ("validation", validation, "train", train),
    ):
        known = {asked(row) for row in others}
        shared = [row for row in rows if asked(row) in known]
        if shared:
            notes.append(
                f"{len(shared)} of {len(rows)} {here} rows have the prompt of a {there} row; first: {shared[0].source}"
            )
    twice = len(test) - len({asked(row) for row in test})
    if twice:
        notes.append(f"{twice} of {len(test)} test rows repeat the prompt of an earlier test row")
    return notes


def asked(row: Row) -> str:
    """What the row asks, with its white space folded: two rows that ask the same overlap."""
    if row.shape == "chat":
        return " ".join(" ".join(f"{role}: {text}" for role, text in row.turns_before).split())
    return " ".join((row.prompt or row.answer).split())
