"""A number for each row of a task: how well the model answers it."""

from __future__ import annotations

import string
from dataclasses import dataclass

import torch

from forgetless.data.batches import Encoder, collate
from forgetless.data.tasks import Row, Task
from forgetless.learning.engine import Engine
from forgetless.model.adapters import Adapters
from forgetless.model.answers import logits_at
from forgetless.score.generation import generate
from forgetless.score.options import OptionScorer

MEASURES: dict[str, tuple[str, ...]] = {
    "options": ("likelihood", "likelihood_union"),
    "exact_match": ("exact_match",),
    "next_token": ("next_token",),
}
"""Scorer -> the measures it gives; the first is its headline."""

MEANINGS = {
    "likelihood": "the task's own option that the model finds likeliest is the right one",
    "likelihood_union": "the same among the options of all tasks of the stream",
    "exact_match": "the greedy answer equals the right one, up to case, punctuation and white space",
    "next_token": "share of the row's answer tokens (all tokens of a text) that the model ranks first",
}


@dataclass(frozen=True)
class TaskScores:
    """Per-row results of one model on one task's test rows, in the order of the rows."""

    measures: dict[str, list[float]]  # measure -> a score per row
    predictions: list[dict]  # a record per row, for predictions.jsonl

    def mean(self, measure: str) -> float | None:
        values = self.measures.get(measure)
        return sum(values) / len(values) if values else None


def headline(task: Task) -> str:
    """The measure that stands for the task in the matrix."""
    return MEASURES[task.scorers[0]][0]


def normalise(text: str) -> str:
    """The O-LoRA benchmark's rule: lower case, no punctuation, single spaces.

    >>> normalise(" Science or  Technology.")
    'science or technology'
    """
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(bare.split())


class Scorer:
    """Scores tasks with one set of adapters on one engine."""

    def __init__(self, adapters: Adapters, encoder: Encoder, engine: Engine, union: tuple[str, ...], batch_tokens: int):
        self.adapters, self.encoder, self.engine, self.union = adapters, encoder, engine, union
        self.batch_tokens = batch_tokens
        self.likelihoods = OptionScorer(adapters.model, encoder, engine.device, batch_tokens)

    def __call__(self, task: Task, rows: tuple[Row, ...] | None = None) -> TaskScores:
        """Scores the task's test rows (or others); processes share the rows and all get the whole result."""
        numbered = list(enumerate(task.test if rows is None else rows))
        mine = self.engine.mine(numbered)
        records = [{"row": number, "key": row.key, "gold": row.label} for number, row in mine]
        with self.engine.autocast():
            for scorer in task.scorers:
                found = getattr(self, f"_{scorer}")(task, [row for _, row in mine])
                for record, more in zip(records, found, strict=True):
                    record |= more
        records = sorted(self.engine.gather(records), key=lambda record: record["row"])
        names = [name for scorer in task.scorers for name in MEASURES[scorer]]
        return TaskScores({name: [float(r[name]["score"]) for r in records] for name in names}, records)

    def _options(self, task: Task, rows: list[Row]) -> list[dict]:
        union = tuple(dict.fromkeys((*task.options, *self.union)))
        table = self.likelihoods(rows, union) if rows else []
        own = [union.index(option) for option in task.options]
        return [
            {
                "likelihood": _chosen(row, union, values, own),
                "likelihood_union": _chosen(row, union, values, list(range(len(union)))),
                "log_likelihoods": {union[i]: round(values[i], 4) for i in own},
            }
            for row, values in zip(rows, table, strict=True)
        ]

    def _exact_match(self, task: Task, rows: list[Row]) -> list[dict]:
        contexts = [self.encoder.generation_context(row, task.max_new_tokens) for row in rows]
        model, tokenizer = self.adapters.model.get_base_model(), self.encoder.tokenizer
        texts = generate(model, tokenizer, contexts, task.max_new_tokens, self.engine.device, self.batch_tokens)
        return [
            {"exact_match": {"answer": text.strip(), "score": int(normalise(text) == normalise(row.label))}}
            for row, text in zip(rows, texts, strict=True)
        ]

    def _next_token(self, task: Task, rows: list[Row]) -> list[dict]:
        pad, size = self.encoder.tokenizer.pad_token_id, max(1, self.batch_tokens // (4 * self.encoder.max_length))
        found: list[dict] = []
        for start in range(0, len(rows), size):
            part = collate([self.encoder(row) for row in rows[start : start + size]], pad, self.engine.device)
            with torch.no_grad():
                best = logits_at(self.adapters.model, part.keep, input_ids=part.ids, attention_mask=part.mask)
            right = (best.argmax(-1) == part.targets).float().cpu()
            counts = part.keep.sum(1).tolist()
            found += [{"next_token": {"score": float(row.mean())}} for row in right.split(counts)]
        return found


def _chosen(row: Row, options: tuple[str, ...], values: list[float], among: list[int]) -> dict:
    """The likeliest option among some; the first of equals."""
    best = options[max(among, key=lambda i: (values[i], -i))]
    return {"answer": best, "score": int(best == row.label)}


def label_counts(scores: TaskScores, measure: str, options: tuple[str, ...]) -> dict[str, int]:
    """How often each option was answered; answers that are no option are counted together."""
    words = {normalise(option): option for option in options}
    counts = dict.fromkeys(options, 0)
    for record in scores.predictions:
        name = words.get(normalise(record[measure].get("answer", "")), "(no option)")
        counts[name] = counts.get(name, 0) + 1
    return counts
