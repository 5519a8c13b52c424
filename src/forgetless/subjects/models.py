"""The models of an audit: what a name stands for, and opening several over one shared base.

A name may be a hub name, a folder with full weights, a PEFT adapter of any type that PEFT loads, `BASE+ADAPTER`, a
run folder of forgetless (each of its tasks), a packaged model, or the output folder of a trainer (`layouts`).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forgetless.data.packages import PACKAGED_MODELS
from forgetless.errors import ForgetlessError, RunError, UsageError
from forgetless.model.adapters import OWN_KINDS
from forgetless.model.base import find_model, load_base, load_config, load_tokenizer
from forgetless.model.encoder_decoder import decoder_start, model_class, task_type
from forgetless.model.identity import (
    Identity,
    check_same,
    config_digest,
    identify,
    json_digest,
    open_tensors,
    template_digest,
    text_digest,
    tokenizer_digest,
    weight_files,
    weights_digest,
)
from forgetless.model.loading import (
    AS_STORED,
    CALLED_4BIT,
    FOUR_BIT,
    code_digest,
    dense_twin,
    is_trusted,
    load_settings,
    stored_in_4bit,
)
from forgetless.runs.folder import RunFolder, check_published
from forgetless.runs.shapes import NUMBER, Each, Maybe, read, read_run
from forgetless.subjects.layouts import ADAPTER_CONFIG, locate
from forgetless.subjects.pickles import as_safetensors

RUN_CONFIG = "run.json"
CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # LoRA starts that take weight out of the base
ADAPTER = {
    "peft_type": Maybe(str), "base_model_name_or_path": Maybe(str), "task_type": Maybe(str), "r": Maybe(int),
    "lora_alpha": Maybe(NUMBER), "rank_pattern": Maybe(Each(int)), "alpha_pattern": Maybe(Each(NUMBER)),
    "modules_to_save": Maybe([str]), "bias": Maybe(str), "use_rslora": Maybe(bool),
}  # fmt: skip
"""The settings of anybody's adapter_config.json whose form is relied on."""
_PER_TASK = ("POLY", "MULTITASK_PROMPT_TUNING")
_EMBEDDING = re.compile(rf"\.({'|'.join(EMBEDDING_LAYER_NAMES)})(\.base_layer|\.modules_to_save)?\.weight$")
IN_4BIT = "{}: its linear layers compute with 4-bit weights here, whose rounding is part of what is measured"
_SAMPLE = "The fox's 12,345 naïve jumps: f(x) = x**2;\n\n\tpreguntó «¿qué?» 你好 🙂"

Opened = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class Subject:
    """A model to be measured: full weights, or an adapter on them."""

    name: str
    base: Path  # the folder of the full weights
    adapter: Path | None
    tokenizer: PreTrainedTokenizerBase = field(repr=False, compare=False)  # its own, where the adapter brings one
    identity: Identity  # the base's weights; its own tokenizer and chat template
    adapter_sha256: str | None  # of the adapter's weights and configuration
    vocabulary: int  # rows of the output embedding, padding included
    load_in: str = AS_STORED  # how the base is loaded: a base in 4 bits is another function
    notes: tuple[str, ...] = ()  # what was accepted that a reader should know

    @property
    def chat_template(self) -> str | None:
        return self.tokenizer.chat_template if self.decoder_start is None else None

    @property
    def decided_by(self) -> dict:
        """Hashes of all that its predictions depend on; equal for equal models, wherever they lie."""
        return self.identity.as_json() | {"adapter": self.adapter_sha256, "config": self._run_by}

    @property
    def runs_as(self) -> tuple[str, str]:
        """Models of which this is equal share a base in memory: its weights, and how its configuration runs them."""
        return self.identity.weights, self._run_by

    @property
    def _in_4bit(self) -> dict[str, str]:
        return {} if self.load_in == AS_STORED else {"load_in": self.load_in}

    @property
    def _run_by(self) -> str:
        """Hash of what decides the base's function beside its weights."""
        own = code_digest(self.base) if is_trusted(self.base, find_model) else ""
        config = config_digest(self.base)
        return config if self.load_in == AS_STORED and not own else json_digest([config, self.load_in, own])

    @cached_property
    def decoder_start(self) -> int | None:
        """The token with which an encoder-decoder's answers start; None for a decoder alone."""
        return decoder_start(load_config(self.base))

    @property
    def task_type(self) -> str:
        """PEFT's name for what the model does."""
        return task_type(load_config(self.base))

    @property
    def context(self) -> int | None:
        """The longest sequence in tokens, where the configuration states one."""
        return getattr(load_config(self.base).get_text_config(), "max_position_embeddings", None)

    def as_json(self) -> dict:
        """What an evidence file keeps: the name, the hashes, the notes."""
        return {
            "name": self.name,
            "identity": self.identity.as_json() | {"adapter": self.adapter_sha256} | self._in_4bit,
            "notes": list(self.notes),
        }


