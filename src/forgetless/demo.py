"""`forgetless demo`: a small model learns three small tasks, forgets, and forgets less."""

from __future__ import annotations

from pathlib import Path

from forgetless.config import LearnConfig
from forgetless.data.streams import demo as demo_stream
from forgetless.learning.stream import learn
from forgetless.progress import console, out
from forgetless.report.files import write_report
from forgetless.report.terminal import print_matrices

# Chosen on the validation rows of the demo stream: docs/log.md has the runs.
KEEPER = "replay"
KEEPER_OPTIONS = {"memory": "20%"}
LEARNING_RATE, EPOCHS, MAX_LENGTH = 2e-3, 1.0, 256


def demo(root: Path, train_rows: int = 150, test_rows: int = 100, seed: int = 0) -> None:
    """Learns the demo stream as a plain sequence and with the method that keeps most, and shows both."""
    stream = demo_stream(train=train_rows, test=test_rows)
    summaries = []
    for method, options in (("sequential", {}), (KEEPER, KEEPER_OPTIONS)):
        folder = root / method
        config = LearnConfig(
            stream=stream,
            method=method,
            method_options=options,
            seed=seed,
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
