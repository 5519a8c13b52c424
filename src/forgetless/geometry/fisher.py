"""Which weights a task's answers depend on: the diagonal of the empirical Fisher information.

    F = 1/N Σ_n (∂ log p(y_n | x_n) / ∂W)²      entry by entry, for the whole weight W (out, in) of a layer

at the model with its adapter, with the rows' own answers y and one gradient a row: log p(y | x) is the sum over the
answer's tokens. (Matena and Raffel, 2022, draw y from the model instead.) W = W_base + s B A, so the derivative by W
is that by the product, which does not depend on how the product is split into factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from forgetless.data.batches import Example, collate
from forgetless.errors import RunError
from forgetless.model.answers import logits_at, token_losses
from forgetless.model.base import transformer
from forgetless.model.head import Using
from forgetless.progress import steps


def fisher(
    model, layers: Iterable[str], examples: Sequence[Example], pad: int, using: Using = nullcontext,
    label: str | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """F (out, in) of each linear layer, by its name in the base; fp32, on the CPU."""
    sums: dict[str, Tensor] = {}
    with _gradients(model, list(layers)) as gradients, steps(label or "", len(examples), show=bool(label)) as progress:
        for example in examples:
            row = collate([example], pad, model.device)
            with torch.enable_grad(), using():
                logits = logits_at(model, row.keep, input_ids=row.ids, attention_mask=row.mask)
                loss = token_losses(logits, row.targets).sum()
            loss.backward()
            for layer, gradient in gradients.items():
                sums[layer] = sums.get(layer, 0) + gradient.square().cpu()
            gradients.clear()
            progress.advance(tokens=len(example.ids))
    for layer, total in sums.items():
        if not total.isfinite().all():
            raise RunError(f"{layer}: the gradients on these rows are not numbers; try --precision fp32")
    return {layer: total / len(examples) for layer, total in sums.items()}


@contextmanager
def _gradients(model, layers: list[str]) -> Iterator[dict[str, Tensor]]:
    """Filled by each backward pass with ∂/∂W = Σ_t δ_t x_t^T of each layer, x its inputs and δ its outputs' gradients;
    no weight needs a gradient of its own.
    """
    base, found = transformer(model), dict[str, Tensor]()

    def add(layer: str, x: Tensor, delta: Tensor) -> None:
        gradient = delta.reshape(-1, delta.shape[-1]).float().T @ x.reshape(-1, x.shape[-1]).float()
        found[layer] = found.get(layer, 0) + gradient

    def watch(layer: str, module: nn.Module, given: tuple, output: Tensor) -> None:
        output.register_hook(partial(add, layer, given[0].detach()))

    def begin(module: nn.Module, given: tuple, output: Tensor) -> None:
        output.requires_grad_(True)

    handles: list[RemovableHandle] = [base.get_input_embeddings().register_forward_hook(begin)]
    handles += [base.get_submodule(layer).register_forward_hook(partial(watch, layer)) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
