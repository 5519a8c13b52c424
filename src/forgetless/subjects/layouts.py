"""Where in a trainer's output folder the model is.

transformers, TRL   what the script's own save_model wrote at the top or in one subfolder, beside checkpoint-N/;
                    checkpoints alone where training was cut short
Unsloth             save_pretrained: an adapter at the top, its base often named `unsloth/...-bnb-4bit`;
                    save_pretrained_merged: full weights
Axolotl             an adapter at the top beside the base's config.json; checkpoint-N/; merged/ by merge-lora
LLaMA-Factory       an adapter at the top beside checkpoint-N/; with PiSSA also pissa_init/ and pissa_converted/
ms-swift            v0-20250131-120000/checkpoint-N/ with args.json; nothing above; checkpoint-N-merged/ by export
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from forgetless.errors import UsageError

ADAPTER_CONFIG = "adapter_config.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_SWIFT_VERSION = re.compile(r"v(\d+)-\d{8}-\d{6}")
_BY_PRODUCTS = ("pissa_init", "pissa_backup", "pissa_converted")  # other forms of LLaMA-Factory's adapter


ADAPTER = "adapter"  # a folder that is called so is named after the one that it lies in


def short_names(names: Collection[str]) -> dict[str, str]:
    """The shortest end of each name that tells it from the others.

    >>> list(short_names(["base", "runs/may/tasks/02-amazon/adapter", "a/june", "b/june"]).values())
    ['base', '02-amazon', 'a/june', 'b/june']
    """
    ends = {name: _ends(name) for name in names}
    while True:
        shown = {name: own[0] for name, own in ends.items()}
        found = list(shown.values())
        doubled = [name for name, own in ends.items() if found.count(shown[name]) > 1 and len(own) > 1]
        if not doubled:
            return shown
        for name in doubled:
            ends[name] = ends[name][1:]


def _ends(name: str) -> list[str]:
    """The last folder, the last two, ..., and the whole name."""
    parts = [part for part in name.split("/") if part]
    if len(parts) > 1 and parts[-1] == ADAPTER:
        parts.pop()
    return [*("/".join(parts[-count:]) for count in range(1, len(parts) + 1)), name]


@dataclass(frozen=True)
class Place:
    """A folder that holds one model."""

    folder: Path
    kind: Literal["adapter", "full"]
    notes: tuple[str, ...] = ()  # what had to be chosen on the way here


def locate(folder: Path) -> Place:
    """The model in a trainer's output folder: at the top, in one subfolder, or the newest checkpoint."""
    place = _at_top(folder) or _in_one(folder, holds_adapter) or _in_newest(folder) or _in_one(folder, holds_full)
    if place is None:
        held = sorted(path.name for path in folder.iterdir())
        raise UsageError(
            f"{folder}: no adapter ({ADAPTER_CONFIG} with adapter_model.safetensors), no full weights (config.json "
            f"with *.safetensors), no checkpoint-N with either. It holds: {', '.join(held[:8]) or 'nothing'}. "
            "Give the folder that save_pretrained wrote."
        )
    return place


def holds_adapter(folder: Path) -> bool:
    """Whether there is a PEFT adapter with its weights."""
    weights = ("adapter_model.safetensors", "adapter_model.bin")
    return (folder / ADAPTER_CONFIG).is_file() and any((folder / name).is_file() for name in weights)


def holds_full(folder: Path) -> bool:
    """Whether there are full weights; a config.json alone is what Axolotl puts beside an adapter."""
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return (folder / "config.json").is_file() and any(not file.name.startswith("adapter_") for file in weights)


def _at_top(folder: Path) -> Place | None:
    if holds_adapter(folder):
        note = f"{folder} holds an adapter and full weights; the adapter was taken"
        return Place(folder, "adapter", (note,) if holds_full(folder) else ())
    return Place(folder, "full") if holds_full(folder) else None


def _in_one(folder: Path, holds: Callable[[Path], bool]) -> Place | None:
    """The one subfolder, checkpoints aside, that holds a model of this kind."""
    children = [child for child in sorted(folder.iterdir()) if child.is_dir()]
    found = [
        child
        for child in children
        if holds(child) and child.name not in _BY_PRODUCTS and not _CHECKPOINT.fullmatch(child.name)
    ]
    if len(found) > 1:
        names = ", ".join(child.name for child in found)
        raise UsageError(f"{folder}: holds several models ({names}); give one of these folders")
    return _through(folder, found[0], "the only model in a subfolder") if found else None


def _in_newest(folder: Path) -> Place | None:
    """The newest checkpoint that is whole, or that of the newest version folder."""
    for pattern, what in ((_CHECKPOINT, "checkpoint"), (_SWIFT_VERSION, "version")):
        children = [child for child in folder.iterdir() if child.is_dir()]
        numbered = {int(match[1]): child for child in children if (match := pattern.fullmatch(child.name))}
        passed: list[str] = []
        for _, child in sorted(numbered.items(), reverse=True):
            if place := _at_top(child) or _in_newest(child):
                skipped = f"; {', '.join(passed)} without a whole model passed over" if passed else ""
                return _through(folder, place, f"the newest {what} of {len(numbered)}{skipped}")
            passed.append(child.name)
    return None


def _through(folder: Path, inner: Path | Place, why: str) -> Place:
    place = inner if isinstance(inner, Place) else locate(inner)
    step = place.folder.relative_to(folder).parts[0]
    return replace(place, notes=(f"{folder}: took {step}, {why}", *place.notes))