# ---------------------------------------------------------------------------------------- what a name stands for


def find_subjects(spec: str, *, base_is: str | None = None, allow_pickle: bool = False) -> list[Subject]:
    """The models that a name stands for: one, or those of a run folder's finished tasks in their order.

    `base_is`: the base of the adapters is this model, whatever name their configuration gives it: the same weights
    under another name, or the dense twin of a 4-bit base. `allow_pickle`: `.bin` files are read, tensors only.
    """
    base, rest = _split(spec)
    folder = find_model(rest)
    if (folder / RUN_CONFIG).is_file() and (folder / "tasks").is_dir():
        if base:
            raise UsageError(f"model {spec!r}: {folder} is a run folder, which names its base itself; give it alone")
        return _of_run(rest, folder, base_is)
    place = locate(folder)
    check_published(place.folder)
    if place.kind == "adapter":
        subject = _on_base(spec, as_safetensors(place.folder, allow_pickle), base, base_is, allow_pickle)
    elif base:
        raise UsageError(f"model {spec!r}: {place.folder} holds full weights, no adapter; give it without {base!r}")
    else:
        subject = _full(spec, as_safetensors(place.folder, allow_pickle))
    return [replace(subject, notes=(*place.notes, *subject.notes))]


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter whose base need not be here."""

    name: str
    folder: Path
    base: str  # its base's name, as the user, the run or the adapter's configuration gives it; may be empty
    notes: tuple[str, ...] = ()


def find_adapters(spec: str, *, allow_pickle: bool = False) -> list[AdapterFolder]:
    """The adapters that a name stands for, found as `find_subjects` finds them: one, or those of a run's tasks."""
    base, rest = _split(spec)
    folder = find_model(rest)
    if (folder / RUN_CONFIG).is_file() and (folder / "tasks").is_dir():
        told, tasks, notes = _finished(folder)
        name = told["model"]["name"]
        return [AdapterFolder(f"{rest.rstrip('/')}/{task.name}", task / "adapter", name, notes) for task in tasks]
    place = locate(folder)
    if place.kind != "adapter":
        raise UsageError(f"{place.folder}: holds full weights, no adapter; give a folder with a LoRA adapter")
    check_published(place.folder)
    adapter = as_safetensors(place.folder, allow_pickle)
    named = adapter_config(adapter).get("base_model_name_or_path") or ""
    _refuse_non_finite(adapter / SAFETENSORS_WEIGHTS_NAME)
    return [AdapterFolder(spec, adapter, base or named, place.notes)]


def same_model(one: str, other: str) -> bool:
    """Whether two names are known to be one model: the same name, or equal weights here."""
    if one == other:
        return True
    found, twin = _found_here(one), _found_here(other)
    if found is None or twin is None:
        return False
    return weights_digest(weight_files(found)) == weights_digest(weight_files(twin))


def _split(spec: str) -> tuple[str | None, str]:
    """`BASE+ADAPTER`, unless a folder has this very name."""
    if "+" not in spec or Path(spec).exists():
        return None, spec
    base, _, adapter = spec.partition("+")
    if not base or not adapter or ("+" in adapter and not Path(adapter).exists()):
        raise UsageError(f"model {spec!r}: expected BASE+ADAPTER, one adapter on one base")
    return base, adapter


