"""Rows of general text, which stand for what a base knows: of a text, or the base's own answers to general prompts."""

from __future__ import annotations

from forgetless.data.batches import Encoder
from forgetless.data.streams import JUDGED_SEED, sample
from forgetless.data.tasks import Row
from forgetless.errors import DataError
from forgetless.forgetting.sides import answers_of
from forgetless.forgetting.texts import PROMPTS, general_prompts, own_prompts, read_text
from forgetless.learning.gradients import evaluating
from forgetless.learning.processes import agreed
from forgetless.model.adapters import Adapters

MOST_ROWS = 10_000  # of a text, drawn once


def text_rows(text: str, encoder: Encoder) -> list[Row]:
    """The rows of a file or of hub:NAME; one that cannot be encoded is said at once."""
    rows = list(read_text(text, MOST_ROWS).rows)
    for row in rows:
        encoder(row)
    return rows


def own_answers(adapters: Adapters, encoder: Encoder, prompts: int) -> list[Row]:
    """The untouched base's greedy answers to packaged prompts that forgetting is not measured on by default."""
    model, tokenizer = adapters.model, encoder.tokenizer
    measured = set(general_prompts(PROMPTS))
    others = [prompt for prompt in general_prompts() if prompt not in measured]
    chosen = sample(others, prompts, seed=JUDGED_SEED, name="general replay", purpose="prompts")
    asked = own_prompts(chosen, chat=encoder.takes_chats)
    with evaluating(model), adapters.disabled():
        answers = answers_of(model, tokenizer, asked, encoder.max_length, lambda: evaluating(model))
    answered = zip(asked.answered(answers).rows, answers, strict=True)
    rows = [row for row, answer in answered if answer.strip()]
    if not rows:
        raise DataError("the base gives no answer to general prompts; give a `text` instead")
    return agreed(rows)
