"""`forgetless audit`."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetless.cli.parsing import add_loading_options, option_adder, parsed, parser_for
from forgetless.errors import RunError, UsageError


def run(arguments: list[str]) -> int:
    told = parsed(parser := make_parser(), arguments)
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
    from forgetless.progress import out

    if differences := verify(file):
        raise RunError(f"{file}: does not hold: " + "; ".join(differences[:5]))
    evidence = read_evidence(file)
    out.print(f"{file}: verified: {evidence['outcome'] or 'no budget, no verdict'}", soft_wrap=True, markup=False)
    return exit_code(evidence)


def make_parser() -> argparse.ArgumentParser:
    from forgetless.config import ENDPOINT_APIS, GENERATORS, TEMPLATES, AuditConfig
    from forgetless.learning.engine import DEVICES, PRECISIONS

    parser = parser_for("audit", "exit codes: 0 pass, or no budget; 2 regression; 3 insufficient evidence; 1 an error")
    add = option_adder(parser, AuditConfig)

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
    add_loading_options(add)
    parser.add_argument("--verify", metavar="FILE", help="work the verdict of an evidence.json out again")
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="rows, rows that each budget needs, and minutes; no audit"
    )
    return parser