def _of_run(spec: str, folder: Path, base_is: str | None) -> list[Subject]:
    """The adapters of a run's finished tasks, on the base that the run was learnt on."""
    told, tasks, notes = _finished(folder)
    base = base_is or told["model"]["name"]
    subjects = []
    for task in tasks:
        subject = _on_base(f"{spec.rstrip('/')}/{task.name}", task / "adapter", base, base)
        check_same(told["base"], subject.identity, subject.base, task)
        subjects.append(replace(subject, notes=(*notes, *_learnt_in(told, subject, folder))))
    return subjects


def _learnt_in(run: dict, subject: Subject, folder: Path) -> Iterator[str]:
    """A note on a base that is loaded otherwise than it was in learning, or in 4 bits."""
    rounded = stored_in_4bit(subject.base, load_config(subject.base))
    learnt = FOUR_BIT if rounded else run["decides"].get("load_in", AS_STORED)
    words = {AS_STORED: "in full", FOUR_BIT: "in 4 bits"}
    if subject.load_in == FOUR_BIT:
        yield IN_4BIT.format(subject.base)
    if learnt != subject.load_in:
        here = words[subject.load_in]
        yield f"{folder}: was learnt on its base {words[learnt]}, and is measured here on it {here}: another model"


def _finished(folder: Path) -> tuple[dict, list[Path], tuple[str, ...]]:
    """What a run's file says, the folders of its finished tasks in their order, and notes."""
    told = read_run(folder)
    planned = [lesson["name"] for lesson in told["lessons"]]
    tasks = RunFolder(folder).finished(planned)
    if not tasks:
        raise RunError(f"{folder}: no task of this run is finished; let `forgetless learn` finish one")
    unfinished = len(planned) - len(tasks)
    note = f"{folder}: {unfinished} of {len(planned)} tasks are not finished and were left out"
    return told, tasks, (note,) if unfinished else ()


def _full(name: str, folder: Path) -> Subject:
    config = load_config(folder)
    decoder_start(config)  # refuses kinds that are not known
    load_in = FOUR_BIT if stored_in_4bit(folder, config) else load_settings().load_in
    tokenizer = load_tokenizer(folder)
    return Subject(
        name=name,
        base=folder,
        adapter=None,
        tokenizer=tokenizer,
        identity=identify(folder, tokenizer.chat_template),
        adapter_sha256=None,
        vocabulary=config.get_text_config().vocab_size,
        load_in=load_in,
        notes=(IN_4BIT.format(folder),) if load_in == FOUR_BIT else (),
    )


def _on_base(name: str, folder: Path, base: str | None, base_is: str | None, allow_pickle: bool = False) -> Subject:
    """An adapter on the base that the user gives, or else the one that its configuration names."""
    config = adapter_config(folder)
    trained_on = config.get("base_model_name_or_path") or ""
    told = base or base_is or trained_on
    if not told:
        raise UsageError(f"{folder}: its {ADAPTER_CONFIG} names no base; give it as BASE+{folder}")
    try:
        place = locate(find_model(told))
    except ForgetlessError as error:
        raise UsageError(
            f"{folder}: its base {told!r} cannot be had ({error}) Say which model it is with base_is (--base-is)."
        ) from error
    if place.kind != "full":
        raise UsageError(f"{folder}: its base {told!r} is an adapter itself; merge it into full weights first")
    plain = _full(told, as_safetensors(place.folder, allow_pickle))
    _refuse_other_kind(folder, config, plain)
    notes = _same_base(folder, trained_on, told, plain, declared=told == base_is)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    subject = replace(
        _with_own_tokenizer(plain, folder),
        name=name,
        adapter=folder,
        adapter_sha256=_adapter_sha256(weights, config),
        vocabulary=_adapter_vocabulary(weights) or plain.vocabulary,
    )
    _refuse_non_finite(weights)
    _refuse_misfit(subject)
    return replace(subject, notes=(*plain.notes, *notes, *_adapter_notes(folder, config), *compare(plain, subject)))


def _with_own_tokenizer(plain: Subject, folder: Path) -> Subject:
    if not (folder / "tokenizer_config.json").is_file():
        return plain
    tokenizer = load_tokenizer(folder)
    identity = replace(
        plain.identity,
        tokenizer=tokenizer_digest(folder),
        chat_template=template_digest(tokenizer.chat_template),
    )
    return replace(plain, tokenizer=tokenizer, identity=identity)


