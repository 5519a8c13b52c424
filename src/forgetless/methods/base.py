"""What a method may change about plain fine-tuning: ten hooks, in call order, then what it deploys.

    start                       once a run
    begin_task                  before a task's steps
    prepare                     the task's rows, where a method looks at them before the first step
      batch                     the whole step's rows; fixes the weight of every answer token
      loss                      a weighted sum over a micro-batch's answer tokens
      penalty                   once a step, after all micro-batches and processes
      after_backward            the whole gradient, before clipping
      after_step                the optimizer has moved
      after_skip                or the step was left out, since its loss or gradient was NaN
    end_task                    after a task's steps

Every default is plain fine-tuning. A method never mentions processes, accumulation or clipping.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from forgetless.data.batches import Encoder, Example, Part, weigh
from forgetless.data.tasks import Row, Stream
from forgetless.errors import UsageError
from forgetless.learning.memory import Memory
from forgetless.model.adapters import Adapters, Pair
from forgetless.model.answers import logits_at, token_losses

ADAPTER, ROWS = "adapter", "rows"
HOOKS = 1
"""The version of the hooks: of their names, call order and meaning. A method from outside states which it was written
for; it grows when such a method would have to change.
"""


ABOUT = ("paper", "task_id", "bound", "ours", "old_rows", "extra_memory", "extra_compute", "stock_peft")
"""What a run's record tells of its method, so that readers need not have it."""


@dataclass(frozen=True)
class Check:
    """One piece of evidence that a method acted on a task."""

    name: str
    value: float
    ok: bool
    meaning: str

    def as_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Lesson:
    """What is trained in one go: a task's rows, or for joint training all tasks' rows."""

    name: str
    rows: tuple[Row, ...]
    last_task: int  # the last task of the stream that is learnt when this lesson is over
    tasks: int = 1  # how many tasks' rows these are; `max_steps` is per task


Options = dict[str, Any]


@dataclass(frozen=True)
class State:
    """What a method needs, beside the deployed adapter, to go on with the next task."""

    tensors: dict[str, Tensor]
    values: dict  # JSON
    memory: Memory | None = None


