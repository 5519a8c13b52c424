"""`forgetless demo`: a small model learns three small tasks, forgets, and forgets less."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetless.config import LearnConfig
from forgetless.data.streams import demo as demo_stream
from forgetless.learning.stream import learn
from forgetless.progress import console, out
from forgetless.report.page import write_report
from forgetless.report.terminal import print_matrices

# Chosen on the validation rows of the demo stream: docs/log.md has the runs.
KEEPER = "replay"
KEEPER_OPTIONS = {"memory": "20%"}
LEARNING_RATE, EPOCHS, MAX_LENGTH = 2e-3, 1.0, 256


def demo(arguments: list[str]) -> int:
    """Learns the demo stream as a plain sequence and with the method that keeps most, and shows both."""
    parser = argparse.ArgumentParser(prog="forgetless demo", description=demo.__doc__)
    parser.add_argument("--output_dir", default="runs/demo", help="folder of both runs and the report (%(default)s)")
    parser.add_argument("--train_rows", type=int, default=150, help="training rows a task (%(default)s)")
    parser.add_argument("--test_rows", type=int, default=100, help="test rows a task (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args([word.replace("-dir", "_dir").replace("-rows", "_rows") for word in arguments])
    root = Path(told.output_dir)
    stream = demo_stream(train=told.train_rows, test=told.test_rows)
    summaries = []
    for method, options in (("sequential", {}), (KEEPER, KEEPER_OPTIONS)):
        folder = root / method
        config = LearnConfig(
            stream=stream,
            method=method,
            method_options=options,
            seed=told.seed,
            output_dir=str(folder),
            learning_rate=LEARNING_RATE,
            num_train_epochs=EPOCHS,
            max_length=MAX_LENGTH,
        )
        # the untouched base is the same for both: scored once
        summaries.append(learn(config, base_scores=root / "sequential"))
        console.print()
    print_matrices(summaries, out)
    files = write_report(summaries, root)
    out.print(f"\nreport: {files['html']}", soft_wrap=True)
    out.print(f"adapters: {root}/*/tasks/*/adapter (plain PEFT folders)", soft_wrap=True)
    return 0
