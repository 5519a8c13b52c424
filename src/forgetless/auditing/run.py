"""An audit from its options to its files: `audit(AuditConfig(...))`.

evidence.json    hashes, settings, the numbers of every row, findings and verdict: `--verify` works it out again
audit.json       the same in tables: scores, flips, divergences, refusals, sanity, weights,
                 what comes back of a loss and what would help
audit.html       one page, in plain words first
audit.md         short enough for a pull request
junit.xml        for a pipeline
texts.jsonl      only with show_text: prompts and answers of the rows that turned, documents that moved furthest
history.jsonl    every audit that was begun in this folder, and how it ended
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from forgetless.auditing.evidence import exit_code, make_evidence, read_evidence, verdict_of, write_evidence
from forgetless.auditing.history import begin, end
from forgetless.auditing.measures import REFERENCE
from forgetless.auditing.measuring import Found, measure, measures_of
from forgetless.auditing.record import audit_record, moved_texts, turned_texts
from forgetless.auditing.recovery import recoveries
from forgetless.auditing.remedies import remedies
from forgetless.auditing.session import AuditSession, prepare
from forgetless.auditing.verdict import Verdict
from forgetless.config import AuditConfig
from forgetless.errors import quoting
from forgetless.model.loading import loaded_as_told
from forgetless.report.audit import audit_markdown
from forgetless.report.audit_page import redraw
from forgetless.report.verdict import verdict_junit
from forgetless.runs.folder import make_folder, write_lines, write_whole
from forgetless.runs.seal import write_sealed

EVIDENCE, RECORD, MARKDOWN, JUNIT = "evidence.json", "audit.json", "audit.md", "junit.xml"
TEXTS, HISTORY = "texts.jsonl", "history.jsonl"


@loaded_as_told
def audit(config: AuditConfig) -> dict:
    """What the models lost against the reference; gives the content of audit.json, with `path` and `exit_code`.

    Raises a ForgetlessError for what cannot be compared or read.
    """
    with quoting(config.show_text):
        session = prepare(config)
        make_folder(session.folder, "give another output_dir")
        history, policy = session.folder / HISTORY, session.policy.sha256 if session.policy else None
        begun, earlier = begin(history, session.weights, policy, _now())
        evidence = None
        try:
            evidence, record = _measured(session, earlier)
        finally:
            end(history, begun, evidence, _now())
    return record | {"path": str(session.folder), "exit_code": exit_code(evidence)}


def _measured(session: AuditSession, earlier: list[dict]) -> tuple[dict, dict]:
    """The evidence and the record, both written; `earlier`: audits of one of these models in the same folder."""
    found = measure(session)
    if session.config.recover:
        found.recovered = recoveries(session, found)
    if session.config.remedies:
        found.remedies = remedies(session, found)
    measured = {one.name: measures_of(session, found, one.name) for one in session.audited}
    data = {name: states.windows.content for name, states in found.sides[REFERENCE].states.items()}
    evidence = make_evidence(measured, session.terms, session.facts(data))
    record = audit_record(session, found, evidence)
    record["earlier_audits"] = [{key: one[key] for key in ("time", "outcome")} for one in earlier]
    _write(session, found, evidence, record)
    return evidence, record


def _write(session: AuditSession, found: Found, evidence: dict, record: dict) -> None:
    folder, again = session.folder, (session.folder / RECORD).exists()
    verdicts = {model["name"]: verdict_of(model) for model in evidence["models"]}
    write_evidence(folder / EVIDENCE, evidence)
    write_sealed(folder / RECORD, record)
    write_whole(folder / MARKDOWN, audit_markdown(record, verdicts))
    write_whole(folder / JUNIT, verdict_junit(verdicts))
    if session.config.show_text:
        write_lines(folder / TEXTS, [*turned_texts(session, found), *moved_texts(found, record)])
    elif again:  # those of an earlier audit
        (folder / TEXTS).unlink(missing_ok=True)
    redraw(folder, show_text=session.config.show_text)


def verdicts_in(file: Path) -> dict[str, Verdict]:
    """The verdicts of an evidence file by model."""
    return {model["name"]: verdict_of(model) for model in read_evidence(file)["models"]}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
