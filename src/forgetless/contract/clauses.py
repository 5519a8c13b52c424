"""The contract: what every method must do, clause by clause, on the tiny model.

A clause looks at a `Trial` and says what it found; it raises `Fails` with the reason where the method breaks it, and
`DoesNotApply` where it cannot be asked of this method.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch
from docstring_parser import parse_from_object
from peft import PeftModel
from torch import Tensor

from forgetless.contract.trial import STOPS_AFTER, Border, Trial
from forgetless.data.batches import collate, split
from forgetless.methods import METHODS
from forgetless.methods.base import Method
from forgetless.methods.finding import options_of
from forgetless.model.adapters import named

FALLS_TO = 0.9  # of its first value
SAME_GRADIENT = 1e-5  # relative: another order of summation in fp32
SAME_LOGITS = 1e-5
SAME_WORK = 1e-6  # relative
NO_SEED = "the same seed does not give the same bytes"
MORE_TASKS = 2  # between the two steps whose work is compared


class Fails(Exception):
    """Says how the method breaks the clause."""


class DoesNotApply(Exception):
    """Says why the clause cannot be asked of this method."""


def loss_falls(trial: Trial) -> str:
    """On each of two tasks in turn the loss falls. Things and answers are random: the form of the answers is learnt."""
    told = []
    for lesson, border in zip(trial.lessons, trial.whole.borders, strict=True):
        first, last = border.losses[0], mean(border.losses[-3:])
        if not last < FALLS_TO * first:
            raise Fails(f"loss on {lesson.name!r}: {first:.3g} at the first step, {last:.3g} at the last three")
        told.append(f"{first:.2f} -> {last:.2f}")
    return "loss " + ", ".join(told)


def same_seed(trial: Trial) -> str:
    """The same seed gives the same bytes: the adapter and the method's state."""
    names = ("first", "second") if len(trial.whole.borders) > 1 else ("only",)
    for name, again, border in zip(names, trial.stopped, trial.whole.borders, strict=True):
        if _difference(again, border):
            number = names.index(name)
            _compare(trial.repeated.borders[number], border, f"a second run, after the {name} task,")
    return "two runs agree in every byte"


def off_is_plain(trial: Trial) -> str:
    """Switched off it is plain fine-tuning, exactly; one that begins with the second task is plain on the first."""
    off, name = trial.kind.off, _name(trial.kind.plain or Method)
    if isinstance(off, str):
        raise DoesNotApply(off)
    if off is None:
        if different := _unequal(named(trial.whole.borders[0].pairs), named(trial.plain.borders[0].pairs)):
            raise Fails(
                f"after the first task it is not {name}: {different} differs. If options switch it off, say which: "
                "`off = {...}`; if nothing can, say why: `off = '...'`"
            )
        return f"on the first task it is {name}"
    if different := _unequal(named(trial.off.borders[-1].pairs), named(trial.plain.borders[-1].pairs)):
        raise Fails(f"with {off} it is not {name} (`off`, `plain`): {different} differs")
    return f"with {off} it is {name}, in every byte" if off else "it is the plain one"


def any_split(trial: Trial) -> str:
    """One micro-batch, some, or one a row: the same gradient, also where answers are of unequal length and rows that
    begin alike share that beginning.
    """
    method, (task, rows) = trial.whole.method, trial.begin()
    pad = trial.bench.tokenizer.pad_token_id
    gradients = []
    for size in (2 * len(trial.bench.uneven), 3, 1):
        for chosen in split(method.batch(trial.bench.uneven, 0), size):
            method.loss(collate(chosen, pad)).backward()
        gradients.append(torch.cat([_taken_gradient(one).flatten() for one in method.adapters.parameters()]))
    method.end_task(task, rows)
    apart = max(float((gradients[0] - other).norm() / gradients[0].norm()) for other in gradients[1:])
    if not apart < SAME_GRADIENT:
        raise Fails(
            f"the gradient depends on how a step's rows are split, by {apart:.2g} of its norm: `loss` must be a sum "
            "with weights that `batch` fixed for the whole step, not a mean over its part"
        )
    return f"gradients agree to {max(apart, 1e-9):.0e}"


