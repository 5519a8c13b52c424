"""Scoring options against lm-evaluation-harness: the same rows, options and model.

    python benchmarks/options_against_lm_eval.py --data TC/agnews --rows 80 [--precision fp32] [--lora]
    python benchmarks/options_against_lm_eval.py --shape 8b --device cuda          (made-up weights and rows)
    python benchmarks/options_against_lm_eval.py --tiny                            (proves that this runs)

`--data` is an O-LoRA data set's folder (test.json, labels.json). The harness's `HFLM.loglikelihood` gets one request
for each row and option, (prompt, answer); ours is `OptionScorer` with its default batches. The harness's batch size
is the fastest of `--batch_sizes`, tried before; "auto" would add five forward passes of its largest batch to each call.
Then both take turns; the figure is the ratio of the medians. Both score the untouched base, or with `--lora` a model
with LoRA pairs on all linear layers. Log-likelihoods and predictions are compared; with bf16 each is compared with
fp32 too, so that a disagreement can be told from an error.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import statistics
import time
from contextlib import ExitStack, nullcontext

import torch
from gpu_step import FOLDER, SHAPES, made_up
from peft import LoraConfig, get_peft_model
from shared import olora_rows, product_rate, require, sizes, versions
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetless.data.batches import Encoder
from forgetless.data.tasks import Row
from forgetless.learning.engine import Engine
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.base import find_model, load_base
from forgetless.score.options import OptionScorer
from forgetless.seeds import generator

Table = list[list[float]]  # rows x options: log p(option | prompt)


class Ours:
    """Options as a run scores them."""

    def __init__(self, told, precision: str):
        self.engine, self.lora = Engine(told.device, precision), told.lora
        base = load_base(told.model, self.engine.dtype, self.engine.device)
        self.adapters = Adapters(base.model, LoraSettings(), told.model, 0)
        learnt(self.adapters.model)
        self.encoder = Encoder(base.tokenizer, told.max_length)
        self.model = self.adapters.model.eval()
        self.scorer = OptionScorer(self.model, self.encoder, self.engine.device)

    def __call__(self, rows: list[Row], options: tuple[str, ...]) -> Table:
        with ExitStack() as stack:
            stack.enter_context(self.engine.autocast())
            stack.enter_context(nullcontext() if self.lora else self.adapters.disabled())
            return self.scorer(rows, options)


class Harness:
    """lm-evaluation-harness with one batch size."""

    def __init__(self, told, precision: str):
        require("lm-eval", "lm_eval")
        logging.disable(logging.WARNING)
        folder = find_model(told.model)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32 if precision == "fp32" else torch.bfloat16
        )
        if told.lora:
            ours = LoraSettings()
            config = LoraConfig(r=ours.r, lora_alpha=ours.lora_alpha, target_modules="all-linear")
            self.model = learnt(get_peft_model(self.model, config))
        self.model = self.model.to(Engine(told.device).device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.batch_size(1)

    def batch_size(self, size: int) -> None:
        from lm_eval.models.huggingface import HFLM

        self.harness = HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=size)

    def __call__(self, rows: list[Row], options: tuple[str, ...]) -> Table:
        from lm_eval.api.instance import Instance

        asked = [(row.prompt, row.lead + option) for row in rows for option in options]
        requests = [Instance("loglikelihood", {}, arguments=pair, idx=i) for i, pair in enumerate(asked)]
        found = [logp for logp, _ in self.harness.loglikelihood(requests, disable_tqdm=True)]
        return [found[i : i + len(options)] for i in range(0, len(found), len(options))]


def learnt(model):
    """The same LoRA pairs in each copy of the model, as large as after a short training."""
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            fresh = torch.rand(weight.shape, generator=generator("pair", name))
            size = 1 / math.sqrt(weight.shape[1]) if ".lora_A." in name else 0.003
            with torch.no_grad():
                weight.copy_((2 * fresh - 1) * size)
    return model


def made_up_rows(count: int) -> tuple[list[Row], tuple[str, ...]]:
    """Rows of 100 words that begin with the same 20, and 14 options of two words, as in DBpedia."""
    drawn, options = random.Random(0), tuple(f"{first} {second}" for first in "ABCDEFG" for second in ("one", "two"))
    words = [f"{a}{b}{c}" for a in "btsk" for b in "aeiou" for c in "mnlr"]
    beginning = " ".join(words[:20])
    rows = [Row(f"{beginning} {' '.join(drawn.choices(words, k=80))}\nAnswer:", f" {drawn.choice(options)}")
            for _ in range(count)]  # fmt: skip
    return rows, options


def timed(scorer, rows: list[Row], options: tuple[str, ...]) -> tuple[float, Table]:
    began = time.perf_counter()
    table = scorer(rows, options)
    return time.perf_counter() - began, table


def fastest_batch(harness: Harness, told, rows: list[Row], options: tuple[str, ...]) -> dict[int, float]:
    """Seconds of one pass by batch size; the fastest is set."""
    seconds = {}
    for size in told.batch_sizes:
        harness.batch_size(size)
        seconds[size] = timed(harness, rows, options)[0]
    harness.batch_size(min(seconds, key=lambda size: seconds[size]))
    return seconds


def tokens(encoder: Encoder, rows: list[Row], options: tuple[str, ...]) -> dict[str, int]:
    """Through the model: ours, the harness's (options of one token share a pass); and ours that need logits."""
    ours = theirs = kept = 0
    for row in rows:
        splits = [(tuple(before), tuple(after)) for before, after in encoder.scoring_splits(row, options)]
        contexts = {before for before, _ in splits}
        inner = sum(len(after) - 1 for _, after in splits)
        ours += sum(map(len, contexts)) + inner
        kept += len(contexts) + inner
        theirs += sum(map(len, {before + after[:-1] for before, after in splits}))
    return {"forgetless": ours, "lm_eval": theirs, "logits": kept}


