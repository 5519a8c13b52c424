"""A sweep file, read strictly: what is common to all runs, what varies, what is chosen, and the limits.

    stream: demo                      # any option of learn, for every run
    batch_size: 8
    grid:
      methods:                        # a name, or a name with its own options
        - sequential
        - {name: replay, memory: 10%}
        - {name: olora, choose: {lam: [0.1, 0.5]}}
      orders: 3                       # the stream's own and two drawn ones; or {given: [a, b], turned: [b, a]}
      seed: [0, 1, 2]                 # any option of learn, or method.OPTION, with a list of values
    choose:                           # on validation rows, for each method by as many trials
      learning_rate: [5e-4, 1e-3]
      tasks: 1                        # seen by the trials: the first of each order; or all
    fair: steps                       # or compute
    max_disk: 10GB
    max_time: 6h

Every value is checked as `learn` checks it, and every method is built once, before anything is trained.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from forgetless.config import LearnConfig
from forgetless.errors import UsageError, nearest
from forgetless.methods.finding import find_method, options_of

FAIR = ("steps", "compute")
KEYS = ("name", "grid", "choose", "fair", "costs", "order_seed", "threads", "max_disk", "max_time")
NOT_HERE = {
    "method": "methods are listed in `grid: {methods: [...]}`",
    "method_options": "options of a method stand beside its name in `grid: {methods: [...]}`",
    "output_dir": "each run has a folder below the sweep's; give that with --output_dir",
    "dry_run": "forgetless sweep FILE --dry_run",
} | dict.fromkeys(
    ("max_drop", "max_lost", "max_kl", "blend_on", "confidence", "borders"),
    "a sweep blends nothing; `forgetless blend` its runs",
)
OPTIONS = tuple(one.name for one in fields(LearnConfig) if one.name not in NOT_HERE)
EQUAL = ("model", "load_in", "seed", "num_train_epochs", "max_steps", "batch_size", "max_length", "score_on")
"""What no method may have a value of its own for: all learn from and are judged on equal terms."""
BESIDE = set(OPTIONS) - {*LearnConfig().decides(), "model"}
"""What does not tell runs apart, so that two values of it would give one run."""
SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class Entry:
    """A method of the grid with its own options, and what is chosen for it: option -> candidates."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    candidates: Mapping[str, Sequence] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says."""

    name: str
    common: Mapping[str, Any]  # options of learn
    entries: tuple[Entry, ...]
    axes: Mapping[str, Sequence]  # option of learn or method.OPTION -> its values
    orders: int | Mapping[str, tuple[str, ...]] = 1
    order_seed: int = 0
    seen: int | None = 1  # tasks that trials see; None: all
    equal_trials: bool = True
    fair: str = "steps"
    costs: Mapping[str, float] = field(default_factory=dict)  # method -> a step's compute, plain fine-tuning being 1
    threads: int | None = None  # of each run
    max_disk: float | None = None  # bytes
    max_time: float | None = None  # seconds


def read_sweep(file: str | Path) -> Sweep:
    """The sweep of a YAML file; UsageError with the place and the nearest name for what does not fit."""
    path = Path(file)
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:  # a date such as 2026-02-30 is a ValueError
        raise UsageError(f"{file}: {' '.join(str(error).split())}") from error
    return sweep_of(told, str(file), path.stem.removeprefix("sweep-"))


def sweep_of(told: Any, place: str = "sweep", name: str = "sweep") -> Sweep:
    """The sweep of what a YAML file holds."""
    told = _mapping(told, place, "`stream:`, `grid:` and options of learn")
    _known(told, (*KEYS, *OPTIONS), place)
    grid = dict(_mapping(told.get("grid"), f"{place}: grid", "`methods:` and lists of values by option"))
    choose = dict(_mapping(told.get("choose") or {}, f"{place}: choose", "lists of candidates by option"))
    orders = _orders(grid.pop("orders", 1), f"{place}: grid: orders")
    seen, equal = _seen(choose.pop("tasks", 1), place), choose.pop("equal_trials", True)
    if not isinstance(equal, bool):
        raise UsageError(f"{place}: choose: equal_trials is true or false, not {equal!r}")
    candidates = _lists(choose, f"{place}: choose")
    entries = _entries(grid.pop("methods", None), candidates, f"{place}: grid: methods")
    axes = _lists(grid, f"{place}: grid")
    methods = [entry.method for entry in entries]
    _some_method_takes(axes, methods, f"{place}: grid")
    common = {key: value for key, value in told.items() if key in OPTIONS}
    if not common.get("stream"):
        raise UsageError(f"{place}: no `stream:`; give a YAML file of tasks or a name such as demo")
    costs = _mapping(told.get("costs") or {}, f"{place}: costs", "a number by method")
    _known(costs, methods, f"{place}: costs")
    sweep = Sweep(
        name=str(told.get("name") or name), common=common, entries=entries, axes=axes, orders=orders,
        order_seed=_whole(told.get("order_seed", 0), 0, f"{place}: order_seed"), seen=seen, equal_trials=equal,
        fair=told.get("fair", "steps"), costs={key: _above_0(value, f"{place}: costs: {key}")
                                               for key, value in costs.items()},
        threads=_whole(told["threads"], 1, f"{place}: threads") if "threads" in told else None,
        max_disk=_amount(told.get("max_disk"), BYTES, f"{place}: max_disk"),
        max_time=_amount(told.get("max_time"), SECONDS, f"{place}: max_time"),
    )  # fmt: skip
    _check(sweep, place)
    return sweep