def resumes_at_the_border(trial: Trial) -> str:
    """A new object that is given the deployed adapter and `state` from disk goes on as if never stopped."""
    if len(trial.lessons) == 1:
        raise DoesNotApply("it is one lesson, without a border to stop at")
    if not _difference(trial.stopped[1], trial.whole.borders[1]):
        return "stopped and gone on with: every byte as uninterrupted"
    if different := _ends_elsewhere(trial, trial.stopped_at_the_border):
        raise Fails(
            f"stopped after the first task and gone on with, it ends elsewhere: {different} differs. What the next "
            "task needs belongs into `state` and is taken back in `restore` or `resume`"
        )
    return "stopped and gone on with: every byte as uninterrupted"


def resumes_inside_a_task(trial: Trial) -> str:
    """Stopped after a step inside its last task, a new object at the border before goes on from the checkpoint."""
    whole = trial.whole.borders[-1]
    if different := _difference(trial.stopped[-1], whole) or _told_apart(trial.stopped[-1], whole):
        if len(trial.lessons) > 1 and _ends_elsewhere(trial, trial.stopped_at_the_border):
            raise DoesNotApply("it does not even go on from the border before: see the clause on that")
        if _difference(trial.repeated.borders[-1], whole):
            raise DoesNotApply(NO_SEED)
        raise Fails(
            f"stopped after step {STOPS_AFTER} of the last task and gone on with, it ends elsewhere: {different} "
            "differs. Name the attributes that change between `begin_task` and `end_task` in `within_task`"
        )
    return f"stopped after step {STOPS_AFTER} of the last task and gone on with: every byte as uninterrupted"


def acts(trial: Trial) -> str:
    """Its own checks hold, and what it deploys is not what it deploys switched off."""
    checks = [check for border in trial.whole.borders for check in border.checks]
    if wrong := [check for check in checks if not check.ok]:
        raise Fails(f"{wrong[0].name} = {wrong[0].value:.3g} ({wrong[0].meaning})")
    names = ", ".join(dict.fromkeys(check.name for check in checks))
    if trial.kind.off == {}:
        return names
    if trial.kind.adapter_class is not (trial.kind.plain or Method).adapter_class:  # other tensors: compare the answers
        if torch.equal(trial.whole.borders[-1].logits, trial.untouched):
            raise Fails("with what it trained the model says what the untouched base says: the method does nothing")
        return f"answers differ from the base's; {names}"
    other = trial.off if isinstance(trial.kind.off, dict) else trial.plain
    if not _unequal(named(trial.whole.borders[-1].pairs), named(other.borders[-1].pairs)):
        raise Fails("what it deploys is, in every byte, what it deploys switched off: the method does nothing")
    return f"differs from switched off; {names}"


def frozen_stay(trial: Trial) -> str:
    """The base and the frozen pairs of earlier tasks have not moved."""
    for border in trial.whole.borders:
        if border.moved:
            raise Fails(
                f"{border.moved[0]} has moved" + (f", and {more} more" if (more := len(border.moved) - 1) else "")
            )
    return f"{len(trial.whole.base)} tensors of the base, and all frozen pairs"


def cost_is_flat(trial: Trial) -> str:
    """A step costs as many operations however many tasks came before, or `growth` says how many more."""
    if len(trial.lessons) == 1:
        raise DoesNotApply("it is one lesson, not task after task")
    works = [trial.one_more_step() for _ in range(1 + MORE_TASKS)]
    more = works[-1] / works[0] - 1
    found = f"{100 * more:+.1f} % operations a step after {MORE_TASKS} more tasks"
    if abs(more) < SAME_WORK and trial.kind.growth:
        raise Fails(f"`growth` says {trial.kind.growth!r}, and a step costs the same: leave it out")
    if more > SAME_WORK and not trial.kind.growth:
        raise Fails(f"{found}: keep the cost flat, or say in `growth` how it grows")
    return f"{found}: {trial.kind.growth}" if trial.kind.growth else "the same number of operations after more tasks"


