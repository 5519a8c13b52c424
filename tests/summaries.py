"""Made-up summaries of runs, realistic in shape, for the tests of the report."""

from __future__ import annotations

import math

HOSTILE = "<script>alert(1)</script>"


def task(name: str, options: list[str], majority: float, **more) -> dict:
    return {"name": name, "train": 150, "validation": 20, "test": 100, "options": options, "headline": "likelihood",
            "scorers": ["options"], "max_new_tokens": 16,
            "majority": {"label": options[0], "share": majority}, "notes": []} | more  # fmt: skip


def flips(name: str, lost: list[tuple[str, str]], gained: list[tuple[str, str]], n: int = 100) -> dict:
    """Rows that turned: (answer before, answer now) of each."""

    def rows(turns, start):
        return [{"row": start + 3 * i, "key": f"{start + i:016x}", "before": old, "now": new}
                for i, (old, new) in enumerate(turns)]  # fmt: skip

    return {"task": name, "n": n, "whole": True, "lost": rows(lost, 0), "gained": rows(gained, 1)}


def between(score: float | None) -> list[float] | None:
    return None if score is None else [max(0, score - 0.09), min(1, score + 0.07)]


def metric(name: str, value, formula: str, divisor: str, why: str | None = None) -> dict:
    return {"name": name, "value": value, "formula": formula, "divisor": divisor, "why": why}


def steps(start: float, penalty: float | None = None, many: int = 38) -> list[dict]:
    found = []
    for i in range(many):
        loss = 0.3 + start * math.exp(-9 * i / many / 2) + 0.08 * math.sin(7 * i)
        found.append({"step": i + 1, "loss": loss, "learning_rate": 1e-3, "tokens": 900, "gradient_norm": 1.0})
        if penalty is not None:
            found[-1] |= {"penalty": penalty * math.exp(-i / 15), "penalty_share": 0.05}
    return found


def borders(names: list[str], kl: float = 0.05) -> list[dict]:
    """Predictions against the base's after each lesson; they move away with every one."""
    text = {"name": "own-answers", "source": "greedy answers", "documents": 32, "tokens": 1234, "sha256": "ab" * 32}
    return [
        {"after": name, "kl": i * kl, "low": 0.8 * i * kl, "high": 1.3 * i * kl, "cross_entropy": 1.5 + i * kl,
         "entropy": 1.5, "agree": 1 - i * kl / 2, "per_document": 1.1 * i * kl, "text": text}
        for i, name in enumerate(names, start=1)
    ]  # fmt: skip


