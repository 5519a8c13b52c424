"""An audit's verdict as Markdown short enough for a pull request, and as JUnit XML for a pipeline. No row texts."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping

from forgetless.auditing.budgets import MAX_DROP, written
from forgetless.auditing.measures import REFERENCE
from forgetless.auditing.verdict import (
    INSUFFICIENT,
    MEASURED,
    NOT_SHOWN,
    OVER,
    PASS,
    REGRESSION,
    UNCLEAR,
    WITHIN,
    WORSE,
    Finding,
    Verdict,
)  # fmt: skip
from forgetless.report.markdown import escaped, pipe_table
from forgetless.report.words import clean, number, p_value

_SAID = {
    PASS: "pass: every loss is shown to be within its budget",
    REGRESSION: "regression: a loss is shown to be over its budget",
    INSUFFICIENT: "insufficient evidence: these rows do not show whether every loss is within its budget",
    None: "no verdict, since no budget was given",
}
_SAID_OF_WAIVED = {OVER: "over budget", UNCLEAR: "not shown to be within budget"}
MOST_LINES = 40  # findings that a Markdown table lists
MOST_QUIET = 10  # findings that are only named


def in_words(verdict: Verdict) -> str:
    """The outcome in words. Of a pass: what is waived, and what is bounded of a text."""
    if verdict.outcome != PASS:
        return _SAID[verdict.outcome]
    kept = [one for one in verdict.findings if one.status == WITHIN]
    on_texts = next((f", {counted(one)}" for one in kept if one.clip), "")
    if not verdict.waived:
        return _SAID[PASS] + on_texts
    waived = Counter(_SAID_OF_WAIVED[one.status] for one in verdict.waived)
    told = " and ".join(f"{many} {'loss' if many == 1 else 'losses'} {what}" for what, many in waived.items())
    rest = f"; every other loss is shown to be within its budget{on_texts}" if kept else ""
    return f"pass with waivers: {told} {'is' if len(verdict.waived) == 1 else 'are'} waived{rest}"


def verdict_markdown(verdicts: Mapping[str, Verdict]) -> str:
    """A heading, a table and the notes for every model."""
    lines = []
    for model, verdict in verdicts.items():
        listed = [one for one in verdict.findings if one.budget is not None or one.status in (WORSE, MEASURED)]
        shown = listed[:MOST_LINES]
        lines += [f"### {escaped(clean(model))}: {in_words(verdict)}", ""]
        if shown:
            lines += [*pipe_table(finding_head(verdict.confidence), [finding_cells(one) for one in shown]), ""]
        quiet = [f"{named(one)} (a loss from {_least(one)} would show)" for one in verdict.findings
                 if one.status == NOT_SHOWN]  # fmt: skip
        lines += [f"- No loss shown: {escaped(', '.join(quiet[:MOST_QUIET]))}"] if quiet else []
        lines += [f"- {len(quiet) - MOST_QUIET} more without a budget: no loss shown"] if quiet[MOST_QUIET:] else []
        lines += [f"- {len(listed) - len(shown)} more are in the evidence file"] if len(listed) > len(shown) else []
        lines += [f"- {escaped(text)}" for text in (*map(needed, shown), *map(clean, verdict.notes)) if text]
        lines += [""]
    return "\n".join(lines)


def verdict_junit(verdicts: Mapping[str, Verdict]) -> str:
    """One suite a model, one case a finding; what is not shown to be within its budget is a failure."""
    root = ET.Element("testsuites", name="forgetless audit")
    for model, verdict in verdicts.items():
        cases = [_case(clean(model), one) for one in verdict.findings]
        counts = {kind: str(sum(case.find(kind) is not None for case in cases)) for kind in ("failure", "skipped")}
        suite = ET.SubElement(
            root, "testsuite", name=clean(model), tests=str(len(cases)),
            failures=counts["failure"], errors="0", skipped=counts["skipped"],
        )  # fmt: skip
        suite.extend(cases)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + _allowed(ET.tostring(root, encoding="unicode")) + "\n"


def sentence(finding: Finding) -> str:
    """One line: `invoices: 1.5 pp lost (0.2 to 3.1) on 400 rows, budget 2pp: insufficient evidence`."""
    loss = "no rows" if finding.loss is None else f"{amount(finding, finding.loss)} lost"
    budget = "" if finding.budget is None else f", budget {written(finding.option, finding.budget)}"
    budget += f" ({counted(finding)})" if budget and finding.clip else ""
    return f"{named(finding)}: {loss} ({bounds(finding)}) on {finding.rows:,} rows{budget}: {_status(finding)}"


def needed(finding: Finding) -> str:
    """How far these rows are from an answer; empty where there is one."""
    if finding.status != UNCLEAR:
        return ""
    name, needed = named(finding), finding.rows_needed
    if not finding.rows:
        return f"{name}: no rows, so nothing is shown"
    if needed is None and finding.clipped:
        return f"{name}: documents moved further than the clip, so no number of rows would show a small loss"
    if needed is None:
        return f"{name}: the loss lies so near its budget that no number of rows like these would tell"
    return f"{name}: about {_rounded(needed):,} rows like these would tell; there are {finding.rows:,}"


def counted(finding: Finding) -> str:
    """What the bounds of a text hold for: without a limit no sample bounds a mean."""
    return f"each document counted as at most {finding.clip:g} nats/token"


def amount(finding: Finding, value: float) -> str:
    """A loss in its unit: `1.5 pp`, `0.032 nats`."""
    return f"{number(100 * value)} pp" if finding.option == MAX_DROP else f"{value:.3g} nats/token"


def finding_head(confidence: float) -> list[str]:
    """The columns of `finding_cells`."""
    return ["", "rows", "loss", f"{number(100 * confidence)} % bounds", "budget", "shown from", "found"]


def finding_cells(finding: Finding) -> list[str]:
    """A finding as a row of a table."""
    loss = "none" if finding.loss is None else amount(finding, finding.loss)
    budget = "" if finding.budget is None else written(finding.option, finding.budget)
    return [named(finding), f"{finding.rows:,}", loss, bounds(finding), budget, _least(finding), _status(finding)]


def _least(finding: Finding) -> str:
    """The least loss above the budget (without one: at all) that as many rows typically show."""
    return "-" if finding.least_shown is None else amount(finding, finding.least_shown)


def named(finding: Finding) -> str:
    """The name of what was measured, and against what where that is not the reference."""
    return clean(finding.name) + _against(finding)


def _against(finding: Finding) -> str:
    return "" if finding.against == REFERENCE else f" (against the {finding.against})"


def bounds(finding: Finding) -> str:
    """`0.2 to 3.1`; of a text with documents beyond the clip only the lower one is a bound."""
    low, high = finding.low, finding.high
    if finding.option == MAX_DROP:
        return f"{number(100 * low)} to {number(100 * high)}"
    return f"{low:.3g} or more" if finding.clipped else f"{low:.3g} to {high:.3g}"


def _status(finding: Finding) -> str:
    p = f" (p {p_value(finding.p)})" if finding.p is not None and finding.status in (OVER, WORSE) else ""
    return f"{finding.status}{p}{', waived' if finding.waived else ''}"


def _case(model: str, finding: Finding) -> ET.Element:
    case = ET.Element("testcase", classname=model, name=clean(finding.budget_text) + _against(finding), time="0")
    if finding.status in (OVER, UNCLEAR):
        child = ET.SubElement(case, "skipped" if finding.waived else "failure", type=finding.status)
        child.set("message", "; ".join(filter(None, (sentence(finding), needed(finding)))))
    else:
        ET.SubElement(case, "system-out").text = sentence(finding)
    return case


def _allowed(text: str) -> str:
    """Without characters that XML 1.0 has no way to write."""
    return re.sub("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _rounded(rows: int) -> int:
    """Up to two digits: a plan is no more precise."""
    unit = 10 ** max(len(str(rows)) - 2, 0)
    return -(-rows // unit) * unit
