"""Made-up run folders: every file that reading a run needs, and no model."""

from __future__ import annotations

import json
from pathlib import Path

from forgetless.runs.folder import RunFolder, write_json, write_lines
from forgetless.runs.seal import sealed

OPTIONS = ["yes", "no"]
SETTINGS = {"score_on": "test", "on_bad_row": "error", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0,
            "target_modules": "all-linear",
            "learning_rate": 1e-3, "num_train_epochs": 1.0, "max_steps": -1, "batch_size": 8, "warmup_ratio": 0.0,
            "lr_scheduler_type": "linear", "weight_decay": 0.0, "max_grad_norm": 1.0, "max_length": 64}  # fmt: skip


def made_run(
    root: Path, method: str = "sequential", *, seed: int = 0, order: tuple[str, ...] = ("a", "b", "c"), rows: int = 40,
    learnt: float = 0.9, falls: float = 0.2, options: dict | None = None, base: str = "ab" * 16,
    status: str = "complete", kept_rows: int | None = None, tokens: int = 100, text: str = "s",
    about: dict | None = None, spent: dict | None = None, more: dict | None = None, **decides: object,
) -> Path:  # fmt: skip
    """A finished run: each task scores `learnt` when learnt and falls by `falls` with each later task.

    The rows that are right are the first of each task, so that two runs differ in the fewest rows they can. `about`,
    `spent` and `more` go into the records of the method, of times and of the run; all else is what decides the run.
    """
    run = RunFolder(root)
    root.mkdir(parents=True)
    tasks = [
        {"name": name, "fingerprint": name, "train": 50, "validation": 0, "test": rows, "options": OPTIONS,
         "scorers": ["options"], "headline": "likelihood", "max_new_tokens": 4,
         "majority": {"label": "yes", "share": 0.5}, "notes": []}
        for name in order
    ]  # fmt: skip
    write_json(run.config, sealed({
        "format": 1, "status": status, "stream": "made-up", "config": SETTINGS | {"seed": seed},
        "decides": SETTINGS | {"seed": seed, "method": method, "method_options": options or {}} | decides,
        "method": {"name": method, "options": options or {}, "summary": method, "stock_peft": True, "deployed": "last"}
        | (about or {}),
        "base": {"weights": base, "tokenizer": "t", "chat_template": "c"}, "precision": "float32", "tasks": tasks,
        "model": {"name": "tiny", "parameters": 10_000, "trainable": 800},
        "lessons": [{"name": name, "last_task": i} for i, name in enumerate(order)], "versions": {"forgetless": "0"},
    } | (more or {})))  # fmt: skip
    _scored(run, 0, "base", order, rows, {name: 0.4 for name in order})
    for i, name in enumerate(order):
        with run.publish(run.task(i + 1, name)) as folder:
            checks = [{"name": "adapter", "value": 1.0, "ok": True, "meaning": "norm of B"}]
            if kept_rows is not None:
                checks.append({"name": "kept rows", "value": kept_rows, "ok": True, "meaning": "rows in memory"})
            write_json(folder / "learned.json", {"lesson": name, "rows": 50, "steps": 2, "checks": checks})
            write_lines(folder / "log.jsonl", [{"step": s, "loss": 1.0 / s, "tokens": tokens} for s in (1, 2)])
            write_json(folder / "times.json", {"seconds": 10.0, "cpu_seconds": 10.0} | (spent or {}))
            (folder / "adapter").mkdir()
            head = json.dumps({"A": {"dtype": "F32", "shape": [8, 100], "data_offsets": [0, 0]}}).encode()
            (folder / "adapter" / "adapter_model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
        scores = {other: round(learnt - falls * (i - j) if j <= i else 0.4, 10) for j, other in enumerate(order)}
        _scored(run, i + 1, name, order, rows, scores)
        with run.publish(run.task(i + 1, name) / "forgetting") as folder:
            means = {"kl": 0.1 * (i + 1), "cross_entropy": 1.6, "entropy": 1.5, "agree": 0.9}
            write_json(folder / "forgetting.json", {
                "asked": "a", "per_token": means, "per_document": means, "interval": [0.05, 0.5],
                "text": {"name": "t", "source": "s", "documents": 2, "tokens": 9, "sha256": text},
            })  # fmt: skip
    return root


def _scored(run: RunFolder, number: int, name: str, order: tuple[str, ...], rows: int, scores: dict) -> None:
    right = {task: round(rows * score) for task, score in scores.items()}
    with run.publish(run.task(number, name) / "scores") as folder:
        write_json(folder / "scores.json", {"deployed": {
            task: {"n": rows, "scores": {"likelihood": right[task] / rows}, "counts": None} for task in order
        }})  # fmt: skip
        write_json(folder / "union.json", OPTIONS)
        write_lines(folder / "predictions.jsonl", [
            {"view": "deployed", "task": task, "row": i, "key": f"{task}{i}", "gold": "yes",
             "likelihood": {"answer": "yes" if i < right[task] else "no", "score": int(i < right[task])}}
            for task in order for i in range(rows)
        ])  # fmt: skip
