"""What a step keeps in memory for its backward pass, block by block, and how long it takes, by method.

    python benchmarks/kept_for_backward.py [--methods sequential sherl] [--steps 5] [--rows 8]

Bytes of the tensors that autograd holds when the loss is there, weights and trained tensors left out and each piece of
memory counted once, by the block in whose forward they were first kept; the steps of the methods take turns, and times
are medians of the ratios to the first one's. Micro-batches are whole steps here.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from flat_steps import one_step, rows
from rich.console import Console
from rich.table import Table

from forgetless.data.batches import Encoder, collate
from forgetless.learning.engine import Engine
from forgetless.methods import METHODS
from forgetless.model.adapters import LoraSettings
from forgetless.model.base import load_base, transformer

MIB = 2**20


def kept(method, engine: Engine, part) -> list[int]:
    """Bytes kept in each block, then between blocks and in the head."""
    model = transformer(method.adapters.model)
    blocks = model.get_decoder().layers
    weights = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *method.adapters.parameters()]}
    bytes_of, seen, now = [0] * (len(blocks) + 1), set(weights), [len(blocks)]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            bytes_of[now[0]] += storage.nbytes()
        return tensor

    hooks = [block.register_forward_pre_hook(lambda *_, i=i: now.__setitem__(0, i)) for i, block in enumerate(blocks)]
    hooks += [block.register_forward_hook(lambda *_: now.__setitem__(0, len(blocks))) for block in blocks]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), engine.autocast():
        loss = method.loss(part)
    for hook in hooks:
        hook.remove()
    del loss
    return bytes_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--methods", nargs="+", default=["sequential", "sherl"], choices=METHODS)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    told = parser.parse_args()
    engine, methods = Engine("cpu", "bf16"), {}
    for name in told.methods:
        base, kind = load_base(told.model, engine.dtype), METHODS[name]
        methods[name] = method = kind()
        method.start(kind.adapter_class(base.model, LoraSettings(), told.model, 0), Encoder(base.tokenizer, 512), 0)
        method.begin_task(0)
    batch = method.batch((rows(base.model.config.vocab_size, 0) * told.rows)[: told.rows], 0)
    part = collate(batch, base.tokenizer.pad_token_id)
    held = {name: kept(method, engine, part) for name, method in methods.items()}
    optimizers = {name: torch.optim.AdamW(method.adapters.parameters()) for name, method in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(told.steps + 1):
        for name, method in methods.items():
            times[name].append(one_step(method, engine, optimizers[name], batch))
    table = Table("method", "early blocks, MiB", "last block, MiB", "between and head, MiB", "all, MiB", "of the first",
                  "time of the first", title=f"{told.model}: {told.rows} rows of 80 to 140 tokens, bf16")  # fmt: skip
    first = told.methods[0]
    for name, per in held.items():
        ratio = statistics.median(one / other for one, other in zip(times[name][1:], times[first][1:], strict=True))
        parts = [sum(per[:-2]), per[-2], per[-1], sum(per)]
        table.add_row(
            name, *(f"{one / MIB:.1f}" for one in parts), f"{sum(per) / sum(held[first]):.2f}", f"{ratio:.2f}"
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
