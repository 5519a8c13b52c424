"""From what a user writes to a method: where a built-in name does, so does one from outside.

    olora                  built in
    ./mine.py:Mine         a class in a file; the file is run
    package.module:Mine    a class in a module that Python can import; the module is run
    mine                   what an installed package offers as an entry point of the group `forgetless.methods`
    replay+olora           several as one, by `forgetless.methods.together`

Nothing of the user's or of a package is run unless it is named.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from forgetless.errors import UsageError, nearest
from forgetless.methods import METHODS
from forgetless.methods.base import HOOKS, Method
from forgetless.methods.together import together
from forgetless.usercode import digest, read_code, run_file

GROUP = "forgetless.methods"
GUIDE = "docs/add-a-method.md"
_IN_FILE = re.compile(r"(.*\.py):([^\W\d]\w*)")
_IN_MODULE = re.compile(r"([^\W\d][\w.]*):([^\W\d]\w*)")


def find_method(told: str) -> type[Method]:
    """The method that a name, a file's or module's class, or several with + between stand for.

    UsageError, with the remedy, where there is none, where it is no `Method` of this version of the hooks, where an
    option has no default, where a name stands for two methods, and where methods do not go together.
    """
    if len(parts := _parts(told)) > 1:
        labels = [label_of(part) for part in parts]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise UsageError(f"method {told!r}: {twice[0]} is named twice; name each part once")
        return together({label: find_method(part) for label, part in zip(labels, parts, strict=True)})
    if found := _IN_FILE.fullmatch(told):
        return _checked(_class_in(_run(found[1]), found[1], found[2]), told)
    if found := _IN_MODULE.fullmatch(told):
        return _checked(_class_in(_imported(found[1], told), found[1], found[2]), told)
    if ":" in told or told.endswith(".py"):
        raise UsageError(f"method {told!r}: a class of yours is named ./FILE.py:CLASS or PACKAGE.MODULE:CLASS")
    offered = [one for one in installed_methods() if one.name == told]
    if len(offered) + (told in METHODS) > 1:
        places = ["built in"] * (told in METHODS) + [f"{one.value} of {_package(one)}" for one in offered]
        names = [METHODS[told]] if told in METHODS else []
        remedy = ", ".join([*(f"{kind.__module__}:{kind.__name__}" for kind in names), *(one.value for one in offered)])
        raise UsageError(f"method: two are called {told!r} ({'; '.join(places)}); name the one you mean: {remedy}")
    if offered:
        return _checked(_offered(offered[0]), told)
    if told not in METHODS:
        known = [*METHODS, *(one.name for one in installed_methods())]
        raise UsageError(f"method: no {told!r}{nearest(told, known)}; one of yours is named ./FILE.py:CLASS")
    return METHODS[told]


def label_of(told: str) -> str:
    """The name for reports and folders, whatever way leads to the file.

    >>> label_of("../work/mine.py:Mine"), label_of("replay+package.module:Mine")
    ('Mine', 'replay+Mine')
    """
    return "+".join(part.rpartition(":")[2] for part in _parts(told))


def code_of(told: str) -> dict[str, str]:
    """sha256 of each user's file among the parts of a name: a run notices that its method was changed."""
    found = [match for part in _parts(told) if (match := _IN_FILE.fullmatch(part))]
    return {match[2]: digest(read_code(Path(match[1]).expanduser())) for match in found}


@cache
def installed_methods() -> tuple[EntryPoint, ...]:
    """What installed packages offer; nothing of them is run."""
    return tuple(entry_points(group=GROUP))


def options_of(kind: type[Method]) -> dict[str, object]:
    """A method's options with their defaults."""
    return {name: one.default for name, one in inspect.signature(kind).parameters.items()}


def _parts(told: str) -> list[str]:
    """The names between the +; a folder may have one in its name: ./c++/mine.py:Mine."""
    found = re.findall(r"([\w.:-]+|.+?\.py:\w+)(?:\+|$)", told)
    return found if "+".join(found) == told else [told]


def _run(told: str) -> ModuleType:
    file = Path(told).expanduser()
    return run_file(str(file.resolve()), digest(read_code(file)))


def _imported(module: str, told: str) -> ModuleType:
    try:
        return import_module(module)
    except Exception as error:
        raise UsageError(
            f"method {told!r}: the module {module!r} cannot be imported ({type(error).__name__}: {error}); install its "
            "package into this environment, or name the file: ./FILE.py:CLASS"
        ) from error


def _class_in(module: ModuleType, place: str, name: str) -> object:
    if name not in vars(module):
        kinds = [key for key, value in vars(module).items() if _is_method(value) and value is not Method]
        raise UsageError(f"{place}: no class {name!r}{nearest(name, kinds) if kinds else ' and no other method'}")
    return vars(module)[name]


def _offered(entry: EntryPoint) -> object:
    try:
        return entry.load()
    except Exception as error:
        raise UsageError(
            f"method {entry.name!r}: {entry.value} of {_package(entry)} cannot be loaded ({type(error).__name__}: "
            f"{error}); repair or remove the package"
        ) from error


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an unnamed package"


def _is_method(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, Method)


def _checked(found: object, told: str) -> type[Method]:
    """What was found, if it is a method as this version understands them."""
    if not (isinstance(found, type) and issubclass(found, Method)):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise UsageError(
            f"method {told!r}: is {what}, no subclass of forgetless.methods.Method; write `class "
            f"{told.rpartition(':')[2]}(Method):` ({GUIDE})"
        )
    own = [kind for kind in found.__mro__ if issubclass(kind, Method) and not kind.__module__.startswith("forgetless.")]
    if own and not any("hooks" in vars(kind) for kind in own):
        raise UsageError(
            f"method {told!r}: does not say for which version of the hooks it is written; write `hooks = {HOOKS}` in "
            f"the class ({GUIDE})"
        )
    if found.hooks != HOOKS:
        raise UsageError(
            f"method {told!r}: is written for version {found.hooks} of the hooks, and these are version {HOOKS}; "
            f"compare it with {GUIDE} and write `hooks = {HOOKS}`, or install the forgetless that it was written for"
        )
    for name, one in inspect.signature(found).parameters.items():
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD, one.POSITIONAL_ONLY):
            raise UsageError(
                f"method {told!r}: {one} in __init__ names no option; write each option out with a default"
            )
        if one.default is one.empty:
            raise UsageError(f"method {told!r}: the option {name!r} has no default; write `{name}: TYPE = VALUE`")
        if name == "name":
            raise UsageError(
                f"method {told!r}: an option cannot be called 'name', which is the method's own; rename it"
            )
    return found
