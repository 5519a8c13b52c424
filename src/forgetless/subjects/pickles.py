"""Pickled weights, read as tensors only and kept as safetensors.

A pickle can run code when it is read, so it is refused unless asked for; then torch's restricted reader takes tensors
and nothing else, and what is read from then on is the safetensors copy in the cache.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from forgetless.data.packages import cache_dir
from forgetless.errors import RunError
from forgetless.model.identity import file_stats, json_digest


def as_safetensors(folder: Path, allow_pickle: bool) -> Path:
    """The folder itself where its weights are safetensors; else a copy of it in the cache whose weights are."""
    adapter = (folder / "adapter_config.json").exists()
    pickles = sorted(folder.glob("adapter_model.bin" if adapter else "pytorch_model*.bin"))
    if not pickles or any(folder.glob("adapter_model.safetensors" if adapter else "*.safetensors")):
        return folder
    if not allow_pickle:
        raise RunError(
            f"{pickles[0]}: is a pickle, which can run code when it is read. Save the model as safetensors "
            "(save_pretrained does), or allow it to be read as tensors only: allow_pickle=True (--allow-pickle)."
        )
    copy = cache_dir() / "unpickled" / json_digest(file_stats(pickles))
    if not copy.exists():
        _copy(folder, pickles, copy)
    return copy


def _copy(folder: Path, pickles: list[Path], copy: Path) -> None:
    unfinished = copy.with_name(f".{copy.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format)  # safetensors keeps no shared memory
        for file in pickles
        for name, tensor in _read(file).items()
    }
    stem = "adapter_model" if pickles[0].stem == "adapter_model" else "model"
    save_file(tensors, unfinished / f"{stem}.safetensors", metadata={"format": "pt"})
    for file in folder.iterdir():
        if file.suffix in (".json", ".txt", ".model", ".jinja") and not file.name.endswith(".bin.index.json"):
            shutil.copy(file, unfinished)
    unfinished.rename(copy)


def _read(file: Path) -> dict[str, torch.Tensor]:
    wrong = f"{file}: holds more than tensors, or is damaged; save the model as safetensors"
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch's reader raises for a damaged file has no common class
        raise RunError(wrong) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    ):
        raise RunError(wrong)
    return found
