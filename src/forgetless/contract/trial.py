"""A method on trial: the runs over small tasks that the clauses look at, each made once."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from forgetless.contract.tiny import make_model, make_tokenizer
from forgetless.data.batches import Encoder, collate
from forgetless.data.tasks import Row, Stream, Task
from forgetless.errors import Stopped
from forgetless.learning.checkpoint import Checkpoints, SaveSettings
from forgetless.learning.engine import Engine
from forgetless.learning.signals import Signals
from forgetless.learning.state import load_state, save_state
from forgetless.learning.step import TrainSettings, learn_task
from forgetless.methods.base import Check, Lesson, Method, Options, penalty_acts
from forgetless.model.adapters import LoraSettings, Pair, named
from forgetless.model.attention import use_blocked_attention
from forgetless.model.encoder_decoder import decoder_start, halves, is_encoder_decoder
from forgetless.model.tables import TrainedTables
from forgetless.runs.folder import RunFolder

SEED = 0
TABLE_RATE = 0.2  # what stands beside the weights begins by saying little, and has far to go
SETTINGS = TrainSettings(
    learning_rate=2e-2, num_train_epochs=3, batch_size=3, micro_batch_size=3, lr_scheduler_type="constant"
)
STOPS_AFTER = 4  # of a lesson's six steps
LORA = LoraSettings(r=4, target_modules=["q_proj", "v_proj", "down_proj"])  # square, and not in either direction
TASKS = {
    "colour": {"sky": "blue", "grass": "green", "blood": "red", "sea": "blue", "leaf": "green", "rose": "red"},
    "size": {"ant": "small", "whale": "large", "mouse": "small", "tower": "large", "seed": "small", "hill": "large"},
    "sound": {"dog": "bark", "cat": "meow", "wolf": "bark", "lion": "meow", "fox": "bark", "puma": "meow"},
}


def question(task: str, thing: str) -> str:
    return f"What {task} has the {thing}? Answer:"


def tiny(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return make_model(tokenizer, initializer_range=0.3)


class Bench:
    """The tiny model, tasks whose rows all have equally many tokens, and the runs that several methods share."""

    def __init__(self, make: Callable[[PreTrainedTokenizerFast], PreTrainedModel] = tiny, lora: LoraSettings = LORA):
        texts = [
            question(task, thing) + f" {answer}" for task, table in TASKS.items() for thing, answer in table.items()
        ]
        self.tokenizer = make_tokenizer(texts)
        self.model, self.lora = make(self.tokenizer).eval().requires_grad_(False), lora
        use_blocked_attention(self.model)
        self.engine = Engine("cpu", "fp32")
        self.encoder = Encoder(self.tokenizer, 64, decoder_start(self.model.config))
        self.tasks = tuple(self._task(name, table) for name, table in TASKS.items())
        asked = question(*next((name, thing) for name, table in TASKS.items() for thing in table))
        self.uneven = [self.encoder(Row(asked, " blue" + " very blue" * more)) for more in (0, 3, 1, 5)]
        self._runs: dict[tuple, Run] = {}

    def _task(self, name: str, table: dict[str, str]) -> Task:
        rows = tuple(Row(question(name, thing), f" {answer}", source=thing) for thing, answer in table.items())
        return Task(name, rows, (), rows, tuple(dict.fromkeys(table.values())))

    def build(self, kind: type[Method], options: Options) -> Run:
        """A started method over a fresh copy of the model."""
        base = copy.deepcopy(self.model)
        weights = dict(base.named_parameters())
        method = kind(**options)
        method.start(kind.adapter_class(base, self.lora, "tiny", SEED), self.encoder, SEED)
        return Run(self, method, weights)

    def run(self, kind: type[Method], options: Options) -> Run:
        """The first two tasks in turn; made once for each method and options."""
        key = (kind, tuple(sorted((name, str(value)) for name, value in options.items())))
        if key not in self._runs:
            run = self.build(kind, options)
            self._runs[key] = run.learn(self.lessons(run.method))
        return self._runs[key]

    def lessons(self, method: Method) -> list[Lesson]:
        return method.lessons(Stream("two", self.tasks[:2]))

    @property
    def longest(self) -> dict[str, Tensor]:
        """The longest uneven row, as the model takes it."""
        part = collate([max(self.uneven, key=lambda one: len(one.ids))], self.tokenizer.pad_token_id)
        return halves(part.ids, part.mask, part.keep)[0] if is_encoder_decoder(self.model) else {"input_ids": part.ids}


@dataclass(frozen=True)
class Border:
    """What there is after a lesson."""

    losses: list[float]  # of its steps
    pairs: dict[str, Pair]  # what is deployed
    logits: Tensor  # of the deployed learner at `Bench.uneven`'s longest row
    state: tuple[dict[str, Tensor], dict]  # the method's own
    checks: list[Check]
    moved: list[str]  # frozen weights that are not what they were


class Run:
    """A method that learns lesson after lesson, and what there is after each."""

    def __init__(self, bench: Bench, method: Method, base: dict[str, nn.Parameter]):
        self.bench, self.method = bench, method
        self.base = base  # the model's own weights, which stay these objects inside PEFT's layers
        self.borders: list[Border] = []

    def learn(self, lessons: list[Lesson], first: int = 0) -> Run:
        for number, lesson in enumerate(lessons):
            if number >= first:
                self.borders.append(self.learn_one(number, lesson))
        return self

    def learn_one(self, number: int, lesson: Lesson, checkpoints: Checkpoints | None = None) -> Border:
        """A whole lesson; what is left of it where there is a checkpoint inside it."""
        method = self.method
        records: list[dict] = checkpoints.records if checkpoints else []
        method.begin_task(number)
        past = {name: tensor.clone() for name, tensor in named(method.adapters.past()).items()}
        self.train(number, lesson.rows, records.append, checkpoints=checkpoints)
        method.end_task(number, lesson.rows)
        shares = [record["penalty_share"] for record in records if "penalty_share" in record]
        checks = [*method.checks(), *penalty_acts(shares)]
        state = method.state()
        kept = {name: tensor.detach().clone() for name, tensor in state.tensors.items()}
        values = {"memory": [row.key for row in state.memory.rows] if state.memory else [], **state.values}
        pairs = {name: _copied(one) for name, one in method.export().items()}
        moved = self._moved(past)
        return Border([one["loss"] for one in records], pairs, self._logits(), (kept, values), checks, moved)

    def stop_inside(self, number: int, lesson: Lesson, checkpoints: Checkpoints) -> None:
        """Begins a lesson and is stopped by a signal in a step, which is finished and saved."""

        def log(record: dict) -> None:
            checkpoints.records.append(record)
            if record["step"] == STOPS_AFTER:
                checkpoints.signals.received = signal.SIGTERM

        self.method.begin_task(number)
        with suppress(Stopped):
            self.train(number, lesson.rows, log, checkpoints=checkpoints)

    def checkpoints(self, root: Path, number: int, lesson: Lesson) -> Checkpoints:
        return Checkpoints(
            RunFolder(root), number + 1, lesson.name, self.method, self.bench.engine, SaveSettings(save_minutes=0),
            signals=Signals(), say=lambda text: None,
        )  # fmt: skip

    def train(
        self,
        number: int,
        rows: tuple[Row, ...],
        log=lambda record: None,
        steps: int = -1,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        """All of a task's steps, or some."""
        examples = [self.method.encoder(row) for row in rows]
        tables = issubclass(self.method.adapter_class, TrainedTables)
        learn_task(
            self.method,
            examples,
            replace(SETTINGS, max_steps=steps, learning_rate=TABLE_RATE if tables else SETTINGS.learning_rate),
            self.bench.engine,
            seed=SEED,
            task=number,
            log=log,
            checkpoints=checkpoints,
        )

    def _logits(self) -> Tensor:
        with torch.no_grad(), next(iter(self.method.views().values())):
            return self.method.adapters.model(**self.bench.longest).logits

    def _moved(self, past: dict[str, Tensor]) -> list[str]:
        """Names of the base's weights and of frozen pairs, as they were when the lesson began, that differ now."""
        there = {id(parameter) for parameter in self.method.adapters.model.parameters()}
        before = dict(self.bench.model.named_parameters())
        moved = [name for name, one in self.base.items() if id(one) not in there or not torch.equal(one, before[name])]
        now = named(self.method.adapters.past())
        return moved + [f"frozen pair {name}" for name, old in past.items() if not _begins_with(now.get(name), old)]


