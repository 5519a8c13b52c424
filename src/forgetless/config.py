"""The options of `learn` and `audit`: dataclass fields = command-line flags = documentation (for learn, YAML keys)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from forgetless.data.tasks import Stream
from forgetless.errors import UsageError, nearest
from forgetless.forgetting.texts import PROMPTS
from forgetless.learning.checkpoint import SaveSettings
from forgetless.learning.engine import DEVICES, PRECISIONS
from forgetless.learning.step import ON_NAN, OPTIMIZERS, TrainSettings
from forgetless.methods import Method
from forgetless.methods.finding import code_of, find_method, label_of, options_of
from forgetless.model.adapters import LoraSettings
from forgetless.model.loading import AS_STORED, LOADINGS, LoadSettings

CHOICES: dict[str, Collection[str]] = {
    "cells": ("all", "seen", "ends", "last"),
    "from_kind": ("continued", "summed"),
    "score_on": ("test", "validation"),
    "blend_on": ("test", "validation"),
    "precision": PRECISIONS,
    "device": DEVICES,
    "on_bad_row": ("error", "skip"),
    "on_nan": ON_NAN,
    "load_in": LOADINGS,
    "optim": OPTIMIZERS,
    "lr_scheduler_type": ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"),
}
_ABOVE_0 = (lambda value: value > 0, "above 0")
_NOT_BELOW_0 = (lambda value: value >= 0, "0 or above")
_SHARE = (lambda value: 0 <= value < 1, "from 0 to below 1")
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "r": _ABOVE_0,
    "lora_alpha": _ABOVE_0,
    "lora_dropout": _SHARE,
    "learning_rate": _ABOVE_0,
    "num_train_epochs": _ABOVE_0,
    "max_steps": (lambda value: value > 0 or value == -1, "above 0, or -1 for as many as the epochs need"),
    "batch_size": _ABOVE_0,
    "micro_batch_size": _ABOVE_0,
    "warmup_ratio": _SHARE,
    "weight_decay": _NOT_BELOW_0,
    "max_grad_norm": _NOT_BELOW_0,
    "max_skipped": _NOT_BELOW_0,
    "save_steps": _NOT_BELOW_0,
    "save_minutes": _NOT_BELOW_0,
    "save_total_limit": _ABOVE_0,
    "max_length": _ABOVE_0,
    "score_batch_tokens": _ABOVE_0,
    "forgetting_prompts": _NOT_BELOW_0,
    "forgetting_every": _NOT_BELOW_0,
    "confidence": (lambda value: 0.5 <= value < 1, "from 0.5 to below 1"),
    "borders": _ABOVE_0,
}


@dataclass(frozen=True)
class LearnConfig(SaveSettings, TrainSettings, LoraSettings, LoadSettings):
    """Learn a stream of tasks, one after another, and score every task after each."""

    stream: Any = ""
    """a stream: a YAML file, or a name such as 'demo' or 'order-1' (`forgetless streams` lists them)"""
    method: str = "sequential"
    """how to learn: `forgetless methods` lists them; options as --method.NAME VALUE; one of yours: ./FILE.py:CLASS"""
    method_options: dict = field(default_factory=dict)
    """the method's own options (from a method file's constructor)"""
    model: str = "smollm2-135m-instruct"
    """a packaged model, a folder, or a hub name"""
    output_dir: str = ""
    """the run folder; default runs/<stream>-<method>-seed<seed>"""
    cells: str = "all"
    """cells of the matrix to score: all, seen (tasks learnt so far), ends (a task when learnt, all at the end), last"""
    score_on: str = "test"
    """test, or validation: choose methods and options on validation rows, and judge them on test rows once"""
    seed: int = 0
    """orders, initial weights, dropout and replay draws; data are cut by their own seed"""
    device: str = "auto"
    """auto, cpu, cuda"""
    precision: str = "auto"
    """auto (bf16 where the machine has instructions for it), bf16, fp32"""
    score_batch_tokens: int = 4096
    """tokens scored at once"""
    on_bad_row: str = "error"
    """error: stop at the first row that cannot be used; skip: leave it out and count it"""
    forgetting_prompts: int = PROMPTS
    """after each task the base's own answers to this many general prompts show how far predictions moved; 0: off"""
    forgetting_every: int = 0
    """measure it also within a task, every this many steps and at the last one, into log.jsonl, with the loss on the
    task's validation rows, so that one training gives `forecast` many points; 0: at the end of each task only"""
    forgetting_text: str = ""
    """a file to be measured on instead: JSONL, JSON or Parquet rows, or plain text whose documents empty lines part"""
    from_adapters: list[str] = field(default_factory=list)
    """--from april=./trl-april may=./trl-may: LoRA adapters of any trainer that become the first tasks of the run, in
    this order (`from: {april: ./trl-april}` in YAML). With rows in the stream, a task of that name is scored too and
    fills a replay memory (docs/again.md)"""
    from_kind: str = "continued"
    """continued: each adapter was trained on from the one before it, so the last one holds them all; summed: each was
    trained by itself on the base, and their updates are added"""
    allow_pickle: bool = False
    """read .bin weights of adapters in --from too (tensors only)"""
    base_is: str = ""
    """the base of the adapters in --from is this model, whatever name they give it; say it where that cannot be seen"""
    report_to: list[str] = field(default_factory=list)
    """trackers: tensorboard, wandb, trackio, ..."""
    max_drop: list[str] = field(default_factory=list)
    """what to deploy after each task is blended (docs/blend.md), into blended/: budgets on the drop of earlier tasks'
    mean scores, a=2pp,b=2pp, kept on rows of `blend_on`; the learner itself goes on unblended"""
    max_lost: list[str] = field(default_factory=list)
    """the same for the share of an earlier task's rows that score less than before"""
    max_kl: list[str] = field(default_factory=list)
    """the same for the nats per token on the model's own answers to general prompts: 0.05"""
    blend_on: str = "validation"
    """the rows on which budgets are kept: validation, or test where validation rows chose the training's options"""
    confidence: float = 0.95
    """of the promise that a blended model is within its budgets"""
    borders: int = 1
    """how many blends the confidence is to hold for together"""
    dry_run: bool = False
    """print the plan and train nothing"""

    def check(self) -> None:
        """Values that the types do not rule out."""
        if not self.stream:
            raise UsageError("no stream given; try --stream demo, or a YAML file with a list of tasks")
        find_method(self.method)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name}: no {getattr(self, name)!r}{nearest(str(getattr(self, name)), known)}")
        for name, (right, said) in RANGES.items():
            if not right(getattr(self, name)):
                raise UsageError(f"{name} must be {said}, not {getattr(self, name)}")

    def all_method_options(self) -> dict:
        """The method's options with its defaults filled in."""
        return options_of(find_method(self.method)) | self.method_options

    def build_method(self) -> Method:
        kind, known = find_method(self.method), options_of(find_method(self.method))
        for name in self.method_options:
            if name not in known:
                raise UsageError(f"method {self.method}: no option {name!r}{nearest(name, known)}")
        return kind(**self.method_options)

    def part(self, kind: type):
        """The fields of one of the settings classes."""
        return kind(**{one.name: getattr(self, one.name) for one in fields(kind)})

    def plain(self) -> dict:
        """The options as JSON, without where the run lies; a stream given as an object by its name."""
        told = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("output_dir", "dry_run")}
        stream = self.stream.name if isinstance(self.stream, Stream) else self.stream
        return told | {"stream": stream, "method_options": self.all_method_options()}

    def as_blend(self, run: str) -> BlendConfig | None:
        """How the borders of the run in this folder are blended; None without a budget."""
        if not (self.max_drop or self.max_lost or self.max_kl):
            return None
        shared = ("on_bad_row", "max_drop", "max_lost", "max_kl", "confidence", "borders", "device", "precision")
        loading = [one.name for one in fields(LoadSettings)]
        told = {name: getattr(self, name) for name in (*shared, *loading)}
        return BlendConfig(self.model, run, tasks=self.stream, score_on=self.blend_on, **told)

    def decides(self) -> dict:
        """The options that may not change when a run is continued. Precision, device and the split may: another
        machine goes on with what it has, and the numbers then agree up to rounding (dropout draws anew).
        """
        free = {
            "report_to",
            "micro_batch_size",
            "gradient_checkpointing",
            "attn_implementation",
            "trust_remote_code",
            "cells",
            "device",
            "precision",
            "score_batch_tokens",
            "stream",
            "model",
            "on_bad_row",
            "on_nan",
            "max_skipped",
            "save_steps",
            "save_minutes",
            "save_total_limit",
            "forgetting_prompts",
            "forgetting_every",
            "forgetting_text",
            "from_adapters",
            "from_kind",
            "allow_pickle",
            "base_is",
            "max_drop",
            "max_lost",
            "max_kl",
            "blend_on",
            "confidence",
            "borders",
        }
        told = {name: value for name, value in self.plain().items() if name not in free}
        code = code_of(self.method)
        return told | {"method": label_of(self.method)} | ({"method_code": code} if code else {})


