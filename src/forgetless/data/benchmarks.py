"""Files of benchmarks: checked against the catalogue, then read in their own layout and prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from forgetless.data.catalogue import DataSet, Part
from forgetless.data.packages import sha256_of
from forgetless.data.readers import BadRow, Reading, alpaca_prompt, answer_of, read_file, read_olora, text_of
from forgetless.data.tasks import Row
from forgetless.errors import DataError, DownloadError

SPLIT_FILES = {"train": "train.json", "validation": "eval.json", "test": "test.json"}  # TRACE's and LLMCL's


def check(data: DataSet) -> str:
    """A note on what of the data set's files was checked; a file that is missing or another one is an error."""
    for part in data.parts:
        state = file_state(data, part)
        path = data.path / part.file
        if state == "missing":
            raise DownloadError(
                f"{path} is not there. {data.source.name}, {data.source.url}, is not part of forgetless; to get it:\n"
                f"{data.source.how_to_get()}\n"
                "or set FORGETLESS_DATA to the folder that holds "
                f"{data.source.folder}/ with these files"
            )
        if state == "differs":
            raise DownloadError(
                f"{path}: its sha256 is {sha256_of(path)}, expected {part.sha256} ({data.source.name} at "
                f"{data.source.revision}): it is damaged or another version. Remove it and get it again:\n"
                f"{data.source.how_to_get()}\n"
                f"To learn from this version, say so in a stream file: `- {{{data.layout}: {data.path}}}`"
            )
    pinned = [part.file for part in data.parts if part.sha256]
    loose = [part.file for part in data.parts if not part.sha256]
    said = [f"{', '.join(pinned)}: as published (sha256 checked)"] * bool(pinned)
    said += [f"{', '.join(loose)}: not checked, no published hash could be confirmed"] * bool(loose)
    return "; ".join(said)


def file_state(data: DataSet, part: Part, *, hashed: bool = True) -> str:
    """missing, differs, as pinned, or not pinned; without hashing, "there" for a file that is."""
    path = data.path / part.file
    if not path.is_file():
        return "missing"
    if not part.sha256:
        return "not pinned"
    if not hashed:
        return "there"
    return "as pinned" if sha256_of(path) == part.sha256 else "differs"


def read(data: DataSet, split: str, *, on_bad_row: str = "error") -> Reading:
    """The rows of a catalogued data set: all of them, or those that its benchmark takes, with a note."""
    reading = LAYOUTS[data.layout](data.path, split, on_bad_row=on_bad_row)
    if data.template:
        reading.rows = [Row(alpaca_prompt(row.prompt), row.answer, source=row.source) for row in reading.rows]
    count = len(reading.rows)
    if split == "train" and data.first and count > data.first:
        reading.rows = reading.rows[: data.first]
        reading.notes.append(f"train: the first {data.first:,} of {count:,} rows, as its code has it")
    if split == "test" and data.last and count > data.last:
        reading.rows = reading.rows[-data.last :]
        reading.notes.append(f"test: the last {data.last:,} of {count:,} rows, as its code has it")
    return reading


def read_trace(folder: str | Path, split: str, *, on_bad_row: str = "error") -> Reading:
    """The rows of `<data set>/{train,eval,test}.json` of TRACE; the answer follows the prompt as it is."""
    return read_file(_file(Path(folder), SPLIT_FILES[split]), _as_it_is, on_bad_row)


def read_llmcl(folder: str | Path, split: str, *, on_bad_row: str = "error") -> Reading:
    """The rows of a data set as LLMCL (I-LoRA's code) has them.

    `<data set>/{train,eval,test}.json` with prompt and answer; or MedMCQA's own train.json and dev.json; or JEC-QA's
    0_train.json and 1_train.json. Of the two exams, questions with several right answers are left out, with a note.
    """
    folder = Path(folder).expanduser()
    names = [SPLIT_FILES[split]]
    if split != "validation" and (folder / "0_train.json").exists():  # JEC-QA's own files
        names = ["0_train.json", "1_train.json"] if split == "train" else ["0_train.json"]
    elif split == "test" and (folder / "dev.json").exists():  # MedMCQA's own files; its test.json has no answers
        names = ["dev.json"]
    readings = [read_file(_file(folder, name), _llmcl_row, on_bad_row) for name in names]
    whole = Reading([])
    for name, reading in zip(names, readings, strict=True):
        whole.rows += reading.rows
        whole.dropped += reading.dropped
        if reading.left_out:
            whole.notes.append(f"{name}: {reading.left_out:,} questions with several right answers left out")
    return whole


def _file(folder: Path, name: str) -> Path:
    """The file; if it is not there, what its layout is."""
    path = folder.expanduser() / name
    if not path.is_file():
        raise DataError(
            f"{path}: not there; a data set of TRACE or LLMCL is a folder with train.json, test.json and, for "
            'validation, eval.json, all with rows {"prompt", "answer"}'
        )
    return path


def _as_it_is(item: Any) -> Row:
    return Row(text_of(item, "prompt"), answer_of(item, "answer"))


def _llmcl_row(item: Any) -> Row | None:
    """None for a question with several right answers."""
    if not isinstance(item, dict) or {"prompt", "answer"} <= set(item):
        return _as_it_is(item)
    if "choice_type" in item:
        return _medmcqa(item)
    if "option_list" in item:
        return _jecqa(item)
    raise BadRow(
        f"no known columns (found: {', '.join(map(str, item)) or 'none'}); rows are "
        '{"prompt","answer"}, or those of MedMCQA or JEC-QA'
    )


def _medmcqa(item: dict) -> Row | None:
    if item["choice_type"] != "single":
        return None
    choices = ", ".join(f"{letter}.{text_of(item, f'op{letter.lower()}')}" for letter in "ABCD")
    right = item.get("cop")
    if right not in (1, 2, 3, 4) or isinstance(right, bool):
        raise BadRow(f"'cop' must be the number of the right choice, 1 to 4, found {right!r}")
    return Row(
        "Solve the following medical problem by choosing the correct answer from following four choices.\n"
        f"Question:\n{text_of(item, 'question')}\nChoices: \n{choices}\n Answer:",
        "ABCD"[right - 1],
    )


def _jecqa(item: dict) -> Row | None:
    right, options = item.get("answer"), item["option_list"]
    if not isinstance(right, list) or not right or not all(letter in list("ABCD") for letter in right):
        raise BadRow(f"'answer' must be a list of letters A to D, found {right!r}")
    if len(right) > 1:
        return None
    choices = "，".join(f"{letter}. {text_of(options, letter)}" for letter in "ABCD")
    return Row(
        "根据以下法律问题，从选项A，B，C，D中选择一项正确的答案\n"
        f"问题：{text_of(item, 'statement')}\n选项: \n{choices}\n 答案:",
        right[0],
    )


LAYOUTS: dict[str, Callable[..., Reading]] = {"olora": read_olora, "trace": read_trace, "llmcl": read_llmcl}