def _check(sweep: Sweep, place: str) -> None:
    """What concerns several parts of the file."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", sweep.name):
        raise UsageError(f"{place}: the name {sweep.name!r} cannot name a folder; use letters, digits, '-', '_', '.'")
    if sweep.fair not in FAIR:
        raise UsageError(f"{place}: fair: no {sweep.fair!r}{nearest(str(sweep.fair), FAIR)}")
    for entry in sweep.entries:
        own = {f"method.{name}" for name in entry.options}
        for first, second, kind in (
            (sweep.axes, sweep.common, "both in the grid and beside it"),
            (sweep.axes, entry.candidates, "both in the grid and to be chosen"),
            (sweep.axes, own, f"both in the grid and an option of {entry.method} alone"),
            (entry.candidates, own, f"both to be chosen and fixed for {entry.method}"),
        ):
            if both := sorted(set(first) & set(second)):
                raise UsageError(f"{place}: {both[0]} is {kind}; keep one of the two")
    if strict := sorted({name for entry in sweep.entries for name in entry.candidates} & set(EQUAL)):
        raise UsageError(f"{place}: choose: {strict[0]} must be equal for all methods; put its values into the grid")
    numbers = [(entry.method, trials(entry)) for entry in sweep.entries]
    if sweep.equal_trials and len({number for _, number in numbers}) > 1:
        told = ", ".join(f"{method} {number}" for method, number in numbers)
        raise UsageError(
            f"{place}: choose: methods have different numbers of trials ({told}), which favours those with more; give "
            "each as many, or `equal_trials: false`, which the record then says"
        )


def trials(entry: Entry) -> int:
    """How many candidates its choice is among."""
    return math.prod(len(values) for values in entry.candidates.values())


# ---------------------------------------------------------------------------------------- typed values


def typed(method: str, options: Mapping[str, Any], place: str) -> LearnConfig:
    """The configuration of `learn` with these options (`method.OPTION` among them), its values checked."""
    return _typed(method, json.dumps(options, default=str), place)  # orders and seeds of a point share it


@cache
def _typed(method: str, told_options: str, place: str) -> LearnConfig:
    options = json.loads(told_options)
    own = {name.removeprefix("method."): value for name, value in options.items() if name.startswith("method.")}
    rest = {name: value for name, value in options.items() if not name.startswith("method.")}
    try:
        told = _parser(method).parse_object(rest | ({"method": own} if own else {})).as_dict()
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise UsageError(f"{place}: {' '.join(str(error).split())}") from error
    parsed = told.pop("method", {})
    config = LearnConfig(**told, method=method, method_options={name: parsed[name] for name in own})
    try:
        config.check()
        config.build_method()
    except UsageError as error:
        raise UsageError(f"{place}: {method}: {error}") from error
    return config


@cache
def _parser(method: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LearnConfig, skip=set(NOT_HERE))
    if (kind := find_method(method)).__init__ is not object.__init__:
        parser.add_class_arguments(kind, "method")
    return parser


def method_options(method: str) -> tuple[str, ...]:
    """The names that a method's constructor takes, as `method.NAME`."""
    return tuple(f"method.{name}" for name in options_of(find_method(method)))


# ---------------------------------------------------------------------------------------- the parts


def _mapping(told: Any, place: str, wanted: str) -> Mapping[str, Any]:
    if not isinstance(told, dict):
        raise UsageError(f"{place}: expected {wanted}, found {type(told).__name__}")
    for key in told:
        if not isinstance(key, str):
            raise UsageError(f"{place}: {key!r} is no name; YAML reads on, off, yes and no as truth values")
    return told


