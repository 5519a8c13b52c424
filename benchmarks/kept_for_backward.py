"""What a step keeps in memory for its backward pass, block by block, its peak, and how long it takes, by method.

    python benchmarks/kept_for_backward.py [--methods sequential sherl] [--steps 5]

Kept: bytes of the tensors that autograd holds when the loss is there, weights and trained tensors left out and each
piece of memory counted once, by the block in whose forward they were first kept; what blocks give to one another has a
column of its own. Peak: of a process of its own for each method, less what it was with the model loaded (Linux). The
steps of the methods take turns, and times are medians of the ratios to the first one's. Eight rows, one micro-batch.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from flat_steps import one_step, rows
from rich.console import Console
from rich.table import Table

from forgetless.data.batches import Encoder, collate
from forgetless.learning.engine import Engine
from forgetless.learning.spending import Spending
from forgetless.methods import METHODS, Method
from forgetless.model.adapters import LoraSettings
from forgetless.model.base import load_base, transformer

MIB = 2**20
PLACES = ("inside early blocks", "what they give", "side network, last block", "head")


def started(name: str, model: str, engine: Engine) -> Method:
    base, method = load_base(model, engine.dtype), METHODS[name]()
    method.start(method.adapter_class(base.model, LoraSettings(), model, 0), Encoder(base.tokenizer, 512), 0)
    method.begin_task(0)
    return method


def batch_of(method: Method) -> list:
    return method.batch(rows(method.adapters.model.config.vocab_size, 0), 0)


def kept(method: Method, engine: Engine) -> dict[str, int]:
    """Bytes by place."""
    model = transformer(method.adapters.model)
    *early, last = model.get_decoder().layers
    seen = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *method.adapters.parameters()]}
    given: set[int] = set()
    bytes_of, now = dict.fromkeys(PLACES, 0), [PLACES[3]]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            place = PLACES[1] if storage.data_ptr() in given else now[0]
            bytes_of[place] += storage.nbytes()
        return tensor

    def enter(place: str):
        def entered(block, inputs: tuple) -> None:
            given.add(inputs[0].untyped_storage().data_ptr())
            now[0] = place

        return entered

    hooks = [block.register_forward_pre_hook(enter(PLACES[0])) for block in early]
    hooks += [last.register_forward_pre_hook(enter(PLACES[2]), prepend=True)]
    hooks += [block.register_forward_hook(lambda *_: now.__setitem__(0, PLACES[3])) for block in [*early, last]]
    part = collate(batch_of(method), method.encoder.tokenizer.pad_token_id)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), engine.autocast():
        loss = method.loss(part)
    for hook in hooks:
        hook.remove()
    del loss
    return bytes_of


def peak(name: str, model: str) -> int:
    """Bytes by which three steps raise the memory of a process with the model loaded."""
    engine = Engine("cpu", "bf16")
    method, spending = started(name, model, engine), Spending(engine.device)
    optimizer, batch = torch.optim.AdamW(method.adapters.parameters()), batch_of(method)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    spending.begin()
    for _ in range(3):
        one_step(method, engine, optimizer, batch)
    return (spending.peak() or 0) - resident


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--methods", nargs="+", default=["sequential", "sherl"], choices=METHODS)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.peak_of:
        print(peak(told.peak_of, told.model))
        return
    asked = [sys.executable, __file__, "--model", told.model, "--peak_of"]
    peaks = {
        name: int(subprocess.run([*asked, name], check=True, capture_output=True, text=True).stdout.split()[-1])
        for name in told.methods
    }
    engine = Engine("cpu", "bf16")
    methods = {name: started(name, told.model, engine) for name in told.methods}
    held = {name: kept(method, engine) for name, method in methods.items()}
    optimizers = {name: torch.optim.AdamW(method.adapters.parameters()) for name, method in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(told.steps + 1):
        for name, method in methods.items():
            times[name].append(one_step(method, engine, optimizers[name], batch_of(method)))
    table = Table("method", *PLACES, "all", "of the first", "peak", "time of the first",
                  title=f"MiB for the backward pass: {told.model}, 8 rows of 80 to 140 tokens, bf16")  # fmt: skip
    first = told.methods[0]
    for name, places in held.items():
        ratio = statistics.median(one / other for one, other in zip(times[name][1:], times[first][1:], strict=True))
        share = sum(places.values()) / sum(held[first].values())
        sizes = [f"{one / MIB:.1f}" for one in (*places.values(), sum(places.values()))]
        table.add_row(name, *sizes, f"{share:.2f}", f"{peaks[name] / MIB:.0f}", f"{ratio:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
