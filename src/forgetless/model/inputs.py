"""What the adapted layers read: the mean of x xᵀ over the tokens of some rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from forgetless.data.batches import Example, collate, split
from forgetless.model.adapters import Adapters

ROWS = 8  # that go through the model at once


@dataclass(frozen=True)
class Moments:
    """One matrix for all layers that read the same tensor, as q_proj, k_proj and v_proj do."""

    of: dict[str, Tensor]  # (in, in) by the first such layer
    first: dict[str, str]  # by layer: the first that reads what it reads


def second_moments(adapters: Adapters, examples: list[Example], pad: int) -> Moments:
    """Mean over all tokens of x xᵀ in fp32, for the input x of each adapted layer, with the adapters as they are."""
    sums: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    last: list[tuple[str, Tensor]] = []  # the layer whose input was added last, and that input
    model = adapters.model.get_base_model()

    def add(name: str, mask: Tensor, layer: nn.Module, inputs: tuple) -> None:
        x = inputs[0]
        if last and x is last[0][1]:
            first[name] = last[0][0]
            return
        last[:], first[name] = [(name, x)], name
        tokens = x[mask].float()  # (tokens, in)
        sums[name] = sums.get(name, 0) + tokens.T @ tokens

    count = 0
    with torch.no_grad():
        for chosen in split(examples, ROWS):
            part = collate(chosen, pad, adapters.device)
            mask = part.mask.bool()
            count += int(mask.sum())
            hooks = [
                model.get_submodule(name).register_forward_pre_hook(partial(add, name, mask))
                for name in adapters.layers()
            ]
            try:
                decoder = model.get_decoder()  # type: ignore[operator]  # torch's stub: a Tensor
                decoder(input_ids=part.ids, attention_mask=part.mask, use_cache=False)
            finally:
                for hook in hooks:
                    hook.remove()
            last.clear()
    return Moments({name: total / count for name, total in sums.items()}, first)
