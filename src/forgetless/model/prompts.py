"""Soft prompts: tables of virtual tokens' embeddings over an untouched base.

A prompt that does not depend on the row is saved as PEFT's prompt tuning saves it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from transformers import PreTrainedModel

from forgetless.errors import RunError, UsageError
from forgetless.model.adapters import LoraSettings
from forgetless.model.base import context_of
from forgetless.model.prompted import Before, Prompted
from forgetless.model.tables import Tables, TrainedTables
from forgetless.runs.shapes import read
from forgetless.seeds import generator

PROMPT, STOCK_NAME = "prompt", "prompt_embeddings"  # what PEFT calls the table
SAVED = {"num_virtual_tokens": int, "token_dim": int}
"""What `Prompts.load` reads of its own adapter_config.json."""


class Prompts(TrainedTables):
    """A base model with trainable tables of its embeddings' width, out of which `before` makes each row's virtual
    tokens.
    """

    kind, tag = "Soft prompt", "prompt-tuning"
    moves = "norm of what the task changed of the prompt"

    def __init__(self, base: PreTrainedModel, settings: LoraSettings, base_name: str, seed: int):
        super().__init__(base, settings, base_name, seed)
        self.model: Prompted = Prompted(base).eval()  # type: ignore[assignment]

    @property
    def width(self) -> int:
        return self._vocabulary().shape[1]

    def _vocabulary(self) -> Tensor:
        """The base's input embeddings, (words, width)."""
        return self.base.get_input_embeddings().get_parameter("weight").detach()

    def put(self, tables: dict[str, Tensor], before: Before, kind: str = "PROMPT_TUNING") -> None:
        """Trains these tables (name -> (tokens, width)) from now on, out of which `before` makes the virtual tokens."""
        self.train_tables(tables, kind)
        self.model.before = before

    def drawn(self, tokens: int, *seed: int | str) -> Tensor:
        """Embeddings of `tokens` words of the vocabulary, drawn by seed: (tokens, width)."""
        embeddings = self._vocabulary()
        chosen = torch.randint(len(embeddings), (tokens,), generator=generator("prompt", self.seed, *seed))
        return embeddings[chosen.to(embeddings.device)].float()

    def check_room(self, tokens: int, max_length: int) -> None:
        """UsageError where rows of `max_length` tokens with so many virtual ones before them are too long."""
        context = context_of(self.base)
        if context and tokens + max_length > context:
            raise UsageError(
                f"{tokens} virtual tokens before rows of up to max_length {max_length} are more than the {context} "
                f"tokens that {self.base_name} was made for; lower max_length or `tokens`"
            )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        before, self.model.before = self.model.before, None
        try:
            yield
        finally:
            self.model.before = before

    # ------------------------------------------------------------------ PEFT folders

    def load(self, folder: Path) -> Tables:  # type: ignore[override]
        told, file = read(folder / CONFIG_NAME, SAVED), folder / SAFETENSORS_WEIGHTS_NAME
        tables, shape = super().load(folder), (told["num_virtual_tokens"], self.width)
        if tuple(tables[PROMPT].P.shape) != shape:
            raise RunError(f"{file}: no prompt of the shape {shape}; restore it")
        return tables

    def _described_to_peft(self, pairs: Tables) -> dict[str, Any]:
        """A plain PEFT prompt adapter; of another kind a folder of the same form, which PEFT refuses."""
        return PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=len(pairs[PROMPT].P), token_dim=self.width,
            num_transformer_submodules=1,
        ).to_dict()  # fmt: skip

    def _file_name(self, table: str) -> str:
        return STOCK_NAME if table == PROMPT else table