TEMPLATES = ("own", "reference")
ENDPOINT_APIS = ("own", "chat")
GENERATORS = ("transformers", "vllm")


@dataclass(frozen=True)
class AuditConfig(LoadSettings):
    """What `audit` compares, on which rows, and the budgets."""

    reference: str = ""
    """the earlier model: a packaged model, a hub name, a folder with full weights or an adapter, or BASE+ADAPTER"""
    models: Sequence[str] = ()
    """the models to audit, of the same kinds; a run folder stands for the models after each of its tasks"""
    tasks: str | Stream | None = None
    """your own tasks, a file as `learn` takes it"""
    score_on: str = "test"
    """test, or validation: the rows of your tasks that are scored"""
    on_bad_row: str = "error"
    """error: stop at the first row of your tasks that cannot be used; skip: leave it out"""
    text: Sequence[str] = ()
    """files on which predictions are compared: JSONL, JSON or Parquet rows, or plain text whose documents empty lines
    part; default: the reference's own answers to general prompts"""
    window: int | None = None
    """tokens of a window of plain text; default 512, or the models' longest sequence where that is less"""
    stride: int | None = None
    """tokens from one window of plain text to the next; below the window, each token is predicted once, after the first
    window with at least window - stride tokens before it; default: windows do not overlap"""
    probes: Sequence[str] = ()
    """names of docs/probes.md, lm-eval:TASK, or files of rows"""
    judge: Sequence[str] = ()
    """functions of yours, ./FILE.py:NAME, that judge the answers to safety prompts too: (answer, row) -> 1 or True for
    a refusal"""
    max_kl: Sequence[str] = ()
    """budgets on texts in nats per token: 0.05 for every text, or NAME=0.05"""
    max_drop: Sequence[str] = ()
    """budgets on tasks and probes in percentage points: NAME=2pp"""
    confidence: float = 0.95
    """of every bound"""
    limit: int | None = None
    """at most this many rows of each task, probe and text, drawn with a fixed seed"""
    output_dir: str = ""
    """default runs/audit-<model>-against-<reference>"""
    base_is: str | None = None
    """the base of the adapters is this model, whatever name they give it"""
    allow_pickle: bool = False
    """read .bin weights too (tensors only)"""
    policy: str | None = None
    """a policy file, which gives the reference, rows and budgets"""
    weights: bool = False
    """summarise the update of each kind of layer too (singular values of every matrix: slow for large models)"""
    recover: int = 0
    """training steps on old rows of each of your tasks that a model lost, on a throw-away copy: how much comes back?"""
    recover_rows: int = 40
    """at most this many old rows for it"""
    remedies: bool = False
    """measure what would help each model that lost a task: blends, its adapter scaled down, a repair on old rows;
    takes as long as several models"""
    show_text: bool = False
    """write the prompts and answers of the rows that turned into texts.jsonl"""
    system_prompt: str | None = None
    """of served models: a text file whose content stands before a chat that has no system turn of its own"""
    endpoint_api: str = "own"
    """of served models: own asks chat rows as chat and prompts as they stand; chat asks a prompt as a user's turn"""
    api_key_env: str | None = None
    """of served models: the name of the environment variable that holds the key; the key is written nowhere"""
    concurrency: int = 8
    """of served models: requests under way at a time"""
    generate_with: str = "transformers"
    """what generates answers: transformers, or vllm (an extra, for a GPU; adapters as LoRA requests on one base)"""
    chat_template: str = "own"
    """own: each model is prompted in its own chat template; reference: all in the reference's"""
    precision: str = "auto"
    """auto, bf16 or fp32"""
    device: str = "auto"
    """auto, cpu or cuda"""

    def check(self) -> None:
        """UsageError for what is missing or out of range."""
        if not self.models or not (self.reference or self.policy):
            raise UsageError("give a reference and at least one model: forgetless audit REFERENCE MODEL ...")
        if not 0.5 <= self.confidence < 1:
            raise UsageError(f"confidence must be from 0.5 to below 1, such as 0.95, not {self.confidence}")
        if self.score_on not in CHOICES["score_on"]:
            raise UsageError(f"score_on: no {self.score_on!r}{nearest(self.score_on, CHOICES['score_on'])}")
        if self.chat_template not in TEMPLATES:
            raise UsageError(f"chat_template: no {self.chat_template!r}{nearest(self.chat_template, TEMPLATES)}")
        if self.remedies and self.generate_with != GENERATORS[0]:
            raise UsageError(f"remedies are answered by transformers; leave out remedies, or {self.generate_with}")
        if self.generate_with not in GENERATORS:
            raise UsageError(f"generate_with: no {self.generate_with!r}{nearest(self.generate_with, GENERATORS)}")
        if self.endpoint_api not in ENDPOINT_APIS:
            raise UsageError(f"endpoint_api: no {self.endpoint_api!r}{nearest(self.endpoint_api, ENDPOINT_APIS)}")
        for name in ("window", "stride", "limit", "concurrency"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} must be 1 or above, not {value}")
        if self.recover < 0 or self.recover_rows < 1:
            raise UsageError(f"recover is a number of steps and recover_rows one of rows, not {self.recover} and "
                             f"{self.recover_rows}")  # fmt: skip
        if self.recover and not (self.tasks or self.policy):
            raise UsageError("recover brings back your own tasks; give them with --tasks")


