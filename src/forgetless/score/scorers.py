"""A number for each row of a task: how well the model answers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from forgetless.data.batches import Encoder, collate
from forgetless.data.scoring import Scoring, name_of
from forgetless.data.tasks import Row, Task
from forgetless.learning.engine import Engine
from forgetless.model.answers import logits_at
from forgetless.score.generation import Answer, generate
from forgetless.score.options import OptionScorer
from forgetless.score.rules import Rule, rules_of
from forgetless.score.texts import compared

UNION = "likelihood_union"  # the one measure that depends on the other tasks of the stream
MEASURES: dict[str, tuple[str, ...]] = {
    "options": ("likelihood", UNION),
    "completions": ("completion_per_char", "completion"),
    "next_token": ("next_token",),
    "exact_match": ("exact_match",),
    "number": ("number",),
    "choice": ("choice",),
    "rouge_l": ("rouge_l",),
    "sari": ("sari",),
    "code_similarity": ("code_similarity",),
    "regex": ("regex",),
    "json": ("json_fields", "json_valid"),
}
"""Scorer -> the measures it gives; the first is its headline. A user's function gives one of its own name."""

MEANINGS = {
    "likelihood": "the task's own option that the model finds likeliest is the right one",
    "likelihood_union": "the same among the options of all tasks of the stream",
    "completion_per_char": "the row's own option with the largest log-likelihood per character is the right one",
    "completion": "the row's own option that the model finds likeliest is the right one",
    "exact_match": "the greedy answer equals the right one, up to case, punctuation and white space",
    "next_token": "share of the row's answer tokens (all tokens of a text) that the model ranks first",
    "number": "the last number of the greedy answer equals that of the right one",
    "choice": "the letter that the greedy answer chooses is the right one",
    "rouge_l": "ROUGE-L of the greedy answer: F1 of the longest common subsequence of words with the right one",
    "sari": "SARI of the greedy answer: what it keeps, deletes and adds to the source as the right one does",
    "code_similarity": "share of characters in the longest common subsequence of greedy and right answer",
    "regex": "the pattern is found in the greedy answer, and its group, if it has one, is the right answer",
    "json_fields": "share of the fields that are in the greedy answer's JSON as in the right one's",
    "json_valid": "the greedy answer is JSON",
}
OWN_MEANING = "what the user's function gives the greedy answer, from 0 to 1"
LIKELIHOODS = ("likelihood", "likelihood_union", "completion_per_char", "completion")
"""Measures whose answer is an option as it is written; other answers are generated."""
RIGHT_OR_WRONG = (*LIKELIHOODS, "exact_match", "number", "choice", "regex", "json_valid")
"""Measures that give each row 0 or 1; the others give shares."""
NO_OPTION = "(no option)"  # counts as the label of an answer that is none of the task's


Answering = Callable[[list[int]], AbstractContextManager]


@dataclass(frozen=True)
class TaskScores:
    """Per-row results of one model on one task's test rows, in the order of the rows."""

    measures: dict[str, list[float]]  # measure -> a score per row
    predictions: list[dict]  # a record per row, for predictions.jsonl

    def without(self, measure: str) -> TaskScores:
        """The same results less one measure."""
        rows = [{key: value for key, value in record.items() if key != measure} for record in self.predictions]
        return TaskScores({name: told for name, told in self.measures.items() if name != measure}, rows)

    def mean(self, measure: str) -> float | None:
        values = self.measures.get(measure)
        return sum(values) / len(values) if values else None


def headline(task: Task) -> str:
    """The measure that stands for the task in the matrix."""
    return measures_of(task.scorers[0])[0]


def measures_of(scorer: str | Scoring) -> tuple[str, ...]:
    """The measures that a scorer gives, its headline first."""
    return MEASURES.get(name_of(scorer), (name_of(scorer),))


