"""Made-up records of audits with their evidence, realistic in shape, for the tests of the audit's page."""

from __future__ import annotations

import datetime
import math

import numpy as np
from summaries import HOSTILE, metric

from forgetless.auditing.budgets import Budget
from forgetless.auditing.evidence import make_evidence
from forgetless.auditing.measures import Divergence, Scores
from forgetless.auditing.recovery import HIDDEN
from forgetless.auditing.verdict import Terms
from forgetless.auditing.where import CERTAINTIES

GROUPED = ("domain", "token_type", "place", "certainty", "documents")
TODAY = datetime.date(2026, 8, 1)


def outcomes(n: int, right: float) -> tuple[float, ...]:
    return tuple(float(i < round(right * n)) for i in range(n))


def case(
    models: list[str], columns: dict[str, tuple[str, int, float]], texts: dict[str, int], damage: list[float], *,
    budgets: tuple[Budget, ...] = (), judged: tuple[str, ...] = (), more: bool = False, reference: str = "runs/april",
) -> tuple[dict, dict]:  # fmt: skip
    """(record, evidence). `columns`: kind, rows, the reference's score; `damage`: how much each model lost, 0 to 1."""
    measures: dict[str, list] = {}
    scores: dict[str, dict] = {}
    divergences: dict[str, dict] = {}
    for name, lost in zip(models, damage, strict=True):
        measures[name], scores[name], divergences[name] = [], {}, {}
        for j, (column, (_, n, right)) in enumerate(columns.items()):
            before, fallen = outcomes(n, right), round(lost * n * right * (0.2 + 0.8 * ((j * 5) % 7) / 6))
            risen = min(3, n - round(right * n))
            values = [0.0] * fallen + list(before[fallen : n - risen]) + [1.0] * risen
            measures[name].append(Scores(column, before, tuple(values)))
            scores[name][column] = {"likelihood": sum(values) / n}
        for probe in judged:
            measures[name].append(Scores(probe, outcomes(60, 0.9), outcomes(60, 0.9 - 0.7 * lost)))
        for j, (text, documents) in enumerate(texts.items()):
            kl = 0.9 * lost**2 / (j + 1) + 2e-5
            nats = tuple(float(x) for x in kl * 100 * (1 + 0.5 * np.sin(np.arange(documents))))
            measures[name].append(Divergence(text, nats, (100,) * documents))
            means = {"cross_entropy": 1.7 + kl, "entropy": 1.7, "kl": kl, "agree": 1 - 0.6 * lost,
                     "outside_reference": 0.0, "outside_model": 0.0}  # fmt: skip
            divergences[name][text] = {
                "per_token": means, "per_document": means | {"kl": 0.9 * kl}, "words": 49152
            }  # fmt: skip
    evidence = make_evidence(measures, Terms(TODAY, budgets), {
        "weights": {"reference": "ab12" * 16} | {f"model {i + 1}": "cd34" * 16 for i in range(len(models))},
        "data": {name: "ef56" * 16 for name in (*columns, *texts)}, "policy": None,
        "versions": {"forgetless": "0.1.0", "torch": "2.13.0"},
        "settings": {"computed_on": "cpu, float32", "limit": None, "kl_clip": 1.0, "chat_template": True},
    })  # fmt: skip
    sanity = {"own-answers": {"answers": 157, "unfinished": 30, "empty": 1}} | {p: {"answers": 60} for p in judged}
    record = {
        "format": 1,
        "reference": {"name": reference, "identity": {"weights": "ab12" * 16, "adapter": None}, "notes": []},
        "confidence": 0.95,
        "computed_on": "cpu, float32",
        "evidence": evidence["sha256"],
        "outcome": evidence["outcome"],
        "columns": [
            {"name": name, "kind": kind, "measure": "likelihood", "rows": n} for name, (kind, n, _) in columns.items()
        ],
        "probes": [
            {"name": name, "kind": "knowledge", "source": "https://example.com/set (a package)", "licence": "MIT",
             "protocol": "plain text, no examples", "rows": n, "sha256": "77" * 32, "notes": []}
            for name, (kind, n, _) in columns.items() if kind == "probe"
        ],
        "texts": [
            {"name": name, "source": "the reference's greedy answers of up to 64 tokens", "documents": documents,
             "tokens": 100 * documents, "windows": {"length": 512, "stride": 512}, "sha256": "99" * 32,
             "noise": {"kl": 3.1e-5}}
            for name, documents in texts.items()
        ],
        "reference_scores": {name: {"likelihood": right} for name, (_, _, right) in columns.items()},
        "reference_refusals": {name: refused(0.9) for name in judged},
        "reference_sanity": sanity,
        "models": [
            {
                "name": name, "identity": {"weights": "ab12" * 16, "adapter": "cd34" * 16}, "notes": [],
                "outcome": told["outcome"], "findings": told["findings"], "scores": scores[name],
                "changes": {column: {"change": -0.1, "low": -0.15, "high": -0.05, "p": 0.001, "lost": 9, "gained": 1}
                            for column in columns},
                "agreement": {column: 1 - 0.8 * lost for column in columns}, "divergence": divergences[name],
                "refusals": {probe: refused(0.9 - 0.7 * lost) for probe in judged},
                "sanity": {one: counts | {"repeated": round(40 * lost)} for one, counts in sanity.items()},
                "weights": [], "where": {text: {kind: [] for kind in GROUPED} for text in texts},
            }
            for name, lost, told in zip(models, damage, evidence["models"], strict=True)
        ],
        "judges": {},
        "metrics": None,
        "notes": ["the chat template differs from the reference's: each model has its own", "2 rows were cut"],
    }  # fmt: skip
    if more:
        add_more(record, damage)
    return record, evidence


