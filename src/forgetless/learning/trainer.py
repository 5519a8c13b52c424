"""A method's penalty and step hooks in any transformers or TRL trainer.

    from forgetless import MethodCallback
    trainer.add_callback(MethodCallback(trainer, OLoRA(lam=0.5), past=["invoices/adapter"]))
    trainer.train()

A penalty belongs to an optimizer step, not to a micro-batch. Its gradient is therefore added once, after the backward
pass of the step's last micro-batch and before the trainer clips: exact under any accumulation, and whether or not the
trainer divides its losses by it. On several processes each adds the same gradient to the averaged one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from forgetless.data.batches import Encoder
from forgetless.data.readers import read_rows
from forgetless.errors import UsageError
from forgetless.learning.engine import Engine
from forgetless.methods.base import Check, Method, penalty_acts
from forgetless.model.adapters import Attached
from forgetless.progress import console


class MethodCallback(TrainerCallback):
    """`penalty` and `after_step` of a method, on the LoRA adapter that a trainer trains.

    past: folders of the adapters of earlier tasks, which O-LoRA keeps the new one orthogonal to. The trained model is
    to compute with them: merge them into its base first.
    old_rows: training rows of earlier tasks, as `read_rows` reads them, of which EWC takes the Fisher information when
    training begins: the adapter is then to be what those tasks left.
    max_length: tokens of an old row; a longer prompt loses its beginning.

    Logged as `method/penalty` and `method/penalty_share`, and what the method itself logs. When training ends, `checks`
    says whether the method acted, and what did not is printed. `save` writes the adapter to deploy.

    Raises `UsageError` for a method that cannot act here (`Method.only_here`), for one that has nothing to do without
    `past` or `old_rows`, a model without one active LoRA adapter, fp16, and weights or gradients that others hold.
    """

    def __init__(
        self,
        trainer: Trainer,
        method: Method,
        past: Sequence[str | Path] = (),
        old_rows: str | Path | None = None,
        max_length: int = 512,
    ):
        self.trainer, self.method, self.name = trainer, method, type(method).__name__
        self.past = [Path(folder) for folder in past]
        self.checks: list[Check] = []
        self._inner: Callable[..., Tensor] | None = None
        self._check_method(old_rows)
        self._check_trainer()
        self.encoder = Encoder(trainer.processing_class, max_length)  # type: ignore[arg-type]  # a tokenizer
        self.old_rows = tuple(read_rows(old_rows).rows) if old_rows else ()

    # ------------------------------------------------------------------ the trainer's events

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        method, task = self.method, int(bool(self.past or self.old_rows))
        method.start(Attached(kwargs["model"], self.past, args.seed), self.encoder, args.seed)
        if state.global_step and method.state().tensors:
            raise UsageError(f"{self.name}: training goes on from a checkpoint, which does not hold the method's state")
        if self.old_rows:  # earlier tasks end here, with what the method makes of their rows
            method.begin_task(0)
            method.end_task(0, self.old_rows)
        method.begin_task(task)
        if method.penalty() is None and not method.has("after_step"):
            raise UsageError(
                f"{self.name}: nothing to do; give what it needs of earlier tasks: their adapters as "
                "past=[FOLDER, ...], or for a method that measures something on their rows old_rows=FILE"
            )
        self.parameters = method.adapters.parameters()
        self.shares: list[float] = []
        self.told: dict[str, float] = {}
        if self._inner is None:  # an earlier training may have been stopped
            self._inner = self.trainer.training_step
            self.trainer.training_step = self._training_step  # type: ignore[method-assign]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        self.method.after_step(kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        told = self.told | self.method.told()
        if control.should_log and told:
            should_log = control.should_log  # which logging resets: the trainer's own record is still to come
            Trainer.log(self.trainer, {f"method/{name}": value for name, value in told.items()})
            control.should_log = should_log

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        assert self._inner is not None  # training has begun
        self.trainer.training_step, self._inner = self._inner, None  # type: ignore[method-assign]
        self.method.end_task(self.method.task, ())
        self.checks = [*self.method.checks(), *penalty_acts(self.shares)]
        for check in self.checks:
            if not check.ok:
                told = f"WARNING: {self.name} did not act: {check.name} = {check.value:.4g} ({check.meaning})"
                console.print(told, markup=False)

    # ------------------------------------------------------------------ what is deployed

    def save(self, folder: str | Path) -> None:
        """Writes the adapter to deploy as PEFT does: of a method with two learners the one that it names."""
        with next(iter(self.method.views().values())):
            self.method.adapters.model.save_pretrained(str(folder))

    # ------------------------------------------------------------------ the step

    def _training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's own, and after the step's last micro-batch the penalty's gradient."""
        assert self._inner is not None
        loss = self._inner(*args, **kwargs)
        if self.trainer.accelerator.sync_gradients:
            penalty = self.method.penalty()
            if penalty is not None:
                share = Engine.add_gradient(penalty, self.parameters)
                self.shares.append(share)
                self.told = {"penalty": float(penalty.detach()), "penalty_share": share}
        return loss

    # ------------------------------------------------------------------ what cannot be

    def _check_method(self, old_rows: str | Path | None) -> None:
        if why := self.method.only_here():
            raise UsageError(f"{self.name}: {why}; learn with `forgetless learn`")
        if old_rows and not self.method.has("end_task"):
            raise UsageError(f"{self.name}: makes nothing of old rows; leave old_rows out")

    def _check_trainer(self) -> None:
        trainer = self.trainer
        if not isinstance(trainer.model, PeftModel):
            raise UsageError(f"{self.name}: acts on LoRA pairs; give the trainer a PEFT model")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise UsageError(f"{self.name}: FSDP and DeepSpeed hold weights or gradients themselves; use DDP")
        if trainer.accelerator.scaler is not None:
            raise UsageError(f"{self.name}: fp16 scales the gradients; train in bf16 or fp32")
