"""Soft prompts in the place of LoRA pairs: tables of virtual tokens' embeddings over an untouched base.

No layer of the base has a pair, so what an `Adapters` says of layers is empty here, and `pairs` names tables:
`{"prompt": Prompt(P)}`. A prompt that does not depend on the row is saved as PEFT's prompt tuning saves it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PromptTuningConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from forgetless.errors import RunError, UsageError
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.base import context_of
from forgetless.model.identity import read_tensors
from forgetless.model.prompted import Before, Prompted
from forgetless.runs.shapes import read
from forgetless.seeds import generator

PROMPT, STOCK_NAME = "prompt", "prompt_embeddings"  # what PEFT calls the table
SAVED = {"num_virtual_tokens": int, "token_dim": int}
"""What `Prompts.load` reads of its own adapter_config.json."""


class Prompt(NamedTuple):
    """Embeddings of virtual tokens, or another table of that width."""

    P: Tensor  # (tokens, width)


Tables = dict[str, Prompt]


class Prompts(Adapters):
    """A base model with trainable tables, out of which `before` makes each row's virtual tokens."""

    kind, tag = "Soft prompt", "prompt-tuning"
    moves = "norm of what the task changed of the prompt"

    def __init__(self, base: PreTrainedModel, settings: LoraSettings, base_name: str, seed: int):
        self.settings, self.base_name, self.seed = settings, base_name, seed
        base.requires_grad_(False)
        self.base: PreTrainedModel = base
        self.model: Prompted = Prompted(base).eval()  # type: ignore[assignment]
        self._layers = {}
        self._tables: dict[str, nn.Parameter] = {}
        self._frozen: Tables = {}
        self._began: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        return self._vocabulary().shape[1]

    def _vocabulary(self) -> Tensor:
        """The base's input embeddings, (words, width)."""
        return self.base.get_input_embeddings().get_parameter("weight").detach()

    # ------------------------------------------------------------------ the tables

    def put(self, tables: dict[str, Tensor], before: Before, kind: str = "PROMPT_TUNING") -> None:
        """Trains these tables (name -> (tokens, width)) from now on, out of which `before` makes the virtual tokens.

        `kind`: PEFT's name for what is saved; another name keeps PEFT from loading it as what it is not.
        """
        self._tables = {name: nn.Parameter(table.float().to(self.base.device)) for name, table in tables.items()}
        self._kind, self.model.before = kind, before
        self.mark()

    def mark(self) -> None:
        """A task begins here: `moved` counts from the tables as they are."""
        self._began = {name: table.detach().clone() for name, table in self._tables.items()}

    def freeze(self, tables: Tables) -> None:
        """Keeps tables of earlier tasks beside the trained ones, in the place of those kept before."""
        self._frozen = {name: Prompt(one.P.detach().to(self.base.device)) for name, one in tables.items()}

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

    def pairs(self) -> Tables:  # type: ignore[override]  # tables stand where pairs do: named tuples of tensors
        return {name: Prompt(table) for name, table in self._tables.items()}

    def past(self) -> Tables:  # type: ignore[override]
        return self._frozen

    def summed(self) -> Tables:  # type: ignore[override]
        return {name: Prompt(one.P.detach()) for name, one in self.pairs().items()}

    def parameters(self) -> list[Tensor]:
        return list(self._tables.values())

    def described(self) -> str:
        return ", ".join(f"{name} {tuple(table.shape)}" for name, table in self._tables.items())

    def base_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.base.parameters())

    def moved(self, *names: str) -> float:
        """The norm of what changed since `mark`, of all tables or of some."""
        parts = [(self._tables[name].detach() - self._began[name]).norm() for name in names or self._tables]
        return float(torch.stack(parts).norm())

    def set_current(self, pairs: Tables) -> None:  # type: ignore[override]
        """Overwrites the trained tables; names and shapes must be those of this method."""
        for name, table in self._tables.items():
            given = pairs[name].P.shape if name in pairs else "none"
            if given != table.shape or pairs.keys() != self._tables.keys():
                raise RunError(f"prompt {name!r}: {given} for a table of {tuple(table.shape)}; restore the folder")
        with torch.no_grad():
            for name, table in self._tables.items():
                table.copy_(pairs[name].P)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        before, self.model.before = self.model.before, None
        try:
            yield
        finally:
            self.model.before = before

    # ------------------------------------------------------------------ PEFT folders

    def save(self, folder: Path, pairs: Tables) -> None:  # type: ignore[override]
        """Writes a plain PEFT prompt adapter; of another kind a folder of the same form, which PEFT refuses."""
        folder.mkdir(parents=True, exist_ok=True)
        told: dict[str, Any] = PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=len(pairs[PROMPT].P), token_dim=self.width,
            num_transformer_submodules=1,
        ).to_dict()  # fmt: skip
        told |= {"peft_type": self._kind, "inference_mode": True, "base_model_name_or_path": self.base_name}
        (folder / CONFIG_NAME).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
        tensors = {_stock(name): one.P.detach().float().cpu().contiguous() for name, one in pairs.items()}
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    def load(self, folder: Path) -> Tables:  # type: ignore[override]
        """The tables of a folder that `save` wrote."""
        told, file = read(folder / CONFIG_NAME, SAVED), folder / SAFETENSORS_WEIGHTS_NAME
        tensors = read_tensors(file)
        prompt, shape = tensors.get(STOCK_NAME), (told["num_virtual_tokens"], self.width)
        if prompt is None or tuple(prompt.shape) != shape or any(_stock(name) not in tensors for name in self._tables):
            raise RunError(f"{file}: no prompt of the shape {shape} with {', '.join(self._tables)}; restore it")
        return {PROMPT if name == STOCK_NAME else name: Prompt(tensor) for name, tensor in tensors.items()}


def _stock(name: str) -> str:
    return STOCK_NAME if name == PROMPT else name