def summary(method: str = "sequential") -> dict:
    """A finished run over three tasks; `replay` forgets less."""
    forgets = method == "sequential"
    tasks = [
        task("sst2", ["negative", "positive"], 0.52, notes=["3 rows were cut to 256 tokens"]),
        task("bbc", ["business", "entertainment", "politics", "sport", "tech"], 0.23),
        task("mmlu", ["A", "B", "C", "D"], 0.29),
    ]
    matrix = [[0.89, 0.31, 0.25], [0.72, 0.93, 0.24], [0.61, 0.4, 0.33]]
    if not forgets:
        matrix = [[0.89, 0.31, 0.25], [0.87, 0.92, 0.26], [0.86, 0.9, 0.31]]
    union = [[score * 0.9 for score in row] for row in matrix]
    forgotten = [
        {"task": "sst2", "learned": 0.89, "now": 0.61, "change": -0.28, "low": -0.36, "high": -0.2, "p": 3e-7,
         "lost": 30, "gained": 2, "n": 100},
        {"task": "bbc", "learned": 0.93, "now": 0.4, "change": -0.53, "low": -0.62, "high": -0.42, "p": 1e-12,
         "lost": 54, "gained": 1, "n": 100},
    ]  # fmt: skip
    if not forgets:
        forgotten = [
            forgotten[0] | {"now": 0.86, "change": -0.03, "low": -0.09, "high": 0.03, "p": 0.51,
                            "lost": 6, "gained": 3},
            forgotten[1] | {"learned": 0.92, "now": 0.9, "change": -0.02, "low": -0.07, "high": 0.03, "p": 0.69,
                            "lost": 4, "gained": 2},
        ]  # fmt: skip
    average = sum(matrix[-1]) / 3
    learning = sum(matrix[i][i] for i in range(3)) / 3
    backward = sum(matrix[2][j] - matrix[j][j] for j in range(2)) / 2
    check = {"name": "adapter", "value": 12.345678, "ok": True, "meaning": "norm of B: the adapter changes answers"}
    turned = [
        flips("sst2", [("negative", "positive")] * 29 + [("positive", "negative")], [("negative", "positive")] * 2),
        flips("bbc", [("sport", "politics")] * 24 + [("business", "politics")] * 18 + [("tech", "(no option)")] * 12,
              [("business", "tech")]),
    ]  # fmt: skip
    if not forgets:
        turned = [
            flips("sst2", [("negative", "positive")] * 6, [("positive", "negative")] * 3),
            flips("bbc", [("tech", "business")] * 4, [("sport", "politics")] * 2),
        ]
    return {
        "format": 1,
        "status": "complete",
        "name": f"{method} on demo",
        "folder": method,
        "method": {"name": method, "options": {} if forgets else {"memory": "20%"}, "stock_peft": True,
                   "summary": "one adapter, trained on task after task", "deployed": "the last adapter"},
        "model": {"name": "SmolLM2-135M", "identity": {"weights": "ab12" * 16}, "parameters": 134515008,
                  "trainable": 4884480, "precision": "float32"},
        "tasks": tasks,
        "learned": ["sst2", "bbc", "mmlu"],
        "headline": {"matrix": matrix, "base": [0.54, 0.28, 0.26]},
        "measures": {
            "likelihood": {"meaning": "the task's own likeliest option is right", "matrix": matrix,
                           "base": [0.54, 0.28, 0.26]},
            "likelihood_union": {"meaning": "the same among all options", "matrix": union, "base": [0.2, 0.1, 0.05]},
            "exact_match": {"meaning": "the greedy answer equals the right one", "base": [None, 0.0, None],
                            "matrix": [[None, row[1], None] for row in union]},
        },
        "intervals": [[between(score) for score in row] for row in matrix],
        "forgotten": forgotten,
        "flips": turned,
        "metrics": {
            "average_accuracy": metric("average accuracy", average, "(1/T) Σ_j R[T,j]", "T (macro over tasks)"),
            "learning_accuracy": metric("learning accuracy", learning, "(1/T) Σ_j R[j,j]", "T"),
            "bwt": metric("backward transfer (GEM)", backward, "(1/(T-1)) Σ_{j<T} (R[T,j] - R[j,j])", "T-1"),
            "fwt": metric("forward transfer (GEM)", None, "(1/(T-1)) Σ_{j>=2} (R[j-1,j] - b_j)", "T-1",
                          "cannot compute: R[1,2] was not scored"),
            "running_average": metric("TRACE OP_t", [0.89, 0.825, average], "(1/t) Σ_{j<=t} R[t,j]", "t"),
        },
        "views": {},
        "test_rows": {"sst2": "aa11", "bbc": "bb22", "mmlu": "cc33"},
        "counts": {"gold": [{"negative": 52, "positive": 48}, dict(zip(tasks[1]["options"], [20] * 5, strict=True)),
                            {"A": 29, "B": 25, "C": 23, "D": 23}], "after": [
            [{"negative": 48, "positive": 52}, None, {"A": 90, "B": 10, "C": 0, "D": 0}],
            [{"negative": 70, "positive": 30}, dict(zip(tasks[1]["options"], [20] * 5, strict=True)), None],
            [{"negative": 8, "positive": 92}, dict(zip(tasks[1]["options"], [9, 1, 60, 10, 20], strict=True)),
             {"A": 30, "B": 20, "C": 25, "D": 25}],
        ]},
        "losses": {name: steps(2 - i / 3, None if forgets else 0.4) for i, name in enumerate(("sst2", "bbc", "mmlu"))},
        "acts": [
            {"task": name, "checks": [check] if forgets else [
                check, {"name": "replayed rows", "value": 40 * (i == 2), "ok": i != 1,
                        "meaning": "old rows learnt again"}]}
            for i, name in enumerate(("sst2", "bbc", "mmlu"))
        ],
        "warnings": [] if forgets else ["replay did not act on bbc: replayed rows = 0 (old rows learnt again)"],
        "forgetting": borders(["sst2", "bbc", "mmlu"], 0.05 if forgets else 0.01),
        "config": {"stream": "demo", "lora": {"r": 8, "targets": ["q_proj", "v_proj"]}, "learning_rate": 1e-3},
        "versions": {"forgetless": "0.1.0", "torch": "2.9.0"},
    }  # fmt: skip


