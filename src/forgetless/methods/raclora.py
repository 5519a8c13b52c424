"""RAC-LoRA: a chain of blocks; each draws one factor at random, freezes it, and trains the other from zero.

    ΔW = s Σ_blocks B_b A_b,   A_b drawn and frozen, B_b trained from 0, then the block is merged       arXiv 2410.08305

Gradient descent on B_b moves W by -η ∇W Aᵀ A; preconditioned by (A Aᵀ)⁺ that is the gradient projected on r random
directions, -η ∇W H with H = Aᵀ (A Aᵀ)⁺ A, and E[H] = (r/in) I for entries drawn independently, symmetric about 0.
Merged blocks are the joined frozen pair, which is exact. Its rank grows by r a block until the pair is as large
as the layer, and then stays: the product is kept as itself times the identity.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.methods.base import ADAPTER, Check, Method, State
from forgetless.model.adapters import Pair, named, norm_of_B, whole
from forgetless.seeds import generator


class RACLoRA(Method):
    """Randomised asymmetric chain of LoRA.

    Args:
        block_steps: optimizer steps of a block; 0: one block a task
        trains: the factor that is trained, 'B' or 'A'; the other one is drawn and frozen
    """

    paper = "2410.08305"
    adopts = ADAPTER
    summary = "a chain of blocks: one factor random and frozen, the other trained, then merged"
    plain_pairs = False
    extra_memory = "one frozen pair of rank r a finished block, at most as large as the layers"
    extra_compute = "one more product a layer, of rank r x finished blocks"
    within_task: ClassVar[tuple[str, ...]] = ("steps", "trained", "merged")
    growth: ClassVar[str] = "the rank of the frozen pair of a layer grows by r a block, up to the layer's own"
    off: ClassVar[str] = "one factor is frozen in every block, the first too"
    example: ClassVar[dict] = {"block_steps": 9}

    def __init__(self, block_steps: int = 100, trains: str = "B"):
        if trains not in ("A", "B"):
            raise UsageError(f"trains {trains!r}: 'B' (A is drawn and frozen) or 'A' (B is)")
        if block_steps < 0:
            raise UsageError(f"block_steps {block_steps}: 0 for one block a task, or more")
        self.block_steps, self.trains = block_steps, trains

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        self.adapters.train_only(self.trains)
        self.steps, self.trained = 0, False  # whether the current block has learnt anything

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self._merge()
        self.steps = 0
        self._draw()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps, self.trained = self.steps + 1, True
        if self.block_steps and self.steps % self.block_steps == 0:
            self._merge()
            self._draw()
            optimizer.state.clear()  # its averages are of another block's gradients

    @property
    def block(self) -> int:
        """The task's current block, from 0."""
        return self.steps // self.block_steps if self.block_steps else 0

    @property
    def merged(self) -> dict[str, Tensor]:
        """The finished blocks, joined: `<layer>.A`, `<layer>.B`."""
        return named(self.adapters.past())

    @merged.setter
    def merged(self, tensors: dict[str, Tensor]) -> None:
        if tensors:
            pairs = self.adapters.pairs().items()
            self.adapters.set_past({n: Pair(tensors[f"{n}.A"], tensors[f"{n}.B"], pair.scale) for n, pair in pairs})

    def _merge(self) -> None:
        if self.trained:
            self.adapters.set_past(bounded(self.adapters.summed()))
            self.trained = False

    def _draw(self) -> None:
        """The frozen factor anew, the other one 0."""
        with torch.no_grad():
            for name, pair in self.adapters.pairs().items():
                for side in "AB":
                    getattr(pair, side).zero_() if side == self.trains else getattr(pair, side).copy_(self.drawn(name))

    def drawn(self, layer: str) -> Tensor:
        """The frozen factor of the current block."""
        if self.trains == "B":
            return self.adapters.drawn_A(layer, self.task, *[self.block][: self.block])
        shape = self.adapters.pairs()[layer].B.shape
        fresh = torch.rand(shape, generator=generator("block", self.seed, self.task, self.block, layer))
        return (2 * fresh - 1) / math.sqrt(shape[0])

    def export(self) -> dict[str, Pair]:
        past = self.adapters.past()
        return past if past and not self.trained else self.adapters.summed()

    def adopt(self, task: int, pairs: dict[str, Pair], rows: tuple[Row, ...] | None) -> dict[str, Pair]:
        """Pairs of any rank are the finished blocks of the next task."""
        self.check_adoption(rows is not None)
        self.task, self.trained = task, False
        past = self.adapters.filled(pairs)
        self.adapters.set_past(past)
        return past

    def resume(self, adapter: dict[str, Pair], state: State, task: int) -> None:
        self.adapters.set_past(adapter)
        self.trained = False

    def told(self) -> dict[str, float]:
        return {"block": self.block + 1}

    def checks(self) -> list[Check]:
        size = norm_of_B(self.export())
        frozen = "A" if self.trains == "B" else "B"
        moved = max(
            float((getattr(pair, frozen).detach().cpu() - self.drawn(name)).abs().max())
            for name, pair in self.adapters.pairs().items()
        )
        return [
            Check("adapter", size, size > 0, "norm of B, merged blocks included: the adapter changes the answers"),
            Check("frozen factor moved", moved, moved == 0, f"largest change of {frozen} since it was drawn"),
            Check("blocks", self.block + 1, True, "blocks of this task, the current one included"),
        ]


def bounded(pairs: dict[str, Pair]) -> dict[str, Pair]:
    """The same updates in a rank that no layer's update can exceed: there each is its product times the identity."""
    largest = max(min(pair.A.shape[1], pair.B.shape[0]) for pair in pairs.values())
    if next(iter(pairs.values())).A.shape[0] <= largest:
        return pairs
    products = {name: (pair.B.double() @ pair.A.double()).float() for name, pair in pairs.items()}
    return {name: whole(products[name], largest, pair.scale) for name, pair in pairs.items()}


def projector(A: Tensor) -> Tensor:
    """H = Aᵀ (A Aᵀ)⁺ A, (in, in): what a block with this A sees of a gradient."""
    return A.T @ torch.linalg.pinv(A @ A.T) @ A