def stock_peft(trial: Trial) -> str:
    """What it deploys loads in PEFT without this library, and gives the same logits."""
    if not trial.kind.stock_peft:
        if not trial.kind.remedy:
            raise Fails("`stock_peft = False` without `remedy`: say how what it deploys is used")
        raise DoesNotApply(f"not a PEFT adapter; {trial.kind.remedy}")
    border = trial.whole.borders[-1]
    with TemporaryDirectory() as folder, torch.no_grad():
        trial.whole.method.adapters.save(Path(folder), border.pairs)
        asked = trial.bench.longest
        logits = PeftModel.from_pretrained(copy.deepcopy(trial.bench.model), folder)(**asked).logits
        logits = logits[:, -border.logits.shape[1] :]  # PEFT gives those of virtual tokens too
    apart = float((logits - border.logits).abs().max())
    if not apart < SAME_LOGITS:
        raise Fails(f"loaded by PEFT, `export` gives logits that differ by up to {apart:.2g} from the first of `views`")
    return f"logits agree to {max(apart, 1e-9):.0e}"


def options_explained(trial: Trial) -> str:
    """Summary and every option are explained in the class, and defaults can be written as JSON."""
    options = options_of(trial.kind)
    told = {one.arg_name for one in parse_from_object(trial.kind).params if one.description}
    if not trial.kind.summary:
        raise Fails("`summary` is empty: say in one line what it does")
    if missing := [name for name in options if name not in told]:
        raise Fails(f"the option {missing[0]!r} is not explained: write `{missing[0]}: ...` under `Args:` of the class")
    try:
        json.dumps([options, trial.kind.example, trial.kind.off])
    except TypeError as error:
        raise Fails(f"an option's value cannot be written down as JSON: {error}") from error
    return ", ".join(options) or "it has none"


CLAUSES: dict[str, Callable[[Trial], str]] = {
    "loss falls on each task": loss_falls,
    "same seed, same bytes": same_seed,
    "switched off it is plain": off_is_plain,
    "it acts": acts,
    "frozen weights stay": frozen_stay,
    "loads in stock PEFT": stock_peft,
    "resumes at a border": resumes_at_the_border,
    "resumes inside a task": resumes_inside_a_task,
    "any split, one gradient": any_split,
    "cost of a step": cost_is_flat,
    "options explained": options_explained,
}


def _compare(found: Border, wanted: Border, what: str) -> None:
    if different := _difference(found, wanted):
        raise Fails(
            f"{what} ends elsewhere: {different} differs; draw by forgetless.seeds.generator(NAME, self.seed, task)"
        )


def _ends_elsewhere(trial: Trial, borders: list[Border]) -> str:
    """What differs after the last lesson; '' where nothing does. DoesNotApply where two whole runs differ too."""
    different = _difference(borders[-1], trial.whole.borders[-1])
    if different and _difference(trial.repeated.borders[-1], trial.whole.borders[-1]):
        raise DoesNotApply(NO_SEED)
    return different


def _told_apart(one: Border, other: Border) -> str:
    """The first of a task's losses and checks that differs; '' where none does."""
    if one.losses != other.losses:
        return "the loss of a step"
    different = [a for a, b in zip(one.checks, other.checks, strict=True) if a != b]
    return f"the check {different[0].name!r}" if different else ""


def _difference(one: Border, other: Border) -> str:
    """The first that differs of what two borders deploy and keep; '' where nothing does."""
    if different := _unequal(named(one.pairs), named(other.pairs)):
        return different
    (tensors, values), (others, other_values) = one.state, other.state
    if different := _unequal(tensors, others):
        return f"state {different}"
    return "" if values == other_values else "state"


def _unequal(one: dict[str, Tensor], other: dict[str, Tensor]) -> str:
    """The name of the first tensor that differs in any bit; '' where none does."""
    names = dict.fromkeys((*one, *other))
    return next(
        (name for name in names if name not in one or name not in other or not _same(one[name], other[name])), ""
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _taken_gradient(parameter: Tensor) -> Tensor:
    gradient, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if gradient is None else gradient


def _name(kind: type[Method]) -> str:
    return (
        "sequential" if kind is Method else next((name for name, one in METHODS.items() if one is kind), kind.__name__)
    )