def joint() -> dict:
    told = summary()
    told |= {"name": "joint on demo", "learned": ["joint"], "forgotten": [], "flips": [], "folder": "joint"}
    told["method"]["name"] = "joint"
    told["forgetting"] = borders(["joint"])
    told["headline"]["matrix"] = told["headline"]["matrix"][-1:]
    told["intervals"], told["losses"] = told["intervals"][-1:], {"joint": steps(2)}
    told["acts"], told["counts"] = (
        [told["acts"][0] | {"task": "joint"}],
        told["counts"] | {"after": told["counts"]["after"][-1:]},
    )
    for measure in told["measures"].values():
        measure["matrix"] = measure["matrix"][-1:]
    return told


def running() -> dict:
    """Stopped after two of three tasks; only the cells of learnt tasks were scored, and no base."""
    told = summary()
    told |= {"status": "running", "learned": ["sst2", "bbc"], "forgotten": told["forgotten"][:1]}
    told["flips"].pop()
    told["headline"] = {"matrix": [[0.89, None, None], [0.72, 0.93, None]], "base": [None] * 3}
    told["intervals"] = [[between(score) for score in row] for row in told["headline"]["matrix"]]
    told["measures"] = {"likelihood": told["headline"] | {"meaning": "own option"}}
    told["losses"].pop("mmlu")
    told["forgetting"].pop()
    told["acts"].pop()
    told["counts"]["after"].pop()
    told["metrics"]["bwt"] |= {"value": None, "why": "the matrix has 2 of 3 rows"}
    return told


def hostile() -> dict:
    """Every text that a user can choose is a script."""
    told = summary("replay")
    old = [t["name"] for t in told["tasks"]]
    new = {name: f"{HOSTILE}|`{name}` @all \x1b[31m" for name in old}
    for one in told["tasks"]:
        one |= {"name": new[one["name"]], "options": [HOSTILE, "b"], "majority": {"label": HOSTILE, "share": 0.9}}
        one["notes"] = [f"note {HOSTILE}"]
    told["learned"] = [new[name] for name in told["learned"]]
    told["forgotten"] = [entry | {"task": new[entry["task"]]} for entry in told["forgotten"]]
    told["forgotten"][0] |= {"change": -0.3, "low": -0.4, "high": -0.2}
    for one in told["forgetting"]:
        one |= {"after": new[one["after"]], "text": one["text"] | {"name": HOSTILE, "source": HOSTILE}}
    told["losses"] = {new[name]: records for name, records in told["losses"].items()}
    told["acts"] = [one | {"task": new[one["task"]]} for one in told["acts"]]
    told["flips"] = [flips(new[one["task"]], [(HOSTILE, "b")] * 3, []) for one in told["flips"]]
    told["test_rows"] = {new[name]: digest for name, digest in told["test_rows"].items()}
    told["counts"] = {"gold": [{HOSTILE: 90, "b": 10}] * 3, "after": [[{HOSTILE: 99, "b": 1}] * 3] * 3}
    told["name"] = told["method"]["name"] = told["model"]["name"] = told["method"]["summary"] = HOSTILE
    told["method"]["options"] = {HOSTILE: HOSTILE}
    told["warnings"], told["config"] = [f"warned {HOSTILE}"], {HOSTILE: HOSTILE, "url": "https://example.com/x"}
    return told


