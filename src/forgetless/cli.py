"""The command line. One verb = parse, call one function, print where the files are.

Exit codes: 0 done; 1 an error, usage errors too; 130 and 143 stopped by SIGINT and SIGTERM. An audit: 0 pass or no
budget, 2 regression, 3 insufficient evidence. `check`: 2 where a clause fails. `doctor`: 2 a problem was found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from forgetless.config import LearnConfig

FROM = "from_adapters"  # --from on the command line
LISTS = ("report_to", "max_drop", "max_lost", "max_kl", "trust_remote_code")  # options of learn that take a,b
LEARN_EPILOG = """
A stream file:                                     A configuration file gives the same options by name:
  name: support                                      stream: support.yaml
  tasks:                                             method: {name: replay, memory: 10%}
    - {name: topics, train: topics.jsonl,            learning_rate: 0.0005
       test: topics-test.jsonl, options: [a, b]}

  forgetless learn --stream support.yaml --method replay --method.memory 10% --learning_rate 5e-4
  forgetless learn --config support-replay.yaml --dry_run
  forgetless learn --stream june.yaml --from april=./trl-april may=./trl-may --method olora
"""


OVERLAP_EPILOG = """
  forgetless overlap ./invoices ./tickets someone/adapter-on-the-hub
  forgetless overlap runs/olora --increments
"""


MERGE_EPILOG = """
  forgetless merge ./may --output_dir may-full                     one adapter into its base, as whole weights
  forgetless merge invoices letters --output_dir both              two into one: their exact sum
  forgetless merge invoices letters --rank 16 --tasks tasks.yaml --output_dir both-16
  forgetless merge invoices letters --method ties --density 0.2 --weights 1 0.5 --output_dir both-ties
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `forgetless` command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    from forgetless.errors import ForgetlessError, Stopped, UsageError, nearest
    from forgetless.progress import console

    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            return _help()
        if arguments[0] == "--version":
            return _version()
        if arguments[0] not in VERBS:
            raise UsageError(f"no command {arguments[0]!r}{nearest(arguments[0], VERBS)}")
        return VERBS[arguments[0]][1](arguments[1:])
    except ForgetlessError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except BrokenPipeError:  # the reader of our output has left
        sys.stderr.close()
        return 1
    except Stopped as stopped:
        console.print(f"stopped. {stopped}", markup=False, soft_wrap=True)
        return 128 + stopped.number
    except KeyboardInterrupt:
        what = {"learn": "tasks", "interpolate": "points", "blend": "points", "sweep": "runs"}.get(arguments[0])
        kept = f" Finished {what} are kept: the same command goes on after the last of them." if what else ""
        console.print(f"stopped.{kept}")
        return 130


def _help() -> int:
    print("forgetless: what did each fine-tune make a language model forget, and how to keep it\n")
    print("usage: forgetless COMMAND [options]        forgetless COMMAND --help\n")
    for verb, (meaning, _) in VERBS.items():
        print(f"  {verb:12}{meaning}")
    return 0


def _version() -> int:
    from importlib.metadata import version

    print(version("forgetless"))
    return 0


def _learn(arguments: list[str]) -> int:
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
        _print_blends(summary.get("blends", []))
    return max((one["exit_code"] for one in summary.get("blends", [])), default=0)


def _print_blends(records: list[dict]) -> None:
    from forgetless.progress import out
    from forgetless.report.blend import print_blend

    for record in records:
        print_blend(record, out)
        files = f"{record['path']} (blend.html, blend.md, blend.json)"
        out.print(f"\nblend: {files}\n", soft_wrap=True, highlight=False, markup=False)


def parse_learn(arguments: list[str]) -> LearnConfig | None:
    """A LearnConfig from flags and a YAML file (flags win), or None where only help was asked for."""
    import jsonargparse

    from forgetless.config import LearnConfig
    from forgetless.errors import UsageError, nearest
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
        epilog=LEARN_EPILOG,
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

    from forgetless.errors import UsageError

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
    from forgetless.errors import UsageError

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


