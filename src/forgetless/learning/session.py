"""What learning a stream works with, once it is loaded and checked (`prepare`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.markup import escape

from forgetless.config import LearnConfig
from forgetless.data.batches import Encoder
from forgetless.data.tasks import Stream
from forgetless.forgetting.reference import Reference
from forgetless.forgetting.texts import Text
from forgetless.learning.engine import Engine
from forgetless.learning.signals import Signals
from forgetless.learning.spending import Spending
from forgetless.methods import Lesson, Method
from forgetless.model.adapters import Adapters, Pair
from forgetless.model.base import Base
from forgetless.progress import console
from forgetless.runs.folder import RunFolder


@dataclass(frozen=True)
class Adopted:
    """An adapter as it was found; `pairs` is None where the run has taken it over and its folder is not needed."""

    name: str
    record: dict = field(repr=False)  # what the run keeps of it, as JSON
    pairs: dict[str, Pair] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()


@dataclass
class Session:
    """Everything that learning a stream needs, loaded and checked."""

    config: LearnConfig
    stream: Stream
    method: Method
    engine: Engine
    base: Base
    encoder: Encoder
    adapters: Adapters
    lessons: list[Lesson]
    notes: list[str]
    run: RunFolder
    text: Text | None  # on which forgetting is measured at task borders
    spending: Spending
    adopted: list[Adopted] = field(default_factory=list)  # the first lessons, which another trainer learnt
    stored: dict | None = None  # run.json as it was found
    history: list[dict] = field(default_factory=list)  # what it was learnt with, from which lesson on
    steps_before: list[int] = field(default_factory=list)  # of each lesson trained in this session
    side: Reference | None = None  # the base's, once it was needed
    signals: Signals = field(default_factory=Signals)
    chosen: dict = field(default_factory=dict)  # option -> its value and what it was chosen among, by a sweep

    def say(self, text: str) -> None:
        if self.engine.is_main:
            console.print(escape(text))