SPACES = ("product", "factors", "both")


@dataclass(frozen=True)
class InterpolateConfig(LoadSettings):
    """Between which models `interpolate` looks, where, and on which rows."""

    before: str = ""
    """the first model: a packaged model, a hub name, a folder with full weights or an adapter, or BASE+ADAPTER"""
    after: str = ""
    """the second one, of the same kinds, on the same base"""
    tasks: str | None = None
    """your own tasks, a file as `learn` takes it, or a stream's name; their test rows are scored"""
    new: str | None = None
    """the task that the second model learnt; the others are old"""
    within: str = "product"
    """product: between the updates s B A; factors: between the matrices A and B (equal layers, ranks and scales);
    both: one after the other"""
    points: int = 11
    """on the line, and on the curve, ends included"""
    curve: int = 0
    """training steps of a curve of low loss between the two (a quadratic Bezier; your tasks' training rows)"""
    learning_rate: float = 1e-3
    """of these steps"""
    plane: str | None = None
    """a third model: loss and score on the plane through the three"""
    grid: int = 7
    """points of the plane in each direction"""
    confidence: float = 0.95
    """of every interval"""
    limit: int | None = None
    """at most this many test rows of each task, drawn with a fixed seed"""
    output_dir: str = ""
    """default runs/interpolate-<first>-<second>"""
    base_is: str | None = None
    """the base of the adapters is this model, whatever name they give it"""
    allow_pickle: bool = False
    """read .bin weights too (tensors only)"""
    precision: str = "auto"
    """auto, bf16 or fp32"""
    device: str = "auto"
    """auto, cpu or cuda"""

    def check(self) -> None:
        """UsageError for what is missing or out of range."""
        if not (self.before and self.after):
            raise UsageError("give two models: forgetless interpolate A B --tasks tasks.yaml")
        if not self.tasks:
            raise UsageError("give your tasks, whose test rows are scored at every point: --tasks tasks.yaml")
        if self.load_in != AS_STORED:
            raise UsageError("load_in: interpolate computes with weights in full only; leave it out")
        if self.within not in SPACES:
            raise UsageError(f"in: no {self.within!r}{nearest(self.within, SPACES)}")
        if self.points < 3 or self.grid < 2:
            raise UsageError(f"points must be 3 or above and grid 2 or above, not {self.points} and {self.grid}")
        if self.curve < 0 or not self.learning_rate > 0:
            raise UsageError(f"curve is a number of steps and learning_rate above 0, not {self.curve} and "
                             f"{self.learning_rate}")  # fmt: skip
        if not 0.5 <= self.confidence < 1:
            raise UsageError(f"confidence must be from 0.5 to below 1, such as 0.95, not {self.confidence}")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit must be 1 or above, not {self.limit}")


