"""Files and data sets -> rows. Whatever is wrong with a row is said with its file and line."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgetless.data.tasks import Row
from forgetless.errors import DataError, DownloadError, UsageError, nearest, quoted, short
from forgetless.runs.folder import is_there

ON_BAD_ROW = ("error", "skip")
ROLES = ("system", "developer", "user", "assistant", "tool")
SHARE_GPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHAPES = (
    '{"prompt","completion"}, {"messages"}, {"prompt","answer"}, {"instruction","input","output"}, '
    '{"conversations"} or {"text"}'
)
COLUMNS = ("prompt", "completion", "messages", "answer", "text", "instruction", "output", "conversations")
FILES = (".jsonl", ".json", ".parquet")

# The O-LoRA benchmark's categories and what each asks; COPA asks inside its sentences.
OLORA_INSTRUCTIONS = {
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"? '
    "Choose one from the option.",
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning? Choose one from the option.',
    "SC": "What is the sentiment of the following paragraph? Choose one from the option.",
    "TC": "What is the topic of the following paragraph? Choose one from the option.",
    "BoolQA": "According to the following passage, is the question true or false? Choose one from the option.",
    "MultiRC": "According to the following passage and question, is the candidate answer true or false? "
    "Choose one from the option.",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both sentence? "
    "Choose one from the option.",
    "COPA": "",
}
SKIP_HINT = "\n(on_bad_row=skip leaves such rows out and counts them)"
NO_ANSWER = "-"  # GLUE's and SNLI's mark for rows on which the annotators did not agree


@dataclass
class Reading:
    """The rows of a source, in its order, and what was left out of it."""

    rows: list[Row]
    dropped: list[str] = field(default_factory=list)  # "train.jsonl:17: the answer is empty", one a bad row
    notes: list[str] = field(default_factory=list)  # counted, for rows that are left out by rule
    left_out: int = 0  # by the rule of a benchmark


class BadRow(ValueError):
    """What is wrong with one row and what to do; whoever knows its place adds it."""


def read_rows(
    path: str | Path,
    *,
    prompt: str | None = None,
    answer: str | None = None,
    split: str = "train",
    on_bad_row: str = "error",
) -> Reading:
    """The rows of a .jsonl, .json or .parquet file, of a saved data set's folder, or of `hub:NAME[:CONFIG][#SPLIT]`.

    The shape of a row is known by its keys: {"prompt","completion"} is taken as it is (TRL's convention;
    messages on both sides make a chat), {"messages"} is a chat, {"conversations"} is ShareGPT's chat,
    {"prompt","answer"} is a pair, {"instruction","input","output"} is Alpaca's (see `alpaca_prompt`), {"text"} has
    no prompt. `prompt` and `answer` name other columns. Where a prompt and an answer meet
    without white space one space is put between them, except for prompt/completion. An answer that is a
    number or a truth value is written as JSON writes it (3, 0.5, true); a data set's class labels give their
    names. In a chat every assistant turn is learnt, those inside a conversational prompt too. A list of texts in the
    column `options`, the answer among them, is what a row with prompt and answer is chosen among. A text in the column
    `domain` is kept as what the row is about.

    >>> read_rows("train.jsonl", prompt="question", answer="label").rows[0].source
    'train.jsonl:1'
    """
    _check(on_bad_row, prompt, answer)
    make = _maker(prompt, answer)
    text, unused = str(path), set[str]()

    def made(item: Any) -> Row | None:
        row = make(item)
        if row.shape == "text" and not (prompt and answer):
            unused.update(map(str, item.keys() - {"text"}))
        return dataclasses.replace(row, domain=_domain(item))

    if text.startswith("hub:"):
        reading = _collect(text, _hub_items(text, split), made, on_bad_row)
    elif is_there(path := Path(path).expanduser(), Path.is_dir):
        reading = _collect(text, _folder_items(path, split), made, on_bad_row)
    else:
        reading = read_file(path, made, on_bad_row)
    if unused:
        reading.notes.append(
            f"{text}: rows are learnt as plain text, {', '.join(sorted(unused))} is not used; "
            "to learn a column as the answer say `prompt: text` and `answer: COLUMN`"
        )
    return reading


def read_file(path: Path, make: Callable[[Any], Row | None], on_bad_row: str = "error") -> Reading:
    """The rows of one file, each made by `make` out of an object: a BadRow it raises gets the row's place, and None
    leaves the row out, counted.
    """
    _check(on_bad_row, None, None)
    if path.suffix not in FILES:
        raise DataError(
            f"{path}: rows are read from {', '.join(FILES)} files, from folders written by "
            "datasets' save_to_disk, and from hub:NAME; convert the file to one of them"
        )
    if path.suffix == ".parquet":
        return _collect(str(path), _parquet_items(path), make, on_bad_row)
    content = _bytes(path)
    # Files of one object a line are often called .json as well.
    if path.suffix == ".json" and content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return _collect(str(path), _list_items(path, content), make, on_bad_row)
    return _collect(str(path), _line_items(path, content), lambda raw: make(_object(raw)), on_bad_row)


def read_olora(folder: str | Path, split: str, *, on_bad_row: str = "error") -> Reading:
    """The rows of `<group>/<task>/<split>.json` of the O-LoRA benchmark, with that benchmark's prompt.

    Rows with the label "-" have no answer: they are left out, with a note that counts them.
    """
    _check(on_bad_row, None, None)
    folder = Path(folder).expanduser()
    category, name = folder.resolve().parent.name, folder.resolve().name
    if category not in OLORA_INSTRUCTIONS:
        near = nearest(category, OLORA_INSTRUCTIONS)
        raise UsageError(f"{folder}: the O-LoRA layout is <category>/<data set>; no category {category!r}{near}")
    options = olora_options(folder)
    head = f"Task:{category}\nDataset:{name}\n"
    if OLORA_INSTRUCTIONS[category]:
        # The space at the end of the line is the benchmark's.
        head += f"{OLORA_INSTRUCTIONS[category]}\nOption: {', '.join(options)} \n"

    def make(item: Any) -> Row:
        label, sentence = text_of(item, "label"), text_of(item, "sentence")
        if label not in options:
            raise BadRow(f"the label {quoted(label)} is not in labels.json{nearest(label, options)}")
        return Row(f"{head}{sentence}\nAnswer:", " " + label)

    path = folder / f"{split}.json"
    items = list(_list_items(path, _bytes(path)))
    kept = [(place, item) for place, item in items if not _unanswered(item)]
    reading = _collect(str(path), kept, make, on_bad_row)
    if len(kept) < len(items):
        count = len(items) - len(kept)
        reading.notes.append(f"{path.name}: {count} rows without an answer ({NO_ANSWER!r}) dropped")
    return reading


def olora_options(folder: str | Path) -> tuple[str, ...]:
    """The label words of an O-LoRA task, in the order of its labels.json."""
    path = Path(folder).expanduser() / "labels.json"
    return read_options(path)


def read_options(path: str | Path) -> tuple[str, ...]:
    """The label words of a JSON file that holds a list of them."""
    try:
        options = json.loads(_decode(_bytes(Path(path))))
        for word in options if isinstance(options, list) else ():
            str(word).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({short(str(error))}); expected a list of label words") from error
    if not isinstance(options, list) or not all(isinstance(word, str) for word in options):
        raise DataError(f"{path}: expected a JSON list of label words, found {_kind(options)}")
    return tuple(options)


# ---------------------------------------------------------------- sources -> (place, raw row)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise DataError(f"{str(path)!r}: is no path ({error})") from error


def _unreadable(path: Path, error: OSError) -> DataError:
    near = nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
    return DataError(f"{path}: cannot be read ({error.strerror}){near}")


def _decode(raw: bytes) -> str:
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        hint = "; it begins like UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise BadRow(
            f"not UTF-8 (byte {error.start + 1}: 0x{raw[error.start]:02x}){hint}; save the file as UTF-8"
        ) from error


def _line_items(path: Path, content: bytes) -> Iterator[tuple[str, bytes]]:
    # Only "\n" ends a line: str.splitlines would also cut at U+2028 inside a string.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def _object(raw: bytes) -> Any:
    text = _decode(raw).strip()
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(
            f"broken JSON ({error.msg}, column {error.colno}): {quoted(text)}; each line must be one whole object"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; endless nesting
        raise BadRow(f"cannot be read as JSON ({error})") from error


def _list_items(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON list with the line on which each begins."""
    try:
        text = _decode(content)
    except BadRow as error:
        raise DataError(f"{path}: {error}") from error
    decoder, at, line, counted = json.JSONDecoder(), _skip(text, 0), 1, 0
    if text[at : at + 1] != "[":
        raise DataError(f"{path}: expected a JSON list of objects, found {quoted(text) if text.strip() else 'nothing'}")
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            item, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}: broken JSON ({error.msg}, column {error.colno}); repair the file there"
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: cannot be read as JSON ({error})") from error
        yield f"{path}:{line}", item
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            here, found = text.count("\n", 0, at) + 1, quoted(text[at:]) if text[at:].strip() else "the end"
            raise DataError(f"{path}:{here}: broken JSON: expected ',' or ']', found {found}; repair the file there")
    if rest := text[at + 1 :].strip():
        here = text.count("\n", 0, at) + 1
        raise DataError(f"{path}:{here}: broken JSON: text after the list's end: {quoted(rest)}")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _parquet_items(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file, counted from 0; class labels are known by what `datasets` wrote into its schema."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:  # opened here, so that pyarrow does not take the name for a data set's
            table = pyarrow.parquet.read_table(file)
        table.validate(full=True)  # texts that are no UTF-8
        data = datasets.Dataset(datasets.table.InMemoryTable(table))
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # pyarrow's own, and whatever `datasets` raises for what stands in the schema
        raise DataError(
            f"{path}: not a Parquet file that can be read ({short(str(error))}); copy it again, or write it anew"
        ) from error
    return _dataset_items(str(path), data)


def _folder_items(folder: Path, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    if not any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        raise DataError(
            f"{folder}: a folder, and not one written by datasets' save_to_disk; name a file in it, or use `olora:`, "
            "`trace:` or `llmcl:` for a folder of one of these benchmarks"
        )
    try:
        data = datasets.load_from_disk(str(folder))
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise DataError(f"{folder}: no split {split!r}; known: {', '.join(data)}")
            data = data[split]
        data.data.table.validate(full=True)  # offsets that lead out of the file, texts that are no UTF-8
    except DataError:
        raise
    except Exception as error:  # what a damaged folder makes `datasets` and pyarrow raise has no common class
        raise DataError(
            f"{folder}: no data set that can be read ({type(error).__name__}: {short(str(error))}); copy it again, or "
            "write it anew with save_to_disk"
        ) from error
    return _dataset_items(str(folder), data)


def _hub_items(source: str, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    place, _, wanted = source.partition("#")
    name, _, config = place.removeprefix("hub:").partition(":")
    split = wanted or split
    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # no network, no such name, configuration or split: they share no class
        raise DownloadError(
            f"{source}: data set {name!r}, split {split!r}, could not be loaded: {short(str(error), 300)}\n"
            "Check the name, the configuration (hub:NAME:CONFIG) and the split (hub:NAME#SPLIT). "
            "Without network: load it on another machine, save_to_disk it, and give that folder's path"
        ) from error
    return _dataset_items(f"{place}#{split}", data)


def _dataset_items(place: str, data: Any) -> Iterator[tuple[str, Any]]:
    import datasets

    names = {column: kind for column, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)}
    number = -1
    try:
        for number, item in enumerate(data):
            for column, kind in names.items():
                label = item[column]
                item[column] = kind.int2str(label) if label is not None and label >= 0 else None
            yield f"{place}:{number}", item
    except Exception as error:  # texts that are no UTF-8, labels without a name: they share no class
        raise DataError(
            f"{place}: the row after {number} cannot be read ({type(error).__name__}: {short(str(error))}); copy it "
            "again, or write it anew"
        ) from error


# ---------------------------------------------------------------- one raw row -> Row


def _collect(
    source: str, items: Iterable[tuple[str, Any]], make: Callable[[Any], Row | None], on_bad_row: str
) -> Reading:
    reading = Reading([])
    for place, item in items:
        try:
            row = make(item)
        except BadRow as error:
            reading.dropped.append(f"{place}: {error}")
            if on_bad_row == "error":
                raise DataError(f"{place}: {error}{SKIP_HINT}") from error
            continue
        if row is None:
            reading.left_out += 1
            continue
        reading.rows.append(dataclasses.replace(row, source=place))
    if not reading.rows:
        bad, left = reading.dropped, reading.left_out
        why = f"all {len(bad)} are bad; first: {bad[0]}" if bad else f"all {left} left out" if left else "it is empty"
        raise DataError(f"{source}: no rows ({why})")
    return reading


def _maker(prompt: str | None, answer: str | None) -> Callable[[Any], Row]:
    if prompt and answer:
        return lambda item: _pair(item, text_of(item, prompt), answer_of(item, answer), space=True)
    return _recognised


def _recognised(item: Any) -> Row:
    keys = _object_keys(item)
    if {"prompt", "completion"} <= keys:
        if isinstance(item["prompt"], list) and isinstance(item["completion"], list):
            return _chat(item["prompt"] + item["completion"])
        return _pair(item, text_of(item, "prompt"), answer_of(item, "completion"), space=False)
    if "messages" in keys:
        return _chat(item["messages"])
    if "conversations" in keys:
        return _share_gpt(item)
    if {"instruction", "output"} <= keys:
        return _alpaca(item)
    if {"prompt", "answer"} <= keys:
        return _pair(item, text_of(item, "prompt"), answer_of(item, "answer"), space=True)
    if "text" in keys:
        return Row("", text_of(item, "text"))
    found = ", ".join(sorted(map(str, keys))) or "none"
    # Nearer than `nearest` asks for, which would take "question" for a misspelt "completion".
    strange = sorted(keys - set(COLUMNS))
    guesses = ((key, difflib.get_close_matches(key, COLUMNS, n=1, cutoff=0.75)) for key in strange)
    near = next((f"; is {key!r} meant to be {guess[0]!r}?" for key, guess in guesses if guess), "")
    raise BadRow(
        f"no known columns (found: {found}{near}); rows are {SHAPES}, or name the columns with `prompt:` and `answer:`"
    )


def _pair(item: dict, prompt: str, answer: str, *, space: bool) -> Row:
    if space and not prompt[-1].isspace() and not answer[0].isspace():
        answer = " " + answer
    return Row(prompt, answer, options=_own_options(item, answer.strip()))


def _own_options(item: dict, label: str) -> tuple[str, ...]:
    """The row's own choices; other things that stand under this name are none of ours."""
    told = item.get("options")
    if not isinstance(told, list) or not all(isinstance(option, str) and option.strip() for option in told):
        return ()
    options = tuple(dict.fromkeys(option.strip() for option in told))
    return options if len(options) > 1 and label in options else ()


def _domain(item: dict) -> str:
    told = item.get("domain")
    return text_of(item, "domain").strip() if isinstance(told, str) and told.strip() else ""


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """The prompt of Alpaca's training, as Alpaca-LoRA writes it: the answer begins on a new line.

    >>> alpaca_prompt("Add them.", "2 and 2").endswith("### Input:\\n2 and 2\\n\\n### Response:\\n")
    True
    """
    paired = ", paired with an input that provides further context" if given else ""
    context = f"### Input:\n{given}\n\n" if given else ""
    return (
        f"Below is an instruction that describes a task{paired}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{context}### Response:\n"
    )


def _alpaca(item: dict) -> Row:
    for column in ("system", "history"):
        if item.get(column):
            raise BadRow(f'{column!r} has no place in the Alpaca prompt; write the row as {{"messages": [...]}}')
    given = item.get("input")
    blank = given is None or (isinstance(given, str) and not given.strip())
    told = "" if blank else text_of(item, "input")
    return Row(alpaca_prompt(text_of(item, "instruction"), told), answer_of(item, "output"))


def _share_gpt(item: dict) -> Row:
    turns = item["conversations"]
    if not isinstance(turns, list) or not turns:
        raise BadRow(f'conversations must be a list of {{"from", "value"}}, found {_kind(turns)}')
    if item.get("tools"):
        raise BadRow("'tools' cannot be learnt from; write the calls into the turns")
    messages = [_share_gpt_turn(number, turn) for number, turn in enumerate(turns, start=1)]
    if item.get("system"):
        messages.insert(0, {"role": "system", "content": text_of(item, "system")})
    return _chat(messages)


def _share_gpt_turn(number: int, turn: Any) -> dict:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise BadRow(f'turn {number}: expected {{"from", "value"}}, found {quoted(str(turn))}')
    role = SHARE_GPT_ROLES.get(str(turn["from"]))
    if role is None:
        raise BadRow(f"turn {number}: unknown speaker {turn['from']!r}{nearest(str(turn['from']), SHARE_GPT_ROLES)}")
    try:
        return {"role": role, "content": text_of(turn, "value")}
    except BadRow as error:
        raise BadRow(f"turn {number} ({turn['from']}): {error}") from error


def _chat(messages: Any) -> Row:
    if not isinstance(messages, list) or not messages:
        raise BadRow(f'messages must be a list of {{"role", "content"}}, found {_kind(messages)}')
    turns = tuple(_turn(number, message) for number, message in enumerate(messages, start=1))
    answers = [content for role, content in turns if role == "assistant"]
    if not answers:
        raise BadRow(
            "no assistant turn among the messages, so there is nothing to learn; add the answer as "
            '{"role": "assistant", "content": ...}'
        )
    if turns[0][0] == "assistant":
        raise BadRow("the first turn is the assistant's, so it answers nothing; put the question before it")
    return Row("", answers[-1], turns)


def _turn(number: int, message: Any) -> tuple[str, str]:
    if not isinstance(message, dict) or "role" not in message:
        raise BadRow(f'turn {number}: expected {{"role", "content"}}, found {quoted(str(message))}')
    role = message["role"]
    if role not in ROLES:
        raise BadRow(f"turn {number}: unknown role {role!r}{nearest(str(role), ROLES)}")
    if message.get("tool_calls"):
        raise BadRow(f"turn {number}: tool_calls cannot be learnt from; write the call into the content")
    try:
        return role, text_of(message, "content")
    except BadRow as error:
        raise BadRow(f"turn {number} ({role}): {error}") from error


def _object_keys(item: Any) -> set[str]:
    if not isinstance(item, dict):
        raise BadRow(f"expected an object {{...}}, found {_kind(item)}")
    return set(item)


def text_of(item: Any, column: str) -> str:
    """The column's text, which must be there, be text and not be blank."""
    keys = _object_keys(item)
    if column not in keys:
        raise BadRow(f"no column {column!r}{nearest(column, map(str, keys))}")
    value = item[column]
    if not isinstance(value, str):
        raise BadRow(f"{column!r} must be text, found {_kind(value)}; put it in quotes")
    if not value.strip():
        raise BadRow(f"{column!r} is empty; remove the row or fill it")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" is JSON and is no text
        raise BadRow(
            f"{column!r} holds half of a surrogate pair (character {error.start + 1}), which is no "
            "Unicode text; remove it"
        ) from error
    return value


def answer_of(item: Any, column: str) -> str:
    """The column's text; numbers and truth values as JSON writes them."""
    value = item.get(column) if isinstance(item, dict) else None
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    return text_of(item, column)


def _unanswered(item: Any) -> bool:
    return isinstance(item, dict) and item.get("label") == NO_ANSWER


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number",
             float: "a number", type(None): "null"}  # fmt: skip
    found = quoted(str(value)) if isinstance(value, str | dict | list) else value
    return f"{kinds.get(type(value), type(value).__name__)}: {found}"


def _check(on_bad_row: str, prompt: str | None, answer: str | None) -> None:
    if on_bad_row not in ON_BAD_ROW:
        raise UsageError(f"on_bad_row={on_bad_row!r}{nearest(on_bad_row, ON_BAD_ROW)}")
    if bool(prompt) != bool(answer):
        raise UsageError("name both columns, `prompt:` and `answer:`, or neither")
