"""Forgetting, measured while any transformers or TRL trainer trains.

    callback = ForgettingCallback(trainer, text, measure, every=100)
    trainer.add_callback(callback)
    trainer.train()

The values stand in the trainer's log as `forgetting/...`, beside its loss and wherever it reports to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from accelerate.scheduler import AcceleratedScheduler
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

from forgetless.auditing.models import CHANGE_THE_BASE, find_subjects, opened
from forgetless.errors import UsageError
from forgetless.progress import console

KL = "kl"  # what a measure calls KL(reference || model), in nats per token
RATE_FACTOR = 0.5  # of the learning rate, each time that the budget is found exceeded
ACTIONS = ("log", "stop", "lower_rate")

Compare = Callable[[nn.Module], Mapping[str, float]]


class Measure(Protocol):
    """Computes the reference's side on a text once; what it returns compares a model with it, `KL` among its values."""

    def __call__(self, reference: nn.Module, tokenizer: PreTrainedTokenizerBase, text: Sequence[str]) -> Compare: ...


class ForgettingCallback(TrainerCallback):
    """Logs what the model forgets on a text, every `every` steps and at the end.

    reference: whose predictions are to be kept: a model, or a name as the audit takes it. By default the model as it
    was before training: with a PEFT adapter the base without it.
    max_kl: the budget in nats per token. With action="stop" training ends when it is found exceeded; with
    "lower_rate" the learning rate is halved each time. The measured value decides, not its confidence bound.
    """

    def __init__(
        self,
        trainer: Trainer,
        text: Sequence[str],
        measure: Measure,
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
        if isinstance(text, str) or not any(document.strip() for document in text):
            raise UsageError("text: a list of documents, at least one of them not empty")
        if not isinstance(trainer.processing_class, PreTrainedTokenizerBase):
            raise UsageError("ForgettingCallback: the trainer has no tokenizer; give it one as processing_class=")
        self.trainer, self.tokenizer, self.text = trainer, trainer.processing_class, list(text)
        self.measure, self.reference = measure, reference
        self.every, self.max_kl, self.action = every, max_kl, action
        self.compare: Compare | None = None
        self.measured_at = -1

    # ------------------------------------------------------------------ the trainer's events

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.compare is None:
            self.compare = self._reference_side(kwargs["model"], resumed=state.global_step > 0)

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

    def _reference_side(self, model: nn.Module, resumed: bool) -> Compare:
        if isinstance(self.reference, str):
            return self._of_named(self.reference, model)
        if self.reference is not None:
            with _inference(self.reference):
                return self.measure(self.reference, self.tokenizer, self.text)
        if isinstance(model, PeftModel):
            _check_base_is_whole(model)
            with _inference(model), model.disable_adapter():
                return self.measure(model, self.tokenizer, self.text)
        if resumed:
            raise UsageError(
                "ForgettingCallback: training goes on from a checkpoint, so the model before training is not here; "
                "give it as reference=, by name or as a model"
            )
        with _inference(model):
            return self.measure(model, self.tokenizer, self.text)

    def _of_named(self, name: str, model: nn.Module) -> Compare:
        subjects = find_subjects(name)
        if len(subjects) > 1:
            raise UsageError(f"reference {name!r} stands for {len(subjects)} models; give one: {subjects[-1].name!r}")
        like = next(model.parameters())
        for subject, reference in opened(subjects, like.dtype, like.device):
            with torch.no_grad():
                return self.measure(reference, subject.tokenizer, self.text)
        raise AssertionError("opened() yields each subject")

    def _log(self, model: nn.Module, state: TrainerState, control: TrainerControl) -> float:
        assert self.compare is not None
        with _inference(model):
            values = self.compare(model)
        self.measured_at = state.global_step
        should_log = control.should_log  # which logging resets: the trainer's own record of this step is still to come
        # TRL's trainers average their own metrics in `log`: theirs are left for their own records
        Trainer.log(self.trainer, {f"forgetting/{name}": float(value) for name, value in values.items()})
        control.should_log = should_log
        return float(values[KL])


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
