"""Who a base model is: hashes of its weights, its tokenizer and its chat template.

An adapter on another base with equal shapes loads without a word and answers nonsense; so every run
stores its base's identity and checks it before it goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from forgetless.data.packages import cache_dir
from forgetless.errors import RunError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
_NOT_THE_FUNCTION = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
_TOLD = re.compile(r"sha256 of the base's ([a-z ]+): ([0-9a-f]{64})")
REMEDY = "Give the model the run began with, or another output_dir."
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # they decide where answers end, not their probabilities
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Identity:
    """Three sha256 digests; `chat_template` is that of the empty text where there is none."""

    weights: str
    tokenizer: str
    chat_template: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)

    def told(self) -> str:
        """The line of a model card; `told_in` reads it."""
        return ", ".join(
            f"sha256 of the base's {part.replace('_', ' ')}: {one}" for part, one in self.as_json().items()
        )


def told_in(card: str) -> dict[str, str]:
    """The digests by part that a model card tells of its base; empty where it tells none."""
    return {part.replace(" ", "_"): digest for part, digest in _TOLD.findall(card)}


def others(stored: dict[str, str], found: Identity) -> list[str]:
    """The parts, in words, whose digests are known and differ."""
    return [
        part.replace("_", " ") for part, digest in found.as_json().items() if stored.get(part) not in (None, digest)
    ]


def identify(folder: Path, chat_template: str | dict[str, str] | None) -> Identity:
    """The identity of the model in a local folder (weights in safetensors)."""
    return Identity(
        weights=weights_digest(weight_files(folder)),
        tokenizer=tokenizer_digest(folder),
        chat_template=template_digest(chat_template),
    )


def weights_digest(files: list[Path]) -> str:
    """sha256 of all weights in safetensors files.

    Hashing reads every byte of the weights, so the result is cached by path, size and time of each file.
    The weights are hashed tensor by tensor in the order of their names: sharding does not matter.
    """
    return _cached(files, _hash_tensors)


def tokenizer_digest(folder: Path) -> str:
    """sha256 of the tokenizer's files, cached as the weights' is."""
    names = (*_TOKENIZER_FILES, *_TOKENIZER_SETTINGS)
    return _cached([folder / name for name in names if (folder / name).exists()], _hash_files)


def text_digest(text: str) -> str:
    """sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def json_digest(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return text_digest(json.dumps(value, sort_keys=True))


def config_digest(folder: Path) -> str:
    """sha256 of what the configuration says about the function and about where answers end: equal weights may be run
    with another context or scale.
    """
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    generation = folder / "generation_config.json"
    ends = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") if generation.is_file() else None
    return json_digest([{key: value for key, value in told.items() if key not in _NOT_THE_FUNCTION}, ends])


def settings_of(folder: Path) -> dict[str, Any]:
    """What the configuration says that makes another function of equal weights."""
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in told.items() if key not in (*_NOT_THE_FUNCTION, *_TOKEN_IDS)}


def other_settings(one: Path, other: Path) -> str:
    """'rms_norm_eps (1e-06, not 1e-05)' of all settings that differ."""
    mine, theirs = settings_of(one), settings_of(other)
    return _told_apart(mine, theirs, mine.keys() | theirs.keys())


def changed_settings(stored: dict[str, Any], folder: Path) -> str:
    """The same against what a run has stored; a setting that only one of them knows is another version's."""
    now = settings_of(folder)
    return _told_apart(stored, now, stored.keys() & now.keys())


def _told_apart(mine: dict, theirs: dict, keys: Iterable[str]) -> str:
    return ", ".join(
        f"{key} ({mine.get(key)}, not {theirs.get(key)})" for key in sorted(keys) if mine.get(key) != theirs.get(key)
    )


def template_digest(template: str | dict[str, str] | None) -> str:
    """sha256 of a chat template, of all where a tokenizer has several by name."""
    return json_digest(template) if isinstance(template, dict) else text_digest(template or "")


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files; at least one."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RunError(
            f"{folder}: no *.safetensors file; forgetless reads no pickled weights. "
            "Convert the model with save_pretrained (transformers writes safetensors)."
        )
    return files


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """A safetensors file, to read tensors from; a damaged one is a named error."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise RunError(f"{file}: damaged or cut short ({error}); copy or save it again") from error


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, by name."""
    with open_tensors(file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def tensor_files(files: list[Path]) -> dict[str, Path]:
    """Which file holds which tensor."""
    places = {}
    for file in files:
        with open_tensors(file) as tensors:
            places.update(dict.fromkeys(tensors.keys(), file))
    return places


def stored_base(found: Identity, folder: Path) -> dict[str, Any]:
    """What a run keeps of its base, for `check_same`."""
    return found.as_json() | {"settings": settings_of(folder)}


def check_same(stored: dict[str, Any], found: Identity, folder: Path, where: Path) -> None:
    """Refuses to go on with another base than the one in `folder`; a changed template or tokenizer changes what the
    rows mean, and a changed configuration what the weights compute.
    """
    for part, digest in found.as_json().items():
        if stored.get(part) != digest:
            raise RunError(
                f"{where}: was learnt on another base: its {part.replace('_', ' ')} had sha256 "
                f"{str(stored.get(part))[:12]}..., this model's is {digest[:12]}.... "
                f"{REMEDY}"
            )
    if changed := changed_settings(stored.get("settings") or {}, folder):
        raise RunError(f"{where}: was learnt on another base: equal weights, but config.json has {changed}. {REMEDY}")


def _hash_tensors(files: list[Path]) -> str:
    places = tensor_files(files)
    digest = hashlib.sha256()
    for name in sorted(places):
        with open_tensors(places[name]) as tensors:
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


def file_stats(files: list[Path]) -> list[tuple]:
    """Path, place on disk, size and times: a file that was written again differs, whatever its date was set to."""
    stats = [(file.resolve(), file.stat()) for file in files]
    return [(str(path), one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for path, one in stats]


def _cached(files: list[Path], compute) -> str:
    """`compute(files)`, kept in the cache folder under what the file system says of the files."""
    key = json_digest([compute.__name__, file_stats(files)])
    kept = cache_dir() / "identity" / key
    if value := _kept(kept):
        return value
    value = compute(files)
    with suppress(OSError):  # a cache that cannot be written costs time only
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}")
        temporary.write_text(f"{value} {text_digest(key + value)}")
        temporary.replace(kept)
    return value


def _kept(file: Path) -> str:
    """The value of a cached file; empty where there is none, or it is damaged and made again."""
    with suppress(OSError, ValueError):
        value, check = file.read_text().split(" ")
        if check == text_digest(file.name + value):
            return value
    return ""
