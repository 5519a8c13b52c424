"""The cost of a step at task 2 and at task 15, for every method that keeps old tasks.

    python benchmarks/flat_steps.py [--target_modules q_proj v_proj] [--steps 20] [--memory]

Three models, at task 1, 2 and 15, take turns step by step in one process on the same rows; the figure is the median
of the ratios of the step times of one turn. The earlier tasks' pairs are kept joined by rank, so the work grows only by
that rank: the share of a step's operations that the joined rank accounts for is printed beside the ratio over task 1.
`--memory` compares the peak memory of whole processes instead, each of which knows one state only (Linux).
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

from forgetless.data.batches import Encoder, Example, collate, split
from forgetless.data.tasks import Row
from forgetless.learning.engine import Engine
from forgetless.methods import METHODS
from forgetless.methods.incremental import Incremental
from forgetless.model.adapters import Adapters, LoraSettings, Pair
from forgetless.model.base import load_base

STATES = (1, 2, 15)  # the task that is being learnt


def rows(vocabulary: int, seed: int) -> list[Example]:
    """Eight rows of 80 to 140 tokens with two answer tokens each, as in a labelling task."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(80, 141, (8,), generator=draw).tolist()
    return [
        Example(tuple(torch.randint(5, vocabulary, (n,), generator=draw).tolist()), (False,) * (n - 2) + (True,) * 2)
        for n in lengths
    ]


def one_step(method, engine, optimizer, batch) -> float:
    began = time.perf_counter()
    for chosen in split(batch, 8):
        with engine.autocast():
            loss = method.loss(collate(chosen, method.encoder.tokenizer.pad_token_id, engine.device))
        engine.backward(loss)
    penalty = method.penalty()
    if penalty is not None:
        engine.add_gradient(penalty, method.adapters.parameters())
    optimizer.step()
    optimizer.zero_grad()
    method.after_step(optimizer)
    return time.perf_counter() - began


def prepare(method, task: int, rank: int) -> None:
    """The model as it is while task number `task` (from 1) is learnt."""
    method.task = task - 1
    if isinstance(method, Incremental):
        if task > 1:
            method.adapters.set_past({
                name: Pair(torch.randn((task - 1) * rank, pair.A.shape[1]) / pair.A.shape[1] ** 0.5,
                           torch.randn(pair.B.shape[0], (task - 1) * rank) * 1e-3, pair.scale)
                for name, pair in method.adapters.pairs().items()
            })  # fmt: skip
        elif method.adapters.past():
            method.adapters.drop_past()
    elif method.old_rows and not method.bound:
        method.memory.rows = [Row(f"kept row {i:03d} " * 12, " label") for i in range(50 * (task - 1))]
        method.memory.tasks = [i // 50 for i in range(50 * (task - 1))]


def joined_share(method, rank: int, task: int) -> float:
    """Operations of the joined rank over those of the whole step: forward and input gradient, per token."""
    joined = sum((task - 1) * rank * (p.A.shape[1] + p.B.shape[0]) for p in method.adapters.pairs().values())
    own = sum(p.numel() for p in method.adapters.parameters())
    model = method.adapters.model
    frozen = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n and "embed" not in n)
    return 2 * joined / (2 * frozen + 3 * own + 2 * joined)


def started(told, engine, name: str):
    base = load_base(told.model, engine.dtype, engine.device)
    targets = told.target_modules[0] if len(told.target_modules) == 1 else told.target_modules
    method = METHODS[name]()
    adapters = Adapters(base.model, LoraSettings(r=told.rank, target_modules=targets), told.model, 0)
    method.start(adapters, Encoder(base.tokenizer, 256), 0)
    method.begin_task(0)
    return method


def steps(methods: list, engine, number: int) -> list[list[float]]:
    """Seconds of steps on the same rows, the methods taking turns; one more before them warms up."""
    optimizers = [torch.optim.AdamW(method.adapters.parameters(), lr=1e-5) for method in methods]
    seconds: list[list[float]] = [[] for _ in methods]
    for i in range(number + 1):
        for place in range(len(methods)) if i % 2 else reversed(range(len(methods))):
            method = methods[place]
            method.adapters.model.train()
            batch = method.batch(rows(method.adapters.model.config.vocab_size, i % 4), i)
            seconds[place].append(one_step(method, engine, optimizers[place], batch))
    return [values[1:] for values in seconds]


def times(told, name: str) -> dict:
    engine = Engine()
    methods = [started(told, engine, name) for _ in STATES]
    for method, task in zip(methods, STATES, strict=True):
        prepare(method, task, told.rank)
    first, second, last = steps(methods, engine, told.steps)

    def ratio(over: list[float], under: list[float]) -> float:
        return round(statistics.median(a / b for a, b in zip(over, under, strict=True)), 3)

    return {
        "task_15_over_task_2": ratio(last, second),
        "task_15_over_task_1": ratio(last, first),
        "joined_share_of_operations_at_15": round(joined_share(methods[-1], told.rank, 15), 3)
        if isinstance(methods[-1], Incremental)
        else 0.0,
        "steps_timed": len(last),
    }


def memory(told, name: str) -> dict:
    """Peak resident memory of the whole process, model and all, in MiB."""
    peaks = {}
    for task in (2, 15):
        asked = [sys.executable, __file__, "--model", told.model, "--rank", str(told.rank), "--methods", name]
        asked += ["--peak_of", str(task), "--target_modules", *told.target_modules]
        peaks[task] = int(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()[-1])
    return {"task_15_over_task_2": round(peaks[15] / peaks[2], 3), "MiB_at_task_2": peaks[2], "MiB_at_15": peaks[15]}


def peak_of(told) -> int:
    engine = Engine()
    method = started(told, engine, told.methods[0])
    prepare(method, told.peak_of, told.rank)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on: loading the model is not a step
    steps([method], engine, 3)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--target_modules", nargs="+", default=["all-linear"], help="all-linear; O-LoRA: q_proj v_proj")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=["incremental", "olora", "nlora", "replay", "ilora"])
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--peak_of", type=int, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.peak_of:
        print(peak_of(told))
        return
    results = {}
    for name in told.methods:
        results[name] = memory(told, name) if told.memory else times(told, name)
        print(name, json.dumps(results[name]), flush=True)
    print(json.dumps({"device": Engine().told, "torch": torch.__version__, "model": told.model, "rank": told.rank,
                      "target_modules": told.target_modules, "results": results}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