def _methods(arguments: list[str]) -> int:
    import argparse

    from forgetless.methods import METHODS
    from forgetless.methods.finding import installed_methods
    from forgetless.progress import out

    parser = argparse.ArgumentParser(prog="forgetless methods", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="for machines")
    told = _parsed(parser, arguments)
    if told is None:
        return 0
    rows = {
        name: {
            "paper": f"arXiv {kind.paper}",
            "summary": kind.summary,
            "old rows": "yes" if kind.old_rows else "no",
            "task id at test": "yes" if kind.task_id else "no",
            "extra memory": kind.extra_memory,
            "extra compute": kind.extra_compute,
            "stock PEFT": "yes" if kind.stock_peft else "no",
        }
        for name, kind in METHODS.items()
    }
    if told.json:
        print(json.dumps(rows, indent=1))
        return 0
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 1, 0))
    for name, row in rows.items():
        summary, paper = row.pop("summary"), row.pop("paper")
        needs = "; ".join(f"{key}: {value}" for key, value in row.items())
        table.add_row(f"[bold]{name}", f"{summary}\n[dim]{paper}; {needs}")
    out.print(table)
    for entry in installed_methods():
        out.print(f"{entry.name}: installed, {entry.value}", markup=False)
    out.print("Pages: docs/methods/<method>.md. Options: forgetless learn --method <method> --help")
    return 0


CHECK_EPILOG = """
  forgetless check ./mine.py:Mine          a class of yours; the file is run
  forgetless check olora replay+olora      built in, and several as one
  forgetless check --all                   every built-in method

exit codes: 0 the contract holds, 2 a clause fails, 1 an error
"""


def _check(arguments: list[str]) -> int:
    import argparse
    import json

    from forgetless.errors import UsageError

    parser = argparse.ArgumentParser(
        prog="forgetless check", description=VERBS["check"][0], exit_on_error=False, allow_abbrev=False,
        epilog=CHECK_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="as --method of learn takes it")
    parser.add_argument("--all", action="store_true", help="every built-in method")
    parser.add_argument("--json", action="store_true", help="for machines")
    told = _parsed(parser, arguments)
    if told is None:
        return 0
    if bool(told.methods) == told.all:
        raise UsageError("check which methods? forgetless check ./mine.py:Mine, or --all for every built-in one")
    from forgetless.contract.check import as_json, check_all, failed, print_findings
    from forgetless.methods import METHODS
    from forgetless.progress import out

    found = check_all([*METHODS] if told.all else told.methods)
    if told.json:
        print(json.dumps(as_json(found), indent=1, ensure_ascii=False))
    else:
        print_findings(found, out)
    return 2 if any(map(failed, found.values())) else 0


