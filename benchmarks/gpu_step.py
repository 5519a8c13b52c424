"""A training step at the shapes of models with 1 to 8 billion weights, which are made up: time, memory, share of peak.

    python benchmarks/gpu_step.py --shape 8b --load_in 4bit --gradient_checkpointing
    python benchmarks/gpu_step.py --shape 1b --shared 500 --length 560
    python benchmarks/gpu_step.py --shape 8b --uneven --liger --padding_free --trl_attention flash_attention_2
    python benchmarks/gpu_step.py --device cpu --tiny             (proves that it runs, without a GPU, in a minute)

Each contender has a process of its own: ours at the first task, ours at the fifteenth (the pairs of fourteen finished
tasks joined in every layer), the same with N-LoRA's penalty, a bare PyTorch loop with stock PEFT and full logits, and
TRL's SFTTrainer (with Liger kernels by `--liger`, without padding by `--padding_free`, which needs flash attention).
All see the same rows of `--length` tokens, or with `--uneven` of half to all of that, of which the last `--answers` are
learnt; with `--shared` they begin with so many common tokens. Printed: the median time of a step, tokens a second, the
peak of the device's memory (of the process's on CPU), the share of peak (the operations that a step cannot do without,
over its time, over the rate of a large bf16 product on this device), and the penalty's share of a step.

The weights are written once to `--folder` (a 16 GB file at 8b) and found there again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from flat_steps import prepare
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from shared import peak, product_rate, require, reset_peak, versions
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from forgetless.contract.tiny import make_tokenizer
from forgetless.data.batches import Encoder, Example, collate, split
from forgetless.learning.engine import Engine
from forgetless.methods import METHODS
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.base import load_base
from forgetless.model.loading import FOUR_BIT, LOADINGS, LoadSettings, four_bits, loading

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256},
}  # fmt: skip
"""Those of SmolLM2 and Llama 3."""
OURS = {"task_1": ("incremental", 1), "task_15": ("incremental", 15), "nlora": ("nlora", 15)}
CONTENDERS = (*OURS, "bare", "trl")
FOLDER = f"{tempfile.gettempdir()}/forgetless-made-up"
WARMUP = 2
NORM = 1.0  # of the gradient, above which it is clipped


def made_up(told) -> str:
    """The folder of a model of this shape."""
    folder = Path(told.folder).expanduser() / told.shape
    if (folder / "tokenizer_config.json").exists():
        return str(folder)
    tokenizer = make_tokenizer(["A tokenizer that only has to be there."])
    config = LlamaConfig(
        **SHAPES[told.shape], max_position_embeddings=8192, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if told.device == "cuda" else "cpu"):  # drawn where it is fast
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # last: what is cut off before it is made anew
    return str(folder)


def batches(told, vocabulary: int) -> list[list[Example]]:
    """The rows of each step, equal for all contenders."""
    draw = torch.Generator().manual_seed(0)
    least = max(told.length // 2, told.shared + told.answers + 1) if told.uneven else told.length
    found = []
    for _ in range(told.steps + WARMUP):
        common = torch.randint(5, vocabulary, (told.shared,), generator=draw).tolist()
        lengths = torch.randint(least, told.length + 1, (told.batch_size,), generator=draw).tolist()
        rows = [(*common, *torch.randint(5, vocabulary, (n - told.shared,), generator=draw).tolist()) for n in lengths]
        found.append([Example(row, (False,) * (len(row) - told.answers) + (True,) * told.answers) for row in rows])
    return found


# --------------------------------------------------------------------------------------- the contenders


def ours(told, folder: str, name: str, task: int) -> tuple[list[float], int]:
    """A step as `learning/step.py` has it, while task number `task` is learnt by the method of this name."""
    engine = Engine(told.device, "bf16")
    with loading(LoadSettings(load_in=told.load_in, attn_implementation=told.attention)):
        base = load_base(folder, engine.dtype, engine.device)
    if told.gradient_checkpointing:
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
        base.model.enable_input_require_grads()
    method = METHODS[name]()
    adapters = Adapters(base.model, LoraSettings(r=told.rank), folder, 0)
    method.start(adapters, Encoder(base.tokenizer, told.length), 0)
    method.begin_task(0)
    if task > 1:
        prepare(method, task, told.rank)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-5)
    adapters.model.train()

    def step(rows: list[Example], number: int) -> None:
        for chosen in split(method.batch(rows, number), told.micro_batch_size):
            part = collate(chosen, base.tokenizer.pad_token_id, engine.device)
            with engine.autocast():
                loss = method.loss(part)
            engine.backward(loss)
        if (penalty := method.penalty()) is not None:
            engine.add_gradient(penalty, adapters.parameters())
        clip_grad_norm_(adapters.parameters(), NORM)
        optimizer.step()
        optimizer.zero_grad()

    return timed(told, batches(told, base.model.config.vocab_size), step)


def stock(told, folder: str, attention: str):
    """The model as transformers and PEFT load it."""
    device = Engine(told.device, "bf16").device
    quantised = {"quantization_config": four_bits(torch.bfloat16)} if told.load_in == FOUR_BIT else {}
    attention = "sdpa" if attention == "auto" else attention
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": device}, attn_implementation=attention, **quantised
    )


def lora(told) -> LoraConfig:
    return LoraConfig(r=told.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def bare(told, folder: str) -> tuple[list[float], int]:
    """A loop that anyone would write: stock PEFT, transformers' loss of all logits."""
    base = stock(told, folder, told.attention)
    if told.load_in == FOUR_BIT or told.gradient_checkpointing:
        base = prepare_model_for_kbit_training(base, told.gradient_checkpointing, {"use_reentrant": False})
    model = get_peft_model(base, lora(told)).train()
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step(rows: list[Example], number: int) -> None:
        count = sum(sum(row.answer) for row in rows)
        for start in range(0, len(rows), told.micro_batch_size):
            chosen = rows[start : start + told.micro_batch_size]
            ids, mask, answer = (
                pad_sequence([torch.tensor(one) for one in column], batch_first=True).to(model.device)
                for column in zip(*((row.ids, (1,) * len(row.ids), row.answer) for row in chosen), strict=True)
            )
            inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(answer, -100)}
            with torch.autocast(model.device.type, dtype=torch.bfloat16):
                loss = model(**inputs, num_items_in_batch=count, use_cache=False).loss
            loss.backward()
        clip_grad_norm_(parameters, NORM)
        optimizer.step()
        optimizer.zero_grad()

    return timed(told, batches(told, model.config.vocab_size), step)


