"""||BA||_1 and its gradient: blockwise against the obvious form, at 4096 x 4096, rank 8.

    python benchmarks/nlora_penalty.py [--size 4096] [--rank 8] [--repeats 15]

Time: paired in one process, the two forms in turn, ratio of medians. Memory: growth of the peak resident size of a
fresh process for each form, beside what arithmetic says (the obvious form holds at least the out x in product).
Floor: 3 products of 2 out in r operations each (the product, sign(BA) Aᵀ, Bᵀ sign(BA)).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from forgetless.methods.nlora import product_l1


def obvious(B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    return (B @ A).abs().sum()


FORMS = {"obvious": obvious, "blockwise": product_l1}


def once(form: str, B: torch.Tensor, A: torch.Tensor) -> float:
    began = time.perf_counter()
    FORMS[form](B, A).backward()
    return time.perf_counter() - began


def factors(size: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(size, rank, requires_grad=True), torch.randn(rank, size, requires_grad=True)


def peak_growth(form: str, size: int, rank: int) -> None:
    """Run in a process of its own (Linux): prints by how many MiB its resident size peaks above its start."""
    once(form, *factors(64, rank))  # loads what the first call loads
    B, A = factors(size, rank)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present size
    before = resident("VmRSS")
    once(form, B, A)
    print((resident("VmHWM") - before) / 1024)


def resident(field: str) -> int:
    """KiB from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--memory-of", choices=FORMS, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.memory_of:
        peak_growth(told.memory_of, told.size, told.rank)
        return
    B, A = factors(told.size, told.rank)
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for repeat in range(told.repeats + 2):
        for form in FORMS:
            taken = once(form, B, A)
            if repeat >= 2:  # the first two warm up
                seconds[form].append(taken)
    memory = {}
    for form in FORMS:
        command = [sys.executable, __file__, "--memory-of", form, "--size", str(told.size), "--rank", str(told.rank)]
        memory[form] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    big, small = torch.randn(told.size, told.size), torch.randn(told.size, told.size)
    products = [_timed(lambda: big @ small) for _ in range(3)]
    peak_rate = 2 * told.size**3 / min(products)
    operations = 3 * 2 * told.size**2 * told.rank
    print(json.dumps({
        "shape": [told.size, told.size, told.rank],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "time_ratio_blockwise_over_obvious": round(
            statistics.median(seconds["blockwise"]) / statistics.median(seconds["obvious"]), 3),
        "peak_memory_growth_MiB": {form: round(value, 1) for form, value in memory.items()},
        "memory_ratio_blockwise_over_obvious": round(memory["blockwise"] / memory["obvious"], 4),
        "one_product_MiB": told.size**2 * 4 / 2**20,
        "share_of_the_matrix_product_rate": round(
            operations / statistics.median(seconds["blockwise"]) / peak_rate, 3),
    }, indent=1))  # fmt: skip


def _timed(act) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
