"""The last hidden states of a causal model, and the head that reads them.

Between its decoder and its logits a model may scale, cap or shift (Cohere, Granite, Gemma 2). So the head is the
model's own forward with an empty decoder in it, and the hidden states are what goes into the output embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.errors import RunError
from forgetless.model.base import transformer
from forgetless.model.prompted import Prompted, before_answers

Using = Callable[[], AbstractContextManager]  # what a model computes in: `model.disable_adapter`, autocast, ...


def hidden_at(model, keep: Tensor, **inputs: Tensor) -> Tensor:
    """What the output embedding reads at the True positions of `keep` (batch, length): (kept, width), row-major.

    No logits are computed. Virtual tokens that an adapter puts before a row are passed over.
    """
    read: list[Tensor] = []

    def take(embedding: nn.Module, given: tuple) -> tuple:
        hidden, *rest = given  # (batch, virtual tokens + length, width)
        read.append(hidden[:, -keep.shape[1] :][keep])
        return (hidden[:, :0], *rest)

    context = {"context": before_answers(keep, inputs["attention_mask"])} if isinstance(model, Prompted) else {}
    with torch.no_grad(), model.get_output_embeddings().register_forward_pre_hook(take):
        model(**inputs, **context, use_cache=False)
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
        if self.embedding is None or base.base_model is base:
            raise RunError(f"{self.name}: no decoder with an output embedding behind it; give a causal language model")
        self.device: torch.device = base.device
        self.token = torch.tensor([[1]], device=self.device)
        hidden, logits, decoded = self._trial(base)
        self.model = _without_decoder(base, decoded)
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
            return self.model(input_ids=self.token, use_cache=False).logits[0]

    def copy(self) -> Head:
        """A head with weights of its own, which stay when the model's change."""
        twin = copy.copy(self)
        twin.model, twin.embedding = copy.deepcopy((self.model, self.embedding))
        return twin

    def _trial(self, base) -> tuple[Tensor, Tensor, Any]:
        """On three tokens: what the output embedding reads (3, width), the logits, and what the decoder gives."""
        read: list[tuple] = []
        decoded: list = []
        ids = torch.tensor([[1, 2, 3]], device=self.device)
        with (
            torch.no_grad(),
            self.using(),
            self.embedding.register_forward_pre_hook(lambda embedding, given: read.append(given)),
            base.base_model.register_forward_hook(lambda decoder, given, output: decoded.append(output)),
        ):
            logits = base(input_ids=ids, use_cache=False).logits[0]
        if len(read) != 1 or len(decoded) != 1:
            raise RunError(
                f"{self.name}: calls its decoder {len(decoded)} times and its output embedding {len(read)} times in a "
                "forward pass; each must be called once"
            )
        return read[0][0][0], logits, decoded[0]


def _without_decoder(base, output) -> nn.Module:
    """The model, sharing its weights, with a decoder that has none and gives `output` whatever it is asked."""
    model, decoder = _twin(base), _twin(base.base_model)
    decoder._modules, decoder._parameters, decoder._buffers = {}, {}, {}
    decoder.forward = lambda *args, **kwargs: output
    model._modules[base.base_model_prefix] = decoder
    return model


def _twin(module: nn.Module) -> nn.Module:
    """The same submodules and tensors in tables of their own; a forward bound to the original is dropped."""
    twin = copy.copy(module)
    for table in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[table] = dict(module.__dict__[table])
    twin.__dict__.pop("forward", None)
    return twin


def _name(model) -> str:
    return type(model).__name__