class Clock(TrainerCallback):
    """Times TRL's steps, without its collation."""

    def __init__(self, told):
        self.device, self.seconds, self.began = told.device, list[float](), 0.0

    def on_step_begin(self, args, state, control, **more):
        if len(self.seconds) == WARMUP:
            begin_peak(self.device)
        wait(self.device)
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **more):
        wait(self.device)
        self.seconds.append(time.perf_counter() - self.began)


def trl(told, folder: str) -> tuple[list[float], int]:
    require("trl", "trl")
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    base, clock = stock(told, folder, told.trl_attention or told.attention), Clock(told)
    rows = [row for step in batches(told, base.config.vocab_size) for row in step]
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="gpu_step-"), use_cpu=told.device == "cpu", bf16=True,
        max_steps=told.steps + WARMUP, per_device_train_batch_size=told.micro_batch_size,
        gradient_accumulation_steps=told.batch_size // told.micro_batch_size, completion_only_loss=True,
        max_length=told.length, gradient_checkpointing=told.gradient_checkpointing, use_liger_kernel=told.liger,
        padding_free=told.padding_free,
        train_sampling_strategy="sequential", learning_rate=1e-5, max_grad_norm=NORM, save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    columns = [{"input_ids": [*row.ids], "completion_mask": [int(one) for one in row.answer]} for row in rows]
    trainer = SFTTrainer(
        base, args=config, train_dataset=datasets.Dataset.from_list(columns), peft_config=lora(told),
        processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    return clock.seconds[WARMUP:], end_peak(told.device)


# ------------------------------------------------------------------------------------------- measuring


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def begin_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()


def end_peak(device: str) -> int:
    """In MiB."""
    return torch.cuda.max_memory_allocated() // 2**20 if device == "cuda" else peak()


def timed(told, rows: list[list[Example]], step) -> tuple[list[float], int]:
    """Seconds of each step after the first ones, and the peak of memory in them."""
    seconds = []
    for number, one in enumerate(rows):
        if number == WARMUP:
            begin_peak(told.device)
        wait(told.device)
        began = time.perf_counter()
        step(one, number)
        wait(told.device)
        seconds.append(time.perf_counter() - began)
    return seconds[WARMUP:], end_peak(told.device)


def tokens(told) -> float:
    """Of a timed step's rows, the mean."""
    counted = batches(told, SHAPES[told.shape]["vocab_size"])[WARMUP:]
    return sum(len(row.ids) for rows in counted for row in rows) / len(counted)


def needed(told) -> float:
    """Operations that a step cannot do without: the frozen layers forward and for the gradient of their inputs, the
    pairs forward and twice backward, the output embedding at answers. Common beginnings count once; attention's own
    products are left out, and so is what gradient checkpointing computes again.
    """
    shape = SHAPES[told.shape]
    width, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    narrow = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    linear = [(width, width)] * 2 + [(width, narrow)] * 2 + [(width, inner)] * 3
    frozen = layers * sum(a * b for a, b in linear)
    pairs = layers * told.rank * sum(a + b for a, b in linear)
    computed = tokens(told) - (told.batch_size - 1) * told.shared
    return (4 * frozen + 6 * pairs) * computed + 4 * width * shape["vocab_size"] * told.batch_size * told.answers


def one(told) -> dict:
    folder = made_up(told)
    if told.only in OURS:
        seconds, memory = ours(told, folder, *OURS[told.only])
    else:
        seconds, memory = {"bare": bare, "trl": trl}[told.only](told, folder)
    return {"seconds": statistics.median(seconds), "peak_MiB": memory}


def each(told) -> dict:
    """Every contender in its own process."""
    made_up(told)
    rate = product_rate(torch.bfloat16, told.products, device=told.device)
    found = {}
    for name in told.contenders:
        command = [sys.executable, *sys.argv, "--only", name]
        told_by = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[name] = json.loads(told_by.strip().splitlines()[-1])
        seconds = found[name]["seconds"]
        found[name] |= {
            "tokens_a_second": round(tokens(told) / seconds, 1),
            "share_of_peak": round(needed(told) / seconds / rate, 3),
        }
        print(name, json.dumps(found[name]), flush=True)
    return found


def ratios(found: dict) -> dict:
    pairs = (("trl", "task_1"), ("bare", "task_1"), ("task_15", "task_1"))
    found_ratios: dict = {
        f"{over}_over_{under}": {key: round(found[over][key] / found[under][key], 3) for key in ("seconds", "peak_MiB")}
        for over, under in pairs
        if over in found and under in found
    }
    if "nlora" in found and "task_15" in found:
        found_ratios["penalty_share_of_a_step"] = round(1 - found["task_15"]["seconds"] / found["nlora"]["seconds"], 3)
    return found_ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of nothing and few steps: does it run?")
    parser.add_argument("--folder", default=FOLDER, help="for the weights")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    parser.add_argument("--steps", type=int, default=10, help=f"timed steps; {WARMUP} more before them warm up")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--micro_batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--answers", type=int, default=256, help="tokens of a row that are learnt")
    parser.add_argument("--shared", type=int, default=0, help="tokens with which all rows of a step begin")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--load_in", choices=LOADINGS, default="as_stored")
    parser.add_argument("--attention", default="auto", help="auto, sdpa, flash_attention_2, ...")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--trl_attention", help="TRL's, where it is another than --attention")
    parser.add_argument("--padding_free", action="store_true", help="TRL without padding (needs flash attention)")
    parser.add_argument("--uneven", action="store_true", help="rows of --length / 2 to --length tokens")
    parser.add_argument("--liger", action="store_true", help="TRL with Liger kernels (pip install liger-kernel)")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    told = parser.parse_args()
    told.products = (4096, 8192)
    if told.tiny:
        told.shape, told.steps, told.batch_size, told.micro_batch_size = "tiny", 2, 4, 2
        told.length, told.answers, told.shared, told.products = 32, 8, min(told.shared, 16), (256,)
    if told.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --device cpu --tiny proves that the script runs")
    if told.only:
        print(json.dumps(one(told)))
        return
    found = each(told)
    place = torch.cuda.get_device_name() if told.device == "cuda" else "cpu"
    settings = {key: value for key, value in vars(told).items() if key not in ("only", "folder", "contenders")}
    print(json.dumps({"device": place, **settings, "versions": versions(), "results": found,
                      "ratios": ratios(found)}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
