"""Prompt tuning: the base stays as it is, and a few virtual tokens before each row are trained on, task after task.

    p(y | x) = base(y | [P; E(x)])          P (tokens, width)          Lester et al. 2021, arXiv 2104.08691

For prompts what `sequential` is for LoRA: the plain form that the other prompt methods change.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from forgetless.errors import UsageError
from forgetless.methods.base import Method, Options
from forgetless.model.adapters import Adapters
from forgetless.model.prompts import PROMPT, Prompts


class PromptTuning(Method):
    """Prompt tuning.

    Args:
        tokens: virtual tokens before each row
    """

    paper = "2104.08691"
    adopts = "it trains a soft prompt, and an adopted adapter has LoRA pairs; take sequential"
    summary = "one soft prompt trained on, task after task; no weight of the model changes"
    adapter_class: ClassVar[type[Adapters]] = Prompts
    plain_pairs = False
    extra_compute = "`tokens` more tokens a row; rows are not packed"
    off: ClassVar[Options | str | None] = "it trains virtual tokens where `sequential` trains pairs"
    example: ClassVar[dict] = {"tokens": 4}
    adapters: Prompts

    def __init__(self, tokens: int = 20):
        if tokens < 1:
            raise UsageError(f"tokens {tokens}: 1 or more virtual tokens")
        self.tokens = tokens

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        self.adapters.put({PROMPT: self.adapters.drawn(self.tokens, 0)}, self.before)

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.adapters.check_room(self.tokens, self.encoder.max_length)
        self.adapters.mark()

    def before(self, ids: Tensor, context: Tensor) -> Tensor:
        """P, the same for each row: (rows, tokens, width)."""
        return self.adapters.pairs()[PROMPT].P.expand(len(ids), -1, -1)