def _streams(arguments: list[str]) -> int:
    import argparse
    import json

    parser = argparse.ArgumentParser(
        prog="forgetless streams", description=VERBS["streams"][0], exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("name", nargs="?", help="one stream in full: every task, file and hash; files here are checked")
    parser.add_argument("--json", action="store_true", help="for machines")
    told = _parsed(parser, arguments)
    if told is None:
        return 0
    from forgetless.data.listing import as_text, describe_stream, list_as_text, list_streams
    from forgetless.progress import out

    found = describe_stream(told.name) if told.name else list_streams()
    if told.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print((as_text if told.name else list_as_text)(found, min(out.width, 120)))
    return 0


def _demo(arguments: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="forgetless demo", description=VERBS["demo"][0], exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--output_dir", "--output-dir", default="runs/demo", help="both runs and the report (%(default)s)"
    )
    parser.add_argument("--train_rows", "--train-rows", type=int, default=150, help="rows a task (%(default)s)")
    parser.add_argument("--test_rows", "--test-rows", type=int, default=100, help="rows a task (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    told = _parsed(parser, arguments)
    if told is None:
        return 0
    from forgetless.demo import demo

    demo(Path(told.output_dir), told.train_rows, told.test_rows, told.seed)
    return 0


def _audit(arguments: list[str]) -> int:
    from forgetless.errors import UsageError

    told = _parsed(parser := _audit_parser(), arguments)
    if told is None:
        return 0
    options = vars(told)
    if file := options.pop("verify"):
        if more := [name for name, value in options.items() if value and value != parser.get_default(name)]:
            raise UsageError(f"--verify takes nothing but the file, which holds all else; leave out {', '.join(more)}")
        return _verify(file)
    dry_run = options.pop("dry_run")
    from forgetless.config import AuditConfig
    from forgetless.progress import out

    names = options.pop("names")
    options |= {"models": names} if options["policy"] else {"reference": names[0] if names else "", "models": names[1:]}
    config = AuditConfig(**options)
    config.check()
    if dry_run:
        from forgetless.auditing.dryrun import plan_audit

        plan_audit(config)
        return 0
    from forgetless.auditing.run import EVIDENCE, audit, verdicts_in
    from forgetless.report.audit import print_audit

    record = audit(config)
    print_audit(record, verdicts_in(Path(record["path"]) / EVIDENCE), out)
    files = f"{record['path']} (audit.html, audit.md, evidence.json)"
    out.print(f"\naudit: {files}", soft_wrap=True, highlight=False, markup=False)
    return record["exit_code"]


def _verify(file: str) -> int:
    """The verdict of an evidence file, worked out again: its own exit code, or 1 where it differs."""
    from forgetless.auditing.evidence import exit_code, read_evidence, verify
    from forgetless.errors import RunError
    from forgetless.progress import out

    if differences := verify(file):
        raise RunError(f"{file}: does not hold: " + "; ".join(differences[:5]))
    evidence = read_evidence(file)
    out.print(f"{file}: verified: {evidence['outcome'] or 'no budget, no verdict'}", soft_wrap=True, markup=False)
    return exit_code(evidence)


def _audit_parser() -> argparse.ArgumentParser:
    import argparse

    from forgetless.config import ENDPOINT_APIS, GENERATORS, TEMPLATES, AuditConfig
    from forgetless.learning.engine import DEVICES, PRECISIONS

    parser = argparse.ArgumentParser(
        prog="forgetless audit", description=VERBS["audit"][0], exit_on_error=False, allow_abbrev=False,
        epilog="exit codes: 0 pass, or no budget; 2 regression; 3 insufficient evidence; 1 an error",
    )  # fmt: skip
    add = _adder(parser, AuditConfig)

    parser.add_argument(
        "names", nargs="*", metavar="REFERENCE MODEL", help="the earlier model, then those to audit: packaged models, "
        "hub names, folders with full weights or adapters, BASE+ADAPTER, run folders; a MODEL may be served: "
        "http://host:port/v1#NAME; with --policy only MODEL ...",
    )  # fmt: skip
    for name in ("tasks", "output_dir", "base_is", "policy", "system_prompt", "api_key_env"):
        add(name)
    add("endpoint_api", choices=ENDPOINT_APIS)
    add("generate_with", choices=GENERATORS)
    add("score_on", choices=("test", "validation"))
    add("on_bad_row", choices=("error", "skip"))
    for name in ("text", "probes", "judge", "max_kl", "max_drop"):
        add(name, nargs="+")
    for name in ("allow_pickle", "weights", "remedies", "show_text"):
        add(name, action="store_true")
    add("confidence", type=float)
    for name in ("window", "stride", "limit", "concurrency"):
        add(name, type=int)
    add("recover", type=int, metavar="STEPS")
    add("recover_rows", type=int, metavar="ROWS")
    add("chat_template", choices=TEMPLATES)
    add("precision", choices=PRECISIONS)
    add("device", choices=DEVICES)
    _add_loading(add)
    parser.add_argument("--verify", metavar="FILE", help="work the verdict of an evidence.json out again")
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="rows, rows that each budget needs, and minutes; no audit"
    )
    return parser


INTERPOLATE_EPILOG = """
  forgetless interpolate runs/a/tasks/01-sst2/adapter runs/a/tasks/02-bbc/adapter --tasks demo --new bbc --in both
"""


def _interpolate(arguments: list[str]) -> int:
    told = _parsed(_interpolate_parser(), arguments)
    if told is None:
        return 0
    from forgetless.config import InterpolateConfig
    from forgetless.geometry.interpolate import interpolate
    from forgetless.progress import out
    from forgetless.report.interpolation import print_interpolation

    record = interpolate(InterpolateConfig(**vars(told)))
    print_interpolation(record, out)
    files = f"{record['path']} (interpolate.html, interpolate.md, interpolate.json)"
    out.print(f"\ninterpolate: {files}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _interpolate_parser() -> argparse.ArgumentParser:
    import argparse

    from forgetless.config import SPACES, InterpolateConfig, documentation
    from forgetless.learning.engine import DEVICES, PRECISIONS

    parser = argparse.ArgumentParser(
        prog="forgetless interpolate", description=VERBS["interpolate"][0], exit_on_error=False, allow_abbrev=False,
        epilog=INTERPOLATE_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    told, add = documentation(InterpolateConfig), _adder(parser, InterpolateConfig)

    parser.add_argument("before", metavar="A", help=told["before"])
    parser.add_argument("after", metavar="B", help=told["after"])
    for name in ("tasks", "new", "plane", "output_dir", "base_is"):
        add(name)
    add("within", "--in", choices=SPACES)
    for name in ("points", "grid", "limit"):
        add(name, type=int)
    add("curve", type=int, nargs="?", const=100, metavar="STEPS")
    for name in ("learning_rate", "confidence"):
        add(name, type=float)
    add("allow_pickle", action="store_true")
    add("precision", choices=PRECISIONS)
    add("device", choices=DEVICES)
    _add_loading(add)
    return parser


def _overlap(arguments: list[str]) -> int:
    import argparse

    from forgetless.errors import UsageError

    parser = argparse.ArgumentParser(
        prog="forgetless overlap", description=VERBS["overlap"][0], exit_on_error=False, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=OVERLAP_EPILOG,
    )  # fmt: skip
    parser.add_argument(
        "models", nargs="*", metavar="ADAPTER", help="two LoRA adapters or more: folders with adapters, output folders "
        "of trainers, hub names, run folders (each of its tasks); their base need not be here",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", "--output-dir", type=Path, help="where to write; default runs/overlap-<first>-and-N-more-<hash>"
    )
    parser.add_argument(
        "--thresholds", nargs="+", type=float, metavar="K", help="an entry counts where it is larger than K times the "
        "rms entry of its update in its layer; default 0 0.01 0.1 0.5 1 2; maps show 1, or else the largest",
    )  # fmt: skip
    parser.add_argument("--base_is", "--base-is", help="all adapters are on this base, whatever they call it")
    parser.add_argument(
        "--increments", action="store_true", help="of each adapter only what it adds to the one before it: for a run, "
        "whose later adapters hold what earlier tasks added",
    )  # fmt: skip
    parser.add_argument("--allow_pickle", "--allow-pickle", action="store_true", help="read .bin files, tensors only")
    told = _parsed(parser, arguments)
    if told is None:
        return 0
    if not told.models:
        raise UsageError("overlap: which adapters? see forgetless overlap --help")
    from forgetless.geometry.overlap import THRESHOLDS, overlap, usual_folder
    from forgetless.progress import out
    from forgetless.report.overlap import print_overlap, write_overlap

    record = overlap(
        told.models, told.thresholds or THRESHOLDS, base_is=told.base_is, increments=told.increments,
        allow_pickle=told.allow_pickle,
    )  # fmt: skip
    folder = told.output_dir or usual_folder(record)
    write_overlap(record, folder)
    print_overlap(record, out)
    files = f"{folder} (overlap.html, overlap.md, overlap.json)"
    out.print(f"\noverlap: {files}", soft_wrap=True, highlight=False, markup=False)
    return 0


BLEND_EPILOG = """
  forgetless blend smollm2-135m-instruct runs/may/adapter --tasks tasks.yaml --max-drop invoices=2pp --max-kl 0.05

tasks.yaml holds the old tasks (those with a budget) and the new one. exit codes: 0 a model was written; 3 none was,
since nothing could be certified or nothing certified learns more: keep the old model; 1 an error
"""


def _blend(arguments: list[str]) -> int:
    parser = _blend_parser()
    told = _parsed(parser, arguments)
    if told is None:
        return 0
    from forgetless.config import BlendConfig
    from forgetless.geometry.borders import blend

    record = blend(BlendConfig(**vars(told)))
    _print_blends(record.get("blends", [record]))
    return record["exit_code"]


def _blend_parser() -> argparse.ArgumentParser:
    import argparse

    from forgetless.config import TEMPLATES, BlendConfig, documentation
    from forgetless.learning.engine import DEVICES, PRECISIONS

    parser = argparse.ArgumentParser(
        prog="forgetless blend", description=VERBS["blend"][0], exit_on_error=False, allow_abbrev=False,
        epilog=BLEND_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    told, add = documentation(BlendConfig), _adder(parser, BlendConfig)

    for name in ("before", "after"):
        parser.add_argument(name, metavar=name.upper(), help=told[name])
    add("tasks")
    for name in ("new", "max_drop", "max_lost", "max_kl", "text", "probes"):
        add(name, nargs="+")
    add("score_on", choices=("test", "validation"))
    add("on_bad_row", choices=("error", "skip"))
    add("confidence", type=float)
    add("borders", type=int)
    add("points", type=int)
    add("limit", type=int)
    for name in ("whole_path", "allow_pickle"):
        add(name, action="store_true")
    add("output_dir")
    add("base_is")
    add("chat_template", choices=TEMPLATES)
    add("precision", choices=PRECISIONS)
    add("device", choices=DEVICES)
    _add_loading(add)
    return parser


def _report(arguments: list[str]) -> int:
    import argparse

    from forgetless.errors import UsageError
    from forgetless.progress import out
    from forgetless.report.files import write_report
    from forgetless.report.record import render_json
    from forgetless.report.summary import summarise
    from forgetless.report.texts import with_texts

    parser = argparse.ArgumentParser(
        prog="forgetless report", description=VERBS["report"][0], exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN",
        help="run folders, several are drawn side by side; or the folder of an audit",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", "--output-dir", type=Path, help="where to write; default: the first run's folder"
    )
    parser.add_argument(
        "--show_text",
        "--show-text",
        action="store_true",
        help="write prompts and answers of the rows that turned into the report's files, which lie in the first run's "
        "folder unless --output_dir names another",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON and write no file")
    told = _parsed(parser, arguments)
    if told is None:
        return 0
    if any((folder / "audit.json").exists() for folder in told.runs):
        return _audit_report(told)
    for folder in told.runs:
        if not (folder / "run.json").exists():
            raise UsageError(
                f"{folder}: no run.json or audit.json; give a folder that `forgetless learn` or `audit` wrote"
            )
    summaries = [summarise(folder) for folder in told.runs]
    if told.show_text:
        summaries = [with_texts(one, folder) for one, folder in zip(summaries, told.runs, strict=True)]
    if told.json:
        print(render_json(summaries), end="")
        return 0
    for file in write_report(summaries, told.output_dir or told.runs[0]).values():
        out.print(str(file), soft_wrap=True, highlight=False)
    return 0


def _audit_report(told: argparse.Namespace) -> int:
    """The page of an audit's folder, drawn again."""
    from forgetless.errors import UsageError
    from forgetless.progress import out
    from forgetless.report.audit_page import redraw

    if len(told.runs) > 1 or told.json:
        raise UsageError("an audit is drawn by itself: give its folder alone, without --json (audit.json is in it)")
    out.print(str(redraw(told.runs[0], told.output_dir, told.show_text)), soft_wrap=True, highlight=False)
    return 0


def _forget_rows(arguments: list[str]) -> int:
    import argparse

    from forgetless.learning.forget_rows import forget_rows
    from forgetless.progress import out
    from forgetless.runs.folder import FORGOTTEN_ROWS

    parser = argparse.ArgumentParser(
        prog="forgetless forget-rows", description=VERBS["forget-rows"][0], exit_on_error=False, allow_abbrev=False,
        epilog="What the adapters learnt from the rows stays in their weights. The next task replays the others only.",
    )  # fmt: skip
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder that `forgetless learn` wrote")
    parser.add_argument(
        "task", metavar="TASK", help="the task whose kept rows, and answers to its test rows, are deleted"
    )
    told = _parsed(parser, arguments)
    if told is None:
        return 0
    record = forget_rows(told.run, told.task)
    folders = ", ".join(f"{name} {count}" for name, count in record["rows"].items()) or "none were kept"
    out.print(f"rows of {told.task} deleted from the memory of: {folders}", markup=False, highlight=False)
    if record["texts"]:
        out.print(f"texts deleted from {record['texts']} records of predictions", markup=False, highlight=False)
    out.print(f"record: {told.run / FORGOTTEN_ROWS}", soft_wrap=True, markup=False, highlight=False)
    return 0


def _merge(arguments: list[str]) -> int:
    told = _parsed(_merge_parser(), arguments)
    if told is None:
        return 0
    from forgetless.config import MergeConfig
    from forgetless.geometry.merging import MARKDOWN, RECORD, merge
    from forgetless.progress import out
    from forgetless.report.merge import print_merge

    record = merge(MergeConfig(**vars(told)))
    print_merge(record, out)
    out.print(f"\nmerged: {record['path']} ({RECORD}, {MARKDOWN})", soft_wrap=True, highlight=False, markup=False)
    return 0


def _merge_parser() -> argparse.ArgumentParser:
    import argparse

    from forgetless.config import MERGES, MergeConfig, documentation
    from forgetless.learning.engine import DEVICES, PRECISIONS

    parser = argparse.ArgumentParser(
        prog="forgetless merge", description=VERBS["merge"][0], exit_on_error=False, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=MERGE_EPILOG,
    )  # fmt: skip
    told, add = documentation(MergeConfig), _adder(parser, MergeConfig)

    parser.add_argument("models", nargs="+", metavar="ADAPTER", help=told["models"])
    add("output_dir", metavar="DIR")
    add("method", choices=MERGES, metavar="METHOD")
    add("weights", nargs="+", type=float, metavar="W")
    for name in ("rank", "limit"):
        add(name, type=int)
    add("density", type=float)
    add("seed", type=int)
    for name in ("rows", "text"):
        add(name, nargs="+", metavar="FILE")
    for name in ("tasks", "base_is"):
        add(name)
    for name in ("kl_by_layer", "allow_pickle"):
        add(name, action="store_true")
    add("precision", choices=PRECISIONS)
    add("device", choices=DEVICES)
    _add_loading(add)
    return parser


COMPARE_EPILOG = """
  forgetless compare runs/sweep                                     every run below a folder
  forgetless compare runs/a runs/b other.json --archive all.zip     with a matrix of other code; kept as one file
  forgetless compare all.zip --output_dir again                     drawn again from that file
"""


def _compare(arguments: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="forgetless compare", description=VERBS["compare"][0], exit_on_error=False, allow_abbrev=False,
        epilog=COMPARE_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders, folders that hold some, matrices of other code (.json, "
        "docs/compare.md), archives (.zip); they are only read",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", "--output-dir", "--output", type=Path, default=Path("runs/compare"), metavar="DIR",
        help="where to write the page, tables (.md .csv .tex), figures (.svg .pdf) and .bib (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--archive", type=Path, metavar="FILE.zip", help="also keep all that is compared in one file, without weights "
        "and row texts",
    )  # fmt: skip
    forms = parser.add_mutually_exclusive_group()
    for name in COMPARE_FORMS:
        forms.add_argument(f"--{name}", action="store_true", help="print this form and write nothing")
    told = _parsed(parser, arguments)
    if told is None:
        return 0
    from forgetless.comparing.comparison import compare
    from forgetless.progress import out
    from forgetless.report import compare as forms_of
    from forgetless.runs.folder import json_text

    record = compare(told.runs, told.archive)
    for name in COMPARE_FORMS:
        if getattr(told, name):
            print(json_text(record) if name == "json" else getattr(forms_of, f"compare_{name}")(record), end="")
            return 0
    names = forms_of.write_compare(record, told.output_dir)
    forms_of.print_compare(record, out)
    out.print(f"\ncompare: {told.output_dir} ({', '.join(names)})", soft_wrap=True, highlight=False, markup=False)
    return 0


COMPARE_FORMS = ("json", "csv", "latex", "markdown")

FORECAST_EPILOG = """
  forgetless forecast fit runs/sweep --output law.json      points of runs or of a table (.csv, .json) to laws
  forgetless forecast law.json --rank 64 --steps 5000       forgetting there, with an interval
  forgetless forecast law.json --rank 64 --max-kl 0.02      the most steps within a budget
  forgetless forecast law.json --steps 5000 --max-kl 0.02   the largest rank within it
"""


def _forecast(arguments: list[str]) -> int:
    import json

    if arguments[:1] == ["fit"]:
        return _forecast_fit(arguments[1:])
    told = _parsed(_forecast_parser(), arguments)
    if told is None:
        return 0
    from forgetless.forecasting.asking import ask
    from forgetless.progress import out
    from forgetless.report.forecast import forecast_lines

    options = vars(told)
    as_json, law = options.pop("json"), options.pop("law")
    answer = ask(law, **options)
    if as_json:
        print(json.dumps(answer, indent=1))
        return 0
    for line in forecast_lines(answer):
        out.print(line, soft_wrap=True, highlight=False, markup=False)
    return 0


def _forecast_parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(
        prog="forgetless forecast", description=VERBS["forecast"][0], exit_on_error=False, allow_abbrev=False,
        epilog=FORECAST_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("law", type=Path, metavar="LAW", help="a file that `forgetless forecast fit` wrote")
    parser.add_argument("--rank", type=float, help="rank of the adapter, with the layers that the runs tuned")
    parser.add_argument("--parameters", type=float, help="tuned parameters, instead of a rank")
    parser.add_argument("--steps", type=float, help="optimizer steps")
    parser.add_argument(
        "--max_kl", "--max-kl", type=float, metavar="NATS",
        help="the inverse: the most steps (for a rank), or the largest rank (for steps), within this forgetting",
    )  # fmt: skip
    parser.add_argument("--confidence", type=float, default=0.95, help="of intervals and of the inverse (%(default)s)")
    parser.add_argument("--dataset", help="which law, where the file has several")
    parser.add_argument("--method", help="the same")
    parser.add_argument("--learning_rate", "--learning-rate", type=float, help="the same")
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


def _forecast_fit(arguments: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="forgetless forecast fit", exit_on_error=False, allow_abbrev=False,
        description="laws of forgetting from measured points; docs/forecast.md says what a run must record",
    )  # fmt: skip
    parser.add_argument(
        "points", nargs="+", metavar="POINTS", help="run folders or folders of them, output folders of trainers with "
        "ForgettingCallback, or tables (.csv, .json, .jsonl) with the columns parameters or rank, steps, loss, "
        "forgetting, base, and where they vary learning_rate, dataset, method, run or seed",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("law.json"), help="the file to write (%(default)s)")
    parser.add_argument("--law", help="the law to forecast with; default: the lowest AICc of those identified")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of starts and draws (%(default)s)")
    told = _parsed(parser, arguments)
    if told is None:
        return 0
    from forgetless.forecasting.forecast import fit_laws, write_laws
    from forgetless.progress import out
    from forgetless.report.forecast import laws_markdown, print_laws
    from forgetless.runs.folder import write_whole

    record = fit_laws(told.points, law=told.law, confidence=told.confidence, seed=told.seed)
    write_laws(record, told.output)
    write_whole(told.output.with_suffix(".md"), laws_markdown(record))
    print_laws(record, out)
    out.print(f"\nlaw: {told.output}, {told.output.with_suffix('.md')}", soft_wrap=True, highlight=False, markup=False)
    return 0


SWEEP_EPILOG = """
  forgetless sweep grid.yaml --dry-run               runs, hours and disk; nothing is trained
  forgetless sweep grid.yaml --workers 2             two runs side by side; given again it goes on
  forgetless sweep grid.yaml --list > commands       a command a run, for a job queue or an array of jobs
  forgetless sweep grid.yaml --ray auto              on a Ray cluster whose machines share the folder

docs/sweep.md has the file's form. exit codes: 0 every run is done; 1 some failed, or an error
"""


def _sweep(arguments: list[str]) -> int:
    told = _parsed(_sweep_parser(), arguments)
    if told is None:
        return 0
    from forgetless.errors import UsageError
    from forgetless.progress import out
    from forgetless.report.sweep import print_sweep
    from forgetless.sweeping import commands

    modes = ("list", "cell", "dry_run", "ray")
    if len([name for name in modes if getattr(told, name)]) > 1 and not (told.dry_run and told.ray):
        raise UsageError("give one of --list, --cell, --dry-run and --ray")
    if told.workers < 1:
        raise UsageError(f"workers must be 1 or above, not {told.workers}")
    if told.list:
        print("\n".join(commands.listed(told.file, told.output_dir)))
        return 0
    if told.dry_run:
        out.print(commands.planned(told.file, told.output_dir, told.workers), markup=False, soft_wrap=True)
        return 0
    if told.cell:
        commands.one(told.file, told.output_dir, told.cell)
        return 0
    record = commands.sweep(told.file, told.output_dir, workers=told.workers, ray=told.ray)
    print_sweep(record, out)
    out.print(f"\nsweep: {record['path']} (sweep.md, sweep.json, cells/)", soft_wrap=True, markup=False)
    return 0 if record["status"] == "complete" else 1


def _sweep_parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(
        prog="forgetless sweep", description=VERBS["sweep"][0], exit_on_error=False, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=SWEEP_EPILOG,
    )  # fmt: skip
    parser.add_argument("file", metavar="SWEEP.yaml", help="what is common, what varies, what is chosen, the limits")
    parser.add_argument(
        "--output_dir", "--output-dir", "--output", default="", metavar="DIR",
        help="the sweep's folder; default runs/sweep-<the file's name>",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="runs at once on this machine (%(default)s)"
    )
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="time a few steps, train nothing")
    parser.add_argument("--list", action="store_true", help="print a command for each run that is not done")
    parser.add_argument("--cell", metavar="ID", help="make this run and the trials that it needs, and no other")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="a Ray cluster: auto, ray://HOST:PORT, or local for --workers runs at once here",
    )
    return parser


DOCTOR_EPILOG = """
  forgetless doctor                                                     this environment
  forgetless doctor runs/may                                            a run folder
  forgetless doctor runs/may/tasks/01-letters/adapter --base ./llama    an adapter of any trainer; does the base fit?
  forgetless doctor ./merged --json                                     full weights, for machines

exit codes: 0 no problem (notes are none), 2 a problem, 1 a usage error
"""


def _doctor(arguments: list[str]) -> int:
    import argparse
    import json

    parser = argparse.ArgumentParser(
        prog="forgetless doctor", description=VERBS["doctor"][0], exit_on_error=False, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=DOCTOR_EPILOG,
    )  # fmt: skip
    parser.add_argument("path", nargs="?", default="", help="a run folder, a part of one, an adapter or full weights; "
                        "default: this environment")  # fmt: skip
    parser.add_argument(
        "--base", metavar="MODEL", help="does the adapter or run fit this base, and what does it change?"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    told = _parsed(parser, arguments)
    if told is None:
        return 0
    from forgetless.checkup.doctor import doctor
    from forgetless.progress import out
    from forgetless.report.doctor import print_diagnosis

    found = doctor(told.path, told.base)
    if told.json:
        print(json.dumps(found.as_json(), indent=1, ensure_ascii=False))
    else:
        print_diagnosis(found, out)
    return found.exit_code


def _adder(parser: argparse.ArgumentParser, config: type) -> Callable[..., None]:
    """Adds an option by its field's name (--a_b and --a-b, or another flag), default and docstring."""
    from forgetless.config import documentation

    told = documentation(config)

    def add(name: str, flag: str | None = None, **how: Any) -> None:
        default = getattr(config, name)
        flags = [flag] if flag else dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        shown = f" (default {default})" if default else ""
        parser.add_argument(*flags, dest=name, default=default, help=(told[name] + shown).replace("%", "%%"), **how)

    return add


def _add_loading(add: Callable[..., None]) -> None:
    """The options of `LoadSettings`."""
    from forgetless.model.loading import LOADINGS

    add("load_in", choices=LOADINGS)
    add("attn_implementation", metavar="NAME")
    add("trust_remote_code", nargs="+", metavar="MODEL")


def _parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace | None:
    """The parsed arguments, or None where only help was asked for; a usage error exits 1 like every other error."""
    import argparse

    from forgetless.errors import UsageError, nearest

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


VERBS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "audit": ("what did a fine-tune make a model forget? any trainer's models against an earlier one", _audit),
    "blend": ("between two models, the one that learns most and keeps what must not be forgotten", _blend),
    "merge": ("merge an adapter into its base, or several into one; says what it cost", _merge),
    "overlap": ("do adapters change the same weights, write to the same outputs, read the same inputs?", _overlap),
    "interpolate": ("loss and score between two models: line, curve, plane; barrier, distance, CKA", _interpolate),
    "learn": ("learn a stream of tasks, score every task after each", _learn),
    "sweep": ("a grid of runs: methods x orders x seeds x options, on equal terms; here, in a queue or on Ray", _sweep),
    "demo": ("see a model forget, and forget less: two methods on three small tasks", _demo),
    "doctor": ("is it whole, whose is it, of use? an environment, a run folder, an adapter, a model", _doctor),
    "forget-rows": ("delete a task's rows from a run's replay memory, with a record", _forget_rows),
    "report": ("draw the report of one or several run folders again", _report),
    "compare": ("methods over seeds and orders: intervals, paired tests, learning against forgetting, cost", _compare),
    "forecast": ("how much will be forgotten at a rank and a number of steps, and how far a budget goes", _forecast),
    "methods": ("list the methods", _methods),
    "check": ("does a method, yours too, keep the contract? on a tiny random model", _check),
    "streams": ("list the streams by name: source, licence, hashes, rows, scorer, and how to get them", _streams),
}