def _known(told: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for key in told:
        if key in NOT_HERE:
            raise UsageError(f"{place}: `{key}:` is not given here: {NOT_HERE[key]}")
        if key not in known:
            raise UsageError(f"{place}: unknown key {key!r}{nearest(key, known)}")


def _lists(told: Mapping[str, Any], place: str) -> dict[str, list]:
    """Option -> its values; whether a method takes `method.NAME` is checked elsewhere."""
    _known({key: None for key in told if not key.startswith("method.")}, OPTIONS, place)
    for key, values in told.items():
        if key in BESIDE:
            raise UsageError(f"{place}: {key} does not tell runs apart; give one value for all, outside of `grid:` and "
                             "`choose:`")  # fmt: skip
        if not isinstance(values, list) or not values:
            raise UsageError(f"{place}: {key}: expected a list of values, found {values!r}; a value that all runs "
                             "share stands outside the grid")  # fmt: skip
        if any(value in values[:i] for i, value in enumerate(values)):
            raise UsageError(f"{place}: {key}: {values} has a value twice")
    return dict(told)


def _entries(told: Any, common: Mapping[str, list], place: str) -> tuple[Entry, ...]:
    if not isinstance(told, list) or not told:
        raise UsageError(
            f"{place}: expected a list such as [sequential, {{name: replay, memory: 10%}}], found {told!r}"
        )
    entries = tuple(_entry(one, common, place) for one in told)
    if double := [entry for i, entry in enumerate(entries) if entry in entries[:i]]:
        raise UsageError(f"{place}: {double[0].method} is there twice with equal options")
    _some_method_takes(common, [entry.method for entry in entries], place)
    return entries


def _entry(told: Any, common: Mapping[str, list], place: str) -> Entry:
    options = {"name": told} if isinstance(told, str) else dict(_mapping(told, place, "a method's name or a mapping"))
    name, own = options.pop("name", None), _mapping(options.pop("choose", {}), place, "lists of candidates by option")
    name = str(name)
    try:
        find_method(name)
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from error
    place, takes = f"{place}: {name}", method_options(name)
    bare = [option.removeprefix("method.") for option in takes]
    _known(options, bare, place)
    for key in own:
        if key not in (*bare, *OPTIONS):
            raise UsageError(f"{place}: choose: unknown option {key!r}{nearest(key, (*bare, *OPTIONS))}")
    mine = {key: values for key, values in common.items() if not key.startswith("method.") or key in takes}
    mine |= {f"method.{key}" if key in bare else key: values for key, values in own.items()}
    return Entry(name, options, _lists(mine, f"{place}: choose"))


def _some_method_takes(axes: Mapping[str, Any], methods: Sequence[str], place: str) -> None:
    known = {option for method in methods for option in method_options(method)}
    for key in axes:
        if key.startswith("method.") and key not in known:
            raise UsageError(f"{place}: no method of this grid has the option {key!r}{nearest(key, known or ['none'])}")


def _orders(told: Any, place: str) -> int | dict[str, tuple[str, ...]]:
    if not isinstance(told, dict):
        return _whole(told, 1, place)
    for name, tasks in told.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._]*", str(name)):
            raise UsageError(f"{place}: the name {name!r} is to stand in folders' names; use letters, digits, '_', '.'")
        if not isinstance(tasks, list) or not tasks:
            raise UsageError(f"{place}: {name}: expected a list of all the stream's tasks, found {tasks!r}")
    if not told:
        raise UsageError(f"{place}: none; give a number, or names with lists of tasks")
    return {str(name): tuple(map(str, tasks)) for name, tasks in told.items()}


def _seen(told: Any, place: str) -> int | None:
    return None if told == "all" else _whole(told, 1, f"{place}: choose: tasks", " or all")


def _whole(told: Any, least: int, place: str, more: str = "") -> int:
    if isinstance(told, bool) or not isinstance(told, int) or told < least:
        raise UsageError(f"{place}: expected a number, {least} or above{more}, found {told!r}")
    return told


def _above_0(told: Any, place: str) -> float:
    if isinstance(told, bool) or not isinstance(told, int | float) or not told > 0:
        raise UsageError(f"{place}: expected a number above 0, found {told!r}")
    return float(told)


def _amount(told: Any, units: Mapping[str, float], place: str) -> float | None:
    """'10GB' -> 1e10."""
    if told is None:
        return None
    found = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(units)})\s*", str(told))
    if not found:
        raise UsageError(f"{place}: expected a number with one of {', '.join(units)}, found {told!r}")
    return float(found[1]) * units[found[2]]
