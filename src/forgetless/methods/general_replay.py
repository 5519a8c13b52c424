"""General-text replay: a small share of every step is text of the kind that the base was made from.

    L = (1 - p) CE(current rows) + p CE(general rows)

p = 1 % of pre-training data kept a model from forgetting them in Bethune et al. 2025, arXiv 2502.06042. Few users have
their model's pre-training data: without a text the base's own answers to general prompts stand in for them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from forgetless.data.batches import Example, weigh
from forgetless.errors import RunError, UsageError
from forgetless.learning.general_rows import own_answers, text_rows
from forgetless.learning.memory import Memory
from forgetless.methods.base import ADAPTER, Check, Method, State
from forgetless.model.identity import json_digest


class GeneralReplay(Method):
    """Replay of general text.

    Args:
        share: p, the share of the loss that general rows have
        text: a file of general text (plain text, JSONL, JSON, Parquet) or hub:NAME; empty: the base's own answers to
            packaged prompts
        general_rows: general rows of a step
        prompts: how many packaged prompts the base answers, where no text is given
    """

    paper = "2502.06042"
    adopts = ADAPTER
    summary = "mixes a small share of general text into every step"
    extra_memory = "the general rows"
    extra_compute = "`general_rows` more rows a step; without a text, at the start, `prompts` answers of the base"
    under_any: ClassVar[bool] = True
    within_task: ClassVar[tuple[str, ...]] = ("replayed",)
    off: ClassVar[dict] = {"share": 0.0}
    example: ClassVar[dict] = {"share": 0.1, "prompts": 1}

    def __init__(self, share: float = 0.01, text: str = "", general_rows: int = 1, prompts: int = 64):
        if not 0 <= share < 1:
            raise UsageError(f"share {share}: from 0 (none) to below 1, such as 0.01 for 1 %")
        if general_rows < 1:
            raise UsageError(f"general_rows {general_rows}: 1 or more; share 0 turns general rows off")
        if prompts < 1:
            raise UsageError(f"prompts {prompts}: 1 or more; share 0 turns general rows off")
        self.share, self.text, self.general_rows, self.prompts = share, text, general_rows, prompts
        self.general = Memory(0)

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        self.general.seed = seed
        if self.text and self.share:
            self.general.rows = text_rows(self.text, encoder)

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.replayed = 0
        if self.share and not self.general.rows:
            self.general.rows = own_answers(self.adapters, self.encoder, self.prompts)

    def batch(self, examples: list[Example], step: int) -> list[Example]:
        return self.mixed(weigh(examples, 1.0), step)

    def mixed(self, weighed: list[Example], step: int) -> list[Example]:
        """(1 - p) of a step that is weighed already, and p of general rows."""
        if not self.share:
            return weighed
        drawn = self.general.draw(self.general_rows, "general", self.task, step)
        self.replayed += len(drawn)
        general = weigh([self.encoder(row) for row in drawn], self.share, memory=True)
        return [replace(example, weight=(1 - self.share) * example.weight) for example in weighed] + general

    def passes(self, rows: int, task: int) -> tuple[float, float]:
        every = rows + (self.general_rows if self.share else 0)
        return every, every

    def state(self) -> State:
        """The base's own answers; a text is read again, and must be the same."""
        if self.text:
            return State({}, {"text": self._digest()})
        return State({}, {}, Memory(0, rows=self.general.rows, tasks=[-1] * len(self.general.rows)))

    def restore(self, state: State) -> None:
        if state.memory is not None:
            self.general.rows = state.memory.rows
        elif state.values["text"] != self._digest():
            raise RunError(
                f"{self.text}: not the text that this run was begun with; give that one, or another output_dir"
            )

    def _digest(self) -> str:
        return json_digest([row.content() for row in self.general.rows])

    def checks(self) -> list[Check]:
        acts = self.replayed > 0 or not self.share
        return [*super().checks(), Check("general rows", self.replayed, acts, "general rows learnt, with repetitions")]
