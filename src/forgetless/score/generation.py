"""Greedy answers, in batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from forgetless.data.batches import LEAST_SHARED, alike, beginning
from forgetless.model.answers import packs
from forgetless.model.base import transformer
from forgetless.model.encoder_decoder import decoder_start
from forgetless.model.prompted import Prompted

TOGETHER = 8  # rows with a beginning of their own that go by themselves; fewer would make small batches


@dataclass(frozen=True)
class Answer:
    """A generated text, and whether the model ended it; if not, it ran into the limit of its length."""

    text: str
    finished: bool


def generate(
    model,
    tokenizer: PreTrainedTokenizerBase,
    contexts: list[list[int]],
    max_new_tokens: int,
    device: torch.device,
    batch_tokens: int = 4096,
) -> list[str]:
    """The model's greedy continuation of each context (token lists), up to its end token, as text."""
    return [one.text for one in answers(model, tokenizer, contexts, max_new_tokens, device, batch_tokens)]


def answers(
    model,
    tokenizer: PreTrainedTokenizerBase,
    contexts: list[list[int]],
    max_new_tokens: int,
    device: torch.device,
    batch_tokens: int = 4096,
) -> list[Answer]:
    """What `generate` gives, with whether each answer came to its end."""
    base = transformer(model)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends_of(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=decoder_start(base.config),
    )
    # transformers fills what `settings` leaves open from the model's own, which may sample or punish repetition
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        return _batches(_generating(model), tokenizer, contexts, settings, device, batch_tokens, share=packs(model))
    finally:
        base.generation_config = own


def ends_of(model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer."""
    told = transformer(model).generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(told if isinstance(told, list) else [told])} - {None})


def _generating(model):
    """What generates: the whole model only where it puts a soft prompt before the rows; others are in the layers."""
    soft = isinstance(model, Prompted) or (isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning)
    return model if soft else transformer(model)


def _batches(
    model,
    tokenizer: PreTrainedTokenizerBase,
    contexts: list[list[int]],
    settings: GenerationConfig,
    device: torch.device,
    batch_tokens: int,
    share: bool,
) -> list[Answer]:
    """The longest contexts first, padded so that every answer of a batch begins at the same place.

    That place is behind the context, or of an encoder-decoder behind the token with which its decoder starts. What all
    contexts of a batch begin with goes through the model once, where it is to `share`.
    """
    found = [Answer("", True)] * len(contexts)
    ends = torch.tensor(settings.eos_token_id, device=device)
    for order in _orders(contexts) if share else [_longest_first(contexts, range(len(contexts)))]:
        while order:
            length = len(contexts[order[0]])
            count = max(1, batch_tokens // (length + settings.max_new_tokens))
            batch, order = order[:count], order[count:]
            shared = beginning([contexts[i][:-1] for i in batch]) if share and len(batch) > 1 else 0
            shared = shared if shared >= LEAST_SHARED else 0
            ids, mask = [], []
            for context in (contexts[i] for i in batch):
                gap = length - len(context)
                ids.append([*context[:shared], *[tokenizer.pad_token_id] * gap, *context[shared:]])
                mask.append([1] * shared + [0] * gap + [1] * (len(context) - shared))
            inputs = {
                "input_ids": torch.tensor(ids, device=device),
                "attention_mask": torch.tensor(mask, device=device),
            }
            with torch.no_grad():
                if shared:
                    inputs["past_key_values"] = _computed(model, inputs["input_ids"][:1, :shared], len(batch))
                made = model.generate(**inputs, generation_config=settings)
            made = made[:, length if settings.decoder_start_token_id is None else 1 :]
            finished = torch.isin(made, ends).any(1).tolist()
            texts = tokenizer.batch_decode(made, skip_special_tokens=True)
            for i, *answer in zip(batch, texts, finished, strict=True):
                found[i] = Answer(*answer)
    return found


def _orders(contexts: list[list[int]]) -> list[list[int]]:
    """The rows of each beginning that enough of them share, and all others, the longest first."""
    groups = [group.rows for group in alike([context[:-1] for context in contexts]) if len(group.rows) >= TOGETHER]
    others = sorted(set(range(len(contexts))).difference(*groups))
    return [_longest_first(contexts, rows) for rows in [*groups, others]]


def _longest_first(contexts: list[list[int]], rows: Iterable[int]) -> list[int]:
    return sorted(rows, key=lambda i: -len(contexts[i]))


def _computed(model, beginning: torch.Tensor, rows: int):
    """What the model keeps of a beginning (1, length), for so many rows."""
    kept = model(input_ids=beginning, use_cache=True).past_key_values
    kept.batch_repeat_interleave(rows)
    return kept
