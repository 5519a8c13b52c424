"""Several methods as one: `replay+olora` is O-LoRA with replayed rows in every step.

    batch, loss, after_backward         of the one part that changes it
    penalty                             Σ over the parts
    after_step, after_skip, ...         of each part, in the order of the name
    lessons, resume, export, views      of the last part, which has the adapters; so it begins a task first

Parts before the last must be made for it (`under_any`). What two parts would both change is refused: the result would
depend on which of them came last.
"""

from __future__ import annotations

import inspect
from collections import Counter
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any, ClassVar, get_type_hints

import torch
from docstring_parser import parse_from_object
from torch import Tensor

from forgetless.data.batches import Example, Part
from forgetless.data.tasks import Row, Stream
from forgetless.errors import UsageError
from forgetless.methods.base import ADAPTER, ROWS, Check, Lesson, Method, Options, State, overrides
from forgetless.model.adapters import Adapters, Pair

OF_ONE = ("batch", "loss", "after_backward")
OF_PAIRS = ("loss", "penalty", "after_backward", "after_step")  # not under a method that trains no pairs
OF_THE_LAST = ("lessons", "resume", "export", "views", "weights_for", "logits")


class Together(Method):
    """The parts' hooks in order; `together` makes a class of it for each combination."""

    kinds: ClassVar[dict[str, type[Method]]]
    own_names: ClassVar[dict[str, tuple[str, str]]]  # option -> (part, the part's name for it)

    def __init__(self, **options: Any):
        told: dict[str, Options] = {name: {} for name in self.kinds}
        for option, value in options.items():
            part, own = self.own_names[option]
            told[part][own] = value
        self.parts = {name: kind(**told[name]) for name, kind in self.kinds.items()}
        self.under = dict(list(self.parts.items())[:-1])
        self.last_name, self.last = list(self.parts.items())[-1]

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        for part in self.parts.values():
            part.start(adapters, encoder, seed)

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        for part in (self.last, *self.under.values()):
            part.begin_task(task)

    def prepare(self, examples: list[Example]) -> None:
        for part in self.parts.values():
            part.prepare(examples)

    def batch(self, examples: list[Example], step: int) -> list[Example]:
        return self._whose("batch").batch(examples, step)

    def loss(self, part: Part) -> Tensor:
        return self._whose("loss").loss(part)

    def penalty(self) -> Tensor | None:
        terms = [term for part in self.parts.values() if (term := part.penalty()) is not None]
        return sum(terms[1:], terms[0]) if terms else None

    def after_backward(self) -> None:
        self._whose("after_backward").after_backward()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for part in self.parts.values():
            part.after_step(optimizer)

    def after_skip(self) -> None:
        for part in self.parts.values():
            part.after_skip()

    def end_task(self, task: int, rows: tuple[Row, ...]) -> None:
        for part in self.parts.values():
            part.end_task(task, rows)

    def lessons(self, stream: Stream) -> list[Lesson]:
        return self.last.lessons(stream)

    def export(self) -> dict[str, Pair]:
        return self.last.export()

    def views(self) -> dict[str, AbstractContextManager]:
        return self.last.views()

    def weights_for(self, learnt: int, task: int) -> int | None:
        return self.last.weights_for(learnt, task)

    def state(self) -> State:
        states = {name: part.state() for name, part in self.parts.items()}
        return State(
            {f"{name}/{key}": tensor for name, one in states.items() for key, tensor in one.tensors.items()},
            {name: one.values for name, one in states.items()},
            next((one.memory for one in states.values() if one.memory is not None), None),
        )

    def restore(self, state: State) -> None:
        for name, part in self.under.items():
            part.restore(_of(name, state))

    def resume(self, adapter: dict[str, Pair], state: State, task: int) -> None:
        for part in self.parts.values():
            part.task = task
        self.last.resume(adapter, _of(self.last_name, state), task)
        self.restore(state)

    def adopt(self, task: int, pairs: dict[str, Pair], rows: tuple[Row, ...] | None) -> dict[str, Pair]:
        """The last part takes the pairs over, as it does alone; the others begin and end the task."""
        self.check_adoption(rows is not None)
        self.task = task
        deployed = self.last.adopt(task, pairs, rows)
        for part in self.under.values():
            part.begin_task(task)
            part.end_task(task, rows or ())
        return deployed

    def told(self) -> dict[str, float]:
        return {name: value for part in self.parts.values() for name, value in part.told().items()}

    def checks(self) -> list[Check]:
        return list(dict.fromkeys(check for part in self.parts.values() for check in part.checks()))

    def only_here(self) -> str:
        return next((f"({name}) {why}" for name, part in self.parts.items() if (why := part.only_here())), "")

    def has(self, hook: str) -> bool:
        return any(part.has(hook) for part in self.parts.values())

    def passes(self, rows: int, task: int) -> tuple[float, float] | None:
        """Each part multiplies what the others make of a row."""
        forward = backward = float(rows)
        for part in self.parts.values():
            if (told := part.passes(rows, task)) is None:
                return None
            forward, backward = forward * told[0] / rows, backward * told[1] / rows
        return forward, backward

    def _whose(self, hook: str) -> Method:
        """The part that changes a hook; the last where none does."""
        return next((part for part in self.parts.values() if part.has(hook)), self.last)


