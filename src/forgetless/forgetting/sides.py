"""A reference's side of a comparison, from a model that is in memory: the text, its states there, and its head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from forgetless.data.batches import Encoder
from forgetless.data.tasks import Row
from forgetless.forgetting.kept import cache_folder, kept
from forgetless.forgetting.reference import (
    BATCH_TOKENS,
    Reference,
    computed,
    hidden_states,
    reference_of,
    write_states,
)  # fmt: skip
from forgetless.forgetting.texts import ANSWER_TOKENS, LONGEST, Text
from forgetless.model.base import context_of
from forgetless.model.encoder_decoder import decoder_start
from forgetless.model.head import Head, Using
from forgetless.score.generation import Answer, answers


def side_in(
    folder: Path, model, tokenizer: PreTrainedTokenizerBase, text: Text, using: Using, label: str | None = None
) -> Reference:
    """What the model says on a text now, in an empty `folder`; it may then be trained on."""
    max_length = longest(model)
    text = text.answered(answers_of(model, tokenizer, text, max_length, using)) if text.open else text
    windows = text.windows(tokenizer, max_length, decoder_start=decoder_start(model.config))
    write_states(folder, hidden_states(model, windows, using=using, label=label), {})
    return Reference(folder, windows, Head(model, using).copy())


def kept_side(
    model, tokenizer: PreTrainedTokenizerBase, text: Text, using: Using, identity: dict[str, Any],
    label: str | None = None,
) -> Reference:  # fmt: skip
    """The same from the user's cache, or computed and put there; `identity` tells this model from others."""
    max_length = longest(model)
    if text.open:
        decided_by = {
            "model": identity,
            "computed": computed(model, BATCH_TOKENS, using),
            "prompts": text.content,
            "max_length": max_length,
            "answer_tokens": ANSWER_TOKENS,
        }
        text = text.answered(kept(decided_by, lambda: answers_of(model, tokenizer, text, max_length, using)))
    windows = text.windows(tokenizer, max_length, decoder_start=decoder_start(model.config))
    reference = reference_of(model, windows, identity, cache_folder() / "states", using=using, label=label)
    return replace(reference, head=reference.head.copy())


def longest(model) -> int:
    """Tokens of the longest sequence that is measured."""
    return min(LONGEST, context_of(model) or LONGEST)


def answers_of(model, tokenizer: PreTrainedTokenizerBase, text: Text, max_length: int, using: Using) -> list[str]:
    """The model's own answers to the prompts of a text."""
    return [one.text for one in ask(model, tokenizer, text.rows, max_length, ANSWER_TOKENS, using)]


def ask(
    model, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int, max_new_tokens: int, using: Using,
    generate: Callable[[list[list[int]], int], list[Answer]] | None = None,
) -> list[Answer]:  # fmt: skip
    """Greedy answers of up to `max_new_tokens`, or half of the longest sequence; `generate`: not by `model` itself."""
    encoder = Encoder(tokenizer, max_length, None if generate else decoder_start(model.config))
    room = min(max_new_tokens, max_length // 2)
    contexts = [encoder.generation_context(row, room) for row in rows]
    if generate:
        return generate(contexts, room)
    with using():
        return answers(model, tokenizer, contexts, room, model.device, BATCH_TOKENS)
