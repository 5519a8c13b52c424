"""Memory and time of the divergence between two models, chunk by chunk, against the obvious form.

    python benchmarks/divergence_memory.py [--vocabularies 49152 262144] [--positions 512] [--width 64]
    python benchmarks/divergence_memory.py --positions 4096 --width 576                                   (24 GB)
    python benchmarks/divergence_memory.py --model smollm2-135m-instruct --tokens 8192 --vocabularies

Heads: two random heads and random hidden states. The obvious form computes all logits of both and `log_softmax` of
both in fp32. Each form runs in a process of its own; memory is the peak of resident memory over what the heads and
states take (Linux).

Whole: two models on the same windows. The forms take turns in one process: the two forward passes with their logits
and nothing else; the measure with nothing on disk; the measure with the reference on disk. A figure is the median of
the ratios to the forward passes of the same turn. The floor is the time that a large matrix product needs for the
operations of the two passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from shared import peak, product_rate, reset_peak, sizes, versions
from transformers import LlamaConfig, LlamaForCausalLM

from forgetless.forgetting.divergence import compare_states, divergence
from forgetless.forgetting.reference import Reference, reference_of, write_states
from forgetless.forgetting.windows import Window, Windows
from forgetless.model.base import load_base
from forgetless.model.head import Head

FORMS = ("chunks", "obvious")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_model(layers: int, width: int, vocabulary: int, dtype: torch.dtype, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), num_key_value_heads=max(1, width // 64), max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def random_windows(tokens: int, length: int, vocabulary: int) -> Windows:
    draw = torch.Generator().manual_seed(0)
    windows = []
    for i in range(max(1, tokens // length)):
        ids = torch.randint(4, vocabulary, (length + 1,), generator=draw).tolist()
        windows.append(Window(i, tuple(ids[:-1]), (True,) * length, tuple(range(1, length + 1)), tuple(ids[1:])))
    return Windows(tuple(windows), len(windows), {"length": length, "stride": length}, content="random")


# ---------------------------------------------------------------- two heads


def obvious(before: torch.Tensor, after: torch.Tensor, reference: Head, head: Head) -> torch.Tensor:
    """(4, positions), as the equations stand."""
    log_p, log_q = reference(before).float().log_softmax(-1), head(after).float().log_softmax(-1)
    entropy, cross_entropy = -(log_p.exp() * log_p).sum(-1), -(log_p.exp() * log_q).sum(-1)
    agree = (log_p.argmax(-1) == log_q.argmax(-1)).float()
    return torch.stack([entropy, cross_entropy, cross_entropy - entropy, agree])


def heads(told) -> dict:
    """One form at one vocabulary, in this process."""
    dtype, (vocabulary,) = DTYPES[told.precision], told.vocabularies
    reference_head, head = (Head(random_model(0, told.width, vocabulary, dtype, seed)) for seed in range(2))
    before, after = torch.randn(2, told.positions, told.width).to(dtype)
    windows = random_windows(told.positions, told.positions, vocabulary)
    with TemporaryDirectory() as folder:
        write_states(Path(folder), [([0], before)], {})
        reference = Reference(Path(folder), windows, reference_head)
        reference_head(before[:1]), head(after[:1])
        started = reset_peak()
        began = time.perf_counter()
        if told.form == "obvious":
            kl = obvious(before, after, reference_head, head)[2].mean().item()
        else:
            kl = compare_states(reference, [([0], after)], head, windows).per_token.kl
        seconds = time.perf_counter() - began
    return {"MiB": peak() - started, "seconds": round(seconds, 3), "kl": kl}


def memory(told) -> dict:
    results = {}
    for vocabulary in told.vocabularies:
        asked = [sys.executable, __file__, "--vocabularies", str(vocabulary), "--positions", str(told.positions)]
        asked += ["--width", str(told.width), "--precision", told.precision, "--threads", str(told.threads)]
        found = {}
        for form in FORMS:
            done = subprocess.run([*asked, "--form", form], check=True, capture_output=True, text=True)
            found[form] = json.loads(done.stdout.splitlines()[-1])
        found["MiB of one model's logits in fp32"] = round(4 * vocabulary * told.positions / 2**20)
        results[vocabulary] = found
        print(vocabulary, json.dumps(found), file=sys.stderr, flush=True)
    return results


# ---------------------------------------------------------------- two models


def two_models(told) -> tuple:
    dtype = DTYPES[told.precision]
    if told.model:
        return tuple(load_base(told.model, dtype).model for _ in range(2))
    return tuple(random_model(told.layers, told.model_width, told.model_vocabulary, dtype, seed) for seed in range(2))


def forward_passes(models: tuple, windows: Windows, batch_tokens: int) -> None:
    for model in models:
        for numbers in windows.batches(batch_tokens):
            ids, mask, _ = windows.collate(numbers)
            with torch.no_grad():
                model(input_ids=ids, attention_mask=mask, use_cache=False)


def whole(told) -> dict:
    models = two_models(told)
    windows = random_windows(told.tokens, told.length, models[0].config.vocab_size)
    seconds: dict[str, list[float]] = {"forward_passes": [], "nothing_on_disk": [], "reference_on_disk": []}

    def measure(root: Path) -> None:
        divergence(reference_of(models[0], windows, {}, root, told.batch_tokens), models[1], None, told.batch_tokens)

    for _ in range(told.turns + 1):  # the first warms up
        with TemporaryDirectory() as folder:
            for name, work in (
                ("forward_passes", lambda: forward_passes(models, windows, told.batch_tokens)),
                ("nothing_on_disk", lambda: measure(Path(folder))),
                ("reference_on_disk", lambda: measure(Path(folder))),
            ):
                began = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - began)
    weights, rate = sizes(models[0]), product_rate(DTYPES[told.precision])
    floor = 2 * 2 * (weights["frozen"] + weights["head"]) * windows.positions / rate
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}

    def ratio(name: str) -> float:
        turns = zip(seconds[name][1:], seconds["forward_passes"][1:], strict=True)
        return round(statistics.median(own / passes for own, passes in turns), 3)

    return {
        "nothing_on_disk_over_forward_passes": ratio("nothing_on_disk"),
        "reference_on_disk_over_forward_passes": ratio("reference_on_disk"),
        "nothing_on_disk_over_floor": round(medians["nothing_on_disk"] / floor, 3),
        "forward_passes_over_floor": round(medians["forward_passes"] / floor, 3),
        "seconds": {name: round(value, 3) for name, value in medians.items()},
        "floor_seconds": round(floor, 3),
        "product_GFLOP_per_second": round(rate / 1e9),
        "tokens": windows.positions,
        "turns": told.turns,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    group = parser.add_argument_group("heads")
    group.add_argument("--vocabularies", type=int, nargs="*", default=[49152, 262144], help="none: leave this part out")
    group.add_argument("--positions", type=int, default=512)
    group.add_argument("--width", type=int, default=64)
    group.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    group = parser.add_argument_group("whole")
    group.add_argument("--model", help="a packaged model, a folder or a hub name; default: a random one")
    group.add_argument("--layers", type=int, default=8)
    group.add_argument("--model_width", type=int, default=256)
    group.add_argument("--model_vocabulary", type=int, default=8192)
    group.add_argument("--tokens", type=int, default=2048, help="0: leave this part out")
    group.add_argument("--length", type=int, default=512, help="tokens of a window")
    group.add_argument("--batch_tokens", type=int, default=1024)
    group.add_argument("--turns", type=int, default=3)
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    if told.form:
        print(json.dumps(heads(told)))
        return
    results: dict = {"torch": torch.__version__, "threads": told.threads, "precision": told.precision}
    if told.vocabularies:
        results["heads"] = {"positions": told.positions, "width": told.width, "by_vocabulary": memory(told)}
    if told.tokens:
        results["whole"] = {"model": told.model or "random", **whole(told)}
    print(json.dumps(results | {"versions": versions()}, indent=1))


if __name__ == "__main__":
    main()
