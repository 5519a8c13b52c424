# pip install -e ".[bench]" -c constraints.txt && python examples/trl/five_tasks.py runs/five
"""Five small real tasks learnt one after another with TRL's SFTTrainer: nothing here trains with forgetless.

Writes an adapter after each task (OUT/1-sst2 ... OUT/5-boolq), the rows, and OUT/tasks.yaml. Then

    forgetless audit smollm2-135m-instruct OUT/1-sst2 OUT/2-bbc OUT/3-mmlu OUT/4-mrpc OUT/5-boolq --tasks OUT/tasks.yaml

says what each fine-tune made the model forget. `--tasks bbc --save_steps 5` keeps checkpoints of one task instead.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import datasets
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from forgetless.data import packages
from forgetless.data.tasks import Row
from forgetless.model.base import find_model

TASKS = {"sst2": packages.sst2, "bbc": packages.bbc, "mmlu": packages.mmlu_subject, "mrpc": packages.mrpc,
         "boolq": packages.boolq}  # fmt: skip


def write_rows(file: Path, rows: tuple[Row, ...]) -> str:
    file.write_text("".join(json.dumps({"prompt": row.prompt, "completion": row.answer}) + "\n" for row in rows))
    return file.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--rows", type=int, default=150, help="that each task learns from, and 100 to be judged by")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--save_steps", type=int, default=0, help="keep OUT/N-task/checkpoint-* every so many steps")
    told = parser.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)

    base = find_model("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16"), config)
    stream = []
    for number, name in enumerate(told.tasks, start=1):
        task = TASKS[name](train=told.rows)
        files = {split: write_rows(told.out / f"{name}-{split}.jsonl", getattr(task, split))
                 for split in ("train", "test")}  # fmt: skip
        stream.append({"name": name, **files, "options": list(task.options), "validation": 0})
        folder = told.out / f"{number}-{name}"
        arguments = SFTConfig(
            output_dir=str(folder), num_train_epochs=told.epochs, learning_rate=told.learning_rate,
            lr_scheduler_type="constant", per_device_train_batch_size=4, gradient_accumulation_steps=2,
            completion_only_loss=True, max_length=256, gradient_checkpointing=False,
            bf16=True, use_cpu=not torch.cuda.is_available(), seed=0, report_to="none", logging_steps=5,
            save_strategy="steps" if told.save_steps else "no", save_steps=told.save_steps or 500,
        )  # fmt: skip
        rows = datasets.load_dataset("json", data_files=str(told.out / files["train"]), split="train")
        trainer = SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        trainer.save_model(str(folder))
        model = trainer.model
    (told.out / "tasks.yaml").write_text(yaml.safe_dump({"name": "five tasks", "tasks": stream}, sort_keys=False))


if __name__ == "__main__":
    main()
