"""The straight path between two models; a point on it is a folder that anybody can load.

    W(α) = (1 - α) W_before + α W_after,   0 <= α <= 1

It is the path of the products. For two LoRA adapters on one base, W(α) = W + (1 - α) ΔW_before + α ΔW_after is an
adapter of both ranks together; the base stands for ΔW = 0. Otherwise whole weights are mixed in fp32, tensor by
tensor, and rounded to the precision in which the later model has them. What is measured is what is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from forgetless.errors import UsageError
from forgetless.geometry.whole import INDEX, copy_others
from forgetless.model.adapters import Pair
from forgetless.model.base import load_config
from forgetless.model.identity import open_tensors, tensor_files, weight_files
from forgetless.model.loading import FOUR_BIT
from forgetless.subjects.models import Opened, Subject, base_name, find_subjects, opened, other_shape
from forgetless.subjects.updates import read_update, weighted, write_update


@dataclass(frozen=True)
class AdapterPath:
    """Between two LoRA adapters on one base, or between the base and an adapter."""

    before: Subject
    after: Subject
    start: Mapping[str, Pair]
    end: Mapping[str, Pair]

    def update(self, alpha: float) -> dict[str, Pair]:
        """ΔW(α) of each layer."""
        return weighted([self.start, self.end], [1 - alpha, alpha])

    def write(self, alpha: float, folder: Path) -> None:
        """A plain PEFT adapter folder."""
        write_update(self.update(alpha), folder, base_name([self.before, self.after]), self.before.task_type)

    def points(
        self, alphas: Sequence[float], folder: Path, dtype: torch.dtype, device: torch.device
    ) -> Generator[tuple[float, Opened], None, None]:
        """The model at each α in turn, ready for inference, good until the next; the base is loaded once.

        The beginning is the model before itself; each other point lies on disk until the next is asked for.
        """
        places = [folder / f"{alpha:.6f}" for alpha in alphas]
        there = [replace(self.after, name=place.name, adapter=place) for place in places]
        subjects = [one if alpha else self.before for alpha, one in zip(alphas, there, strict=True)]
        with closing(opened(subjects, dtype, device)) as models:
            for alpha, place in zip(alphas, places, strict=True):
                if alpha:
                    self.write(alpha, place)
                yield alpha, next(models)[1]
                shutil.rmtree(place, ignore_errors=True)


@dataclass(frozen=True)
class WeightPath:
    """Between the whole weights of two models."""

    before: Subject
    after: Subject

    def write(self, alpha: float, folder: Path) -> None:
        """Whole weights beside the later model's configuration and tokenizer; one file is in memory at a time."""
        folder.mkdir(parents=True, exist_ok=True)
        others = tensor_files(weight_files(self.before.base))
        copy_others(self.after, folder)
        for index in self.after.base.glob(INDEX):
            shutil.copyfile(index, folder / index.name)
        for file in weight_files(self.after.base):
            mixed = {}
            with open_tensors(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    mixed[name] = _mixed(self._before(name, others), tensors.get_tensor(name), alpha)
            save_file(mixed, folder / file.name, metadata={"format": "pt"})

    def _before(self, name: str, others: Mapping[str, Path]) -> Tensor:
        if name not in others:
            raise UsageError(f"{self.before.name}: has no tensor {name}, which {self.after.name} has; no path")
        with open_tensors(others[name]) as tensors:
            return tensors.get_tensor(name)

    def points(
        self, alphas: Sequence[float], folder: Path, dtype: torch.dtype, device: torch.device
    ) -> Generator[tuple[float, Opened], None, None]:
        """The model at each α in turn, ready for inference, good until the next; one lies on disk at a time."""
        for alpha in alphas:
            place = folder / f"{alpha:.6f}"
            if alpha:
                self.write(alpha, place)
            for _, model in opened(find_subjects(str(place)) if alpha else [self.before], dtype, device):
                yield alpha, model
            shutil.rmtree(place, ignore_errors=True)


def straight_path(before: Subject, after: Subject) -> AdapterPath | WeightPath:
    """The path between two models. Raises UsageError where there is none."""
    if before.adapter is None and after.adapter is None:
        for one in (before, after):
            if one.load_in == FOUR_BIT:
                raise UsageError(
                    f"{one.name}: is computed from 4-bit weights, between which there is no path; give weights in full "
                    "without --load_in 4bit, or adapters on one base"
                )
        tied = [load_config(one.base).get_text_config().tie_word_embeddings for one in (before, after)]
        if tied[0] != tied[1]:
            one, other = (before, after) if tied[0] else (after, before)
            raise UsageError(
                f"{one.name} reads and predicts with one embedding (tie_word_embeddings), {other.name} with two, so "
                f"there is no path in weights; save {one.name} with its embeddings untied, then give this"
            )
        if differing := other_shape(before.base, after.base):
            raise UsageError(
                f"{before.name} and {after.name}: {differing}; there is no path between models of different "
                "architectures or vocabularies"
            )
        return WeightPath(before, after)
    if before.runs_as != after.runs_as:
        raise UsageError(
            f"{before.name} and {after.name} have different bases; a path needs one base or whole weights of both: "
            "`forgetless merge` writes an adapter into its base"
        )
    start, end = (read_update(one.adapter, one.name).layers if one.adapter else {} for one in (before, after))
    for layer in start.keys() & end.keys():
        shapes = [(pair.B.shape[0], pair.A.shape[1]) for pair in (start[layer], end[layer])]
        if shapes[0] != shapes[1]:
            raise UsageError(f"{layer}: {before.name} changes {shapes[0]}, {after.name} {shapes[1]} entries; no path")
    return AdapterPath(before, after, start, end)


def _mixed(before: Tensor, after: Tensor, alpha: float) -> Tensor:
    """(1 - α) before + α after, the ends exactly as they are."""
    if alpha in (0.0, 1.0) or not after.is_floating_point():
        return (after if alpha else before).to(after.dtype)
    return torch.lerp(before.float(), after.float(), alpha).to(after.dtype)
