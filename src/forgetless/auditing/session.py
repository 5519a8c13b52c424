"""Everything that an audit needs, loaded and checked before any model is opened."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from forgetless.auditing.budgets import Budget, flag_budgets, resolve
from forgetless.auditing.contamination import contamination, without
from forgetless.auditing.judges import OwnJudge, judged_names, own_judges
from forgetless.auditing.measures import ANCHOR, KL_CLIP, REFERENCE
from forgetless.auditing.policy import Policy, read_policy
from forgetless.auditing.probes import Probe, content_hash, load_probes
from forgetless.auditing.served import answers_only
from forgetless.auditing.verdict import Terms, check_clip
from forgetless.config import AuditConfig
from forgetless.data.batches import Encoder
from forgetless.data.streams import JUDGED_SEED, load_stream, sample
from forgetless.data.tasks import Row, Stream, Task
from forgetless.errors import DataError, RunError, UsageError
from forgetless.forgetting.reference import BATCH_TOKENS
from forgetless.forgetting.texts import (
    ANSWER_TOKENS,
    LONGEST,
    OWN_ANSWERS,
    Text,
    general_prompts,
    own_answers,
    read_text,
)
from forgetless.forgetting.windows import Windows, measured_alike
from forgetless.learning.engine import Engine
from forgetless.learning.fit import fit_rows
from forgetless.model.identity import json_digest
from forgetless.score.rules import rules_of
from forgetless.subjects.endpoint import Endpoint, find_endpoint, is_endpoint
from forgetless.subjects.layouts import short_names
from forgetless.subjects.models import Subject, compare, find_subjects
from forgetless.subjects.vllm_answers import VLLM, VllmAnswers
from forgetless.versions import versions

JUDGED = ("refusals", "over_refusals")  # kinds of probes whose answers are judged


@dataclass
class AuditSession:
    """What is compared with what, on which rows, and what it is held to."""

    config: AuditConfig
    engine: Engine
    policy: Policy | None
    roles: dict[str, Subject]  # REFERENCE, and ANCHOR where the policy has one
    models: list[Subject]
    weights: dict[str, str]  # sha256 by role: of all that decides the predictions, each model in its own chat template
    tasks: tuple[Task, ...]  # the user's
    probes: tuple[Probe, ...]
    texts: tuple[Text, ...]  # empty where the reference's own answers are the text
    prompts: tuple[str, ...]  # those that are answered for it
    judges: dict[str, OwnJudge]  # the user's, by name
    terms: Terms
    max_length: int  # tokens
    chat: bool  # whether prompts stand in chat templates
    notes: list[str]
    folder: Path
    endpoints: list[Endpoint] = field(default_factory=list)  # served models, of which there are answers only
    vllm: VllmAnswers | None = None  # what answers in the place of the models in memory
    began: float = field(default_factory=time.monotonic)

    @property
    def reference(self) -> Subject:
        return self.roles[REFERENCE]

    @property
    def audited(self) -> list[Subject | Endpoint]:
        """The models that are opened here, then the served ones."""
        return [*self.models, *self.endpoints]

    @property
    def scored(self) -> tuple[Task, ...]:
        """The tasks whose answers are right or wrong: the user's own, then probes."""
        return (*self.tasks, *(probe.task for probe in self.probes if probe.kind not in JUDGED))

    @property
    def judged(self) -> tuple[Probe, ...]:
        """The probes whose answers are judged."""
        return tuple(probe for probe in self.probes if probe.kind in JUDGED)

    def judged_names(self, probe: Probe) -> dict[str, str]:
        """Judge -> the name of what it says about the probe."""
        return judged_names(probe.task.name, self.judges)

    @property
    def rows_of(self) -> tuple[Task, ...]:
        """Everything with rows of its own: the user's tasks, then all probes."""
        return (*self.tasks, *(probe.task for probe in self.probes))

    @property
    def text_names(self) -> list[str]:
        return [OWN_ANSWERS] if self.prompts else [text.name for text in self.texts]

    def encoder(self, subject: Subject) -> Encoder:
        return _encoder(subject, self.max_length)

    def windows_of(self, text: Text, subject: Subject) -> Windows:
        """What goes through a model: of a chat the turns as its own template has them, else as the reference has it."""
        tokenizer = subject.tokenizer if text.chat else self.reference.tokenizer
        return text.windows(tokenizer, self.max_length, **self.cut, decoder_start=subject.decoder_start)

    def windows(self, text: Text) -> dict[str, Windows]:
        """What goes through each model, by its name. The measured tokens are those of the reference's tokenizer and
        chat template, but for what ends an answer where a model's template ends it otherwise.
        """
        measured, everyone = self.windows_of(text, self.reference), (*self.roles.values(), *self.models)
        longest = max(max(window.ids) for window in measured.windows)
        for subject in everyone:
            if longest >= subject.vocabulary:
                raise UsageError(
                    f"{subject.name}: the text {text.name!r} holds token {longest} of the reference's tokenizer, and "
                    f"this model has {subject.vocabulary}; give another text or reference"
                )
        template = self.reference.identity.chat_template
        others = [one for one in everyone if text.chat and one.identity.chat_template != template]
        if not others:
            return {one.name: measured for one in everyone}
        special = {token for token, told in self.reference.tokenizer.added_tokens_decoder.items() if told.special}
        try:
            measured, *own = measured_alike([measured, *(self.windows_of(text, one) for one in others)], special)
        except DataError as error:
            raise DataError(f"{text.name}: {error}") from error
        return {one.name: measured for one in everyone} | {one.name: w for one, w in zip(others, own, strict=True)}

    def check_time(self) -> None:
        """RunError where the policy's time-limit is over."""
        limit = self.policy.time_limit if self.policy else None
        if self.policy and limit and time.monotonic() - self.began > limit:
            raise RunError(
                f"{self.policy.file}: the audit takes longer than its time-limit of {limit:g} s; raise it, or measure "
                "fewer rows"
            )

    def facts(self, data: dict[str, str]) -> dict:
        """What the evidence keeps beside its numbers; `data` adds the hashes of texts."""
        return {
            "weights": self.weights,
            "data": {task.name: content_hash(task) for task in self.rows_of} | data,
            "policy": self.policy.sha256 if self.policy else None,
            "versions": versions(),
            "settings": {
                "computed_on": self.engine.told,
                "limit": self.config.limit,
                "base_is": self.config.base_is,
                "notes": list(dict.fromkeys(self.notes)),
                "max_length": self.max_length,
                "batch_tokens": BATCH_TOKENS,
                "answer_tokens": ANSWER_TOKENS,
                "chat": self.chat,
                "chat_template": (self.policy or self.config).chat_template,
                "kl_clip": self.kl_clip,
                **self.cut,
                "judges": {name: judge.sha256 for name, judge in self.judges.items()},
            },
        }

    @property
    def cut(self) -> dict[str, int | None]:
        """How plain text is cut, where it is told: window and stride in tokens."""
        told = self.policy or self.config
        return {"window": told.window, "stride": told.stride}

    @property
    def kl_clip(self) -> float:
        return self.policy.kl_clip if self.policy else KL_CLIP


