"""What each part of a fast step on CPU brings, added one after another to a step with PEFT's and torch's own forms.

    python benchmarks/step_parts.py [--steps 8] [--data TC/agnews] [--shared 500]
    python benchmarks/step_parts.py --shared 500 --forms 3 5 --steps 3       (a long system prompt: unshared, shared)

One model, the same rows (made up, or those of an O-LoRA data set's folder, which begin alike); with `--shared` each
made-up row has so many common tokens and 60 of its own. `--layers 6` keeps the first six layers, for a short trial.
The forms take turns step by step. A figure is the median of the ratios to the first form of the same turn. Page faults
show what `keep_freed_memory` saves.
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

from forgetless.data.batches import Encoder, Example, collate, split
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


def made_up(vocabulary: int, seed: int, shared: int) -> list[Example]:
    """Eight rows: 80 to 140 tokens, or a common beginning and 60 tokens; two of them are the answer."""
    if not shared:
        return rows(vocabulary, seed)
    draw = torch.Generator().manual_seed(seed)
    common = torch.randint(5, vocabulary, (shared,), generator=draw).tolist()
    answer = (False,) * (shared + 58) + (True,) * 2
    return [Example((*common, *torch.randint(5, vocabulary, (60,), generator=draw).tolist()), answer) for _ in range(8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--data", help="an O-LoRA data set's folder")
    parser.add_argument("--shared", type=int, default=0, help="tokens with which all made-up rows begin")
    parser.add_argument("--layers", type=int, help="keep the first so many layers of a Llama-like model")
    parser.add_argument("--forms", type=int, nargs="+", default=range(len(FORMS)), help="numbers of forms, from 0")
    told = parser.parse_args()
    forms = [FORMS[number] for number in told.forms]
    engine = Engine("cpu")
    base = load_base(told.model, engine.dtype)
    if told.layers:
        base.model.model.layers = base.model.model.layers[: told.layers]
        base.model.config.num_hidden_layers = told.layers
    method = METHODS["sequential"]()
    adapters = Adapters(base.model, LoraSettings(), told.model, 0)
    encoder = Encoder(base.tokenizer, 256)
    method.start(adapters, encoder, 0)
    real = [encoder(row) for row in olora_rows(told.data, "train", 8 * (told.steps + 1))[0]] if told.data else []
    forwards = {name: layer.forward for name, layer in adapters.layers().items()}
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-5)
    adapters.model.train()
    seconds: dict[str, list[float]] = {form.name: [] for form in forms}
    faults: dict[str, list[int]] = {form.name: [] for form in forms}
    losses: dict[str, float] = {}
    for i in range(told.steps + 1):
        batch = method.batch(real[8 * i : 8 * i + 8] or made_up(base.model.config.vocab_size, i % 4, told.shared), i)
        for form in forms:
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
    first = seconds[forms[0].name][1:]
    results = {
        form.name: {
            "time": round(statistics.median(a / b for a, b in zip(seconds[form.name][1:], first, strict=True)), 3),
            "page_faults": int(statistics.median(faults[form.name][1:])),
            "loss": round(losses[form.name], 4),
        }
        for form in forms
    }
    print(
        json.dumps(
            {"device": engine.told, "torch": torch.__version__, "layers": told.layers or "all", "results": results},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
