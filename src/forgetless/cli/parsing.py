"""What the commands parse alike."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from forgetless.cli import VERBS
from forgetless.errors import UsageError, nearest


def parser_for(verb: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """An empty parser with what every verb's `--help` begins and ends with."""
    form = argparse.RawDescriptionHelpFormatter if "\n" in (epilog or "") else argparse.HelpFormatter
    return argparse.ArgumentParser(
        prog=f"forgetless {verb}", description=VERBS[verb], exit_on_error=False, allow_abbrev=False,
        formatter_class=form, epilog=epilog,
    )  # fmt: skip


def option_adder(parser: argparse.ArgumentParser, config: type) -> Callable[..., None]:
    """Adds an option by its field's name (--a_b and --a-b, or another flag), default and docstring."""
    from forgetless.config import documentation

    told = documentation(config)

    def add(name: str, flag: str | None = None, **how: Any) -> None:
        default = getattr(config, name)
        flags = [flag] if flag else dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        shown = f" (default {default})" if default else ""
        parser.add_argument(*flags, dest=name, default=default, help=(told[name] + shown).replace("%", "%%"), **how)

    return add


def parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace | None:
    """The parsed arguments, or None where only help was asked for; a usage error exits 1 like every other error."""
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        return None
    try:
        told, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error
    except SystemExit as error:  # argparse leaves by itself where a required argument is missing
        raise UsageError(f"see {parser.prog} --help") from error
    if rest:
        known = [word for action in parser._actions for word in action.option_strings]
        raise UsageError(f"unknown option {rest[0]!r}{nearest(rest[0], known)}")
    return told


def add_loading_options(add: Callable[..., None]) -> None:
    """The options of `LoadSettings`."""
    from forgetless.model.loading import LOADINGS

    add("load_in", choices=LOADINGS)
    add("attn_implementation", metavar="NAME")
    add("trust_remote_code", nargs="+", metavar="MODEL")