def prepare(config: AuditConfig) -> AuditSession:
    """Reads and checks everything; UsageError and DataError name what does not fit."""
    config.check()
    policy = _policy(config)
    roles, models, notes = _subjects(config, policy)
    endpoints = _endpoints(config)
    notes += [f"{one.name}: the server's word is all that is known of which weights answer" for one in endpoints]
    weights = _weights(roles, [*models, *endpoints])
    folder = Path(config.output_dir or _usual_folder(config, roles, weights))
    if (policy or config).chat_template == REFERENCE:
        roles = {role: _prompted_as(one, roles[REFERENCE]) for role, one in roles.items()}
        models = [_prompted_as(one, roles[REFERENCE]) for one in models]
    everyone = [*roles.values(), *models]
    chat = all(one.chat_template for one in everyone)
    max_length = min([LONGEST, *(one.context for one in everyone if one.context)])
    tasks, probes, texts = _rows(config, policy, chat, notes)
    if none := [one.name for one in everyone if not one.chat_template and not chat]:
        notes.append(f"every model is asked in the Alpaca prompt, since {', '.join(none)} has no chat template")
    prompts = () if texts or policy else general_prompts(config.limit)
    judges = _judges(config, policy, probes)
    tasks, probes = _fitting(tasks, probes, _encoder(roles[REFERENCE], max_length), notes)
    if endpoints:
        tasks = tuple(answers_only(task, notes) for task in tasks)
        probes = tuple(
            probe if probe.kind in JUDGED else replace(probe, task=answers_only(probe.task, notes)) for probe in probes
        )
    notes += _without_system_prompt(endpoints, [*tasks, *(probe.task for probe in probes)])
    _check_templates(everyone, (*tasks, *(probe.task for probe in probes)), max_length)
    engine = Engine(config.device, config.precision)
    if engine.processes > 1:
        raise UsageError("an audit runs in one process; start it without accelerate launch")
    vllm = VllmAnswers(everyone, engine.dtype, max_length) if config.generate_with == VLLM else None
    if vllm:
        notes.append(f"answers were generated by {vllm.told}, all else was measured by transformers")
    session = AuditSession(
        config, engine, policy, roles, models, weights, tasks, probes, texts, prompts, judges,
        Terms(datetime.date.today()), max_length, chat, notes, folder, endpoints, vllm,
    )  # fmt: skip
    session.terms = _terms(session)
    _check_texts(session)
    return session