def together(kinds: dict[str, type[Method]]) -> type[Together]:
    """One method of several by name, the last of which has the adapters. UsageError where they do not go together."""
    _check(kinds)
    names = list(kinds)
    *under, last = kinds.values()
    own_names = _own_names(kinds)
    of_part = {names_of: option for option, names_of in own_names.items()}

    def renamed(options: str) -> Options:
        """The parts' `off` or `example` as options of the whole."""
        told = {name: getattr(kind, options) for name, kind in kinds.items()}
        return {
            of_part[name, own]: value
            for name, one in told.items()
            if isinstance(one, dict)
            for own, value in one.items()
        }

    def listed(attribute: str) -> str:
        told = dict.fromkeys(getattr(kind, attribute) for kind in kinds.values())
        return "; ".join(one for one in told if one and one != "none") or "none"

    def __init__(self, **options: Any):
        Together.__init__(self, **options)

    __init__.__signature__ = _signature(own_names, kinds)  # type: ignore[attr-defined]
    stuck = [name for name, kind in kinds.items() if not isinstance(kind.off, dict)]
    held = {f"{name}_{one}": (name, one) for name, kind in kinds.items() for one in kind.within_task}
    body = {
        "__init__": __init__,
        "__doc__": _documentation(own_names, kinds),
        "kinds": kinds,
        "own_names": own_names,
        "paper": ", ".join(dict.fromkeys(kind.paper for kind in kinds.values() if kind.paper)),
        "summary": f"{last.summary}; with {', '.join(names[:-1])}: {'; '.join(kind.summary for kind in under)}",
        "old_rows": any(kind.old_rows for kind in kinds.values()),
        "adopts": _adopts(kinds),
        "task_id": last.task_id,
        "ours": any(kind.ours for kind in kinds.values()),
        "adapter_class": last.adapter_class,
        "extra_memory": listed("extra_memory"),
        "extra_compute": listed("extra_compute"),
        "stock_peft": last.stock_peft,
        "remedy": last.remedy,
        "under_any": all(kind.under_any for kind in kinds.values()),
        "plain": last.plain if isinstance(last.off, dict) else last,
        "off": renamed("off") if stuck in ([], names[-1:]) else f"{stuck[0]} cannot be switched off",
        "example": renamed("example"),
        "growth": "; ".join(kind.growth for kind in kinds.values() if kind.growth),
        "within_task": tuple(held),
    }
    if overrides(last, "answering"):
        body["answering"] = lambda self, context: self.last.answering(context)
    return type("+".join(names), (Together,), body | {name: _passed_on(*place) for name, place in held.items()})