class Trial:
    """One method with the options of its `example`."""

    def __init__(self, name: str, kind: type[Method], bench: Bench):
        self.name, self.kind, self.bench = name, kind, bench
        self.options = dict(kind.example)
        self.tasks_seen = 2

    @cached_property
    def whole(self) -> Run:
        """Both tasks without interruption."""
        return self.bench.run(self.kind, self.options)

    @cached_property
    def lessons(self) -> list[Lesson]:
        return self.bench.lessons(self.kind(**self.options))

    @cached_property
    def stopped(self) -> list[Border]:
        """Of a run that is stopped before its last lesson and once more inside it; each time a new object goes on that
        is given only what is on disk.
        """
        return self._gone_on(inside=True)

    @cached_property
    def stopped_at_the_border(self) -> list[Border]:
        """Of a run that is stopped before its last lesson only; needed only where `stopped` ends elsewhere."""
        return self._gone_on(inside=False)

    @cached_property
    def repeated(self) -> Run:
        """Both tasks once more, likewise."""
        return self.bench.build(self.kind, self.options).learn(self.lessons)

    def _gone_on(self, inside: bool) -> list[Border]:
        *before, lesson = self.lessons
        with TemporaryDirectory() as folder:
            run, root = self.bench.build(self.kind, self.options), Path(folder)
            borders = run.learn(before).borders
            if before:
                run.method.adapters.save(root / "adapter", run.method.export())
                save_state(root, run.method.state())
                run = self._resumed(root)
            if inside:
                run.stop_inside(len(before), lesson, run.checkpoints(root, len(before), lesson))
                run = self._resumed(root)
            return [*borders, run.learn_one(len(before), lesson, run.checkpoints(root, len(before), lesson))]

    def _resumed(self, root: Path) -> Run:
        """A new object at the border that was saved; at the beginning where none was."""
        run = self.bench.build(self.kind, self.options)
        if (root / "adapter").exists():
            method, number = run.method, len(self.lessons) - 2
            method.task = number
            method.resume(method.adapters.load(root / "adapter"), load_state(root), number)
        return run

    @property
    def untouched(self) -> Tensor:
        """The base's logits where a `Border` has those of the deployed learner."""
        with torch.no_grad():
            return self.bench.model(**self.bench.longest).logits

    @property
    def plain(self) -> Run:
        """The method that this one is when switched off."""
        kind = self.kind.plain or Method
        return self.bench.run(kind, dict(kind.example))

    @property
    def off(self) -> Run:
        """Both tasks, switched off."""
        assert isinstance(self.kind.off, dict)
        return self.bench.run(self.kind, self.options | self.kind.off)

    def begin(self) -> tuple[int, tuple[Row, ...]]:
        """Begins one more task after those of `whole`, whose borders are kept: its number and rows."""
        number, self.tasks_seen = self.tasks_seen, self.tasks_seen + 1
        self.whole.method.begin_task(number)
        return number, self.bench.tasks[number % len(self.bench.tasks)].train

    def one_more_step(self) -> int:
        """One more task of one step; how many arithmetic operations the step took."""
        number, rows = self.begin()
        with Work() as work:
            self.whole.train(number, rows, steps=1)
        self.whole.method.end_task(number, rows)
        return work.operations


class Work(TorchDispatchMode):
    """Counts operations: those of products as torch counts them, and one for each number that anything else gives."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        if counted := flop_registry.get(func.overloadpacket):
            self.operations += counted(*args, **(kwargs or {}), out_val=out)
        else:
            self.operations += sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def _copied(pair: Any) -> Any:
    """A pair or prompt with tensors of its own."""
    return pair._make(one.detach().clone() if isinstance(one, Tensor) else one for one in pair)


def _begins_with(now: Tensor | None, old: Tensor) -> bool:
    """Whether a joined tensor still holds, first, what it held; later pairs may have been joined to it."""
    return now is not None and torch.equal(now[: old.shape[0], : old.shape[1]], old)