def _encoder(subject: Subject, max_length: int) -> Encoder:
    return Encoder(subject.tokenizer, max_length, subject.decoder_start)


def _weights(roles: dict[str, Subject], models: Sequence[Subject | Endpoint]) -> dict[str, str]:
    named = {f"model {number}": one.decided_by for number, one in enumerate(models, start=1)}
    named |= {role: one.decided_by for role, one in roles.items()}
    return {name: json_digest(told) for name, told in named.items()}


# ---------------------------------------------------------------- models


def _subjects(config: AuditConfig, policy: Policy | None) -> tuple[dict[str, Subject], list[Subject], list[str]]:
    """The roles, the models, and what a reader should know of them; refuses what cannot be compared."""
    roles = {REFERENCE: _one(policy.reference if policy else config.reference, config, policy)}
    if policy and policy.anchor:
        roles[ANCHOR] = _one(policy.anchor, config, policy)
    models = [one for spec in config.models if not is_endpoint(spec) for one in _find(spec, config)]
    _distinct([_place(one) for one in models], "models", "give each once")
    notes = [note for one in (*roles.values(), *models) for note in one.notes]
    notes += [note for role in roles.values() for one in models for note in compare(role, one)]
    return roles, models, notes


def _endpoints(config: AuditConfig) -> list[Endpoint]:
    """The served models, each asked whether it is there."""
    specs = [spec for spec in config.models if is_endpoint(spec)]
    if not specs:
        return []
    prompt = Path(config.system_prompt) if config.system_prompt else None
    if prompt and not prompt.is_file():
        raise UsageError(f"system_prompt: no file {prompt}; give a text file that holds it")
    settings = {
        "api": config.endpoint_api,
        "system_prompt": prompt.read_text(encoding="utf-8-sig").strip() if prompt else "",
        "key_variable": config.api_key_env,
        "concurrency": config.concurrency,
    }
    found = [find_endpoint(spec, **settings) for spec in specs]
    _distinct([one.name for one in found], "models", "give each once")
    return found


def _without_system_prompt(endpoints: list[Endpoint], tasks: list[Task]) -> list[str]:
    plain = [task.name for task in tasks if any(not row.messages for row in task.test)]
    if not plain or not any(one.system_prompt and one.api == "own" for one in endpoints):
        return []
    return [
        f"{', '.join(plain)}: plain prompts, asked without the system prompt; --endpoint-api chat asks them as chat"
    ]


def _place(subject: Subject) -> str:
    """Where its weights lie, however that was written."""
    return "+".join(str(folder.resolve()) for folder in (subject.base, subject.adapter) if folder)


def _prompted_as(subject: Subject, reference: Subject) -> Subject:
    """The model with the reference's tokenizer and chat template."""
    own = replace(
        subject.identity, tokenizer=reference.identity.tokenizer, chat_template=reference.identity.chat_template
    )
    return replace(subject, tokenizer=reference.tokenizer, identity=own)


def _find(spec: str, config: AuditConfig) -> list[Subject]:
    return find_subjects(spec, base_is=config.base_is, allow_pickle=config.allow_pickle)


def _one(spec: str, config: AuditConfig, policy: Policy | None) -> Subject:
    if is_endpoint(spec):
        raise UsageError(
            f"reference {spec!r}: a served model gives answers only, and a reference also gives the tokenizer and "
            "judges; give its weights"
        )
    found = _find(_beside(spec, policy.file.parent) if policy else spec, config)
    if len(found) > 1:
        tasks = ", ".join(one.name for one in found)
        raise UsageError(f"reference {spec!r}: a run folder of {len(found)} models; give one of its adapters ({tasks})")
    return found[0]


