"""The texts on which forgetting is measured: the user's own, or a reference's own answers to general prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from forgetless.data.batches import Encoder
from forgetless.data.readers import alpaca_prompt, read_rows
from forgetless.data.streams import JUDGED_SEED, sample
from forgetless.data.tasks import Row
from forgetless.errors import DataError, UsageError
from forgetless.forgetting.windows import Windows, row_windows, text_windows
from forgetless.model.identity import json_digest

OWN_ANSWERS = "own-answers"
PROMPT_FILES = ("general_prompts.txt", "look_alikes.txt")
PROMPTS = 32  # that are answered where many measurements are made
ANSWER_TOKENS = 64  # of an own answer
LONGEST = 2048  # tokens of a row: a prompt that is longer loses its beginning
WINDOW = 512  # tokens; windows do not overlap
ROWS = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Text:
    """Documents by name; a document is a row: one with a prompt is measured at its answer, a plain text everywhere.

    An open text has prompts only, which the reference is to answer itself.
    """

    name: str
    rows: tuple[Row, ...]
    source: str
    open: bool = False

    @property
    def content(self) -> str:
        """sha256 of the rows."""
        return json_digest([row.content() for row in self.rows])

    def answered(self, answers: Sequence[str]) -> Text:
        """An open text with a reference's answers in their places."""
        rows = tuple(_answered(row, answer) for row, answer in zip(self.rows, answers, strict=True))
        return replace(self, rows=rows, open=False)

    def windows(self, tokenizer: PreTrainedTokenizerBase, context: int) -> Windows:
        """What goes through a model; no window is longer than `context` tokens."""
        if self.rows[0].shape != "text":
            return row_windows(self.rows, Encoder(tokenizer, context))
        return text_windows([row.answer for row in self.rows], tokenizer, min(WINDOW, context))


def read_text(source: str, limit: int | None = None) -> Text:
    """The text of a file: rows of JSONL, JSON, Parquet or hub:NAME, or plain text whose documents empty lines part."""
    is_rows = source.startswith("hub:") or Path(source).suffix in ROWS or Path(source).expanduser().is_dir()
    rows = tuple(read_rows(source).rows) if is_rows else _plain_text(source)
    shapes = {row.shape == "text" for row in rows}
    if len(shapes) > 1:
        raise DataError(f"{source}: some rows are plain text and some have a prompt; give them as two files")
    name = source.removeprefix("hub:").replace("/", "-") if source.startswith("hub:") else Path(source).stem
    return Text(name, sample(rows, limit, seed=JUDGED_SEED, name=name, purpose="text"), source)


def own_prompts(prompts: Sequence[str], chat: bool) -> Text:
    """Prompts whose answers by a reference will be the text that it is compared on."""
    source = f"the reference's greedy answers of up to {ANSWER_TOKENS} tokens"
    return Text(OWN_ANSWERS, tuple(asked(prompt, "", chat) for prompt in prompts), source, open=True)


def own_answers(prompts: Sequence[str], answers: Sequence[str], chat: bool) -> Text:
    """A reference's answers as the text that it is compared on."""
    return own_prompts(prompts, chat).answered(answers)


def general_prompts(limit: int | None = None) -> tuple[str, ...]:
    """The packaged prompts, as people write to an assistant; a smaller sample is part of a larger one."""
    folder = resources.files("forgetless.forgetting")
    lines = [line.strip() for name in PROMPT_FILES for line in (folder / name).read_text("utf-8").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    return sample(prompts, limit, seed=JUDGED_SEED, name=OWN_ANSWERS, purpose="prompts")


def asked(prompt: str, answer: str, chat: bool) -> Row:
    """A prompt and an answer in a chat, or in the Alpaca prompt for models without a chat template."""
    if chat:
        return Row("", answer, (("user", prompt), ("assistant", answer)))
    return Row(alpaca_prompt(prompt), answer)


def _answered(row: Row, answer: str) -> Row:
    messages = (*row.turns_before, ("assistant", answer)) if row.messages else ()
    return replace(row, answer=answer, messages=messages)


def prompt_of(row: Row) -> str:
    """What was asked: the first turn of a chat, or the prompt."""
    return row.messages[0][1] if row.messages else row.prompt


def _plain_text(source: str) -> tuple[Row, ...]:
    try:
        whole = Path(source).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{source}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: not UTF-8 (byte {error.start + 1}); save it as UTF-8") from error
    parts = [part.strip() for part in whole.replace("\r\n", "\n").split("\n\n") if part.strip()]
    if not parts:
        raise DataError(f"{source}: holds no text")
    return tuple(Row("", part, source=f"{source}: paragraph {n}") for n, part in enumerate(parts, start=1))
