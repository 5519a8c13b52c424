"""What the speed benchmarks share: rows, versions, peak memory, and the rate of a large matrix product."""

from __future__ import annotations

import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from forgetless.data.readers import olora_options, read_olora
from forgetless.data.tasks import Row

PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "lm-eval")


def versions() -> dict[str, str]:
    """The installed versions of the packages that are compared."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def require(package: str, module: str) -> None:
    """Ends with one clear line where an extra is missing."""
    try:
        __import__(module)
    except ImportError as error:
        raise SystemExit(f"this benchmark needs {package}: pip install -c constraints.txt -e '.[bench]'") from error


def olora_rows(folder: str, split: str, count: int) -> tuple[list[Row], tuple[str, ...]]:
    """The first rows of an O-LoRA data set that are not yet there, and its label words."""
    if not (Path(folder).expanduser() / "labels.json").exists():
        raise SystemExit(f"--data {folder}: no labels.json; give a folder of the O-LoRA benchmark, such as TC/agnews")
    rows = list(dict.fromkeys(read_olora(folder, split).rows))
    if len(rows) < count:
        raise SystemExit(f"--data {folder}: {len(rows)} rows in {split}.json, {count} are needed")
    return rows[:count], olora_options(folder)


def product_rate(
    dtype: torch.dtype, sizes: tuple[int, ...] = (2048, 4096), times: int = 5, device: str = "cpu"
) -> float:
    """Operations a second of a square matrix product: the best size's median."""
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
        seconds = []
        for _ in range(times + 1):
            began = time.perf_counter()
            a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        best = max(best, 2 * size**3 / statistics.median(seconds[1:]))
    return best


def sizes(model) -> dict[str, int]:
    """Weights that a token meets: of the frozen linear layers, of the LoRA pairs, of the output embedding."""
    head = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return {
        "frozen": sum(m.weight.numel() for name, m in linear.items() if "lora_" not in name),
        "lora": sum(m.weight.numel() for name, m in linear.items() if "lora_" in name),
        "head": head.weight.numel(),
    }


def reset_peak() -> int:
    """Sets the peak of this process's resident memory back to what is resident now, and gives it in MiB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The peak of this process's resident memory in MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