def refused(share: float) -> dict:
    return {"share": share, "low": max(0.0, share - 0.1), "high": min(1.0, share + 0.05), "answers": 60}


def add_more(record: dict, damage: list[float]) -> None:
    """What an audit can measure beside scores and predictions."""
    rate = {"share": 0.04, "low": 0.02, "high": 0.08, "answers": 240}
    record["judges"] = {
        "patterns": {"false_refusals": rate, "missed_refusals": rate, "on": "478 labelled answers"},
        "likelihood": {"false_refusals": None, "missed_refusals": None, "on": "not measured: no network"},
    }
    for model, lost in zip(record["models"], damage, strict=True):
        model["weights"] = [
            {"module": module, "layers": 30, "norm": 3 * lost + i, "relative_norm": 0.02 * (4 - i) * lost,
             "nuclear_norm": 9.5 * lost + i, "effective_rank": 7.9 - i, "intruders": None if i == 3 else 3 - i}
            for i, module in enumerate(("down_proj", "q_proj", "v_proj", "norm"))
        ]  # fmt: skip
        model["where"] = {text["name"]: where(lost) for text in record["texts"]}
        model["recovery"] = {
            column["name"]: {
                "reference": 0.9, "model": 0.9 - 0.6 * lost, "rows": 32, "steps": [0, 4, 16, 64], "found": HIDDEN,
                "recovered": [0.9 - 0.6 * lost * math.exp(-k) for k in range(4)], "control": [0.9, 0.9, 0.92, 0.93],
                "base": [0.2, 0.3, 0.4, 0.5] if lost > 0.5 else None,
                "sentence": f"{60 * lost:.0f} points were lost; 16 steps on 32 old rows bring most of them back.",
            }
            for column in record["columns"] if column["kind"] == "task"
        }  # fmt: skip
        model["remedies"] = [
            {
                "kind": kind, "strength": strength, "command": command, "words": words, "why": "",
                "helps": bool(command), "texts": {
                    text["name"]: {"kl": 0.1 * lost, "change": -0.1, "low": -0.2, "high": -0.05, "lost": False}
                    for text in record["texts"]
                },
                "tasks": {
                    column["name"]: {"score": 0.9, "change": 0.3 * lost, "low": 0.1, "high": 0.4, "lost": i == 0}
                    for i, column in enumerate(record["columns"])
                },
            }
            for kind, strength, command, words in (
                ("blend", "0.5", f"forgetless merge april {model['name']} --weights 0.5 0.5", "with a promise: ..."),
                ("kept apart", "", "", f"keep both: april for invoices, {model['name']} for the rest"),
            )
        ]  # fmt: skip
    record["metrics"] = {"bwt": metric("backward transfer (GEM)", -0.12, "(1/(T-1)) Σ_{j<T} (R[T,j] - R[j,j])", "T-1")}


