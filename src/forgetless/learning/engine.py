"""Device, precision and processes. Accelerate gives the placement and the collectives; it wraps nothing."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from dataclasses import replace

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from forgetless.data.batches import Example
from forgetless.errors import UsageError
from forgetless.learning.sharding import asked_for as sharding_asked_for

PRECISIONS = ("auto", "bf16", "fp32")
DEVICES = ("auto", "cpu", "cuda")


class Engine:
    """Where tensors live and how processes add up their gradients."""

    def __init__(
        self,
        device: str = "auto",
        precision: str = "auto",
        report_to: list[str] | None = None,
        logging_dir: str | None = None,
    ):
        if precision not in PRECISIONS:
            raise UsageError(f"precision {precision!r}: one of {', '.join(PRECISIONS)}")
        if device not in DEVICES:
            raise UsageError(f"device {device!r}: one of {', '.join(DEVICES)}")
        _check_trackers(report_to or [])
        self.accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision=None if is_initialized() else "no",  # one state a process: a trainer may have made it
            log_with=report_to or None,
            project_dir=logging_dir,
        )
        self.device = self.accelerator.device
        if device not in ("auto", "cpu") and self.device.type != torch.device(device).type:
            raise UsageError(f"device {device!r}: this machine offers {self.device.type!r}")
        self.processes = self.accelerator.num_processes
        self.rank = self.accelerator.process_index
        self.shards = self.processes > 1 and sharding_asked_for()
        self.repeats = False  # in shards: every process computes the whole step
        self.is_main = self.accelerator.is_main_process
        self.dtype = self._dtype(precision)
        if self.device.type == "cpu":
            keep_freed_memory()

    def _dtype(self, precision: str) -> torch.dtype:
        if precision == "auto":
            return torch.bfloat16 if has_fast_bf16(self.device) else torch.float32
        return torch.bfloat16 if precision == "bf16" else torch.float32

    @property
    def told(self) -> str:
        """'cpu, bf16, 2 threads': what this machine computes with."""
        kind = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]
        place = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        together = f", {self.processes} processes" if self.processes > 1 else ""
        together += ", the base in shards" if self.shards else ""
        return f"{place}, {kind}{threads}{together}"

    def autocast(self) -> contextlib.AbstractContextManager:
        """Products in bf16 where the base is in bf16; adapters and losses stay fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Plain `backward`: no hidden division by steps or processes."""
        loss.backward()

    def sum_gradients(self, parameters: list[Tensor], loss: Tensor) -> Tensor:
        """Adds up the gradients of all processes in one flat all-reduce; the loss (a scalar) rides along."""
        if self.processes == 1:
            return loss
        flat = torch.cat([_gradient(p).flatten() for p in parameters] + [loss.reshape(1)])
        dist.all_reduce(flat)
        if self.repeats:
            flat /= self.processes
        start = 0
        for parameter in parameters:
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        return flat[-1]

    @staticmethod
    def add_gradient(penalty: Tensor, parameters: list[Tensor]) -> float:
        """Adds the penalty's gradient; returns its norm as a share of the loss gradient's: does the penalty act?"""
        before = torch.stack([_gradient(parameter).norm() for parameter in parameters]).norm()
        found = torch.autograd.grad(penalty, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                parameter.grad = _gradient(parameter).add_(gradient)
        size = torch.stack([gradient.norm() for gradient in found if gradient is not None]).norm()
        return float(size / before.clamp_min(1e-30))

    def mine(self, items: list) -> list:
        """This process's share of a list that every process holds: of a base in shards, all of it."""
        return items if self.shards else items[self.rank :: self.processes]

    def parts(self, parts: list[list[Example]]) -> list[list[Example]]:
        """This process's micro-batches. Of a base in shards each process has as many, some of them without weight."""
        if self.repeats:
            return parts
        idle = [replace(example, weight=0.0) for example in parts[-1]]
        missing = -len(parts) % self.processes if self.shards else 0
        return (parts + [idle] * missing)[self.rank :: self.processes]

    def gather(self, items: list) -> list:
        """Every process's lists, joined, on every process."""
        return gather_object(items) if self.processes > 1 and not self.shards else items

    def agree(self, value):
        """The main process's value, on every process."""
        if self.processes == 1:
            return value
        box = [value]
        broadcast_object_list(box)
        return box[0]

    def most(self, value: int) -> int:
        """The largest of the processes' numbers, on every process."""
        if self.processes == 1:
            return value
        box = torch.tensor(value, device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return int(box)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 products are computed by instructions made for them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):  # there mkldnn also says yes where it would emulate
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def keep_freed_memory() -> None:
    """Lets the C library keep freed memory for the next step instead of fetching zeroed pages from the system again.

    A step on CPU frees and asks for gigabytes; the page faults are a good part of its time. glibc only; the peak of
    memory stays what it was, only blocks of more than 32 MiB still go back at once.
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        mmap_threshold, trim_threshold = -3, -1  # malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 1 << 30)


def _check_trackers(names: list[str]) -> None:
    """A tracker that is not installed would be left out without a word."""
    here = [str(tracker.value) for tracker in get_available_trackers()]
    for name in names:
        if name not in here:
            raise UsageError(
                f"report_to {name!r}: not installed, or no tracker that accelerate knows; installed: "
                f"{', '.join(here) or 'none'}. `pip install {name}` adds it."
            )


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
