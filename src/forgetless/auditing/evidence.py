"""The evidence of an audit: one file from which its verdict can be worked out again.

It holds hashes of weights, data and policy, versions, settings, the numbers of every row (no texts), findings and
verdict, and its own sha256. The bytes are canonical: keys in order, no spaces, the shortest decimals that give the
same float. The hash shows that a file was changed by accident or without care; who must rule out more signs it.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forgetless.auditing.budgets import MAX_DROP, Budget
from forgetless.auditing.measures import Divergence, Measure, Scores
from forgetless.auditing.verdict import EXIT_CODES, Finding, Terms, Verdict, Waiver, judge, worst
from forgetless.errors import ForgetlessError, RunError
from forgetless.runs.folder import read_json, write_whole
from forgetless.runs.seal import canonical, own_hash

FORMAT = 1
FACTS = ("weights", "data", "policy", "versions", "settings")
"""What an audit knows beside its numbers: sha256 of weights by role, of data by name, of the policy file or None;
versions by package; settings by name."""
CLOSE = 1e-9  # between numbers that two versions of the same library work out


def make_evidence(models: Mapping[str, Sequence[Measure]], terms: Terms, facts: Mapping[str, Any]) -> dict:
    """The evidence on some models, each with its measures; every one of `facts` must be told."""
    if facts.keys() != set(FACTS):
        raise ValueError(f"facts: {sorted(facts)} instead of {sorted(FACTS)}")
    judged = {name: judge(measures, terms) for name, measures in models.items()}
    told = {
        "format": FORMAT,
        **facts,
        "terms": _plain(terms),
        "models": [
            {"name": name, "measures": [_measure_record(one) for one in models[name]], **_verdict_record(verdict)}
            for name, verdict in judged.items()
        ],
        "outcome": worst(verdict.outcome for verdict in judged.values()),
    }
    return told | {"sha256": own_hash(told)}


def write_evidence(file: Path, evidence: dict) -> None:
    write_whole(file, canonical(evidence).decode("utf-8") + "\n")


def read_evidence(file: str | Path) -> dict:
    """The content of an evidence file; RunError for anything else."""
    file = Path(file)
    told = read_json(file)
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        found = told.get("format") if isinstance(told, dict) else None
        raise RunError(f"{file}: format {found!r} instead of {FORMAT}; give the evidence file that an audit wrote")
    return told


def verify(file: str | Path) -> list[str]:
    """What differs between the file and the verdict worked out again from its rows and budgets; [] if nothing does."""
    told = read_evidence(file)
    try:
        terms = _terms(told["terms"])
        models = {one["name"]: [_measure(record) for record in one["measures"]] for one in told["models"]}
        again = make_evidence(models, terms, {key: told[key] for key in FACTS})
    except KeyError as error:
        raise RunError(f"{file}: no {error}; it was cut or is of another version, take the original") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError, ForgetlessError) as error:
        raise RunError(f"{file}: cannot be worked out again: {error}") from error
    found = [] if own_hash(told) == told.get("sha256") else ["sha256: the file was changed after it was written"]
    return found + [text for text in _differences("", told, again) if not text.startswith("sha256:")]


def exit_code(evidence: dict) -> int:
    return EXIT_CODES[evidence["outcome"]]


def verdict_of(model: dict) -> Verdict:
    """One entry of `models` as it was judged."""
    findings = tuple(Finding(**one) for one in model["findings"])
    return Verdict(model["outcome"], model["confidence"], findings, tuple(model["notes"]))


def _differences(place: str, told: Any, again: Any) -> Iterator[str]:
    """Where two JSON values differ: `models[0].findings[2].high: 0.018 in the file, 0.024 worked out again`."""
    if isinstance(told, dict) and isinstance(again, dict):
        for key in sorted(told.keys() | again.keys()):
            yield from _differences(f"{place}.{key}".lstrip("."), told.get(key), again.get(key))
    elif isinstance(told, list) and isinstance(again, list) and len(told) == len(again):
        for number, pair in enumerate(zip(told, again, strict=True)):
            yield from _differences(f"{place}[{number}]", *pair)
    elif not _same(told, again):
        yield f"{place}: {told!r} in the file, {again!r} worked out again"


def _same(told: Any, again: Any) -> bool:
    if isinstance(told, float) and isinstance(again, float):
        return math.isclose(told, again, rel_tol=CLOSE, abs_tol=CLOSE)
    return told == again


# ---------------------------------------------------------------- as JSON and back


def _verdict_record(verdict: Verdict) -> dict:
    return {
        "findings": [asdict(finding) for finding in verdict.findings],
        "outcome": verdict.outcome,
        "confidence": verdict.confidence,
        "notes": list(verdict.notes),
    }


def _plain(terms: Terms) -> dict:
    return json.loads(json.dumps(asdict(terms), default=datetime.date.isoformat))


def _terms(told: dict) -> Terms:
    return Terms(
        today=datetime.date.fromisoformat(told["today"]),
        budgets=tuple(Budget(**one) for one in told["budgets"]),
        anchor_budgets=tuple(Budget(**one) for one in told["anchor_budgets"]),
        confidence=told["confidence"],
        waivers=tuple(Waiver(**one | {"until": datetime.date.fromisoformat(one["until"])}) for one in told["waivers"]),
    )


def _measure_record(measure: Measure) -> dict:
    return {"option": measure.option} | {
        key: list(one) if isinstance(one, tuple) else one for key, one in asdict(measure).items()
    }


def _measure(told: dict) -> Measure:
    kind: Callable[..., Measure] = Scores if told["option"] == MAX_DROP else Divergence
    return kind(**{key: tuple(one) if isinstance(one, list) else one for key, one in told.items() if key != "option"})