def where(lost: float) -> dict:
    def groups(names: list[str]) -> list[dict]:
        return [
            {"name": name, "tokens": 4000 // (i + 1), "share_of_tokens": 0.5 / (i + 1), "share_of_kl": 0.4 / (i + 1),
             "kl": lost / (i + 2), "low": 0.8 * lost / (i + 2), "high": 1.3 * lost / (i + 2), "agree": 1 - lost / 3}
            for i, name in enumerate(names)
        ]  # fmt: skip

    return {
        "domain": groups(["code", "chat", "news"]),
        "token_type": groups(["word", "part of a word", "number", "sign", "white space"]),
        "place": groups(["first 10", "11 to 100", "after 100"]),
        "certainty": groups(list(CERTAINTIES)),
        "documents": groups([f"document {i}" for i in range(1, 16)]),
    }


def two() -> tuple[dict, dict]:
    columns = {"invoices": ("task", 400, 0.91), "letters": ("task", 250, 0.84), "arc": ("probe", 1172, 0.36),
               "hellaswag": ("probe", 500, 0.41)}  # fmt: skip
    budgets = (Budget("max-drop", "invoices", 0.02), Budget("max-drop", "letters", 0.05), Budget("max-kl", "", 0.1))
    return case(["runs/may", "runs/may-replay"], columns, {"own-answers": 157, "manual": 60}, [0.5, 0.01],
                budgets=budgets, judged=("advbench", "advbench-likelihood"), more=True)  # fmt: skip


def one() -> tuple[dict, dict]:
    budgets = (Budget("max-drop", "invoices", 0.02),)
    columns = {"invoices": ("task", 60, 0.9)}
    return case(["models/may"], columns, {"own-answers": 20}, [0.08], budgets=budgets, more=True)


def five() -> tuple[dict, dict]:
    names = [f"task-{j + 1:02}-of-the-year" for j in range(12)]
    columns = {name: ("task", 40 + 4 * j, 0.95 - 0.03 * j) for j, name in enumerate(names)}
    budgets = tuple(Budget("max-drop", name, 0.05) for name in names)
    models = [f"runs/stream/tasks/0{i + 1}-after-a-very-long-name-of-a-task-{i}/adapter-{i}" for i in range(5)]
    return case(models, columns, {"own-answers": 30}, [0.0, 0.05, 0.15, 0.4, 0.9], budgets=budgets, more=True)


def odd() -> tuple[dict, dict]:
    """Names that read from right to left, are long, or are markup."""
    columns = {f"{HOSTILE}|`x` \x1b[31m": ("task", 40, 0.8), "الفواتير القديمة": ("task", 40, 0.9),
               "x" * 90: ("probe", 40, 0.5)}  # fmt: skip
    told = case([HOSTILE, "نموذج/مايو", "z" * 120], columns, {HOSTILE: 8, "نص": 9}, [0.4, 0.1, 0.0],
                judged=(f"j{HOSTILE}",), more=True, reference="<b>april</b>")  # fmt: skip
    told[0]["notes"] = [f"note {HOSTILE} \x1b[31m"]
    return told


def bare() -> tuple[dict, dict]:
    """One text, nothing else, no budget."""
    told = case(["may"], {}, {"own-answers": 5}, [0.0])
    told[0]["reference_sanity"], told[0]["notes"] = {}, []
    told[0]["models"][0]["sanity"] = {}
    return told


def nothing() -> tuple[dict, dict]:
    """No text, no task: nothing was measured."""
    told = bare()
    told[0]["texts"], told[0]["models"][0]["divergence"], told[0]["models"][0]["findings"] = [], {}, []
    told[1]["models"][0]["findings"], told[0]["models"][0]["where"] = [], {}
    return told


RECORDS = {"one": one, "two": two, "five": five, "odd": odd, "bare": bare, "nothing": nothing}