def chosen(table: Table) -> list[int]:
    return [max(range(len(row)), key=row.__getitem__) for row in table]


def differences(a: Table, b: Table) -> list[float]:
    return [abs(x - y) for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True)]


def agreement(ours: Table, theirs: Table, exact: Table, options: tuple[str, ...]) -> dict:
    """Where the predictions differ, and by how little each preferred its own; `exact`: in fp32."""
    apart = [i for i, (a, b) in enumerate(zip(chosen(ours), chosen(theirs), strict=True)) if a != b]
    told = []
    for i in apart:
        a, b = chosen(ours)[i], chosen(theirs)[i]
        told.append({
            "row": i, "forgetless": options[a], "lm_eval": options[b], "fp32": options[chosen(exact)[i]],
            "margin_forgetless": round(ours[i][a] - ours[i][b], 4),
            "margin_lm_eval": round(theirs[i][b] - theirs[i][a], 4),
            "margin_fp32": round(abs(exact[i][a] - exact[i][b]), 4),
        })  # fmt: skip
    both = differences(ours, theirs)
    return {
        "predictions_differ": len(apart),
        "disagreements": told,
        "log_likelihoods_apart": {"median": round(statistics.median(both), 5), "largest": round(max(both), 5)},
        "error_to_fp32": {
            name: {"median": round(statistics.median(found), 5), "largest": round(max(found), 5)}
            for name, found in (("forgetless", differences(ours, exact)), ("lm_eval", differences(theirs, exact)))
        },
        "predictions_unlike_fp32": {
            name: sum(a != b for a, b in zip(chosen(table), chosen(exact), strict=True))
            for name, table in (("forgetless", ours), ("lm_eval", theirs))
        },
    }


def compare(told) -> dict:
    rows, options = olora_rows(told.data, "test", told.rows) if told.data else made_up_rows(told.rows)
    ours, harness = Ours(told, told.precision), Harness(told, told.precision)
    ours(rows[:8], options), harness(rows[:2], options)  # warm; ours tries once whether the model can share prompts
    if ours.scorer.shared is False:  # None: no option branches, so one sequence a row is all
        raise SystemExit("this model does not take a shared prompt: the comparison would be one sequence an option")
    tried = fastest_batch(harness, told, rows, options)
    seconds: dict[str, list[float]] = {"forgetless": [], "lm_eval": []}
    tables: dict[str, Table] = {}
    for round_ in range(told.rounds):
        turns = [("forgetless", ours), ("lm_eval", harness)]
        for name, scorer in turns[:: -1 if round_ % 2 else 1]:
            second, tables[name] = timed(scorer, rows, options)
            seconds[name].append(second)
        print(
            f"round {round_}: " + "  ".join(f"{name} {found[-1]:.2f} s" for name, found in seconds.items()), flush=True
        )
    median = {name: statistics.median(found) for name, found in seconds.items()}
    exact = tables["forgetless"] if told.precision == "fp32" else Ours(told, "fp32")(rows, options)
    agreed = agreement(tables["forgetless"], tables["lm_eval"], exact, options)
    count, size = tokens(ours.encoder, rows, options), sizes(ours.model)
    weights = size["frozen"] + (size["lora"] if told.lora else 0)
    needed = 2 * weights * count["forgetless"] + 2 * size["head"] * count["logits"]
    rate = product_rate(ours.engine.dtype, device=told.device)
    right = {
        name: sum(options[i] == row.label for i, row in zip(chosen(table), rows, strict=True))
        for name, table in tables.items()
    }
    return {
        "lm_eval_over_forgetless": round(median["lm_eval"] / median["forgetless"], 2),
        "rounds": [round(b / a, 2) for a, b in zip(seconds["forgetless"], seconds["lm_eval"], strict=True)],
        "lm_eval_batch_size": harness.harness.batch_size,
        "batch_sizes_over_the_fastest": {n: round(second / min(tried.values()), 2) for n, second in tried.items()},
        "tokens_through_the_model": count,
        "share_of_product_rate": {name: round(needed / median[name] / rate, 3) for name in median},
        "rows_right": right,
        **agreed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of an O-LoRA data set, such as TC/agnews; default: rows made up")
    parser.add_argument("--shape", choices=SHAPES, help="made-up weights of this shape instead of --model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", default=FOLDER, help="for made-up weights")
    parser.add_argument("--tiny", action="store_true", help="a model of nothing and few rows: does it run?")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--lora", action="store_true", help="score a model with LoRA pairs instead of the base")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="the harness's, tried")
    told = parser.parse_args()
    if told.tiny:
        told.shape, told.rows, told.rounds, told.batch_sizes = "tiny", 8, 1, [4]
    if told.shape:
        told.model = made_up(told)
    data = told.data.rstrip("/").split("/")[-1] if told.data else "made up"
    print(json.dumps({"data": data, "rows": told.rows, "precision": told.precision, "lora": told.lora,
                      "model": told.shape or told.model, "device": told.device, "threads": torch.get_num_threads(),
                      "versions": versions(), **compare(told)}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
