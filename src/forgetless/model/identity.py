"""Who a base model is: hashes of its weights, its tokenizer and its chat template.

An adapter on another base with equal shapes loads without a word and answers nonsense; so every run
stores its base's identity and checks it before it goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from forgetless.data.packages import cache_dir
from forgetless.errors import RunError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Identity:
    """Three sha256 digests; `chat_template` is that of the empty text where there is none."""

    weights: str
    tokenizer: str
    chat_template: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def identify(folder: Path, chat_template: str | None) -> Identity:
    """The identity of the model in a local folder (weights in safetensors).

    Hashing reads every byte of the weights, so the result is cached by path, size and time of each file.
    The weights are hashed tensor by tensor in the order of their names: sharding does not matter.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise RunError(
            f"{folder}: no *.safetensors file; forgetless reads no pickled weights. "
            "Convert the model with save_pretrained (transformers writes safetensors)."
        )
    tokenizer = [folder / name for name in (*_TOKENIZER_FILES, *_TOKENIZER_SETTINGS) if (folder / name).exists()]
    return Identity(
        weights=_cached(weights, _hash_tensors),
        tokenizer=_cached(tokenizer, _hash_files),
        chat_template=hashlib.sha256((chat_template or "").encode()).hexdigest(),
    )


def check_same(stored: dict[str, str], found: Identity, where: Path) -> None:
    """Refuses to go on with another base; a changed template or tokenizer changes what the rows mean."""
    for part, digest in found.as_json().items():
        if stored.get(part) != digest:
            raise RunError(
                f"{where}: was learnt on another base: its {part.replace('_', ' ')} had sha256 "
                f"{str(stored.get(part))[:12]}..., this model's is {digest[:12]}.... "
                "Give the model the run began with, or another output_dir."
            )


def _hash_tensors(files: list[Path]) -> str:
    places = {}
    for file in files:
        with safe_open(file, framework="np") as tensors:
            places.update(dict.fromkeys(tensors.keys(), file))
    digest = hashlib.sha256()
    for name in sorted(places):
        with safe_open(places[name], framework="pt") as tensors:
            tensor = tensors.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        content = _settings(file) if file.name in _TOKENIZER_SETTINGS else file.read_bytes()
        digest.update(file.name.encode() + b"\n")
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _settings(file: Path) -> bytes:
    """What changes the tokens: special tokens and where they are added. The rest names versions and paths."""
    told = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in told.items() if key.endswith("_token") or key.startswith("add_")}
    return json.dumps(kept, sort_keys=True).encode()


def _cached(files: list[Path], compute) -> str:
    """`compute(files)`, kept in the cache folder under the files' paths, sizes and times."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([compute.__name__, stats]).encode()).hexdigest()
    kept = cache_dir() / "identity" / key
    if kept.exists():
        return kept.read_text()
    value = compute(files)
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_suffix(f".{os.getpid()}")
    temporary.write_text(value)
    temporary.replace(kept)
    return value
