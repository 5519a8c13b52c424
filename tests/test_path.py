"""Points between two models: what is written is what the formula says, and what is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetless.errors import UsageError
from forgetless.geometry.path import straight_path
from forgetless.model.adapters import Pair
from forgetless.subjects.models import find_subjects
from forgetless.subjects.updates import write_update

IDS = torch.arange(3, 12).view(1, 9)
CPU = torch.device("cpu")


def adapter(base: str, folder: Path, rank: int, seed: int, layers: tuple[str, ...] = ("q_proj", "v_proj")) -> str:
    draw = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    shapes = {name: module.weight.shape for name, module in model.named_modules() if name.endswith(layers)}
    pairs = {
        name: Pair(torch.randn(rank, into, generator=draw) / 3, torch.randn(out, rank, generator=draw) / 3, 0.7)
        for name, (out, into) in shapes.items()
    }
    write_update(pairs, folder, base)
    return str(folder)


def whole(base: str, folder: Path, seed: int) -> str:
    draw = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) / 50)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def subject(spec: str):
    (found,) = find_subjects(spec)
    return found


def weights_of(model) -> dict[str, torch.Tensor]:
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return {name: tensor.clone() for name, tensor in merged.state_dict().items()}


def test_between_adapters_of_different_shapes(tiny, tmp_path):
    """ΔW(α) layer by layer, logits of both ends, and the same path from the base alone."""
    one = adapter(tiny, tmp_path / "one", 2, 0)
    two = adapter(tiny, tmp_path / "two", 5, 1, ("q_proj", "up_proj"))
    path = straight_path(subject(one), subject(two))
    ends = [weights_of(find_model) for find_model in map(loaded, (one, two))]
    for alpha, model in path.points([0.0, 0.3, 1.0], tmp_path / "points", torch.float32, CPU):
        found = weights_of(model)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, (1 - alpha) * ends[0][name] + alpha * ends[1][name])
    scaled = straight_path(subject(tiny), subject(two))
    plain = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    for alpha, model in scaled.points([0.5], tmp_path / "scaled", torch.float32, CPU):
        for name, tensor in weights_of(model).items():
            torch.testing.assert_close(tensor, (1 - alpha) * plain[name] + alpha * ends[1][name])


def loaded(spec: str):
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(spec)


def test_between_whole_weights(tiny, tmp_path):
    one, two = whole(tiny, tmp_path / "one", 0), whole(tiny, tmp_path / "two", 1)
    path = straight_path(subject(one), subject(two))
    ends = [load_file(Path(folder) / "model.safetensors") for folder in (one, two)]
    seen = []
    for alpha, model in path.points([0.0, 0.25, 1.0], tmp_path / "points", torch.float32, CPU):
        seen.append(alpha)
        told = dict(model.named_parameters())
        for name in ends[0].keys() & told.keys():
            torch.testing.assert_close(told[name].data, (1 - alpha) * ends[0][name] + alpha * ends[1][name])
        assert len(list(tmp_path.glob("points/*"))) == (alpha > 0), "one point on disk at a time; the first is there"
    assert seen == [0.0, 0.25, 1.0] and not list((tmp_path / "points").iterdir())
    path.write(1.0, tmp_path / "end")
    again = load_file(tmp_path / "end" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in ends[1].items())


def test_what_has_no_path_is_refused(tiny, tmp_path):
    one, other = adapter(tiny, tmp_path / "one", 2, 0), whole(tiny, tmp_path / "other", 1)
    with pytest.raises(UsageError, match="different bases"):
        straight_path(subject(one), subject(other))
