"""A made-up run.json, for tests that need a run folder without learning."""

from __future__ import annotations

from forgetless.runs.folder import FORMAT
from forgetless.runs.seal import sealed


def run_record(model: str, lessons: list[str], base: dict[str, str] | None = None) -> dict:
    """What `learn` writes of a stream with a task for each lesson."""
    task = {
        "fingerprint": "ab" * 8, "train": 8, "validation": 0, "test": 4, "options": [], "scorers": ["exact_match"],
        "headline": "exact_match", "max_new_tokens": 4, "majority": None, "notes": [],
    }  # fmt: skip
    return sealed({
        "format": FORMAT,
        "status": "complete",
        "stream": "made-up",
        "config": {"on_bad_row": "error"},
        "decides": {},
        "method": {"name": "sequential", "options": {}, "summary": "", "stock_peft": True, "deployed": "deployed"},
        "base": base or {"weights": "", "tokenizer": "", "chat_template": ""},
        "model": {"name": model, "parameters": 1000, "trainable": 10},
        "precision": "float32",
        "tasks": [{"name": name} | task for name in lessons],
        "lessons": [{"name": name, "last_task": number} for number, name in enumerate(lessons)],
        "versions": {"forgetless": "0.1.0"},
    })  # fmt: skip