# ---------------------------------------------------------------------------------------- is it the same base?


def _same_base(adapter: Path, trained_on: str, told: str, plain: Subject, declared: bool) -> list[str]:
    """Notes on a base of another name; refuses one that is not known to be the same."""
    base = plain.base
    if not trained_on or trained_on == told:
        return []
    found = _found_here(trained_on)
    if found and found.resolve() == base.resolve():
        return []
    if found and weights_digest(weight_files(found)) == weights_digest(weight_files(base)):
        return [f"{adapter}: its base is called {trained_on!r}; {told!r} has equal weights"]
    in_full = all("quantization_config" not in load_config(one).to_dict() for one in (found, base) if one)
    if found and in_full and (differing := other_shape(found, base)):
        raise UsageError(
            f"{adapter}: was trained on {trained_on!r}, whose {differing} than in {told!r}: a different model. "
            f"Audit it on {trained_on!r}."
        )
    if declared:
        rounded = CALLED_4BIT.search(trained_on) and plain.load_in == AS_STORED
        twin = " (4-bit; rounding that the adapter learnt to undo is not there)" if rounded else ""
        return [f"{adapter}: was trained on {trained_on!r}{twin}; taken for {told!r} as declared, not verified"]
    why = "has other weights of equal shapes" if found else "is not here to be compared with it"
    raise UsageError(
        f"{adapter}: was trained on {trained_on!r}, which {why}, not on {told!r}. On another base its answers mean "
        f"nothing. If both are one model (another name, a 4-bit twin), say base_is={told!r} (--base-is {told})."
    )


def _refuse_other_kind(adapter: Path, config: dict, base: Subject) -> None:
    """An adapter of a decoder alone on an encoder-decoder, or the other way round; a soft prompt on the latter."""
    if config.get("task_type") not in (None, base.task_type):
        raise UsageError(
            f"{adapter / ADAPTER_CONFIG}: task_type {config['task_type']}, and {base.name} is of {base.task_type}: it "
            "was made for another kind of model; give its own base"
        )
    soft = issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]], PromptLearningConfig)
    if soft and base.decoder_start is not None:
        raise UsageError(
            f"{adapter / ADAPTER_CONFIG}: {config['peft_type']} puts virtual tokens before a row, which is not "
            "measured on encoder-decoders; give an adapter that is in the layers, as LoRA"
        )


def base_name(subjects: Sequence[Subject]) -> str:
    """What their adapters' configurations call their one base; its folder where they differ, or mean another one."""
    adapters = [one.adapter for one in subjects if one.adapter]
    names = {adapter_config(adapter).get("base_model_name_or_path") or "" for adapter in adapters}
    base, found = subjects[0].base, _found_here(min(names)) if len(names) == 1 and "" not in names else None
    return min(names) if found and found.resolve() == base.resolve() else str(base)


def _found_here(name: str) -> Path | None:
    """A model's folder without fetching it, if its weights are there."""
    from huggingface_hub import snapshot_download

    if name in PACKAGED_MODELS:
        return find_model(name)
    try:
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None
    return folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None


def other_shape(one: Path, other: Path) -> str | None:
    """'tensor x has another shape ((2, 3), not (4, 3))' of the first tensor that differs."""
    mine, theirs = _shapes(weight_files(one)), _shapes(weight_files(other))
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            return f"tensor {name} has another shape ({mine.get(name)}, not {theirs.get(name)})"
    return None


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with open_tensors(file) as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def dense(subject: Subject, what: str) -> Subject:
    """The subject on its base's weights in full; UsageError where they lie there in 4 bits. `what`: needs them."""
    if stored_in_4bit(subject.base, load_config(subject.base)):
        raise UsageError(
            f"{subject.base}: its weights lie there in 4 bits, and {what} needs them in full; give the dense "
            f"model{dense_twin(subject.base)}. For an adapter trained on it say base_is (--base-is)."
        )
    return replace(subject, load_in=AS_STORED)


