"""Last hidden states at the measured positions: a model's, batch by batch, and a reference's, kept on disk.

    states.json            whose states, of what, how they were computed, and which windows lie in which shard
    00000.safetensors ...  `states` (positions, width), as the head reads them; the windows of a shard in their order
    manifest.json          the sha256 of each file

States are exact and small where distributions are neither, so a second audit costs one forward pass of the model and
two heads. A folder is used where everything that decides its bits is the same: model, precision, device, versions,
windows and batches. A result then does not depend on whether the folder was there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from forgetless.errors import RunError, UsageError
from forgetless.forgetting.windows import Windows
from forgetless.model.head import Head, Using, hidden_at
from forgetless.model.identity import json_digest
from forgetless.progress import console, steps
from forgetless.runs.folder import RunFolder, complete, read_json, write_json
from forgetless.versions import versions

FORMAT = 1
INDEX = "states.json"
BATCH_TOKENS = 4096  # through a decoder at once
SHARD_BYTES = 2**26
ELSEWHERE = "give another folder for the reference's predictions"

Stream = Iterable[tuple[list[int], Tensor]]  # (numbers of windows, their states one behind the other)


def hidden_states(
    model, windows: Windows, batch_tokens: int = BATCH_TOKENS, using: Using = nullcontext, label: str | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """The model's last hidden states at the measured positions, batch by batch; shows progress under a `label`."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # some have no limit
    longest = max(len(window.ids) for window in windows.windows)
    if context and longest > context:
        raise UsageError(f"windows of {longest} tokens, and the model's context is {context}; give shorter windows")
    batches = windows.batches(batch_tokens)
    with steps(label or "", len(batches), show=label is not None) as progress:
        for numbers in batches:
            ids, mask, keep = windows.collate(numbers, model.device)
            with using():
                hidden = hidden_at(model, keep, input_ids=ids, attention_mask=mask)
            yield numbers, hidden
            progress.advance(tokens=int(mask.sum()))


@dataclass(frozen=True)
class Reference:
    """A model's states on disk, and its head. The model itself may be let go."""

    folder: Path
    windows: Windows
    head: Head

    @cached_property
    def _places(self) -> dict[int, tuple[Path, int, int]]:
        """Window -> its shard, and where its rows begin and end there."""
        places = {}
        for shard in read_json(self.folder / INDEX)["shards"]:
            end = 0
            for i in shard["windows"]:
                start, end = end, end + len(self.windows.windows[i].targets)
                places[i] = (self.folder / shard["file"], start, end)
        return places

    def states(self, numbers: Iterable[int]) -> Tensor:
        """(positions, width) of these windows, one behind the other."""
        parts = []
        for i in numbers:
            file, start, end = self._places[i]
            with safe_open(file, framework="pt") as shard:
                parts.append(shard.get_slice("states")[start:end])
        return torch.cat(parts)


def reference_of(
    model, windows: Windows, identity: Mapping[str, Any], root: Path,
    batch_tokens: int = BATCH_TOKENS, using: Using = nullcontext, label: str | None = None,
) -> Reference:  # fmt: skip
    """The model as a reference: its states from a folder below `root`, or computed and put there.

    `identity` is whatever tells this model, its adapter and its tokenizer from others, as JSON. A damaged folder is
    made again. Raises `RunError` where `root` cannot be written.
    """
    told = {
        "format": FORMAT,
        "identity": dict(identity),
        "computed": computed(model, batch_tokens, using),
        "windows": {
            **windows.settings,
            "documents": windows.documents,
            "positions": windows.positions,
            "tokens_sha256": windows.fingerprint,
            "content_sha256": windows.content,
        },
    }
    folder = root / json_digest(told)[:32]
    if not _usable(folder):  # before the lock, so that a read-only folder that has it serves
        with _locked(folder):
            if not _usable(folder):
                with RunFolder(root, ELSEWHERE).publish(folder) as new:
                    write_states(new, hidden_states(model, windows, batch_tokens, using, label), told)
    return Reference(folder, windows, Head(model, using))


def write_states(folder: Path, states: Stream, told: Mapping[str, Any], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes shards of `shard_bytes` or a batch more, and their index; no more than one is in memory."""
    shards: list[dict] = []
    numbers: list[int] = []
    held: list[Tensor] = []

    def flush() -> None:
        file = f"{len(shards):05d}.safetensors"
        save_file({"states": torch.cat(held)}, folder / file)
        shards.append({"file": file, "windows": list(numbers)})
        numbers.clear()
        held.clear()

    for batch, hidden in states:
        numbers += batch
        held.append(hidden.cpu())
        if sum(part.nbytes for part in held) >= shard_bytes:
            flush()
    if held:
        flush()
    write_json(folder / INDEX, {**told, "shards": shards})


def _usable(folder: Path) -> bool:
    try:
        return complete(folder)
    except RunError as error:
        console.print(f"{error} The reference's predictions are computed again.")
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Waits for another process that computes the same."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        lock.acquire()
    except OSError as error:
        raise RunError(f"{folder.parent}: cannot be written ({error.strerror}); {ELSEWHERE}") from error
    try:
        yield
    finally:
        lock.release()


def computed(model, batch_tokens: int, using: Using) -> dict[str, Any]:
    """What the last bits of a model's results depend on, besides weights and tokens."""
    kind = model.device.type
    with using():
        autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
    return {
        "device": torch.cuda.get_device_name(model.device) if kind == "cuda" else kind,
        "threads": torch.get_num_threads(),
        "precision": str(model.dtype),
        "autocast": autocast,
        "attention": model.config._attn_implementation,
        "batch_tokens": batch_tokens,
        "versions": versions(),
    }
