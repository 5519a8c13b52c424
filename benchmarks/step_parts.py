"""What each part of a fast step on CPU brings, added one after another to a step with PEFT's and torch's own forms.

    python benchmarks/step_parts.py [--steps 8] [--data TC/agnews]

One model, the same rows (made up, or those of an O-LoRA data set's folder, which begin alike); the forms take turns
step by step. A figure is the median of the ratios to the first form of the same turn. Page faults show what
`keep_freed_memory` saves.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import statistics
import time
from typing import NamedTuple

import torch
from flat_steps import rows
from shared import olora_rows

from forgetless.data.batches import Encoder, collate, split
from forgetless.learning.engine import Engine, keep_freed_memory
from forgetless.methods import METHODS
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.attention import BLOCKED, PACKED
from forgetless.model.base import load_base


class Form(NamedTuple):
    name: str
    one_operation: bool = False  # LoRA layers as one operation
    attention: str = "sdpa"
    keep_memory: bool = False
    micro_batch_size: int = 8


FORMS = (
    Form("PEFT's layers, torch's fused attention"),
    Form("+ one operation a LoRA layer", True),
    Form("+ blocked attention", True, BLOCKED),
    Form("+ freed memory kept", True, BLOCKED, True),
    Form("+ 4 rows at once", True, BLOCKED, True, 4),
    Form("+ rows packed, 8 at once", True, PACKED, True, 8),
)


def use(form: Form, adapters: Adapters, forwards: dict) -> None:
    for name, layer in adapters.layers().items():
        if form.one_operation:
            layer.forward = forwards[name]
        else:
            layer.__dict__.pop("forward", None)  # back to PEFT's
    adapters.model.get_base_model().set_attn_implementation(form.attention)
    if form.keep_memory:
        keep_freed_memory()
    else:  # glibc's own values
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 128 << 10)
        libc.mallopt(-1, 128 << 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--data", help="an O-LoRA data set's folder")
    told = parser.parse_args()
    engine = Engine("cpu")
    base = load_base(told.model, engine.dtype)
    method = METHODS["sequential"]()
    adapters = Adapters(base.model, LoraSettings(), told.model, 0)
    encoder = Encoder(base.tokenizer, 256)
    method.start(adapters, encoder, 0)
    real = [encoder(row) for row in olora_rows(told.data, "train", 8 * (told.steps + 1))[0]] if told.data else []
    forwards = {name: layer.forward for name, layer in adapters.layers().items()}
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-5)
    adapters.model.train()
    seconds: dict[str, list[float]] = {form.name: [] for form in FORMS}
    faults: dict[str, list[int]] = {form.name: [] for form in FORMS}
    losses: dict[str, float] = {}
    for i in range(told.steps + 1):
        batch = method.batch(real[8 * i : 8 * i + 8] or rows(base.model.config.vocab_size, i % 4), i)
        for form in FORMS:
            use(form, adapters, forwards)
            before, began, total = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter(), 0.0
            for chosen in split(batch, form.micro_batch_size):
                with engine.autocast():
                    loss = method.loss(collate(chosen, base.tokenizer.pad_token_id))
                engine.backward(loss)
                total += float(loss.detach())
            optimizer.zero_grad()  # all forms see the same weights
            seconds[form.name].append(time.perf_counter() - began)
            faults[form.name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
            losses[form.name] = total
    first = seconds[FORMS[0].name][1:]
    results = {
        form.name: {
            "time": round(statistics.median(a / b for a, b in zip(seconds[form.name][1:], first, strict=True)), 3),
            "page_faults": int(statistics.median(faults[form.name][1:])),
            "loss": round(losses[form.name], 4),
        }
        for form in FORMS
    }
    print(json.dumps({"device": engine.told, "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