# ---------------------------------------------------------------------------------------- adapters as they are


def adapter_config(folder: Path) -> dict:
    """The adapter's configuration, of a type and a task that can be measured."""
    config = read(folder / ADAPTER_CONFIG, ADAPTER)
    kind = config.get("peft_type")
    refuse_own_kind(folder / ADAPTER_CONFIG, config)
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        what = f"the adapter type {kind!r}, which PEFT {peft.__version__} does not know" if kind else "no peft_type"
        raise UsageError(
            f"{folder / ADAPTER_CONFIG}: has {what}. Update peft if it is a newer type; an adapter of another library "
            "must be merged into full weights first."
        )
    if kind in _PER_TASK:
        raise UsageError(f"{folder / ADAPTER_CONFIG}: {kind} needs a task id beside each row, which an audit has not")
    if kind == "XLORA":
        raise UsageError(f"{folder / ADAPTER_CONFIG}: XLORA loads further adapters, which no hash here covers")
    known = {one.name for one in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    if unknown := sorted(key for key, value in config.items() if value and key not in known):
        raise UsageError(
            f"{folder / ADAPTER_CONFIG}: PEFT {peft.__version__} does not know {', '.join(unknown)} and would leave it "
            "out, so this would be another model; update peft"
        )
    if (task := config.get("task_type")) not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise UsageError(
            f"{folder / ADAPTER_CONFIG}: task_type {task} predicts no next token; CAUSAL_LM and SEQ_2_SEQ_LM do"
        )
    return config


def refuse_own_kind(file: Path, told: dict) -> None:
    """UsageError for what a method of ours saved that is no PEFT adapter."""
    if name := OWN_KINDS.get(told.get("peft_type") or ""):
        raise UsageError(
            f"{file}: was learnt by {name} and is no PEFT adapter; only that method puts it into a model "
            f"(docs/methods/{name}.md)"
        )


def _adapter_sha256(weights: Path, config: dict) -> str:
    named = {key: value for key, value in config.items() if key != "base_model_name_or_path"}
    return text_digest(weights_digest([weights]) + json.dumps(named, sort_keys=True))


def _adapter_vocabulary(weights: Path) -> int | None:
    """Rows of the embeddings that the adapter brings, if any."""
    return next((shape[0] for name, shape in _shapes([weights]).items() if _EMBEDDING.search(name)), None)


def _adapter_notes(folder: Path, config: dict) -> list[str]:
    notes = []
    if saved := config.get("modules_to_save"):
        notes.append(f"{folder}: brings whole modules of its own: {', '.join(saved)} (modules_to_save)")
    if config.get("trainable_token_indices"):
        notes.append(f"{folder}: brings embeddings of single tokens of its own (trainable_token_indices)")
    return notes


def _refuse_non_finite(weights: Path) -> None:
    with open_tensors(weights) as tensors:
        for name in tensors.keys():  # noqa: SIM118
            _check_finite(name, tensors.get_tensor(name), weights)


def _refuse_misfit(subject: Subject) -> None:
    """Puts the adapter on the base's shapes without data, so that a misfit is said before anything is computed."""
    with torch.device("meta"):
        config: Any = load_config(subject.base)
        trusted = is_trusted(subject.base, find_model)
        base = model_class(config).from_config(config, trust_remote_code=trusted)  # type: ignore[attr-defined]
    with suppress(NotImplementedError):  # some types compute with the base's data; they are seen when opened
        _attach(base, subject, "cpu", low_cpu_mem_usage=True)


def _check_finite(name: str, tensor: Tensor, place: Path) -> None:
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise RunError(f"{place}: {name} holds NaN or infinity: its training broke down; audit an earlier checkpoint")


# ---------------------------------------------------------------------------------------- can two be compared?


def compare(reference: Subject, subject: Subject) -> tuple[str, ...]:
    """Notes on what differs between two models; refuses those whose tokens do not mean the same."""
    _refuse_two_kinds(reference, subject)
    notes = [
        *_compare_tokenizers(reference, subject),
        *_compare_vocabularies(reference, subject),
        *_compare_templates(reference, subject),
    ]
    return tuple(f"{subject.name}: {note} (against {reference.name})" for note in notes)


def _refuse_two_kinds(reference: Subject, subject: Subject) -> None:
    def kind(one: Subject) -> str:
        start = one.decoder_start
        return "a decoder alone" if start is None else f"an encoder-decoder whose answers start with token {start}"

    if reference.decoder_start != subject.decoder_start:
        raise UsageError(
            f"{subject.name} is {kind(subject)}, and {reference.name} {kind(reference)}; give a reference of its kind"
        )


def _compare_tokenizers(reference: Subject, subject: Subject) -> Iterator[str]:
    ours, theirs = reference.tokenizer.get_vocab(), subject.tokenizer.get_vocab()
    moved = [token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]]
    if moved:
        token = min(moved, key=lambda moved: ours[moved])
        raise UsageError(
            f"{subject.name}: its tokenizer gives {len(moved)} tokens other ids than that of {reference.name} "
            f"({token!r}: {theirs[token]}, not {ours[token]}), so their distributions cannot be compared. Give a "
            "reference with the same tokenizer."
        )
    if added := len(theirs.keys() - ours.keys()):
        yield f"its tokenizer has {added} tokens more"
    if gone := len(ours.keys() - theirs.keys()):
        yield f"its tokenizer has {gone} tokens less"
    if reference.tokenizer(_SAMPLE)["input_ids"] != subject.tokenizer(_SAMPLE)["input_ids"]:
        yield "its tokenizer splits the same text into other tokens"