def _beside(spec: str, folder: Path) -> str:
    """A policy's model: a path from the policy's folder, where there is such a folder."""
    return "+".join(str(folder / part) if (folder / part).exists() else part for part in spec.split("+"))


def _usual_folder(config: AuditConfig, roles: dict[str, Subject], weights: dict[str, str]) -> str:
    """Named by what is compared: the same models again, the same folder."""
    digest = json_digest(weights)
    told = [config.models[0], roles[REFERENCE].name]
    names = [re.sub(r"[^\w.-]+", "-", name) for name in map(short_names(told).__getitem__, told)]
    more = f"-and-{len(config.models) - 1}-more" if len(config.models) > 1 else ""
    return f"runs/audit-{names[0]}{more}-against-{names[1]}-{digest[:6]}"


# ---------------------------------------------------------------- rows


def _rows(
    config: AuditConfig, policy: Policy | None, chat: bool, notes: list[str]
) -> tuple[tuple[Task, ...], tuple[Probe, ...], tuple[Text, ...]]:
    """The user's tasks, probes without what stands in the tasks' training rows, and texts; each row once."""
    if policy:
        tasks, probes, texts = _policy_tasks(policy), _policy_probes(policy, chat), _policy_texts(policy)
    else:
        tasks, probes = _tasks(config), load_probes(config.probes, limit=config.limit, chat=chat)
        texts = tuple(read_text(source, config.limit) for source in config.text)
    if (policy or config).window or (policy or config).stride:
        _check_plain(texts)
    probes = _unseen(probes, [row for task in tasks for row in task.train])
    tasks = tuple(_once(task, notes) for task in tasks)
    probes = tuple(replace(probe, task=_once(probe.task, notes)) for probe in probes)
    if policy:
        policy.check_rows({task.name: content_hash(task) for task in (*tasks, *(probe.task for probe in probes))})
    return tasks, probes, tuple(replace(text, rows=_distinct_rows(text.name, text.rows, notes)) for text in texts)


def _judges(config: AuditConfig, policy: Policy | None, probes: tuple[Probe, ...]) -> dict[str, OwnJudge]:
    """The user's own judges."""
    judges = own_judges(f"{one.path}:{one.name}" for one in policy.judges) if policy else own_judges(config.judge)
    if judges and not any(probe.kind in JUDGED for probe in probes):
        raise UsageError(
            f"judge {', '.join(judges)}: no probe's answers are judged; name one, such as --probes advbench"
        )
    return judges


def _tasks(config: AuditConfig) -> tuple[Task, ...]:
    if not config.tasks:
        return ()
    tasks = load_stream(config.tasks, on_bad_row=config.on_bad_row).tasks
    for task in tasks:
        if not getattr(task, config.score_on):
            raise DataError(f"{config.tasks}: task {task.name} has no {config.score_on} rows")
    return tuple(
        replace(
            task,
            test=sample(
                getattr(task, config.score_on), config.limit, seed=JUDGED_SEED, name=task.name, purpose=config.score_on
            ),
        )
        for task in tasks
    )


def _check_plain(texts: tuple[Text, ...]) -> None:
    if not any(text.plain for text in texts):
        raise UsageError("window and stride are of plain text, and none is measured: name one with --text")


def _unseen(probes: tuple[Probe, ...], trained: list[Row]) -> tuple[Probe, ...]:
    """The probes without the rows that stand in the tasks' training rows."""
    if not trained:
        return probes
    return tuple(replace(probe, task=without(probe.task, contamination(probe.task.test, trained))) for probe in probes)


def _once(task: Task, notes: list[str]) -> Task:
    return replace(task, test=_distinct_rows(task.name, task.test, notes))


def _distinct_rows(name: str, rows: tuple[Row, ...], notes: list[str]) -> tuple[Row, ...]:
    """Each row once: what is said twice shows nothing more, and bounds count independent rows."""
    found = tuple({row.key: row for row in reversed(rows)}.values())[::-1]
    if len(found) < len(rows):
        notes.append(f"{name}: {len(rows) - len(found)} rows that repeat another were left out")
    return found


