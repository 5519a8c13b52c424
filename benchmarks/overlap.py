"""Time and memory of `forgetless overlap` on made-up adapters of a large model, and how far from the floor it is.

    python benchmarks/overlap.py [--adapters 8] [--layers 32] [--width 4096] [--rank 8] [--threads 2]

The adapters have the shape of Llama-2-7B's: q_proj and v_proj of 32 layers of 4096 x 4096. They are written as PEFT
folders and read back, so that the figures hold for the whole command without its page. Memory is the peak of this
process's resident memory, libraries included (Linux).

The floor of the products is their operations, 2 x rank an entry and adapter, at the rate of a large fp32 matrix product
on as many threads. Processor seconds tell the work apart from waiting for other programs. The parts are those of one
layer on one thread, timed by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from shared import peak, product_rate, versions

from forgetless.geometry import collisions
from forgetless.geometry.overlap import THRESHOLDS, overlap
from forgetless.model.adapters import Pair
from forgetless.subjects.updates import decomposed, write_update


def made_up(told, seed: int) -> dict[str, Pair]:
    draw = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{i}.self_attn.{kind}" for i in range(told.layers) for kind in ("q_proj", "v_proj")]
    return {
        name: Pair(
            torch.randn(told.rank, told.width, generator=draw), torch.randn(told.width, told.rank, generator=draw), 2.0
        )
        for name in names
    }


def parts(told) -> dict[str, float]:
    """Seconds of one layer's parts on one thread, for all layers."""
    torch.set_num_threads(1)
    pairs = [next(iter(made_up(told, i).values())) for i in range(told.adapters)]
    times = {"decompositions": 0.0, "products, sizes and sums": 0.0, "bits": 0.0, "pairs": 0.0}
    began = time.perf_counter()
    for pair in pairs:
        decomposed(pair)
    times["decompositions"] = time.perf_counter() - began
    rows = max(1, collisions.BLOCK_ENTRIES // (told.adapters * told.width))
    block = torch.empty(told.adapters, rows, told.width)
    limits = np.outer(THRESHOLDS, [4 * told.rank**0.5] * told.adapters).astype(np.float32)[:, :, None]
    for start in range(0, told.width - rows + 1, rows):
        began = time.perf_counter()
        for product, pair in zip(block, pairs, strict=True):
            torch.mm(pair.B[start : start + rows], pair.A, out=product)
        size = block.abs_().view(told.adapters, -1).numpy()
        size.sum(axis=1)
        multiplied = time.perf_counter()
        bits = collisions._bits(size, limits)
        packed = time.perf_counter()
        for i in range(told.adapters):
            np.bitwise_count(bits[:, i : i + 1] & bits[:, i:]).sum(axis=2, dtype=np.int64)
        counted = time.perf_counter()
        times["products, sizes and sums"] += multiplied - began
        times["bits"] += packed - multiplied
        times["pairs"] += counted - packed
    return {name: round(2 * told.layers * seconds, 1) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"adapters": 8, "layers": 32, "width": 4096, "rank": 8, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    entries = 2 * told.layers * told.width**2
    with TemporaryDirectory() as folder:
        folders = [f"{folder}/{i}" for i in range(told.adapters)]
        for i, each in enumerate(folders):
            write_update(made_up(told, i), Path(each), "made-up")
        began, worked = time.perf_counter(), time.process_time()
        found = overlap(folders)
        seconds, busy = time.perf_counter() - began, time.process_time() - worked
    memory = peak()
    rate = product_rate(torch.float32)
    operations = 2 * told.rank * told.adapters * entries
    result = {
        "adapters": told.adapters,
        "pairs": len(found["pairs"]),
        "entries of each": entries,
        "threads": told.threads,
        "seconds": round(seconds, 1),
        "processor seconds": round(busy, 1),
        "load of the machine": os.getloadavg()[0],
        "peak MiB": memory,
        "GB of the products in fp32": round(4 * told.adapters * entries / 1e9, 1),
        "floor of the products, s": round(operations / rate, 2),
        "times the floor": round(seconds * rate / operations, 1),
        "parts on one thread, s": parts(told),
        "average collision rate": found["average_collision_rate"],
        "by chance": found["average_by_chance"],
        "versions": versions(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