class Method:
    """Plain fine-tuning of one adapter. Constructor arguments are the options of YAML and command line."""

    hooks: ClassVar[int] = HOOKS
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    old_rows: ClassVar[bool] = False  # keeps rows of earlier tasks
    task_id: ClassVar[bool] = False  # must be told at test which task a row belongs to
    extra_memory: ClassVar[str] = "none"
    extra_compute: ClassVar[str] = "none"
    stock_peft: ClassVar[bool] = True  # what it deploys loads in `PeftModel.from_pretrained`
    remedy: ClassVar[str] = ""  # where it does not: how to use what it deploys
    snapshots: ClassVar[bool] = False  # keeps the trainable pair of a moment, for what the model was then
    adapter_class: ClassVar[type[Adapters]] = Adapters  # LoRA pairs; else `Prompts` (model/prompts.py) or
    # `SideNetwork` (model/side.py)
    plain_pairs: ClassVar[bool] = True  # the model is past and trainable pair, and a task begins where the last ended
    # What it needs of a task that another trainer learnt: ADAPTER (nothing else), ROWS (the task's too, of which it
    # makes what it keeps), or a text: why it cannot take one over
    adopts: ClassVar[str] = ROWS
    bound: ClassVar[bool] = False  # a bound for the table rather than a way to learn a stream
    ours: ClassVar[bool] = False  # made by this project: marked so, and in no ranking of it unless that is asked for
    under_any: ClassVar[bool] = False  # may go under another method: it leaves the adapters' life to that one

    # What the contract (forgetless.contract) holds it to
    plain: ClassVar[type[Method] | None] = None  # the method that it is when switched off; None: sequential
    off: ClassVar[Options | str | None] = None  # options that switch it off; None: it begins with the second task, so
    # on the first alone it is `plain` without being switched off; a text: why neither can be
    example: ClassVar[Options] = {}  # options that suit a model of a few thousand weights
    growth: ClassVar[str] = ""  # how a step's cost grows with the number of tasks; empty: it does not

    # Attributes that change between `begin_task` and `end_task`: numbers, texts, tensors, or lists and dicts of these.
    # A checkpoint inside a task holds them (tensors come back on the model's device); what `begin_task` sets once is
    # set again by it.
    within_task: ClassVar[tuple[str, ...]] = ()

    adapters: Adapters
    encoder: Encoder
    seed: int

    # ------------------------------------------------------------------------------ the ten hooks

    def start(self, adapters: Adapters, encoder: Encoder, seed: int) -> None:
        self.adapters, self.encoder, self.seed = adapters, encoder, seed

    def begin_task(self, task: int) -> None:
        self.task = task

    def prepare(self, examples: list[Example]) -> None:
        pass

    def batch(self, examples: list[Example], step: int) -> list[Example]:
        """L = mean over the step's answer tokens of -log p(token)."""
        return weigh(examples, 1.0)

    def loss(self, part: Part) -> Tensor:
        return (part.weights * token_losses(self.logits(part), part.targets)).sum()

    def penalty(self) -> Tensor | None:
        return None

    def after_backward(self) -> None:
        pass

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def after_skip(self) -> None:
        """Drops what was summed over the parts of a step that moves no weight (`--on_nan skip`)."""

    def end_task(self, task: int, rows: tuple[Row, ...]) -> None:
        pass

    # ------------------------------------------------------------------- what is deployed and scored

    def lessons(self, stream: Stream) -> list[Lesson]:
        """What is trained, in order: by default each task by itself."""
        return [Lesson(task.name, task.train, t) for t, task in enumerate(stream.tasks)]

    def export(self) -> dict[str, Pair]:
        """The pairs to deploy, one a layer."""
        return self.adapters.summed()

    def views(self) -> dict[str, AbstractContextManager]:
        """The learners that are scored, the deployed one first; each computes inside its block."""
        return {"deployed": nullcontext()}

    def weights_for(self, learnt: int, task: int) -> int | None:
        """Whose weights answer rows of `task` after `learnt` lessons: those after lesson 0, 1, ...; None: the base's.

        Two cells with one answer are scored once.
        """
        return learnt

    def answering(self, context: list[int]) -> AbstractContextManager:
        """What the model computes in while it answers the test row with these tokens before its answer.

        A method with one of its own is asked for each row by itself; it is not told the answer.
        """
        return nullcontext()

    # ----------------------------------------------------------------------------------- going on

    def state(self) -> State:
        return State({}, {})

    def restore(self, state: State) -> None:
        """Takes back what `state` gave."""

    def resume(self, adapter: dict[str, Pair], state: State, task: int) -> None:
        """Goes on after `task`, whose deployed adapter and state these are."""
        self.adapters.set_current(adapter)
        self.restore(state)

    def adopt(self, task: int, pairs: dict[str, Pair], rows: tuple[Row, ...] | None) -> dict[str, Pair]:
        """Takes over a task that another trainer learnt; gives the pairs to deploy after it, whose update is that of
        `pairs` (layers and ranks of their own). By default the trainable pair goes on from them, and what the end of a
        task makes of its rows is made of `rows`: the task's training rows, None where they are not given.
        """
        self.check_adoption(rows is not None)
        self.begin_task(task)
        self.adapters.take(pairs, task)
        self.end_task(task, rows or ())
        return self.export()

    def check_adoption(self, rows: bool) -> None:
        """UsageError where it cannot take a task over, with the task's rows or without them."""
        if self.adopts not in (ADAPTER, ROWS):
            raise UsageError(f"{type(self).__name__} cannot take an adapter over: {self.adopts}")
        if self.adopts == ROWS and not rows:
            raise UsageError(
                f"{type(self).__name__} keeps something of each task's rows ({self.extra_memory}), and this task's are "
                "not given: list the task with its rows first in the stream, under the name that --from gives it, or "
                "choose a method that keeps nothing of them, such as olora"
            )

    # ------------------------------------------------------------------------------ does it act?

    def told(self) -> dict[str, float]:
        """Figures of the last step for the log."""
        return {}

    def checks(self) -> list[Check]:
        """Evidence that the method did something in the task that just ended."""
        moved = self.adapters.moved()
        return [Check("adapter", moved, moved > 0, self.adapters.moves)]

    # -------------------------------------------------------------------------- in others' loops

    def only_here(self) -> str:
        """Why it cannot act in another's trainer, which leaves it `penalty` and `after_step` on pairs that are the
        trainer's; empty where it can.
        """
        if self.adapter_class is not Adapters:
            return f"trains a {self.adapter_class.kind.lower()}, not the trainer's LoRA pairs"
        if own := [hook for hook in ("prepare", "batch", "loss", "after_backward") if self.has(hook)]:
            return f"makes {', '.join(own)} of a step itself, which a trainer does not let it"
        if not self.plain_pairs:
            return "draws, merges or scales the pairs itself, and these are the trainer's"
        if not (self.has("penalty") or self.has("after_step")):
            return "has neither a penalty nor anything to do after a step"
        return ""

    # ----------------------------------------------------------------------------- what a step costs

    def passes(self, rows: int, task: int) -> tuple[float, float] | None:
        """Rows that go forward through the model in a step of task 0, 1, ... with `rows` new ones, and rows that come
        back; of kept rows as many as a step asks for. None where a step costs more than passes.
        """
        return (rows, rows) if self.extra_compute.partition(";")[0] == "none" else None

    # ----------------------------------------------------------------------------------- helpers

    def has(self, hook: str) -> bool:
        """Whether it has a hook of its own."""
        return overrides(type(self), hook)

    def logits(self, part: Part, *, hidden: bool = False):
        """Logits (answers, vocabulary) of a part, and its hidden states if asked for."""
        return logits_at(self.adapters.model, part.keep, hidden=hidden, input_ids=part.ids, attention_mask=part.mask)


def overrides(kind: type[Method], hook: str) -> bool:
    """Whether a method has a hook of its own."""
    return getattr(kind, hook) is not getattr(Method, hook)


def own_answering(method: Method) -> Callable[[list[int]], AbstractContextManager] | None:
    """`method.answering`; None where rows may be answered together."""
    return method.answering if overrides(type(method), "answering") else None


def penalty_acts(shares: Sequence[float]) -> list[Check]:
    """A penalty whose gradient is lost beside the loss's changes nothing, whatever it is called.

    `shares`: of each step with a penalty, ||penalty's gradient|| / ||loss gradient||.
    """
    if not shares:
        return []
    share = statistics.median(shares)
    meaning = "median over steps of ||penalty's gradient|| / ||loss gradient||; below 0.001 the penalty does nothing"
    return [Check("penalty share", share, share > 1e-3, meaning)]


def each_layer(current: dict[str, Pair], past: dict[str, Pair]) -> Iterator[tuple[Pair, Pair]]:
    """(current, past) of each layer that has both."""
    return ((pair, past[name]) for name, pair in current.items() if name in past)
