"""Killed at any moment: `forgetless learn` is killed again and again, and must end with the bytes of a run that was
not.

    python benchmarks/kill.py [--kills 100] [--seconds 600] [--methods ilora replay+olora ...] [--seed 0]

The command learns two small tasks with a tiny random model and saves a checkpoint every second step. A parent that has
imported everything forks a child for each attempt; the child runs the command's own entry point and gets SIGKILL: half
of the kills at a random moment, half a few milliseconds after something began to be written. The same command is given
again until the run is finished. Then every file is compared with those of an uninterrupted run, all but `times*` and
the lock. The methods take turns: all that are built in and one of two parts, with options that suit the tiny model.
`--seconds` bounds the time: no run is begun after it, and the last one is still finished and compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from forgetless.cli import main as command
from forgetless.methods import METHODS
from forgetless.methods.finding import find_method

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from conftest import COLOURS, SIZES, make_tokenizer

EVERY = [*METHODS, "replay+olora"]
POLL = 0.002  # seconds
FLAGS = "--r 4 --batch_size 4 --micro_batch_size 3 --num_train_epochs 10 --learning_rate 0.02 --max_length 64"
FLAGS += " --device cpu --precision fp32 --forgetting_prompts 2 --lora_dropout 0.1 --save_steps 2"


def make_model(folder: Path) -> None:
    """A random Llama of two layers."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True, initializer_range=0.1,
    )).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)


def make_stream(folder: Path) -> Path:
    """Two tasks of 12 training and 6 test rows."""
    tasks = []
    for name, table in (("colours", COLOURS), ("sizes", SIZES)):
        rows = [{"prompt": f"What has the {'very ' * i}{key}? Answer:", "completion": f" {value}"}
                for i in range(3) for key, value in table.items()]  # fmt: skip
        for split, part in (("train", rows[6:]), ("test", rows[:6])):
            (folder / f"{name}-{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
        tasks.append({"name": name, "train": f"{name}-train.jsonl", "test": f"{name}-test.jsonl", "validation": 0,
                      "options": sorted(set(table.values()))})  # fmt: skip
    (folder / "stream.yaml").write_text(json.dumps({"tasks": tasks}))
    return folder / "stream.yaml"


def options(method: str) -> list[str]:
    """The method as flags, with the options that the contract gives it."""
    given = find_method(method).example.items()
    return ["--method", method, *(text for name, value in given for text in (f"--method.{name}", str(value)))]


def start(arguments: list[str], log: Path) -> int:
    """Runs the command in a fork of this process; its process id."""
    if pid := os.fork():
        return pid
    try:
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(written, 1)
        os.dup2(written, 2)
        os._exit(command(arguments))
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)


def being_written(run: Path) -> set[str]:
    """What has a temporary name now; a folder may go while it is looked at."""
    found = set()
    for folder in (run, run / "tasks", *run.glob("tasks/[0-9]*"), *run.glob("checkpoints/*")):
        try:
            found |= {entry.path for entry in os.scandir(folder) if entry.name.endswith(".writing")}
        except FileNotFoundError:
            continue
    return found


def kill_once(pid: int, run: Path, draw: random.Random, longest: float) -> int | None:
    """Kills the process at a moment drawn; its exit status where it ended before that, else None."""
    writes = draw.choice([0, draw.randint(1, 15)])  # how many beginnings of a write are waited for; 0: go by the clock
    moment, seen, began = draw.uniform(0, longest), set[str](), time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        now = being_written(run) if writes else set()
        writes, left = writes - len(now - seen), writes
        seen = now
        if (left > 0 >= writes) or (left == 0 and time.monotonic() - began > moment):
            time.sleep(draw.uniform(0, 0.005) if left else 0)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(POLL)


def contents(run: Path) -> dict[str, bytes]:
    """Every file that equal runs have alike."""
    files = (path for path in sorted(run.rglob("*")) if path.is_file() and not path.name.startswith(("times", ".lock")))
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def finish(pid: int, log: Path) -> None:
    if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit(f"exit code {code}:\n{log.read_text()[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no run is begun after so many")
    parser.add_argument("--methods", nargs="+", default=EVERY)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    torch.set_num_threads(1)
    draw, began = random.Random(told.seed), time.monotonic()
    kills, saving, inside, runs, differing = 0, 0, 0, 0, []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["FORGETLESS_CACHE"] = str(root / "cache")
        make_model(root / "model")
        shared = ["learn", "--model", str(root / "model"), "--stream", str(make_stream(root)), *FLAGS.split()]
        whole: dict[str, dict[str, bytes]] = {}
        longest = {}
        while kills < told.kills and time.monotonic() - began < told.seconds:
            method = told.methods[runs % len(told.methods)]
            log = root / f"{runs}.log"
            if method not in whole:
                run, at = root / "whole" / method, time.monotonic()
                finish(start([*shared, *options(method), "--output_dir", str(run)], log), log)
                whole[method], longest[method] = contents(run), time.monotonic() - at
            run = root / str(runs) / method
            arguments = [*shared, *options(method), "--output_dir", str(run)]
            code: int | None = None
            while code is None and kills < told.kills:
                code = kill_once(start(arguments, log), run, draw, longest[method])
                kills += code is None
                saving += code is None and bool(being_written(run))
                inside += code is None and any(run.glob("checkpoints/*/step-*"))
            if code is None:
                finish(start(arguments, log), log)
            elif code:
                raise SystemExit(f"exit code {code}:\n{log.read_text()[-3000:]}")
            found, expected = contents(run), whole[method]
            names = sorted(file for file in found.keys() | expected.keys() if found.get(file) != expected.get(file))
            differing += [f"{method}, run {runs}: {file}" for file in names]
            runs += 1
            print(f"{method}: finished after {kills} kills in all, {'not ' if names else ''}equal", file=sys.stderr)
    result = "all files equal" if not differing else f"{len(differing)} files differ from"
    print(
        f"{kills} kills, {saving} of them while something was being written, {inside} with a checkpoint inside a task "
        f"to go on from; {runs} runs of {min(runs, len(told.methods))} methods finished, {result} those of "
        f"uninterrupted runs; {time.monotonic() - began:.0f} s"
    )
    print("\n".join(differing))
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