class Scorer:
    """Scores tasks with one model on one engine."""

    def __init__(
        self,
        model,
        encoder: Encoder,
        engine: Engine,
        union: tuple[str, ...],
        batch_tokens: int,
        answers: Callable[[list[list[int]], int], list[Answer]] | None = None,
    ):
        """`answers`: (contexts, most new tokens) -> greedy answers, where the model does not generate them itself."""
        self.model, self.encoder, self.engine, self.union = model, encoder, engine, union
        self.batch_tokens, self.answers = batch_tokens, answers
        self.likelihoods = OptionScorer(model, encoder, engine.device, batch_tokens)

    def __call__(
        self, task: Task, rows: tuple[Row, ...] | None = None, answering: Answering | None = None
    ) -> TaskScores:
        """Scores the task's test rows (or others); processes share the rows and all get the whole result.

        `answering`: the tokens before a row's answer -> what the model answers this row in; rows are then scored alone.
        """
        mine = self.engine.mine(list(enumerate(task.test if rows is None else rows)))
        if answering is None:
            records = self._records(task, mine)
        else:
            records = []
            for one in mine:
                with answering(self.encoder.generation_context(one[1], 1)):
                    records += self._records(task, [one])
        records = sorted(self.engine.gather(records), key=lambda record: record["row"])
        names = [name for scorer in task.scorers for name in measures_of(scorer)]
        return TaskScores({name: [float(r[name]["score"]) for r in records] for name in names}, records)

    def _records(self, task: Task, mine: list[tuple[int, Row]]) -> list[dict]:
        """A record of each of these numbered rows."""
        records: list[dict] = [{"row": number, "key": row.key, "gold": row.label} for number, row in mine]
        rules, mine_rows = rules_of(task), [row for _, row in mine]
        with self.engine.autocast():
            found = [self._judged(rules, task, mine_rows)] if rules else []
            found += [self._options(task, mine_rows)] if "options" in task.scorers else []
            found += [self._completions(mine_rows)] if "completions" in task.scorers else []
            found += [self._next_token(task, mine_rows)] if "next_token" in task.scorers else []
        for more in found:
            for record, result in zip(records, more, strict=True):
                record |= result
        return records

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

    def _completions(self, rows: list[Row]) -> list[dict]:
        found = []
        for row, values in zip(rows, self.likelihoods.own(rows), strict=True):
            among = list(range(len(row.options)))
            per_char = [value / len(option) for value, option in zip(values, row.options, strict=True)]
            found.append(
                {
                    "completion_per_char": _chosen(row, row.options, per_char, among),
                    "completion": _chosen(row, row.options, values, among),
                    "log_likelihoods": [round(value, 4) for value in values],
                }
            )
        return found

    def _judged(self, rules: dict[str, Rule], task: Task, rows: list[Row]) -> list[dict]:
        """One greedy answer a row, judged by every rule; it is kept once, beside the first rule's score."""
        contexts = [self.encoder.generation_context(row, task.max_new_tokens) for row in rows]
        if self.answers:
            return _by_rules(rules, rows, [one.text for one in self.answers(contexts, task.max_new_tokens)])
        tokenizer = self.encoder.tokenizer
        texts = generate(self.model, tokenizer, contexts, task.max_new_tokens, self.engine.device, self.batch_tokens)
        return _by_rules(rules, rows, texts)

    def _next_token(self, task: Task, rows: list[Row]) -> list[dict]:
        pad, size = self.encoder.tokenizer.pad_token_id, max(1, self.batch_tokens // (4 * self.encoder.max_length))
        found: list[dict] = []
        for start in range(0, len(rows), size):
            part = collate([self.encoder(row) for row in rows[start : start + size]], pad, self.engine.device)
            with torch.no_grad():
                best = logits_at(self.model, part.keep, input_ids=part.ids, attention_mask=part.mask)
            right = (best.argmax(-1) == part.targets).float().cpu()
            counts = part.keep.sum(1).tolist()
            found += [{"next_token": {"score": float(row.mean())}} for row in right.split(counts)]
        return found


def _by_rules(rules: dict[str, Rule], rows: Sequence[Row], texts: Sequence[str]) -> list[dict]:
    found: list[dict] = []
    for row, answer in zip(rows, map(str.strip, texts), strict=True):
        scores = {
            measure: score for rule in rules.values() for measure, score in rule.scores(answer, rule.gold(row)).items()
        }
        next(iter(scores.values()))["answer"] = answer
        found.append(scores)
    return found


def scores_of(task: Task, texts: Sequence[str]) -> TaskScores:
    """The scores of answers to the task's test rows, however they were made; all its scorers judge answers."""
    found = _by_rules(rules_of(task), task.test, texts)
    records = [
        {"row": number, "key": row.key, "gold": row.label} | told
        for number, (row, told) in enumerate(zip(task.test, found, strict=True))
    ]
    return TaskScores({name: [float(one[name]["score"]) for one in records] for name in found[0]}, records)


def _chosen(row: Row, options: tuple[str, ...], values: list[float], among: list[int]) -> dict:
    """The likeliest option among some; the first of equals."""
    best = options[max(among, key=lambda i: (values[i], -i))]
    return {"answer": best, "score": int(best == row.label)}


def label_counts(scores: TaskScores, measure: str, options: tuple[str, ...]) -> dict[str, int]:
    """How often each option was answered, or found in the answer; all that is no option is counted together."""
    counts = dict.fromkeys(options, 0)
    for record in scores.predictions:
        name = label_of(record[measure], measure, options)
        if name is not None:
            counts[name] = counts.get(name, 0) + 1
    return counts


def label_of(told: dict, measure: str, options: Sequence[str]) -> str | None:
    """The option that a row's record of a measure says, NO_OPTION if none; None for free answers and no answer at all.

    What a rule found in the answer goes before the answer. An option as it is written goes before one up to case and
    punctuation, which is taken only from a generated text, and only where a single option is meant.
    """
    if not options or "answer" not in told:
        return None
    text = (told["found"] if "found" in told else told["answer"]) or ""
    if text in options:
        return text
    if measure in LIKELIHOODS:
        return NO_OPTION
    alike = [option for option in options if compared(option) == compared(text)]
    return alike[0] if len(alike) == 1 else NO_OPTION
