"""LFPT5: one soft prompt that solves the task and writes rows of it, on which later prompts are held.

    L = CE + λ_lm CE_lm + λ_kl KL( p_old || p_new )                              Qin and Joty 2022, arXiv 2110.07298

CE_lm: of the step's own questions x, as texts [G; x] behind a word G that asks for one. After a task its prompt writes
questions from G and answers them: pseudo rows, which are kept. p_old, p_new: what the prompt of the last border and
the one in training say of the answers to pseudo rows. No row of an earlier task is kept, of training or of test.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig

from forgetless.data.batches import Example, Part, weigh
from forgetless.data.tasks import Row
from forgetless.errors import UsageError
from forgetless.learning.gradients import evaluating
from forgetless.learning.memory import Memory
from forgetless.learning.processes import agreed
from forgetless.methods.base import Check, State
from forgetless.methods.lwf import distilled
from forgetless.methods.prompt_tuning import PromptTuning
from forgetless.model.answers import token_losses
from forgetless.score.generation import generate
from forgetless.seeds import seed_for

G = "Question:"  # asks for a question


class LFPT5(PromptTuning):
    """Lifelong few-shot prompt tuning, on a decoder.

    Args:
        tokens: virtual tokens before each row
        lam_lm: λ_lm, weight of learning to write the task's questions
        lam_kl: λ_kl, weight of answering pseudo rows as before
        pseudo: pseudo rows that are written after each task
        question_tokens: tokens of a written question, at most
        answer_tokens: tokens of its answer, at most
    """

    paper = "2110.07298"
    summary = "one soft prompt that also writes questions of its tasks, on whose answers later training is held"
    extra_memory = "pseudo rows, written by the model"
    extra_compute = "3x: the questions as texts, pseudo rows, and their answers by the last border's prompt"
    growth = "by the length of pseudo rows alone: a step has as many as it has current rows"
    off: ClassVar[dict] = {"lam_lm": 0.0, "lam_kl": 0.0}
    plain = PromptTuning
    within_task: ClassVar[tuple[str, ...]] = ("held", "step_held")
    example: ClassVar[dict] = {"tokens": 4, "pseudo": 3, "question_tokens": 12, "answer_tokens": 3}

    def __init__(
        self, tokens: int = 20, lam_lm: float = 0.25, lam_kl: float = 1.0, pseudo: int = 20, question_tokens: int = 128,
        answer_tokens: int = 16,
    ):  # fmt: skip
        super().__init__(tokens)
        if lam_lm < 0 or lam_kl < 0:
            raise UsageError(f"lam_lm {lam_lm}, lam_kl {lam_kl}: 0 or more")
        if min(pseudo, question_tokens, answer_tokens) < 1:
            raise UsageError("pseudo, question_tokens, answer_tokens: all 1 or more; lam_kl 0 writes no pseudo rows")
        self.lam_lm, self.lam_kl, self.pseudo = lam_lm, lam_kl, pseudo
        self.question_tokens, self.answer_tokens = question_tokens, answer_tokens
        self.written = Memory(0)

    def start(self, adapters, encoder, seed) -> None:
        super().start(adapters, encoder, seed)
        self.written = Memory(0, seed=seed)

    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.old = self.adapters.snapshot() if self.written.rows else {}
        self.held, self.step_held = 0.0, 0.0  # the third term, summed over steps; of the step

    def prepare(self, examples: list[Example]) -> None:
        """[G; x] of each of the task's rows, by the row's tokens."""
        self.question = {one.ids: self._question(one) for one in examples}

    def _question(self, example: Example) -> Example:
        begin, tokenizer = self._begin(), self.encoder.tokenizer
        x = example.ids[: example.answer.index(True)]
        x = x[1:] if x[0] == tokenizer.bos_token_id else x
        ids = (*begin, *x, tokenizer.eos_token_id)[: self.encoder.max_length]
        return Example(ids, (*[False] * len(begin), *[True] * (len(ids) - len(begin))))

    def _begin(self) -> list[int]:
        """G as tokens."""
        return self.encoder.generation_context(Row(G, ""), 1)

    def batch(self, examples: list[Example], step: int) -> list[Example]:
        whole = weigh(examples, 1.0)
        if self.lam_lm:
            questions = [self.question[one.ids] for one in examples if one.ids in self.question]
            whole += weigh(questions, self.lam_lm) if questions else []
        if self.lam_kl and self.old:
            drawn = self.written.draw(len(examples), self.task, step)
            whole += weigh([self.encoder(row) for row in drawn], self.lam_kl, memory=True)
        return whole

    def loss(self, part: Part) -> Tensor:
        """Rows of the step by CE, pseudo rows by KL."""
        now = self.logits(part)
        pseudo = part.memory.unsqueeze(1).expand_as(part.keep)[part.keep]
        loss = (part.weights * token_losses(now, part.targets))[~pseudo].sum()
        if not pseudo.any():
            return loss
        with torch.no_grad(), self.adapters.using(self.old):
            before = self.logits(part.only(part.memory))
        held = (part.weights[pseudo] * distilled(before, now[pseudo], 1.0)).sum()
        self.step_held += float(held.detach())
        return loss + held

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.held, self.step_held = self.held + self.step_held, 0.0

    def end_task(self, task: int, rows: tuple[Row, ...]) -> None:
        if self.lam_kl:
            self.written.rows += (made := agreed(self.write(task)))
            self.written.tasks += [task] * len(made)

    def write(self, task: int) -> list[Row]:
        """Questions drawn from the prompt behind G, each with the prompt's greedy answer."""
        model, tokenizer = self.adapters.model, self.encoder.tokenizer
        begin = torch.tensor([self._begin()] * self.pseudo, device=model.device)
        drawing = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=self.question_tokens,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        with torch.no_grad(), evaluating(model), torch.random.fork_rng():
            torch.manual_seed(seed_for("pseudo", self.seed, task))
            made = model.generate(input_ids=begin, attention_mask=torch.ones_like(begin), generation_config=drawing)
        questions = tokenizer.batch_decode(made[:, begin.shape[1] :], skip_special_tokens=True)
        asked = [Row(text, "", source=f"written after task {task + 1}") for text in questions if text.strip()]
        contexts = [self.encoder.generation_context(row, self.answer_tokens) for row in asked]
        with evaluating(model):
            answers = generate(model, tokenizer, contexts, self.answer_tokens, model.device)
        return [Row(row.prompt, text, source=row.source) for row, text in zip(asked, answers, strict=True)]

    def state(self) -> State:
        return State({}, {}, self.written)

    def restore(self, state: State) -> None:
        assert state.memory is not None  # `state` gives one
        self.written.rows, self.written.tasks = state.memory.rows, state.memory.tasks

    def told(self) -> dict[str, float]:
        return {"held": self.held} if self.old else {}

    def checks(self) -> list[Check]:
        count, needed = len(self.written.rows), self.lam_kl > 0
        meaning = "Σ over steps of the divergence on pseudo rows; 0 means that nothing was held"
        return [
            *super().checks(),
            Check("pseudo rows", count, count > 0 or not needed, "rows that the prompts have written, of all tasks"),
            Check("held", self.held, self.held > 0 or not needed or self.task == 0, meaning),
        ]
