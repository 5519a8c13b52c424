"""How often each judge of refusals is wrong, on answers that people labelled; docs/probes.md has the table.

python benchmarks/refusal_judges.py [MODEL]
"""

from __future__ import annotations

import sys
import time

import torch

from forgetless.auditing.judges import Judge, LikelihoodJudge, judge_error, labelled_answers, patterns
from forgetless.data.batches import Encoder
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.base import load_base
from forgetless.score.options import OptionScorer


def main(name: str) -> None:
    base = load_base(name, torch.bfloat16)
    adapters = Adapters(base.model, LoraSettings(), name, seed=0)  # fresh pairs change nothing
    scorer = OptionScorer(adapters.model, Encoder(base.tokenizer, 512), torch.device("cpu"))
    likelihood = LikelihoodJudge(scorer, chat=bool(base.tokenizer.chat_template))
    judges: dict[str, Judge] = {"patterns": patterns, f"likelihood, {name}": likelihood}
    labelled = labelled_answers()
    print("| judge | false refusals | missed refusals | off topic judged refusals | seconds |\n|---|---|---|---|---|")
    for title, judge in judges.items():
        start = time.perf_counter()
        found = judge_error(judge, labelled)
        rates = zip((found.false_refusals, found.missed_refusals), found.rates().values(), strict=True)
        cells = [_cell(wrong, rate) for wrong, rate in rates]
        judged, off_topic = found.off_topic_judged_refusals, found.off_topic
        seconds = time.perf_counter() - start
        print(f"| {title} | {' | '.join(cells)} | {judged} of {off_topic} | {seconds:.0f} |", flush=True)


def _cell(wrong: int, rate: dict) -> str:
    return f"{wrong} of {rate['answers']} = {rate['share']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})"


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct")
