"""A training step against TRL's SFTTrainer and against a bare PyTorch loop with full logits.

    python benchmarks/step_against_trl.py --data TC/agnews [--answers half] [--memory] [--profile] [--choose]

`--data` is an O-LoRA data set's folder (train.json, labels.json). TRL's trainer drives: its step is timed from
`on_step_begin` to `on_step_end`, which leaves out its collation; then the same eight rows go through a step of ours
(batch, split, collate, loss, backward, clip, AdamW, as `learning/step.py` has them) and a step of the bare loop (stock
PEFT, `labels=`), in turn. Three copies of the model begin with the same LoRA weights. The rows of a step lie longest
first, so that TRL's and the bare loop's micro-batches hold the rows and the padding that ours hold. Token ids are
compared, and so are the losses of every step. The figures are ratios of medians.

All three run in one process, so all three profit from the C library keeping freed memory, which only we ask for.
`--memory` gives each its own process. `--choose` times TRL's settings against each other; `--trl` picks one.
`--profile` prints the operators that take most of a step. `--answers half` makes rows of which half are answers.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from shared import olora_rows, peak, product_rate, require, reset_peak, sizes, versions
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from forgetless.data.batches import Encoder, Example, collate, split
from forgetless.data.tasks import Row
from forgetless.learning.engine import Engine
from forgetless.learning.step import TrainSettings
from forgetless.methods import METHODS
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.base import find_model, load_base
from forgetless.seeds import generator

BATCH = 8
NORM = 1.0  # of the gradient, above which it is clipped: everyone's default
WARMUP = 2  # steps at the beginning that are not counted
TRL_SETTINGS = {
    "8": {"per_device_train_batch_size": 8},
    "4x2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "8-eager": {"per_device_train_batch_size": 8, "attention": "eager"},
    "4x2-eager": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "attention": "eager"},
    "8-no-autocast": {"per_device_train_batch_size": 8, "bf16": False},
    "8-logits": {"per_device_train_batch_size": 8, "logits": True},
    "4x2-logits": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logits": True},
    "8-compiled": {"per_device_train_batch_size": 8, "torch_compile": True},
}
"""What might be fastest on CPU. `logits`: `compute_loss_func` instead of the fused head (deprecated in TRL 1.16: full
logits, and one more forward pass for the metrics). `chunked_nll` is an alias of `nll` there, `padding_free` and
packing need FlashAttention, Liger needs Triton."""


# ------------------------------------------------------------------------------------------ the rows


def half_answers(row: Row) -> Row:
    """The same text, of which the second half is the answer."""
    text = row.prompt + row.answer
    borders = [i for i in range(1, len(text) - 1) if text[i] == " " and text[i - 1].isalnum() and text[i + 1].isalnum()]
    border = min(borders, key=lambda i: abs(i - len(text) // 2))
    return Row(text[:border], text[border:])


def rows_of(told, encoder: Encoder) -> list[list[Row]]:
    """The rows of each step, the longest first."""
    rows, _ = olora_rows(told.data, "train", BATCH * (told.steps + WARMUP))
    if told.answers == "half":
        rows = [half_answers(row) for row in rows]
    steps = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    return [sorted(step, key=lambda row: -len(encoder(row).ids)) for step in steps]


# --------------------------------------------------------------------------------------- the three


class Ours:
    """A step as `learning/step.py` has it."""

    def __init__(self, told):
        self.engine = Engine("cpu", "bf16")
        base = load_base(told.model, self.engine.dtype, self.engine.device)
        adapters = Adapters(base.model, LoraSettings(r=told.rank), told.model, 0)
        self.method = METHODS["sequential"]()
        self.method.start(adapters, Encoder(base.tokenizer, told.max_length), 0)
        self.method.begin_task(0)
        self.model, self.parameters = begin_alike(adapters.model), adapters.parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=told.learning_rate, weight_decay=0.0)
        self.size, self.steps = told.micro_batch_size, 0
        self.model.train()

    def __call__(self, rows: list[Example]) -> float:
        method, engine = self.method, self.engine
        batch = method.batch(rows, self.steps)
        total = torch.zeros((), device=engine.device)
        for chosen in split(batch, self.size):
            part = collate(chosen, method.encoder.tokenizer.pad_token_id, engine.device)
            with engine.autocast():
                loss = method.loss(part)
            engine.backward(loss)
            total += loss.detach()
        method.after_backward()
        norm = clip_grad_norm_(self.parameters, NORM)
        if not math.isfinite(float(total) + float(norm)):
            raise SystemExit(f"step {self.steps}: loss {float(total)}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        method.after_step(self.optimizer)
        self.steps += 1
        return float(total)


class Bare:
    """A loop that anyone would write: stock PEFT, transformers' loss of all logits."""

    def __init__(self, told):
        self.model = stock_peft(stock_model(told), told)
        self.pad = AutoTokenizer.from_pretrained(find_model(told.model)).pad_token_id
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=told.learning_rate, weight_decay=0.0)
        self.size = told.micro_batch_size
        self.model.train()

    def __call__(self, rows: list[Example]) -> float:
        count, total = sum(row.answers for row in rows), 0.0
        for start in range(0, len(rows), self.size):
            inputs = self.padded(rows[start : start + self.size])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = self.model(**inputs, num_items_in_batch=count, use_cache=False).loss
            loss.backward()
            total += float(loss.detach())
        clip_grad_norm_(self.parameters, NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def padded(self, rows: list[Example]) -> dict[str, torch.Tensor]:
        length = max(len(row.ids) for row in rows)
        ids, labels = torch.full((len(rows), length), self.pad), torch.full((len(rows), length), -100)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row.ids)
            ids[i, :n], mask[i, :n] = torch.tensor(row.ids), 1
            labels[i, :n] = torch.where(torch.tensor(row.answer), torch.tensor(row.ids), -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def stock_model(told, attention: str = "sdpa"):
    return AutoModelForCausalLM.from_pretrained(
        find_model(told.model), dtype=torch.bfloat16, attn_implementation=attention
    )


def stock_config(told) -> LoraConfig:
    ours = LoraSettings(r=told.rank)
    return LoraConfig(r=ours.r, lora_alpha=ours.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def stock_peft(base, told):
    return begin_alike(get_peft_model(base, stock_config(told)))


def begin_alike(model):
    """The same A in every copy of the model, uniform in ±1/sqrt(in); B is zero already."""
    pairs = [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    for name in pairs:
        weight = model.get_parameter(f"{name}.weight")
        fresh = torch.rand(weight.shape, generator=generator("init", name))
        with torch.no_grad():
            weight.copy_((2 * fresh - 1) / math.sqrt(weight.shape[1]))
    return model


def trl_trainer(told, steps: list[list[Row]], setting: str, callback):
    """TRL's trainer on these rows in this order; `callback.saw(inputs, loss)` is told each micro-batch."""
    require("trl", "trl")
    import datasets
    from transformers.loss.loss_utils import ForCausalLMLoss
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()

    class Watched(SFTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            kept = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
            loss = super().training_step(model, inputs, num_items_in_batch)
            callback.saw(kept, loss)
            return loss

    def own_loss(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits
        return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)

    asked = dict(TRL_SETTINGS[setting])
    base = stock_model(told, asked.pop("attention", "sdpa"))
    own = {"compute_loss_func": own_loss} if asked.pop("logits", False) else {}
    config = SFTConfig(
        **({"bf16": True} | asked),
        output_dir=tempfile.mkdtemp(prefix="step_against_trl-"),
        use_cpu=True,
        max_steps=len(steps),
        completion_only_loss=True,
        max_length=told.max_length,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        learning_rate=told.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=NORM,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"prompt": row.prompt, "completion": row.answer} for step in steps for row in step]
    trainer = Watched(
        base,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(find_model(told.model)),
        peft_config=stock_config(told),
        callbacks=[callback],
        **own,
    )
    begin_alike(trainer.model)
    return trainer


# ------------------------------------------------------------------------------------- the comparison


class Paired(TrainerCallback):
    """Times TRL's steps, and after each the others' steps on the same rows."""

    def __init__(self, steps: list[list[Example]], others: dict[str, Callable[[list[Example]], float]], profiled=()):
        self.steps, self.others, self.profiled = steps, others, set(profiled)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.losses: dict[str, list[float]] = defaultdict(list)
        self.profiles: dict[str, torch.profiler.profile] = {}
        self.done, self.parts, self.profile = 0, [], None
        self.resident = 0

    def on_train_begin(self, args, state, control, **more):
        self.resident = reset_peak()

    def on_step_begin(self, args, state, control, **more):
        self.parts = []
        if self.done in self.profiled:
            self.profile = profiler()
            self.profile.start()
        self.began = time.perf_counter()

    def saw(self, inputs: dict, loss) -> None:
        self.parts.append((inputs, loss))

    def on_step_end(self, args, state, control, **more):
        self.seconds["trl"].append(time.perf_counter() - self.began)
        if self.profile is not None:
            self.profile.stop()
            self.profiles["trl"], self.profile = self.profile, None
        rows = self.steps[self.done]
        same_tokens([inputs for inputs, _ in self.parts], rows)
        self.losses["trl"].append(float(sum(loss for _, loss in self.parts)))
        for name in list(self.others)[:: 1 if self.done % 2 else -1]:
            if self.done in self.profiled:
                with profiler() as self.profiles[name]:
                    self.step(name, rows)
            else:
                self.step(name, rows)
        self.done += 1
        if self.others:
            print(f"step {self.done}: " + ", ".join(f"{n} {found[-1]:.2f} s" for n, found in self.seconds.items()),
                  flush=True)  # fmt: skip

    def step(self, name: str, rows: list[Example]) -> None:
        began = time.perf_counter()
        loss = self.others[name](rows)
        self.seconds[name].append(time.perf_counter() - began)
        self.losses[name].append(loss)


def same_tokens(parts: list[dict], rows: list[Example]) -> None:
    """TRL trains on the tokens, and learns the tokens, that we do."""
    ids, learnt = [], []
    for part in parts:
        for one, mask, labels in zip(part["input_ids"], part["attention_mask"], part["labels"], strict=True):
            ids.append(tuple(one[mask.bool()].tolist()))
            learnt.append(tuple((labels[mask.bool()] != -100).tolist()))
    if ids != [row.ids for row in rows] or learnt != [row.answer for row in rows]:
        raise SystemExit("TRL's tokens differ from ours: nothing to compare")


def profiler() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)


def operations(rows: list[Example], size: dict[str, int]) -> float:
    """Of the products that a step cannot do without: forward, gradients of inputs and of LoRA pairs; answer rows only.

    Attention's own products (1 to 2 % at these lengths) and padding are not counted.
    """
    tokens, answers = sum(len(row.ids) for row in rows), sum(row.answers for row in rows)
    return 4 * size["frozen"] * tokens + 6 * size["lora"] * tokens + 4 * size["head"] * answers


def padded_tokens(rows: list[Example], size: int) -> int:
    return sum(len(part) * max(len(row.ids) for row in part) for part in split(rows, size))


def compare(told) -> dict:
    ours, bare = Ours(told), Bare(told)
    rows = rows_of(told, ours.method.encoder)
    steps = [[ours.method.encoder(row) for row in step] for step in rows]
    paired = Paired(steps, {"forgetless": ours, "bare": bare})
    trl_trainer(told, rows, told.trl, paired).train()
    counted = slice(WARMUP, None)
    median = {name: statistics.median(seconds[counted]) for name, seconds in paired.seconds.items()}
    losses = paired.losses
    apart = {
        name: max(abs(a - b) / max(1.0, b) for a, b in zip(losses[name], losses["bare"], strict=True))
        for name in ("forgetless", "trl")
    }
    rate, size = product_rate(torch.bfloat16), sizes(ours.model)
    needed = statistics.median(operations(step, size) for step in steps[counted])
    flat = [example for step in steps for example in step]
    result = {
        "trl_over_forgetless": round(median["trl"] / median["forgetless"], 2),
        "bare_over_forgetless": round(median["bare"] / median["forgetless"], 2),
        "trl_setting": told.trl,
        "steps_timed": len(steps) - WARMUP,
        "share_of_product_rate": {name: round(needed / median[name] / rate, 3) for name in median},
        "answer_share_of_tokens": round(sum(row.answers for row in flat) / sum(len(row.ids) for row in flat), 3),
        "tokens_a_step": sum(len(row.ids) for row in flat) // len(steps),
        "padded_tokens_a_step": {n: sum(padded_tokens(step, n) for step in steps) // len(steps) for n in (8, 4)},
        "loss_first_and_last": {name: [round(values[0], 4), round(values[-1], 4)] for name, values in losses.items()},
        "largest_loss_difference_to_bare": {name: round(value, 4) for name, value in apart.items()},
    }
    if max(apart.values()) > told.tolerance:
        raise SystemExit(json.dumps(result, indent=1) + f"\nlosses differ by more than {told.tolerance}")
    return result


def choose(told) -> dict:
    """Medians of TRL's settings, in turn."""
    encoder = Encoder(AutoTokenizer.from_pretrained(find_model(told.model)), told.max_length)
    rows = rows_of(told, encoder)
    steps = [[encoder(row) for row in step] for step in rows]
    Engine("cpu", "bf16")  # asks the C library to keep freed memory, as in the comparison
    seconds: dict[str, list[float]] = defaultdict(list)
    for round_ in range(told.rounds):
        for setting in list(told.settings)[:: -1 if round_ % 2 else 1]:
            paired = Paired(steps, {})
            trl_trainer(told, rows, setting, paired).train()
            seconds[setting] += paired.seconds["trl"][WARMUP:]
            print(setting, [round(second, 2) for second in paired.seconds["trl"]], flush=True)
    median = {setting: statistics.median(values) for setting, values in seconds.items()}
    return {"over_the_fastest": {name: round(value / min(median.values()), 2) for name, value in median.items()}}


def memory(told) -> dict:
    """Peak resident memory of whole processes after loading, and how far a step rises over what loading left."""
    peaks = {}
    for name in ("forgetless", "bare", "trl"):
        command = [sys.executable, *sys.argv, "--peak_of", name]
        peaks[name] = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[-2]
        )
    ours = peaks["forgetless"]
    return {
        "forgetless_over_trl": round(ours["peak_MiB"] / peaks["trl"]["peak_MiB"], 3),
        "forgetless_over_bare": round(ours["peak_MiB"] / peaks["bare"]["peak_MiB"], 3),
        "rise_forgetless_over_trl": round(ours["rise_MiB"] / peaks["trl"]["rise_MiB"], 3),
        "rise_forgetless_over_bare": round(ours["rise_MiB"] / peaks["bare"]["rise_MiB"], 3),
        "trl_setting": told.trl,
        "processes": peaks,
    }


def peak_of(told) -> dict:
    encoder = Encoder(AutoTokenizer.from_pretrained(find_model(told.model)), told.max_length)
    rows = rows_of(told, encoder)
    steps = [[encoder(row) for row in step] for step in rows]
    if told.peak_of == "trl":
        paired = Paired(steps, {})
        trl_trainer(told, rows, told.trl, paired).train()
        resident = paired.resident
    else:
        one = Ours(told) if told.peak_of == "forgetless" else Bare(told)
        resident = reset_peak()
        for step in steps:
            one(step)
    return {"peak_MiB": peak(), "rise_MiB": peak() - resident}


def profile(told) -> dict:
    """The operators that take most of one step, as shares of the step, for each of the three."""
    ours, bare = Ours(told), Bare(told)
    told.steps = 1
    rows = rows_of(told, ours.method.encoder)
    steps = [[ours.method.encoder(row) for row in step] for step in rows]
    paired = Paired(steps, {"forgetless": ours, "bare": bare}, profiled=[WARMUP])
    trl_trainer(told, rows, told.trl, paired).train()
    shares: dict[str, dict[str, float]] = {}
    whole = {}
    for name, found in paired.profiles.items():
        taken: dict[str, float] = defaultdict(float)
        for event in found.key_averages(group_by_input_shape=True):
            wide = any(isinstance(n, int) and n >= 2**14 for shape in event.input_shapes for n in shape or ())
            taken[event.key.removeprefix("aten::") + (" (vocabulary)" if wide else "")] += event.self_cpu_time_total
        whole[name] = sum(taken.values())
        shares[name] = {key: value / whole[name] for key, value in taken.items()}
    for name, found in shares.items():
        print(f"\n{name}: {whole[name] / whole['forgetless']:.2f} times the time of our step")
        for key, share in sorted(found.items(), key=lambda item: -item[1])[: told.top]:
            print(f"  {share:6.1%}  {share * whole[name] / whole['forgetless']:6.2f} of our step  {key}")
    return {name: {k: round(v, 3) for k, v in sorted(found.items(), key=lambda item: -item[1])[: told.top]}
            for name, found in shares.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of an O-LoRA data set, such as TC/agnews")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help=f"timed steps; {WARMUP} more before them warm up")
    parser.add_argument("--answers", choices=("labels", "half"), default="labels")
    parser.add_argument("--micro_batch_size", type=int, default=TrainSettings().micro_batch_size, help="ours and bare")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="of AdamW, constant")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of a step's loss, relative where above 1")
    parser.add_argument("--trl", choices=TRL_SETTINGS, default="4x2", help="TRL's setting; the fastest by --choose")
    parser.add_argument("--choose", action="store_true", help="time TRL's settings against each other instead")
    parser.add_argument("--settings", nargs="+", choices=TRL_SETTINGS, default=[*TRL_SETTINGS], help="for --choose")
    parser.add_argument("--rounds", type=int, default=2, help="for --choose")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time (Linux)")
    parser.add_argument("--profile", action="store_true", help="operators of one step instead of time")
    parser.add_argument("--top", type=int, default=12, help="operators to print")
    parser.add_argument("--peak_of", choices=("forgetless", "bare", "trl"), help=argparse.SUPPRESS)
    told = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*(compute_loss_func|gradient_checkpointing).*")
    if told.peak_of:
        print(json.dumps(peak_of(told)))
        return
    kind = choose if told.choose else memory if told.memory else profile if told.profile else compare
    print(json.dumps({"compared": kind.__name__, "answers": told.answers, "rows_a_step": BATCH,
                      "micro_batch_size": told.micro_batch_size, "model": told.model, "rank": told.rank,
                      "threads": torch.get_num_threads(), "versions": versions(), **kind(told)}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
