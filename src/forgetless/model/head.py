"""The last hidden states of a language model, and the head that reads them.

Between its decoder and its logits a model may scale, cap or shift (Cohere, Granite, Gemma 2, T5). So the head is the
model's own forward with an empty decoder (and encoder) in it, and the hidden states are what goes into the output
embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.errors import RunError
from forgetless.model.answers import packs
from forgetless.model.base import transformer
from forgetless.model.encoder_decoder import halves, is_encoder_decoder
from forgetless.model.packing import pack
from forgetless.model.prompted import Prompted, before_answers

Using = Callable[[], AbstractContextManager]  # what a model computes in: `model.disable_adapter`, autocast, ...


def hidden_at(model, keep: Tensor, **inputs: Tensor) -> Tensor:
    """What the output embedding reads at the True positions of `keep` (batch, length): (kept, width), row-major.

    `inputs`: `input_ids` and `attention_mask` of right-padded rows, which for an encoder-decoder are cut in `halves`.
    No logits are computed. A model that can is given the rows packed. Virtual tokens that an adapter puts before a row
    are passed over.
    """
    packed = pack(inputs["input_ids"], inputs["attention_mask"]) if packs(model) else None
    context = {"context": before_answers(keep, inputs["attention_mask"])} if isinstance(model, Prompted) else {}
    if is_encoder_decoder(model):
        inputs, keep = halves(**inputs, keep=keep)
    read: list[Tensor] = []

    def take(embedding: nn.Module, given: tuple) -> tuple:
        hidden, *rest = given  # (batch, virtual tokens + length, width), or (1, tokens, width)
        read.append(hidden[0, packed.place[keep]] if packed else hidden[:, -keep.shape[1] :][keep])
        return (hidden[:, :0], *rest)

    with torch.no_grad(), model.get_output_embeddings().register_forward_pre_hook(take):
        model(**(packed.inputs if packed else inputs), **context, use_cache=False)
    if len(read) != 1:
        raise RunError(f"{_name(model)}: its output embedding was called {len(read)} times in a forward pass, not once")
    return read[0]


class Head:
    """Hidden states -> logits, by the model's own forward.

    Holds the output embedding and not the decoder, so the model may be let go. `using` gives the context to compute in.
    """

    def __init__(self, model, using: Using = nullcontext):
        base: Any = transformer(model)
        self.name, self.using, self.embedding = _name(base), using, base.get_output_embeddings()
        if self.embedding is None or base in _body(base).values():
            raise RunError(f"{self.name}: no decoder with an output embedding behind it; give a causal language model")
        self.device: torch.device = base.device
        self.sides = ("input_ids", "decoder_input_ids") if is_encoder_decoder(base) else ("input_ids",)
        hidden, logits, given = self._trial(base)
        self.model = _without_body(base, given)
        own = self(hidden)
        if own.shape != logits.shape or (own - logits).abs().max() > 0.02 * logits.abs().max():
            raise RunError(
                f"{self.name}: its logits are more than a function of its last hidden states, which is all that is "
                "kept of a model here; it cannot be compared"
            )
        self.vocabulary = own.shape[-1]

    def __call__(self, hidden: Tensor) -> Tensor:
        """(n, width), as `hidden_at` gives them -> logits (n, vocabulary) in the model's precision."""

        def give(embedding: nn.Module, given: tuple) -> tuple:
            return (hidden.unsqueeze(0), *given[1:])

        with torch.no_grad(), self.using(), self.embedding.register_forward_pre_hook(give):
            return self.model(**self._tokens(1), use_cache=False).logits[0]

    def copy(self) -> Head:
        """A head with weights of its own, which stay when the model's change."""
        twin = copy.copy(self)
        twin.model, twin.embedding = copy.deepcopy((self.model, self.embedding))
        return twin

    def _tokens(self, *ids: int) -> dict[str, Tensor]:
        """A row, of an encoder-decoder one for each half."""
        return dict.fromkeys(self.sides, torch.tensor([ids], device=self.device))

    def _trial(self, base) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """On three tokens: what the output embedding reads (3, width), the logits, and what the body gives."""
        read: list[tuple] = []
        given: dict[str, list] = {name: [] for name in _body(base)}
        with ExitStack() as hooks, torch.no_grad(), self.using():
            hooks.enter_context(self.embedding.register_forward_pre_hook(lambda embedding, inputs: read.append(inputs)))
            for name, part in _body(base).items():
                hooks.enter_context(part.register_forward_hook(partial(_note, given[name])))
            logits = base(**self._tokens(1, 2, 3), use_cache=False).logits[0]
        calls = {"output embedding": len(read)} | {name: len(outputs) for name, outputs in given.items()}
        if wrong := [f"its {name} {count} times" for name, count in calls.items() if count != 1]:
            raise RunError(f"{self.name}: calls {' and '.join(wrong)} in a forward pass; each must be called once")
        return read[0][0][0], logits, {name: outputs[0] for name, outputs in given.items()}


def _body(base) -> dict[str, nn.Module]:
    """What stands before the output embedding, by its names in the model."""
    if is_encoder_decoder(base):
        return {"encoder": base.encoder, "decoder": base.decoder}
    return {base.base_model_prefix: base.base_model}


def _note(outputs: list, module: nn.Module, inputs: tuple, output) -> None:
    outputs.append(output)


def _without_body(base, given: dict[str, Any]) -> nn.Module:
    """The model, sharing its weights, with a body that has none and gives `given` whatever it is asked."""
    model = _twin(base)
    for name, part in _body(base).items():
        empty: Any = _twin(part)
        empty._modules, empty._parameters, empty._buffers = {}, {}, {}
        empty.forward = partial(_give, given[name])
        model._modules[name] = empty
    return model


def _give(output, *args, **kwargs):
    return output


def _twin(module: nn.Module) -> nn.Module:
    """The same submodules and tensors in tables of their own; a forward bound to the original is dropped."""
    twin = copy.copy(module)
    for table in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[table] = dict(module.__dict__[table])
    twin.__dict__.pop("forward", None)
    return twin


def _name(model) -> str:
    return type(model).__name__