def _fitting(
    tasks: tuple[Task, ...], probes: tuple[Probe, ...], encoder: Encoder, notes: list[str]
) -> tuple[tuple[Task, ...], tuple[Probe, ...]]:
    """Both with every row encoded once, so that errors come before anything is computed."""
    names = [task.name for task in (*tasks, *(probe.task for probe in probes))]
    _distinct(names, "tasks and probes", "rename one")
    for task in tasks:
        rules_of(task)
    if tasks:
        stream, told = fit_rows(Stream("tasks", tasks), encoder, splits=("test",))
        tasks = stream.tasks
        notes += told
    fitted = []
    for probe in probes:
        task, told = probe.task, [f"{probe.task.name}: {note}" for note in probe.task.notes]
        if probe.kind not in JUDGED:
            stream, told = fit_rows(Stream("probe", (task,)), encoder, splits=("test",))
            [task] = stream.tasks
        notes += told
        fitted.append(replace(probe, task=task))
    return tasks, tuple(fitted)


def _check_templates(subjects: list[Subject], tasks: tuple[Task, ...], max_length: int) -> None:
    """Each model's own tokenizer and chat template take a row of everything, before anything is computed."""
    for subject in subjects:
        encoder = _encoder(subject, max_length)
        for task in tasks:
            try:
                encoder.generation_context(task.test[0], 1) if not task.test[0].label else encoder(task.test[0])
            except DataError as error:
                raise DataError(f"{subject.name}, {task.name}: {error}") from error


def _check_texts(session: AuditSession) -> None:
    """Every text can be cut and goes through every model, before anything is computed; of own answers a made-up one."""
    made_up = own_answers(session.prompts[:1], ["Yes."], session.chat) if session.prompts else None
    for text in (made_up,) if made_up else session.texts:
        session.windows(text)


# ---------------------------------------------------------------- what it is held to


def drop_names(session: AuditSession) -> list[str]:
    """What a --max-drop can name. A judged probe has its patterns' name, and one more for each other judge."""
    judged = [name for probe in session.judged for name in session.judged_names(probe).values()]
    return [*(task.name for task in session.scored), *judged]


def _terms(session: AuditSession) -> Terms:
    terms = session.policy.terms(session.terms.today) if session.policy else _flag_terms(session)
    check_clip((*terms.budgets, *terms.anchor_budgets), session.kl_clip)
    return terms


def _flag_terms(session: AuditSession) -> Terms:
    drops, config = drop_names(session), session.config
    _distinct([*drops, *session.text_names], "tasks, probes and texts", "rename one")
    budgets: tuple[Budget, ...] = resolve(flag_budgets(config.max_drop, config.max_kl), drops, session.text_names)
    return replace(session.terms, budgets=budgets, confidence=config.confidence)


def _policy(config: AuditConfig) -> Policy | None:
    if not config.policy:
        return None
    told = [
        name
        for name in ("tasks", "text", "window", "stride", "probes", "judge", "max_kl", "max_drop", "limit")
        if getattr(config, name)
    ]
    if config.reference:
        told.insert(0, "reference")
    told += [
        name
        for name in ("confidence", "chat_template", "score_on")
        if getattr(config, name) != getattr(AuditConfig, name)
    ]
    if told:
        raise UsageError(f"--policy says what is compared on what; leave out {', '.join(told)}, or change the policy")
    policy = read_policy(config.policy)
    policy.check_files()
    if not (policy.tasks or policy.texts or policy.probes):
        raise UsageError(f"{policy.file}: names no tasks, texts or probes, so there is nothing to measure")
    if config.recover and not policy.tasks:
        raise UsageError(f"{policy.file}: recover brings back your own tasks, and the policy names none")
    return policy


def _policy_tasks(policy: Policy) -> tuple[Task, ...]:
    found = []
    for source in policy.tasks:
        tasks = {task.name: task for task in load_stream(str(source.path)).tasks}
        if source.name not in tasks:
            raise UsageError(f"{policy.file}: {source.path} has no task {source.name!r}, only {', '.join(tasks)}")
        found.append(tasks[source.name])
    return tuple(found)


def _policy_texts(policy: Policy) -> tuple[Text, ...]:
    return tuple(replace(read_text(str(one.path)), name=one.name) for one in policy.texts)


def _policy_probes(policy: Policy, chat: bool) -> tuple[Probe, ...]:
    found: list[Probe] = []
    for source in policy.probes:
        loaded = load_probes([str(source.path or source.name)], chat=chat)
        if [probe.task.name for probe in loaded] != [source.name]:
            names = ", ".join(probe.task.name for probe in loaded)
            raise UsageError(f"{policy.file}: probe {source.name!r}: there it is called {names}; name one probe so")
        found += loaded
    return tuple(found)


def _distinct(names: list[str], what: str, remedy: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{what}: {name!r} is there twice; {remedy}")
