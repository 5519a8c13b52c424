"""The cost of a step at task 2 and at task 15, for every method that keeps old tasks.

    python benchmarks/flat_steps.py [--target_modules q_proj v_proj] [--rounds 6]

The states (task 1, 2, 15) take turns in one process on the same rows; the figure is the ratio of the medians of
their step times. The earlier tasks' pairs are kept joined by rank, so the work grows only by that rank: the share of a
step's operations that the joined rank accounts for is printed beside the ratio over task 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--target_modules", nargs="+", default=["q_proj", "v_proj"], help="O-LoRA's own by default")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--methods", nargs="+", default=["incremental", "olora", "nlora", "replay", "ilora"])
    told = parser.parse_args()
    engine = Engine()
    targets = told.target_modules[0] if len(told.target_modules) == 1 else told.target_modules
    results = {}
    for name in told.methods:
        base = load_base(told.model, engine.dtype, engine.device)
        method = METHODS[name]()
        method.start(Adapters(base.model, LoraSettings(r=told.rank, target_modules=targets), told.model, 0),
                     Encoder(base.tokenizer, 256), 0)  # fmt: skip
        method.begin_task(0)
        seconds: dict[int, list[float]] = {task: [] for task in STATES}
        for round_ in range(told.rounds):
            for task in STATES if round_ % 2 == 0 else STATES[::-1]:
                prepare(method, task, told.rank)
                method.adapters.model.train()
                optimizer = torch.optim.AdamW(method.adapters.parameters(), lr=1e-5)
                for step in range(4):
                    batch = method.batch(rows(base.model.config.vocab_size, step), step)
                    taken = one_step(method, engine, optimizer, batch)
                    if step > 0:  # the first after a change warms up
                        seconds[task].append(taken)
        median = {task: statistics.median(values) for task, values in seconds.items()}
        results[name] = {
            "task_15_over_task_2": round(median[15] / median[2], 3),
            "task_15_over_task_1": round(median[15] / median[1], 3),
            "joined_share_of_operations_at_15": round(joined_share(method, told.rank, 15), 3)
            if isinstance(method, Incremental) else 0.0,
            "steps_timed": len(seconds[15]),
        }  # fmt: skip
        print(name, json.dumps(results[name]), flush=True)
    print(json.dumps({"device": engine.told, "torch": torch.__version__, "model": told.model, "rank": told.rank,
                      "target_modules": targets, "results": results}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