def many_tasks(tasks: int = 15, labels: int = 14, forgets: float = 0.04, method: str = "sequential") -> dict:
    """A long stream; tasks fall at different speeds, and come back a little now and then."""
    told = summary(method)
    names = [f"benchmark_{j + 1:02}" for j in range(tasks)]
    options = [f"label number {k}" for k in range(labels)]
    told["tasks"] = [task(name, options, 0.2) for name in names]
    told["learned"] = names
    told["forgetting"] = borders(names, 0.02)

    def score(i: int, j: int) -> float:
        if j > i:
            return 0.1 + 0.02 * ((7 * j + i) % 9)
        fall = forgets * (0.4 + (5 * j % 7) / 5) * (i - j) + (0.05 * math.sin(3 * i + j) if i > j else 0)
        return round(max(0.12, 0.93 - 0.02 * (j % 6) - fall), 2)

    matrix = [[score(i, j) for j in range(tasks)] for i in range(tasks)]
    told["headline"] = {"matrix": matrix, "base": [0.1 + 0.02 * (3 * j % 8) for j in range(tasks)]}
    told["intervals"] = [[between(score) for score in row] for row in matrix]
    told["measures"] = {"likelihood": told["headline"] | {"meaning": "own"}}
    changes = [matrix[-1][j] - matrix[j][j] for j in range(tasks - 1)]
    told["forgotten"] = [
        told["forgotten"][0] | {"task": name, "learned": matrix[j][j], "now": matrix[-1][j], "change": changes[j],
                                "low": changes[j] - 0.08, "high": changes[j] + 0.08}
        for j, name in enumerate(names[:-1])
    ]  # fmt: skip
    told["flips"] = [flips(name, [(options[0], options[1 + i % 10]) for i in range(30)], [(options[2], options[0])])
                     for name in names[:-1]]  # fmt: skip
    told["test_rows"] = {name: f"{name} rows" for name in names}
    told["counts"] = {"gold": [dict.fromkeys(options, 7) for _ in names],
                      "after": [[dict.fromkeys(options, 7) for _ in names] for _ in names]}  # fmt: skip
    told["losses"] = {name: steps(2 + j % 4 / 3, many=380) for j, name in enumerate(names)}
    told["acts"] = [{"task": name, "checks": told["acts"][0]["checks"]} for name in names]
    return told


def per_task() -> dict:
    """One adapter per task: the bound that forgets nothing."""
    told = summary("per_task")
    told["forgetting"] = [{"after": name, "not_measured": "no one model is deployed"} for name in told["learned"]]
    matrix = [[0.89, 0.28, 0.26], [0.89, 0.95, 0.26], [0.89, 0.95, 0.36]]
    told["headline"] = told["measures"]["likelihood"] = told["headline"] | {"matrix": matrix, "meaning": "own"}
    return told


def two_learners() -> dict:
    """I-LoRA's figures in the log."""
    told = summary("ilora")
    for records in told["losses"].values():
        for i, record in enumerate(records):
            record |= {"consistency": 0.2 * math.exp(-i / 20), "slow_fast_distance": 0.1 + i / 40}
    told["views"] = {"fast": {"headline": told["headline"], "forgotten": summary()["forgotten"]}}
    return told


CASES = {
    "one run": lambda: [summary()],
    "two runs": lambda: [summary(), summary("replay")],
    "four runs": lambda: [summary(), summary("replay"), per_task(), joint()],
    "joint": lambda: [joint()],
    "running": lambda: [running()],
    "hostile": lambda: [hostile()],
    "two hostile": lambda: [hostile(), hostile()],
    "many tasks": lambda: [many_tasks()],
    "many tasks, two runs": lambda: [many_tasks(), many_tasks(forgets=0.012, method="replay")],
    "two learners": lambda: [two_learners()],
}