def _check(kinds: dict[str, type[Method]]) -> None:
    *under, last = kinds
    whole = "+".join(kinds)
    for name in under:
        stays = [hook for hook in OF_THE_LAST if overrides(kinds[name], hook)]
        if not kinds[name].under_any or stays:
            why = (
                f"it changes {', '.join(stays)}, which the last one decides" if stays else "it has adapters of its own"
            )
            raise UsageError(f"{whole}: {name} cannot go under another method: {why}; it can only come last")
        if of_pairs := kinds[last].adapter_class is not Adapters and [
            hook for hook in OF_PAIRS if overrides(kinds[name], hook)
        ]:
            raise UsageError(
                f"{whole}: {name} is made for LoRA pairs (it changes {', '.join(of_pairs)}), and {last} trains none; "
                "leave one of them out"
            )
        if kinds[name].snapshots and not kinds[last].plain_pairs:
            raise UsageError(
                f"{whole}: {name} compares with the model of the last border, which {last}'s pairs alone do not make; "
                "leave one of them out"
            )
    if kinds[last].bound:
        raise UsageError(
            f"{whole}: {last} is a bound to compare with, which nothing is added to; leave one of them out"
        )
    for hook in OF_ONE:
        both = [name for name, kind in kinds.items() if overrides(kind, hook)]
        if len(both) > 1:
            raise UsageError(f"{whole}: {' and '.join(both)} both change {hook}; leave one of them out")
    if len(both := [name for name, kind in kinds.items() if kind.old_rows]) > 1:
        raise UsageError(f"{whole}: {' and '.join(both)} both keep old rows; leave one of them out")


def _adopts(kinds: dict[str, type[Method]]) -> str:
    """The first part's reason against it; rows where any part needs them."""
    told = {name: kind.adopts for name, kind in kinds.items()}
    reasons = [f"{name}: {one}" for name, one in told.items() if one not in (ADAPTER, ROWS)]
    return reasons[0] if reasons else ROWS if ROWS in told.values() else ADAPTER


def _own_names(kinds: dict[str, type[Method]]) -> dict[str, tuple[str, str]]:
    """Option -> (part, the part's option); one that two parts have is told as PART_OPTION."""
    options = [(name, own) for name, kind in kinds.items() for own in inspect.signature(kind).parameters]
    counts = Counter(own for _, own in options)
    return {own if counts[own] == 1 else f"{name}_{own}": (name, own) for name, own in options}


def _signature(own_names: dict[str, tuple[str, str]], kinds: dict[str, type[Method]]) -> inspect.Signature:
    """`self` and the parts' options, by keyword, with types and defaults."""
    found = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    for option, (name, own) in own_names.items():
        default = inspect.signature(kinds[name]).parameters[own].default
        hint = get_type_hints(kinds[name].__init__).get(own, Any)
        found.append(inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))
    return inspect.Signature(found)


def _documentation(own_names: dict[str, tuple[str, str]], kinds: dict[str, type[Method]]) -> str:
    """The parts' Args, each with the part that it is of."""
    told = {
        (name, one.arg_name): " ".join((one.description or "").split())
        for name, kind in kinds.items()
        for one in parse_from_object(kind).params
    }
    lines = [f"    {option}: ({place[0]}) {told.get(place, '')}" for option, place in own_names.items()]
    return "\n".join([" + ".join(kinds) + ".", *(["", "Args:", *lines] if lines else [])])


def _passed_on(name: str, attribute: str) -> property:
    """A part's attribute as one of the whole."""
    return property(
        lambda self: attrgetter(attribute)(self.parts[name]),
        lambda self, value: setattr(self.parts[name], attribute, value),
    )


def _of(name: str, state: State) -> State:
    """A part's own state out of that of the whole."""
    prefix = f"{name}/"
    tensors = {key.removeprefix(prefix): one for key, one in state.tensors.items() if key.startswith(prefix)}
    return State(tensors, state.values[name], state.memory)