@dataclass(frozen=True)
class BlendConfig(LoadSettings):
    """What `blend` mixes, on which held-out rows, and the budgets."""

    before: str = ""
    """the model before: a packaged model, a hub name, a folder with full weights or an adapter, or BASE+ADAPTER"""
    after: str = ""
    """the model after, of the same kinds: an adapter on the same base, or full weights of the same shapes; or a run
    folder, which is blended border by border"""
    tasks: str | Stream | None = None
    """your tasks, a file as `learn` takes it. Those with a budget are what must not be forgotten, the others what is
    learnt"""
    new: Sequence[str] = ()
    """names of the tasks that are learnt; tasks that are neither named here nor have a budget are left out"""
    score_on: str = "test"
    """test, or validation: the held-out rows of the tasks; choose on validation rows, and judge on test rows once"""
    on_bad_row: str = "error"
    """error: stop at the first row of the tasks that cannot be used; skip: leave it out"""
    probes: Sequence[str] = ()
    """names of docs/probes.md, lm-eval:TASK, or files of rows, each with a budget of its own"""
    text: Sequence[str] = ()
    """files for max_kl: JSONL, JSON or Parquet rows, or plain text whose documents empty lines part; default: the
    model's own answers to general prompts"""
    max_drop: Sequence[str] = ()
    """budgets on the drop of the mean score of a task or probe in percentage points, gains counted: NAME=2pp"""
    max_lost: Sequence[str] = ()
    """budgets on the share of rows that score less than before (right before, wrong after): NAME=2pp"""
    max_kl: Sequence[str] = ()
    """budgets on texts in nats per token: 0.05 for every text, or NAME=0.05"""
    confidence: float = 0.95
    """of the promise that the written model is within all budgets"""
    borders: int = 1
    """how many blends the confidence is to hold for together: each is tested at (1 - confidence) / borders"""
    points: int = 10
    """of the path, equally far from each other, the last one the model after"""
    whole_path: bool = False
    """measure the points after the first that is not certified too, for the drawing; none of them can be chosen"""
    limit: int | None = None
    """at most this many rows of each task, probe and text, drawn with a fixed seed"""
    output_dir: str = ""
    """default runs/blend-<after>-against-<before>"""
    base_is: str | None = None
    """the base of the adapters is this model, whatever name they give it"""
    allow_pickle: bool = False
    """read .bin weights too (tensors only)"""
    chat_template: str = "own"
    """own: each model is prompted in its own chat template; reference: both in that of the model before"""
    precision: str = "auto"
    """auto, bf16 or fp32"""
    device: str = "auto"
    """auto, cpu or cuda"""

    def check(self) -> None:
        """UsageError for what is missing or out of range."""
        if not (self.before and self.after):
            raise UsageError("give two models: forgetless blend BEFORE AFTER --tasks tasks.yaml --max-drop NAME=2pp")
        if not (self.max_drop or self.max_lost or self.max_kl):
            raise UsageError(
                "how much may be forgotten? Give --max-drop NAME=2pp, --max-lost NAME=2pp or --max-kl 0.05"
            )
        if self.text and not self.max_kl:
            raise UsageError("text is measured for a budget of nats per token; give one with --max-kl 0.05")
        for name in ("borders", "points"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or above, not {getattr(self, name)}")

    def as_audit(self) -> AuditConfig:
        """The same models on the same rows, with the budgets that an audit has too."""
        shared = {one.name for one in fields(AuditConfig)} & {one.name for one in fields(self)}
        return AuditConfig(self.before, (self.after,), **{name: getattr(self, name) for name in shared})


MERGES = (
    "sum",
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "slao",
    "fisher",
)
"""How several adapters become one."""


@dataclass(frozen=True)
class MergeConfig(LoadSettings):
    """What `merge` merges, how, and what it measures the result on."""

    models: Sequence[str] = ()
    """adapters on one base: folders, hub names or BASE+ADAPTER; one is merged into its base, several into one"""
    output_dir: str = ""
    """the folder to write; it must be new, empty, or of an earlier merge, which is replaced"""
    method: str = "sum"
    """sum (exact); linear, ties, dare_linear or dare_ties as PEFT merges factors; ties_svd, dare_linear_svd or
    dare_ties_svd as it merges products; slao; fisher"""
    weights: Sequence[float] = ()
    """of the adapters in their order; default 1 each, for linear 1/n each"""
    rank: int | None = None
    """the most that a layer's rank may be; default: all of it, for products the sum of the adapters' ranks"""
    density: float | None = None
    """share of entries that TIES and DARE keep; default 0.5"""
    seed: int = 0
    """of what DARE drops"""
    rows: Sequence[str] = ()
    """for fisher: a file of rows of each adapter's task, in the adapters' order"""
    text: Sequence[str] = ()
    """files on which predictions are compared; default: each adapter's own answers to general prompts"""
    tasks: str | None = None
    """your own tasks, a file as `learn` takes it; base, adapters and result are scored on their test rows"""
    kl_by_layer: bool = False
    """with a rank: the KL that re-compressing each layer alone costs; one more pass over the text a layer"""
    limit: int | None = None
    """at most this many rows of each task, text and file, and prompts; for fisher 64 where it is not given"""
    base_is: str | None = None
    """the base of the adapters is this model, whatever name they give it"""
    allow_pickle: bool = False
    """read .bin weights too (tensors only)"""
    precision: str = "auto"
    """of what is measured: auto, bf16 or fp32; merging itself is in fp32"""
    device: str = "auto"
    """auto, cpu or cuda"""

    @property
    def prunes(self) -> bool:
        """Whether the method drops entries."""
        return self.method.startswith(("ties", "dare"))

    @property
    def kept_share(self) -> float:
        """The density, given or usual."""
        return 0.5 if self.density is None else self.density

    def check(self) -> None:
        """UsageError for what is missing, out of range or without effect."""
        if not self.models or not self.output_dir:
            raise UsageError("give at least one adapter and a folder: forgetless merge ADAPTER ... --output_dir DIR")
        if self.method not in MERGES:
            raise UsageError(f"method: no {self.method!r}{nearest(self.method, MERGES)}")
        if self.density is not None and not (self.prunes and 0 < self.density <= 1):
            raise UsageError(f"density is for TIES and DARE, above 0 and up to 1, not {self.density} for "
                             f"{self.method}")  # fmt: skip
        if self.rows and self.method != "fisher":
            raise UsageError(f"rows are for --method fisher, not {self.method}")
        if self.weights and self.method == "slao":
            raise UsageError("slao weighs the adapters by their order; leave out weights")
        if any(not math.isfinite(w) for w in self.weights) or (
            self.method == "fisher" and min(self.weights, default=1) <= 0
        ):
            raise UsageError(f"weights must be numbers, for fisher above 0, not {list(self.weights)}")
        for name in ("rank", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} must be 1 or above, not {value}")
        if self.kl_by_layer and self.rank is None:
            raise UsageError("kl_by_layer is of re-compression; give a rank")


def documentation(config: type) -> dict[str, str]:
    """What stands below each field of a dataclass."""
    from docstring_parser import parse_from_object

    classes = [one for one in reversed(config.__mro__) if one is not object]  # what is inherited is said where it is
    told = [one for kind in classes for one in parse_from_object(kind).params]
    return {one.arg_name: " ".join((one.description or "").split()) for one in told}
