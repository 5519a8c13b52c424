"""What a checkpoint inside a task costs, against the disk's own rate.

    python benchmarks/checkpoint_cost.py [--layers 32] [--width 4096] [--rank 8] [--repeats 9] [--folder .]

Saving (check for NaN, safetensors, fsync, sha256, rename) against a plain write and fsync of as many bytes; verifying
against reading and sha256 of as many bytes, which lie in the system's cache both times. In turn; ratios of medians, of
processor seconds too, which other programs on the machine change less.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from forgetless.learning.checkpoint import Checkpoints, SaveSettings
from forgetless.learning.engine import Engine
from forgetless.runs.folder import RunFolder, complete


def trained(layers: int, width: int, rank: int) -> tuple[SimpleNamespace, torch.optim.Optimizer]:
    """A method with pairs of seven linear layers (width x width) each, and its optimizer after a step."""
    shapes = {"A": (rank, width), "B": (width, rank)}
    pairs = {
        f"layers.{layer}.{linear}.{side}": torch.nn.Parameter(torch.randn(shape))
        for layer in range(layers)
        for linear in range(7)
        for side, shape in shapes.items()
    }
    optimizer = torch.optim.AdamW(pairs.values())
    for parameter in pairs.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return SimpleNamespace(adapters=SimpleNamespace(snapshot=lambda: dict(pairs)), within_task=()), optimizer


def write_plainly(data: bytes, file: Path) -> None:
    with file.open("wb") as written:
        written.write(data)
        written.flush()
        os.fsync(written.fileno())


def cost(act: Callable[[], object]) -> tuple[float, float]:
    """Seconds and processor seconds."""
    began, cpu_began = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - began, time.process_time() - cpu_began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", default=".", help="a folder on the disk that is measured")
    told = parser.parse_args()
    method, optimizer = trained(told.layers, told.width, told.rank)
    costs: dict[str, list[tuple[float, float]]] = {"save": [], "write": [], "verify": [], "read": []}
    with tempfile.TemporaryDirectory(dir=told.folder) as name:
        root = Path(name)
        settings = SaveSettings(save_total_limit=1)
        checkpoints = Checkpoints(RunFolder(root), 1, "task", method, Engine("cpu"), settings)  # type: ignore[arg-type]
        plain = root / "plain"
        for repeat in range(told.repeats + 1):
            saved = checkpoints.folder / f"step-{repeat:06d}"
            taken = {"save": cost(lambda: checkpoints.save(repeat, optimizer))}  # noqa: B023
            size = sum(file.stat().st_size for file in saved.iterdir())
            data = os.urandom(size)
            taken["write"] = cost(lambda: write_plainly(data, plain))  # noqa: B023
            taken["verify"] = cost(lambda: complete(saved))  # noqa: B023
            taken["read"] = cost(lambda: hashlib.sha256(plain.read_bytes()).digest())
            if repeat:  # the first warms up
                for part, value in taken.items():
                    costs[part].append(value)
    seconds, cpu = ({part: statistics.median(one[i] for one in found) for part, found in costs.items()} for i in (0, 1))
    rounded = {name: {part: round(value, 3) for part, value in found.items()} for name, found in
               (("seconds", seconds), ("processor_seconds", cpu))}  # fmt: skip
    print(json.dumps({
        "trainable_parameters": sum(p.numel() for p in method.adapters.snapshot().values()),
        "checkpoint_MB": round(size / 1e6, 1),
        **rounded,
        "disk_MB_per_s": round(size / 1e6 / seconds["write"]),
        "sha256_MB_per_s": round(size / 1e6 / seconds["read"]),
        "save_over_write_and_fsync": round(seconds["save"] / seconds["write"], 2),
        "save_over_write_fsync_and_sha256": round(seconds["save"] / (seconds["write"] + seconds["read"]), 2),
        "the_same_in_processor_seconds": round(cpu["save"] / (cpu["write"] + cpu["read"]), 2),
        "verify_over_read_and_sha256": round(seconds["verify"] / seconds["read"], 2),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
