"""A side network: what the first blocks said, put together anew before the last blocks. Nothing runs backward through
the first blocks.

    h_0 -> block 1 -> h_1 -> ... -> h_n -> late blocks -> head           the base
                                    route(h_0, ..., h_n) instead of h_n  with a side network
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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

    def blocks(self, late: int) -> tuple[list[nn.Module], list[nn.Module]]:
        """The early and the late blocks. UsageError where the model has none to be found, or too few."""
        try:
            found = list(self.base.get_decoder().layers)
        except AttributeError as error:
            raise UsageError(
                f"{type(self.base).__name__}: its blocks are not called `layers`, as Llama-like decoders call them "
                f"({error}); take another model, or a method that trains LoRA pairs"
            ) from error
        if self.base.config.is_encoder_decoder:
            raise UsageError(f"{type(self.base).__name__}: side networks are for decoders; take a method of LoRA pairs")
        if not 1 <= late < len(found):
            raise UsageError(f"late {late}: of {len(found)} blocks, from 1 to {len(found) - 1} can be the late ones")
        return found[:-late], found[-late:]

    def put(self, tables: dict[str, Tensor], route: Route, late: int, kind: str) -> None:
        """Trains these tables from now on, out of which `route` makes the input of the `late` last blocks."""
        self.train_tables(tables, kind)
        early, (first_late, *_) = self.blocks(late)
        states: dict[int, Tensor] = {}  # by number, so that a block which is computed again fills its own place

        def begin(block: nn.Module, given: tuple) -> None:
            states[0] = given[0].detach()

        def keep(number: int) -> Callable[[nn.Module, tuple, Tensor], None]:
            def kept(block: nn.Module, given: tuple, output: Tensor) -> None:
                states[number] = output.detach()

            return kept

        def replace(block: nn.Module, given: tuple) -> tuple | None:
            if self._route is None:
                return None
            hidden = self._route([states[number] for number in range(len(early) + 1)])
            return (hidden.to(given[0].dtype), *given[1:])

        early[0].register_forward_pre_hook(begin)
        for number, block in enumerate(early, 1):
            block.register_forward_hook(keep(number))
        first_late.register_forward_pre_hook(replace)
        self._route = route

    @contextmanager
    def disabled(self) -> Iterator[None]:
        route, self._route = self._route, None
        try:
            yield
        finally:
            self._route = route
