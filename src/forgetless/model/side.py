"""A side network: what the early blocks said, put together anew before the late blocks. Nothing runs backward through
the early blocks, and of their activations only what they give is kept.

    h_0 -> block 1 -> h_1 -> ... -> h_n -> late blocks -> head           the base
                                    route(h_0, ..., h_n) instead of h_n  with a side network
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.errors import UsageError
from forgetless.model.tables import TrainedTables

Route = Callable[[list[Tensor]], Tensor]
"""[h_0, ..., h_n], each (rows, length, width), without gradient -> what goes into the late blocks."""


class SideNetwork(TrainedTables):
    """A base model with trainable tables, out of which `route` makes the input of its late blocks."""

    kind, tag = "Side network", "side-network"
    moves = "norm of what the task changed of the side network"
    _route: Route | None = None

    @property
    def width(self) -> int:
        return self.base.config.get_text_config().hidden_size

    def blocks(self, late: int) -> tuple[list[nn.Module], list[nn.Module]]:
        """The early and the late blocks. UsageError where the model has none to be found, or too few."""
        name, remedy = type(self.base).__name__, "take another model, or a method that trains LoRA pairs"
        if self.base.config.is_encoder_decoder:
            raise UsageError(f"{name}: side networks are for decoders; {remedy}")
        found = list(getattr(self.base.get_decoder(), "layers", ()))
        if not found:
            raise UsageError(f"{name}: its blocks are not called `layers`, as in Llama-like decoders; {remedy}")
        if not 1 <= late < len(found):
            raise UsageError(f"late {late}: of {len(found)} blocks, from 1 to {len(found) - 1} can be the late ones")
        return found[:-late], found[-late:]

    def put(self, tables: dict[str, Tensor], route: Route, late: int, kind: str, **told: Any) -> None:
        """Trains these tables from now on, out of which `route` makes the input of the `late` last blocks.

        `kind`, `told`: as for `train_tables`. UsageError where the blocks do not pass on one tensor.
        """
        self.train_tables(tables, kind, late=late, **told)
        early, (first_late, *_) = self.blocks(late)
        self.comes_back = late / (len(early) + late)
        states: list[Tensor] = []

        def begin(block: nn.Module, given: tuple) -> None:
            states[:] = [given[0].detach()] if self._route else []

        def keep(block: nn.Module, given: tuple, output: Tensor) -> None:
            if self._route:
                states.append(output.detach())

        def replace(block: nn.Module, given: tuple) -> tuple | None:
            if self._route is None:
                return None
            hidden = self._route(states)
            states.clear()
            return (hidden.to(given[0].dtype), *given[1:])

        early[0].register_forward_pre_hook(begin)
        for block in early:
            block.register_forward_hook(keep)
        first_late.register_forward_pre_hook(replace)
        self._route = route
        self._try()

    @torch.no_grad()
    def _try(self) -> None:
        """On two tokens."""
        try:
            self.base(torch.zeros(1, 2, dtype=torch.long, device=self.base.device), use_cache=False)
        except (AttributeError, IndexError, RuntimeError, TypeError) as error:
            raise UsageError(
                f"{type(self.base).__name__}: its blocks do not pass on one tensor (rows, length, {self.width}), as "
                f"Llama-like decoders' do ({error}); take another model, or a method that trains LoRA pairs"
            ) from error

    @contextmanager
    def disabled(self) -> Iterator[None]:
        route, self._route = self._route, None
        try:
            yield
        finally:
            self._route = route
