"""`forgetless learn`."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgetless.cli.blend import print_blends
from forgetless.errors import UsageError, nearest

if TYPE_CHECKING:
    from forgetless.config import LearnConfig


FROM = "from_adapters"  # --from on the command line
LISTS = ("report_to", "max_drop", "max_lost", "max_kl", "trust_remote_code")  # options of learn that take a,b
EPILOG = """
A stream file:                                     A configuration file gives the same options by name:
  name: support                                      stream: support.yaml
  tasks:                                             method: {name: replay, memory: 10%}
    - {name: topics, train: topics.jsonl,            learning_rate: 0.0005
       test: topics-test.jsonl, options: [a, b]}

  forgetless learn --stream support.yaml --method replay --method.memory 10% --learning_rate 5e-4
  forgetless learn --config support-replay.yaml --dry_run
  forgetless learn --stream june.yaml --from april=./trl-april may=./trl-may --method olora
"""


def run(arguments: list[str]) -> int:
    config = parse_learn(arguments)
    if config is None:
        return 0
    if config.dry_run:
        from forgetless.geometry.borders import check_budgets
        from forgetless.learning.dryrun import plan_run

        check_budgets(config)
        plan_run(config)
        return 0
    from accelerate import PartialState

    from forgetless.learning.stream import learn
    from forgetless.progress import out
    from forgetless.report.terminal import print_matrices

    summary = learn(config)
    if PartialState().is_main_process:
        print_matrices([summary], out)
        out.print(f"\nreport: {summary['path']}/report.html", soft_wrap=True, highlight=False)
        print_blends(summary.get("blends", []))
    return max((one["exit_code"] for one in summary.get("blends", [])), default=0)


def parse_learn(arguments: list[str]) -> LearnConfig | None:
    """A LearnConfig from flags and a YAML file (flags win), or None where only help was asked for."""
    import jsonargparse

    from forgetless.config import LearnConfig
    from forgetless.methods import METHODS
    from forgetless.methods.finding import find_method, options_of

    flags, file = _read_flags(arguments)
    options = _read_options(Path(file)) if file is not None else {}
    chosen = flags.get("method.name", options.get("method", {}).get("name", "sequential"))
    source = f" (with --config {file})" if file is not None else ""
    try:
        kind = find_method(str(chosen))
    except UsageError as error:
        raise UsageError(f"{error}{source}") from error
    own = list(options_of(kind))
    names = [one.name for one in fields(LearnConfig) if one.name not in ("method", "method_options")]
    known = [*names, "method.name", *(f"method.{name}" for name in own)]
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the options' help
    parser = jsonargparse.ArgumentParser(
        prog="forgetless learn",
        usage="forgetless learn --stream STREAM [--method METHOD] [options]",
        exit_on_error=False,
        epilog=EPILOG,
        description=LearnConfig.__doc__,
        formatter_class=_formatter(),
    )
    parser.add_argument("--config", help="a YAML file with any of these options; flags win")
    parser.add_argument(
        "--method.name",
        default="sequential",
        help="--method NAME for short; one of: "
        + ", ".join(METHODS)
        + "; ./FILE.py:CLASS or PACKAGE.MODULE:CLASS for one of yours; replay+NAME for old rows in any",
    )
    parser.add_class_arguments(LearnConfig, skip={"method", "method_options"})
    if own:
        parser.add_class_arguments(kind, "method")
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        return None
    for name in _flat(options):
        if name not in known:
            raise UsageError(f"{file}: unknown key {name!r}{nearest(name, known)}")
    for name in flags:
        if name not in known:
            raise UsageError(f"unknown option --{name}{nearest(name, known)}")
    try:
        parser.set_defaults(parser.parse_object(options).as_flat().__dict__ if options else {})
        parsed = parser.parse_args([f"--{name}={value}" for name, value in flags.items()])
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise UsageError(" ".join(str(error).split()) + source) from error
    told = parsed.as_dict()
    method = told.pop("method")
    told.pop("config", None)
    config = LearnConfig(**told, method=method.pop("name"), method_options=method)
    try:
        config.check()
    except UsageError as error:
        raise UsageError(f"{error}{source}") from error
    return config


def _read_options(file: Path) -> dict:
    """The options of a YAML file, `method: olora` and single entries of lists written out."""
    import yaml

    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8-sig")) or {}
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 (byte {error.start + 1}); save it as UTF-8") from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:  # a date such as 2026-02-30 is a ValueError
        raise UsageError(f"{file}: {error}") from error
    if not isinstance(options, dict):
        raise UsageError(f"{file}: expected options by name, such as `learning_rate: 0.001`")
    if strange := [key for key in options if not isinstance(key, str)]:
        raise UsageError(f"{file}: {strange[0]!r} is no option's name")
    if not isinstance(options.get("method", {}), dict):
        options["method"] = {"name": options["method"] or "sequential"}
    if "from" in options:
        options[FROM] = options.pop("from")
    for name in (FROM, *LISTS):
        if name in options:
            options[name] = _listed(options[name])
    return options


def _read_flags(arguments: list[str]) -> tuple[dict[str, str], str | None]:
    """{option: value} and the YAML file. `--a-b 1`, `--a_b=1` and, for switches, a bare `--a_b` are one option."""
    from forgetless.config import LearnConfig

    switches = {one.name for one in fields(LearnConfig) if one.type == "bool"}
    flags: dict[str, str] = {}
    rest = [word for word in arguments if word not in ("-h", "--help")]
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UsageError(f"unexpected {word!r}: options are given as --name value")
        name, given, value = word[2:].partition("=")
        name = name.replace("-", "_")
        name = {"method": "method.name", "from": FROM}.get(name, name)
        if not given:
            bare = not rest or rest[0].startswith("--")
            if bare and name not in switches and not name.startswith("method."):
                raise UsageError(f"--{name} needs a value")
            value = "true" if bare else rest.pop(0)
        if name in (FROM, *LISTS) and not value.startswith("["):
            more = list(takewhile(lambda word: not word.startswith("--"), rest))
            rest = rest[len(more) :]
            words = [value, *more]
            value = json.dumps(words if name == FROM else [part.strip() for word in words for part in word.split(",")])
        flags[name] = value
    return flags, flags.pop("config", None)


def _listed(told: Any) -> list[str]:
    """What a YAML file gives for a list of NAME=VALUE: a list, a mapping (`max_drop: {topics: 2pp}`), or one entry."""
    if isinstance(told, dict):
        return [f"{name}={value}" for name, value in told.items()]
    return [str(one) for one in (told if isinstance(told, list) else [told])]


def _formatter() -> type:
    """Help with defaults, which keeps the layout of the examples below the options."""
    import jsonargparse

    class Formatter(jsonargparse.DefaultHelpFormatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text

    return Formatter


def _flat(options: dict) -> list[str]:
    """Option names of a YAML file: `method: {lam: 1}` is method.lam."""
    inner = options.get("method") or {}
    return [name for name in options if name != "method"] + [f"method.{name}" for name in inner]
