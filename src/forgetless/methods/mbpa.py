"""MbPA++: rows kept in memory, sparsely replayed, and to which the model is fitted anew before each answer.

    training   CE(current rows), and in every n-th step 1/2 (CE(current rows) + CE(rows of the memory))
    answering  θ_x = argmin_θ  λ ||θ - θ_0||² - 1/K Σ_k log p(y_k | x_k; θ),   by L steps from θ_0
               over the K rows of the memory whose keys q(x_k) are nearest to q(x);  then θ_0 again

                                                           de Masson d'Autume et al. 2019, arXiv 1906.01076
q(x): mean over the tokens before the answer of the untouched base's last hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from forgetless.data.batches import Example, collate, weigh
from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.learning.gradients import evaluating
from forgetless.methods.base import Check, Method
from forgetless.methods.replay import Replay
from forgetless.model.base import transformer
from forgetless.model.prompted import encoded


class MbPA(Replay):
    """Memory-based parameter adaptation, with sparse replay.

    Args:
        memory: rows kept in all (a number), or a share of each task (a number and a percent sign)
        every: n, one step in so many replays rows of the memory
        neighbours: K, nearest rows to which the model is fitted before an answer
        steps: L, steps of that
        rate: learning rate of those steps (Adam)
        hold: λ, how strongly the weights are held where training left them
    """

    paper = "1906.01076"
    summary = "before each answer the adapter is fitted to the nearest kept rows, then put back; replays sparsely"
    extra_memory = "the kept rows and a vector of the model's width for each"
    extra_compute = "training: 1 + 1/`every`; an answer: `steps` steps on `neighbours` rows, one row at a time"
    stock_peft = False
    remedy = (
        "PEFT loads A and B, but then nothing is fitted to a question's neighbours: with the memory beside it, answer "
        "inside `MbPA.answering`"
    )
    under_any = False
    example: ClassVar[dict] = {"memory": 6, "every": 2, "neighbours": 3, "steps": 3}

    def __init__(
        self, memory: int | str = "10%", every: int = 100, neighbours: int = 16, steps: int = 10, rate: float = 1e-3,
        hold: float = 1e-3,
    ):  # fmt: skip
        super().__init__(memory)
        if min(every, neighbours, steps) < 1:
            raise UsageError(
                f"every {every}, neighbours {neighbours}, steps {steps}: all 1 or more; memory 0 keeps none"
            )
        if rate <= 0 or hold < 0:
            raise UsageError(f"rate {rate}: above 0; hold {hold}: 0 or more")
        self.every, self.neighbours, self.steps, self.rate, self.hold = every, neighbours, steps, rate, hold
        self.keys: dict[Row, Tensor] = {}

    def batch(self, examples: list[Example], step: int) -> list[Example]:
        return super().batch(examples, step) if (step + 1) % self.every == 0 else weigh(examples, 1.0)

    # ------------------------------------------------------------------------------ answering

    @contextmanager
    def answering(self, context: list[int]) -> Iterator[None]:
        """θ_x inside the block, θ_0 after it."""
        with self.adapters.using(self.adapters.snapshot()):
            self.fit(self.nearest(context))
            yield

    def nearest(self, context: list[int]) -> list[Row]:
        """The K rows of the memory with the smallest ||q(x) - q(x_k)||, the nearest first."""
        rows = self.memory.rows
        if not rows:
            return []
        keys = torch.stack([self.key(row) for row in rows])
        order = (keys - self.encoding(context)).norm(dim=1).argsort(stable=True)
        return [rows[i] for i in order[: self.neighbours].tolist()]

    def fit(self, rows: list[Row]) -> None:
        """L steps on  λ ||θ - θ_0||² - 1/K Σ_k log p(y_k | x_k; θ)."""
        if not rows:
            return
        parameters = self.adapters.parameters()
        start = [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.Adam(parameters, lr=self.rate)
        for _ in range(self.steps):
            with torch.enable_grad():
                held = sum((now - before).square().sum() for now, before in zip(parameters, start, strict=True))
                (self.hold * held + self.surprise(rows)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def surprise(self, rows: list[Row]) -> Tensor:
        """- 1/K Σ_k log p(y_k | x_k; θ)."""
        examples = [replace(self.encoder(row), weight=1 / len(rows)) for row in rows]
        part = collate(examples, self.encoder.tokenizer.pad_token_id, self.adapters.model.device)
        with evaluating(self.adapters.model):
            return Method.loss(self, part)

    def key(self, row: Row) -> Tensor:
        if row not in self.keys:
            self.keys[row] = self.encoding(self.encoder.generation_context(row, 1))
        return self.keys[row]

    def encoding(self, context: list[int]) -> Tensor:
        """q(x), (width,), of the tokens before an answer; a text without any has its end token for them."""
        model = self.adapters.model
        ids = torch.tensor([context or [self.encoder.tokenizer.eos_token_id]], device=model.device)
        with evaluating(model), self.adapters.disabled():
            return encoded(transformer(model), ids, torch.ones_like(ids).bool())[0]

    def checks(self) -> list[Check]:
        """Fits the model to the neighbours of one kept row, as an answer would."""
        fall = self.fall() if self.memory.rows else 0.0
        meaning = "nats by which the local steps lower the loss on the neighbours of a kept row"
        return [
            *Method.checks(self),
            Check("kept rows", len(self.memory.rows), len(self.memory.rows) > 0, "rows in memory after the task"),
            Check("local fit", fall, fall > 0, meaning),
        ]

    @torch.no_grad()
    def fall(self) -> float:
        context = self.encoder.generation_context(self.memory.rows[0], 1)
        rows = self.nearest(context)
        before = float(self.surprise(rows))
        with self.answering(context):
            return before - float(self.surprise(rows))