def _compare_vocabularies(reference: Subject, subject: Subject) -> Iterator[str]:
    if reference.vocabulary != subject.vocabulary:
        shared = min(reference.vocabulary, subject.vocabulary)
        yield (
            f"its embedding has {subject.vocabulary} rows, not {reference.vocabulary}: compared on the first {shared}, "
            "and a probability m of the others adds -log(1 - m) to the KL"
        )


def _compare_templates(reference: Subject, subject: Subject) -> Iterator[str]:
    if reference.identity.chat_template != subject.identity.chat_template:
        yield "its chat template differs" if subject.chat_template else "it has no chat template"


# ---------------------------------------------------------------------------------------- opening


def opened(
    subjects: list[Subject], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Generator[tuple[Subject, Opened], None, None]:
    """Each subject with its model, ready for inference; each base is loaded once, one at a time.

    Subjects on one base come after one another, so the order may change. A model is good until the next one is asked
    for: then its adapter is taken off the shared base, or its weights are freed. Logits are those of the tokens given;
    an adapter's virtual tokens have none.
    """
    groups: dict[tuple[str, str], list[Subject]] = {}
    for subject in subjects:
        groups.setdefault(subject.runs_as, []).append(subject)
    for group in groups.values():
        shared = _SharedBase(group[0].base, dtype, device, group[0].load_in)
        try:
            for subject in group:
                with shared.using(subject) as model:
                    yield subject, model
        finally:
            shared.free()


class _SharedBase:
    """One base in memory that adapters are put on and taken off again."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device | str, load_in: str):
        self.folder, self.dtype, self.device, self.load_in = folder, dtype, device, load_in
        self.model: PreTrainedModel | None = None
        self.fingerprint: dict[str, tuple] = {}

    @contextmanager
    def using(self, subject: Subject) -> Iterator[Opened]:
        base = self._load()
        if subject.adapter is None:
            yield base
            return
        model, handles = _attach(base, subject, self.device)
        try:
            yield model
        finally:
            for handle in handles:
                handle.remove()
            if not _detach(model) or _fingerprint(base) != self.fingerprint:
                self.free()  # some types change the base for good (PiSSA, resized embeddings, biases)

    def free(self) -> None:
        """Gives the memory back, even where a caller still holds the model."""
        if self.model is not None and self.load_in == FOUR_BIT:
            for module in self.model.modules():
                module._parameters.clear()  # such a parameter does not go to "meta"
        elif self.model is not None:
            self.model.to("meta")  # type: ignore[arg-type]  # transformers' wrapper of `to` is typed without self
        self.model = None

    def _load(self) -> PreTrainedModel:
        if self.model is None:
            self.model = load_base(str(self.folder), self.dtype, self.device, load_in=self.load_in).model
            for name, tensor in self.model.state_dict().items():
                _check_finite(name, tensor, self.folder)
            self.fingerprint = _fingerprint(self.model)
        return self.model


def _attach(
    base: PreTrainedModel, subject: Subject, device: torch.device | str, low_cpu_mem_usage: bool = False
) -> tuple[PeftModel, list[RemovableHandle]]:
    """The adapter on the base, every one of its tensors in its place; and the hooks to be removed with it."""
    assert subject.adapter is not None
    if base.get_input_embeddings().get_parameter("weight").shape[0] != subject.vocabulary:
        base.resize_token_embeddings(subject.vocabulary, mean_resizing=False)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # PEFT draws a start that is then replaced
            warnings.simplefilter("ignore")  # what it warns of is refused, in `adapter_config` or below
            model = PeftModel.from_pretrained(
                base, str(subject.adapter), torch_device=str(device), low_cpu_mem_usage=low_cpu_mem_usage
            )
    except NotImplementedError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, ImportError, AttributeError, ArithmeticError) as error:
        raise RunError(f"{subject.adapter}: does not go onto {subject.base}: {_told(error)}") from error
    _check_complete(model, subject)
    return model.eval(), _without_virtual_tokens(model)


def _check_complete(model: PeftModel, subject: Subject) -> None:
    """PEFT passes over tensors without a place and leaves layers without tensors at their beginning: neither here."""
    assert subject.adapter is not None
    stored = {name for name in _shapes([subject.adapter / SAFETENSORS_WEIGHTS_NAME]) if not _EMBEDDING.search(name)}
    placed = {
        name for name in get_peft_model_state_dict(model, save_embedding_layers=False) if not _EMBEDDING.search(name)
    }
    if unplaced := sorted(stored - placed):
        raise RunError(
            f"{subject.adapter}: {len(unplaced)} of {len(stored)} tensors have no place in {subject.base} "
            f"({unplaced[0]}): it was made for another architecture or other names of layers"
        )
    if missing := sorted(placed - stored):
        raise RunError(
            f"{subject.adapter}: lacks {len(missing)} of {len(placed)} tensors that its configuration calls for "
            f"({missing[0]}); save it again with save_pretrained"
        )


def _told(error: Exception) -> str:
    """The line of PEFT's message that says what does not fit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)


def _without_virtual_tokens(model: PeftModel) -> list[RemovableHandle]:
    """Hooks that keep a soft prompt's positions from the output embedding, so that logits[i] stays token i's."""
    config = model.active_peft_config
    head: nn.Module = model.get_base_model().get_output_embeddings()  # type: ignore[operator]  # torch's stub
    if not config.is_prompt_learning or config.peft_type == "PREFIX_TUNING":  # a prefix has keys and values only
        return []
    whole_rows = False  # in generation the model sees the prompt as embeddings and asks for its last row only

    def begin(module: nn.Module, inputs: tuple) -> None:
        nonlocal whole_rows
        whole_rows = True

    def end(module: nn.Module, inputs: tuple, output: object) -> None:
        nonlocal whole_rows
        whole_rows = False

    def drop(module: nn.Module, inputs: tuple) -> tuple:
        hidden, *rest = inputs  # (batch, virtual + length, width)
        return (hidden[:, config.num_virtual_tokens :], *rest) if whole_rows else inputs

    return [
        model.register_forward_pre_hook(begin),
        model.register_forward_hook(end, always_call=True),
        head.register_forward_pre_hook(drop),
    ]


def _detach(model: PeftModel) -> bool:
    """Takes the adapter off; False where its type cannot be."""
    if not isinstance(model.base_model, BaseTuner):
        return model.active_peft_config.is_prompt_learning  # never part of the base
    try:
        model.unload()
    except (NotImplementedError, AttributeError):
        return False
    return True


def _fingerprint(model: nn.Module) -> dict[str, tuple]:
    """Name, shape and sum of bits of each tensor: enough to see that an adapter left something behind."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: (tensor.shape, int(tensor.view(integers[tensor.element_size()]).sum(dtype=torch.int64)))
        for name, tensor in model.state_dict().items()
    }
