"""Greedy answers, in batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from forgetless.model.base import transformer
from forgetless.model.encoder_decoder import decoder_start
from forgetless.model.prompted import Prompted


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
        return _batches(_generating(model), tokenizer, contexts, settings, device, batch_tokens)
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
) -> list[Answer]:
    """The longest contexts first, padded on the left: every answer of a batch begins at the same place.

    That place is behind the context, or of an encoder-decoder behind the token with which its decoder starts.
    """
    order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
    found = [Answer("", True)] * len(contexts)
    ends = torch.tensor(settings.eos_token_id, device=device)
    while order:
        length = len(contexts[order[0]])
        count = max(1, batch_tokens // (length + settings.max_new_tokens))
        batch, order = order[:count], order[count:]
        ids = torch.full((len(batch), length), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for b, i in enumerate(batch):
            ids[b, length - len(contexts[i]) :] = torch.tensor(contexts[i])
            mask[b, length - len(contexts[i]) :] = 1
        with torch.no_grad():
            made = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings)
        made = made[:, length if settings.decoder_start_token_id is None else 1 :]
        finished = torch.isin(made, ends).any(1).tolist()
        texts = tokenizer.batch_decode(made, skip_special_tokens=True)
        for i, *answer in zip(batch, texts, finished, strict=True):
            found[i] = Answer(*answer)
    return found
