"""Models of two halves, as T5: an encoder reads the prompt, a decoder behind it writes the answer.

A row is one sequence here as everywhere else, so that batches, kept rows and windows know a single kind of row: what
the encoder reads, its end token, then what the decoder reads, from the token with which every answer starts. That
token is the first one whose successor is asked for, which is how the halves are told apart.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from forgetless.errors import UsageError

KINDS = ("t5", "mt5", "umt5")


def decoder_start(config: PreTrainedConfig) -> int | None:
    """The token with which a decoder behind an encoder starts; None for a decoder alone.

    UsageError for encoder-decoders of another kind: some begin their answers with further tokens.
    """
    if not config.is_encoder_decoder:
        return None
    if config.model_type not in KINDS or config.decoder_start_token_id is None:
        raise UsageError(
            f"{config.model_type}: an encoder-decoder of this kind is not known; those of {', '.join(KINDS)} with a "
            "decoder_start_token_id are, and models that are a decoder alone"
        )
    return int(config.decoder_start_token_id)


def model_class(config: PreTrainedConfig) -> type:
    """The class of transformers that loads such a model with its output embedding."""
    return AutoModelForCausalLM if decoder_start(config) is None else AutoModelForSeq2SeqLM


def task_type(config: PreTrainedConfig) -> str:
    """PEFT's name for what such a model does."""
    return "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"


def is_encoder_decoder(model) -> bool:
    return bool(model.config.is_encoder_decoder)


def refuse_encoder_decoder(model, what: str, remedy: str) -> None:
    """UsageError where `what` cannot be had of a model of two halves."""
    if is_encoder_decoder(model):
        raise UsageError(f"{what}: not for encoder-decoders ({model.config.model_type}); {remedy}")


def refuse_reading_inputs(model) -> None:
    """UsageError for methods that look at what each layer reads: of two halves, each reads rows of its own."""
    refuse_encoder_decoder(model, "this method", "it looks at what a decoder's layers read; take another method")


def halves(input_ids: Tensor, attention_mask: Tensor, keep: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Right-padded rows (rows, length) -> the model's inputs, and `keep` (rows, longest answer) among the decoder's.

    `keep` is True where the next token is asked for, first at the token with which the decoder starts.
    """
    border = keep.long().argmax(1, keepdim=True)  # (rows, 1): tokens of the encoder
    length, count = attention_mask.sum(1, keepdim=True), torch.arange(keep.shape[1], device=keep.device)
    read = count < border
    place = count[: int((length - border).max())] + border  # of the decoder's tokens in the row
    inside = place < length
    place = place.clamp(max=keep.shape[1] - 1)
    longest = int(border.max())
    inputs = {
        "input_ids": (input_ids * read)[:, :longest],
        "attention_mask": read.long()[:, :longest],
        "decoder_input_ids": input_ids.gather(1, place) * inside,
    }
    return inputs, keep.gather(1, place) & inside


def encoded(model, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What the encoder gives the decoder: (rows, length, width)."""
    return model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def decoded(model, states: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
    """Logits (rows, answer, vocabulary) behind what the encoder gave."""
    given = BaseModelOutput(last_hidden_state=states)  # type: ignore[arg-type]  # typed as a FloatTensor
    inputs = {"attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids}
    return model(encoder_outputs=given, **inputs, use_cache=False).logits
