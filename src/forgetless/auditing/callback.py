"""Forgetting, measured while any transformers or TRL trainer trains.

    from forgetless import ForgettingCallback
    trainer.add_callback(ForgettingCallback(trainer))
    trainer.train()

The values stand in the trainer's log as `forgetting/...`, beside its loss and wherever it reports to. Every process
measures the whole text; what the main one found is logged and decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.forgetting.divergence import divergence
from forgetless.forgetting.reference import Reference
from forgetless.forgetting.sides import side_in
from forgetless.forgetting.texts import PROMPTS, Text, general_prompts, own_prompts, read_text
from forgetless.progress import console
from forgetless.subjects.models import CHANGE_THE_BASE, find_subjects, opened

LOGGED = ("kl", "cross_entropy", "entropy", "agree")
RATE_FACTOR = 0.5  # of the learning rate, each time that the budget is found exceeded
ACTIONS = ("log", "stop", "lower_rate")


class ForgettingCallback(TrainerCallback):
    """Logs what the model forgets on a text, every `every` steps and at the end.

    Logged, as means over the text's tokens: `forgetting/kl`, KL(reference || model); `forgetting/cross_entropy`, which
    is the KL and `forgetting/entropy`, the reference's own (all in nats); and `forgetting/agree`, the share of tokens
    at which both hold the same word likeliest.

    text: documents, or a file as the audit's --text takes it. By default the reference's own answers to 32 general
    prompts, made when training begins.
    reference: whose predictions are to be kept: a model, or a name as the audit takes it. By default the model as it
    was before training: with a PEFT adapter the base without it.
    max_kl: the budget in nats per token. With action="stop" training ends when it is found exceeded; with
    "lower_rate" the learning rate is halved each time. The measured value decides, not its confidence bound.

    Raises `UsageError` for wrong options, a trainer without a tokenizer, weights that are sharded over processes, and
    where training begins without the model that is to be the reference; `DataError` for a text without tokens.
    """

    def __init__(
        self,
        trainer: Trainer,
        text: Sequence[str] | str | None = None,
        *,
        reference: nn.Module | str | None = None,
        every: int = 100,
        max_kl: float | None = None,
        action: Literal["log", "stop", "lower_rate"] = "log",
    ):
        if action not in ACTIONS:
            raise UsageError(f"action {action!r}: one of {', '.join(ACTIONS)}")
        if (action == "log") != (max_kl is None):
            raise UsageError(
                f"action={action!r}, max_kl={max_kl}: a budget goes with the action 'stop' or 'lower_rate', such as "
                "max_kl=0.05 (nats per token)"
            )
        if every < 1:
            raise UsageError(f"every={every}: a number of steps, at least 1")
        if not isinstance(trainer.processing_class, PreTrainedTokenizerBase):
            raise UsageError("ForgettingCallback: the trainer has no tokenizer; give it one as processing_class=")
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise UsageError(
                "ForgettingCallback: FSDP and ZeRO-3 shard the weights, so no process has a model to measure; audit "
                "the saved checkpoints with `forgetless audit` instead"
            )
        self.trainer, self.tokenizer = trainer, trainer.processing_class
        self.text = _text(text, self.tokenizer)
        self.using = trainer.accelerator.autocast  # the precision that the trainer computes in
        self.reference, self.every, self.max_kl, self.action = reference, every, max_kl, action
        self.folder = TemporaryDirectory(prefix="forgetless-")
        self.side: Reference | None = None
        self.measured_at = -1

    # ------------------------------------------------------------------ the trainer's events

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.side is None:
            self.side = self._reference_side(kwargs["model"], resumed=state.global_step > 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step % self.every:
            return
        kl = self._log(kwargs["model"], state, control)
        if self.max_kl is None or kl <= self.max_kl:
            return
        if self.action == "stop":
            console.print(f"step {state.global_step}: forgetting {kl:.4g} nats/token > max_kl {self.max_kl}: stopping")
            control.should_training_stop = True
        else:
            _lower_rate(kwargs["optimizer"], kwargs["lr_scheduler"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step != self.measured_at:
            self._log(kwargs["model"], state, control)

    # ------------------------------------------------------------------ measuring

    def _reference_side(self, model: nn.Module, resumed: bool) -> Reference:
        if isinstance(self.reference, str):
            return self._of_named(self.reference, model)
        if self.reference is not None:
            return self._side_of(self.reference)
        if isinstance(model, PeftModel):
            _check_base_is_whole(model)
            with model.disable_adapter():
                return self._side_of(model)
        if resumed:
            raise UsageError(
                "ForgettingCallback: training goes on from a checkpoint, so the model before training is not here; "
                "give it as reference=, by name or as a model"
            )
        return self._side_of(model)

    def _side_of(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> Reference:
        label = "forgetting, reference" if self.trainer.is_world_process_zero() else None
        with _inference(model):
            return side_in(Path(self.folder.name), model, tokenizer or self.tokenizer, self.text, self.using, label)

    def _of_named(self, name: str, model: nn.Module) -> Reference:
        subjects = find_subjects(name)
        if len(subjects) > 1:
            raise UsageError(f"reference {name!r} stands for {len(subjects)} models; give one: {subjects[-1].name!r}")
        like = next(model.parameters())
        for subject, reference in opened(subjects, like.dtype, like.device):
            return self._side_of(reference, subject.tokenizer)
        raise AssertionError("opened() yields each subject")

    def _log(self, model: nn.Module, state: TrainerState, control: TrainerControl) -> float:
        assert self.side is not None
        with _inference(model):
            means = divergence(self.side, model, using=self.using).per_token
        # rounding may differ between processes, and all must stop or none
        [values] = broadcast_object_list([{name: getattr(means, name) for name in LOGGED}])
        self.measured_at = state.global_step
        should_log = control.should_log  # which logging resets: the trainer's own record of this step is still to come
        # TRL's trainers average their own metrics in `log`: theirs are left for their own records
        Trainer.log(self.trainer, {f"forgetting/{name}": value for name, value in values.items()})
        control.should_log = should_log
        return values["kl"]


def _text(told: Sequence[str] | str | None, tokenizer: PreTrainedTokenizerBase) -> Text:
    if told is None:
        return own_prompts(general_prompts(PROMPTS), chat=bool(tokenizer.chat_template))
    if isinstance(told, str):
        return read_text(told)
    documents = tuple(Row("", document) for document in told if document.strip())
    if not documents:
        raise UsageError("text: a list of documents, at least one of them not empty, or a file")
    return Text("text", documents, "given in Python")


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; every module's mode afterwards as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check_base_is_whole(model: PeftModel) -> None:
    for config in model.peft_config.values():
        start = str(config.to_dict().get("init_lora_weights", "")).lower()
        if start.startswith(CHANGE_THE_BASE):
            raise UsageError(
                f"ForgettingCallback: init_lora_weights={start!r} has moved part of the base into the adapter, so the "
                "base without it is not the model before training; give that as reference=, by name or as a model"
            )


def _lower_rate(optimizer: Optimizer, scheduler) -> None:
    """Halves the rate now and in the rest of the schedule."""
    for group in optimizer.param_groups:
        group["lr"] *= RATE_FACTOR
    inner = scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler
    if not isinstance(inner, ReduceLROnPlateau):  # which goes on from the groups' own rates
        inner.base_lrs = [rate * RATE_FACTOR for rate in inner.base_lrs]
        inner._last_lr = [group["lr"] for group in optimizer.param_groups]  # what the trainer logs as the next rate
