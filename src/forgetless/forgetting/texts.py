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
from forgetless.forgetting.windows import Windows, continuation_windows, row_windows, text_windows
from forgetless.model.identity import json_digest

OWN_ANSWERS = "own-answers"
PROMPT_FILES = ("general_prompts.txt", "look_alikes.txt")
PROMPTS = 32  # that are answered where many measurements are made
ANSWER_TOKENS = 64  # of an own answer
LONGEST = 2048  # tokens of a row: a prompt that is longer loses its beginning
WINDOW = 512  # tokens
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

    @property
    def plain(self) -> bool:
        """Without prompts, so that it is cut into windows."""
        return self.rows[0].shape == "text"

    @property
    def chat(self) -> bool:
        """Turns, which stand in a chat template."""
        return self.rows[0].shape == "chat"

    def windows(
        self, tokenizer: PreTrainedTokenizerBase, context: int, window: int | None = None, stride: int | None = None,
        decoder_start: int | None = None,
    ) -> Windows:  # fmt: skip
        """What goes through a model, at most `context` tokens at once; `window` and `stride` are those of plain text,
        `decoder_start` is that of an encoder-decoder.

        UsageError where the window is longer than the context, or the stride than the window.
        """
        if not self.plain:
            return row_windows(self.rows, Encoder(tokenizer, context, decoder_start))
        if window is not None and window > context:
            raise UsageError(
                f"text {self.name!r}: a window of {window} tokens; the models and an audit take {context} at once: "
                "give a shorter window"
            )
        documents, length = [row.answer for row in self.rows], window or min(WINDOW, context)
        if decoder_start is not None:
            return continuation_windows(documents, tokenizer, decoder_start, length, stride)
        return text_windows(documents, tokenizer, length, stride)


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
    """Prompts whose answers by a reference will be the text; the domain of a packaged prompt is its topic."""
    topic, source = topics(), f"the reference's greedy answers of up to {ANSWER_TOKENS} tokens"
    rows = tuple(
        replace(asked(prompt, "", chat), source=f"prompt {number}", domain=topic.get(prompt, ""))
        for number, prompt in enumerate(prompts, start=1)
    )
    return Text(OWN_ANSWERS, rows, source, open=True)


def own_answers(prompts: Sequence[str], answers: Sequence[str], chat: bool) -> Text:
    """A reference's answers as the text that it is compared on."""
    return own_prompts(prompts, chat).answered(answers)


def general_prompts(limit: int | None = None) -> tuple[str, ...]:
    """The packaged prompts, as people write to an assistant; a smaller sample is part of a larger one."""
    return sample(tuple(topics()), limit, seed=JUDGED_SEED, name=OWN_ANSWERS, purpose="prompts")


def topics() -> dict[str, str]:
    """Packaged prompt -> what it is about: `[topic] prompt` in its file, or else the file's name."""
    found = {}
    for file in PROMPT_FILES:
        for line in (resources.files("forgetless.forgetting") / file).read_text("utf-8").splitlines():
            if line.strip() and not line.startswith("#"):
                topic, _, prompt = line[1:].partition("] ") if line.startswith("[") else (Path(file).stem, "", line)
                found[prompt.strip()] = topic.replace("_", "-")
    return found


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
