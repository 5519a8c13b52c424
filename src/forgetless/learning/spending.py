"""What learning a lesson costs, as it is measured: time, tokens through the model, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

PROCESS = Path("/proc/self")  # of Linux: its peak of memory is begun anew in clear_refs and read in status
PASSES = ("forward_tokens", "backward_tokens")


class Spending:
    """Clocks that run on, and the peak of memory since it was last begun.

    A token pass is one token through all layers: every call of the model counts its tokens as it embeds them (padding
    with them; what packed rows share, once) as going forward, and as coming back too where a derivative is recorded,
    through the share `comes_back` of the layers. A method's extra passes are counted like the loop's own, and so are
    those over a task's rows before and after its steps.
    """

    def __init__(self, device: torch.device, embeddings: nn.Module | None = None, comes_back: float = 1.0):
        self.device, self.comes_back = device, comes_back
        self.tokens = dict.fromkeys(PASSES, 0)
        self.aside = dict.fromkeys(self._now(), 0.0)
        self.anew = False  # whether the peak was begun anew
        if embeddings is not None:  # else no tokens are counted
            embeddings.register_forward_pre_hook(self._count)

    def _count(self, embeddings: nn.Module, inputs: tuple) -> None:
        for kind, share in zip(PASSES, (1.0, self.comes_back * torch.is_grad_enabled()), strict=True):
            self.tokens[kind] += round(share * inputs[0].numel())

    def _now(self) -> dict[str, float]:
        now = time.monotonic()
        gpu = now if self.device.type == "cuda" else 0.0  # that it is held, busy or not
        return {"seconds": now, "cpu_seconds": time.process_time(), "gpu_seconds": gpu, **self.tokens}

    def clocks(self) -> dict[str, float]:
        """Amounts that only grow."""
        return {name: now - self.aside[name] for name, now in self._now().items()}

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is measured inside the block is no learning."""
        before = self._now()
        try:
            yield
        finally:
            self.aside = {name: self.aside[name] + now - before[name] for name, now in self._now().items()}

    def begin(self) -> None:
        """The peak of memory counts from here."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            (PROCESS / "clear_refs").write_text("5")
            self.anew = True
        except OSError:  # no Linux, or not allowed here
            self.anew = False

    def peak(self) -> int | None:
        """Bytes: of the GPU, or of the process; None where the system tells no peak that is begun anew."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = (PROCESS / "status").read_text() if self.anew else ""
        told = dict(line.split(":", 1) for line in status.splitlines())
        return 1024 * int(told["VmHWM"].split()[0]) if "VmHWM" in told else None
