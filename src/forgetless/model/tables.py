"""Trained tables beside an untouched base, in the place of LoRA pairs.

No layer of the base has a pair, so what an `Adapters` says of layers is empty here, and `pairs` names tables:
`{"prompt": Table(P)}`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from forgetless.errors import RunError
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.identity import read_tensors
from forgetless.runs.shapes import read


class Table(NamedTuple):
    """One trained tensor, of any shape."""

    P: Tensor


Tables = dict[str, Table]


class TrainedTables(Adapters):
    """A base model with trainable tables, of which a method makes something."""

    moves = "norm of what the task changed of the tables"

    def __init__(self, base: PreTrainedModel, settings: LoraSettings, base_name: str, seed: int):
        self.settings, self.base_name, self.seed = settings, base_name, seed
        base.requires_grad_(False)
        self.base: PreTrainedModel = base
        self.model = base.eval()  # type: ignore[assignment]  # no PEFT model
        self._layers = {}
        self._tables: dict[str, nn.Parameter] = {}
        self._frozen: Tables = {}
        self._told: dict[str, Any] = {}
        self._began: dict[str, Tensor] = {}

    def train_tables(self, tables: dict[str, Tensor], kind: str, **told: Any) -> None:
        """Trains these tables from now on. `kind`: PEFT's name for what is saved; one that it does not know keeps it
        from loading the folder as what it is not. `told`: what else decides what is computed, saved with the tables.
        """
        self._told = told
        self._tables = {name: nn.Parameter(table.float().to(self.base.device)) for name, table in tables.items()}
        self._kind = kind
        self.mark()

    def mark(self) -> None:
        """A task begins here: `moved` counts from the tables as they are."""
        self._began = {name: table.detach().clone() for name, table in self._tables.items()}

    def freeze(self, tables: Tables) -> None:
        """Keeps tables of earlier tasks beside the trained ones, in the place of those kept before."""
        self._frozen = {name: Table(one.P.detach().to(self.base.device)) for name, one in tables.items()}

    def pairs(self) -> Tables:  # type: ignore[override]  # tables stand where pairs do: named tuples of tensors
        return {name: Table(table) for name, table in self._tables.items()}

    def past(self) -> Tables:  # type: ignore[override]
        return self._frozen

    def summed(self) -> Tables:  # type: ignore[override]
        return {name: Table(one.P.detach()) for name, one in self.pairs().items()}

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
            given = tuple(pairs[name].P.shape) if name in pairs else "none"
            if given != tuple(table.shape) or pairs.keys() != self._tables.keys():
                raise RunError(f"{self.kind} {name!r}: {given} for {tuple(table.shape)}; restore the folder")
        with torch.no_grad():
            for name, table in self._tables.items():
                table.copy_(pairs[name].P)

    # ------------------------------------------------------------------ folders in PEFT's form

    def save(self, folder: Path, pairs: Tables) -> None:  # type: ignore[override]
        """Writes a folder with PEFT's two files; equal tensors give equal bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        told = self._described_to_peft(pairs)
        told |= {"peft_type": self._kind, "inference_mode": True, "base_model_name_or_path": self.base_name}
        (folder / CONFIG_NAME).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
        tensors = {self._file_name(name): one.P.detach().float().cpu().contiguous() for name, one in pairs.items()}
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    def load(self, folder: Path) -> Tables:  # type: ignore[override]
        """The tables of a folder that `save` wrote."""
        file, config = folder / SAFETENSORS_WEIGHTS_NAME, folder / CONFIG_NAME
        stored = read(config, {name: type(value) for name, value in self._told.items()})
        for name, mine in self._told.items():
            if stored[name] != mine:
                raise RunError(f"{config}: was learnt with {name} {stored[name]!r}, not {mine!r}; give that one")
        tensors = read_tensors(file)
        if missing := [name for name in self._tables if self._file_name(name) not in tensors]:
            raise RunError(f"{file}: holds no {self._file_name(missing[0])!r}; restore it")
        own = {self._file_name(name): name for name in self._tables}
        return {own.get(name, name): Table(tensor) for name, tensor in tensors.items()}

    def _described_to_peft(self, pairs: Tables) -> dict[str, Any]:
        return {"task_type": "CAUSAL_LM"} | self._told

    def _file_name(self, table: str) -> str:
        return table
