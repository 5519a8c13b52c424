"""Is a model folder, an adapter or full weights, whole and of use? For `forgetless doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from forgetless.checkup.findings import Finding, checked, note, ok, problem
from forgetless.errors import ForgetlessError, RunError, UsageError
from forgetless.learning.engine import Engine
from forgetless.model.adapters import OWN_KINDS
from forgetless.model.base import load_config, load_tokenizer
from forgetless.model.identity import open_tensors, others, tensor_files, told_in, weight_files, weights_digest
from forgetless.runs.folder import check_published, read_json
from forgetless.runs.shapes import read
from forgetless.subjects.layouts import ADAPTER_CONFIG, Place, locate
from forgetless.subjects.models import ADAPTER, Subject, adapter_config, find_subjects, opened
from forgetless.subjects.updates import norm, read_update

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
PROMPT = "The three primary colours are"
INDEX = "model.safetensors.index.json"


def model_findings(folder: Path, base: str | None) -> Iterator[Finding]:
    """The lines about the model in a folder; with `base` also whether it fits and what it changes."""
    try:
        place = locate(folder)
    except UsageError as error:
        yield problem("complete", str(error))
        return
    for said in place.notes:
        yield note("place", said)
    yield checked("unchanged", lambda: _unchanged(place.folder))
    yield pickles(place.folder)
    yield own_code(place.folder)
    if place.kind == "adapter":
        yield from _adapter_findings(place.folder, base)
    else:
        yield from _full_findings(place, base)


def _unchanged(folder: Path) -> Finding:
    check_published(folder)
    listed = any((place / "manifest.json").is_file() for place in (folder, folder.parent))
    return ok("unchanged", "all hashes hold") if listed else note("unchanged", "nobody left hashes to compare with")


def pickles(folder: Path) -> Finding:
    """Files that could run code when they are read; a trainer's optimizer and arguments are of no use here."""
    found = sorted(path for path in folder.rglob("*") if path.suffix in PICKLES and path.is_file())
    weights = [path for path in found if path.name.startswith(("adapter_model", "pytorch_model"))]
    safe = any(path.suffix == ".safetensors" for path in folder.iterdir())
    if weights and not safe:
        remedy = "save the model as safetensors, or read it as tensors only with --allow-pickle"
        return problem(
            "pickles", f"{weights[0]}: the weights are a pickle, which can run code when it is read; {remedy}"
        )
    if found:
        return note("pickles", f"{found[0]}{_more(found)}: pickles, which forgetless does not read")
    return ok("pickles", "none")


def own_code(folder: Path) -> Finding:
    """Code that a model brings is never run."""
    config = folder / "config.json"
    try:
        told = read_json(config) if config.is_file() else {}
    except RunError as error:
        return problem("code", str(error))
    if isinstance(told, dict) and told.get("auto_map"):
        return note(
            "code", f"{config}: names code of its own (auto_map), which is not run unless --trust_remote_code names it"
        )
    return ok("code", "none of its own is asked for")


def finite(files: list[Path]) -> Finding:
    """NaN and infinities; every byte is read."""
    bad = [f"{file}: {name}" for file in files for name in _broken(file)]
    if bad:
        remedy = "its training broke down: take an earlier checkpoint"
        return problem("numbers", f"{bad[0]}{_more(bad)} holds NaN or infinity; {remedy}")
    return ok("numbers", "all finite")


def _broken(file: Path) -> Iterator[str]:
    with open_tensors(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118
            tensor = tensors.get_tensor(name)
            if tensor.is_floating_point() and not tensor.isfinite().all():
                yield name


def _more(found: list) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""


# ---------------------------------------------------------------------------------------- adapters


def _adapter_findings(folder: Path, base: str | None) -> Iterator[Finding]:
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    yield checked("adapter", lambda: _kind(folder))
    if weights.is_file():
        yield checked("numbers", lambda: finite([weights]))
        yield checked("effect", lambda: effect(folder))
    if _own_method(folder):
        yield note("base", "is not looked at: that method's own page says how it goes into a model")
    elif base is None:
        yield checked("base", lambda: _named_base(folder))
    else:
        yield from against_base(folder, base)


def _own_method(folder: Path) -> str:
    """The method of forgetless that alone puts the folder into a model; empty for a PEFT adapter."""
    return OWN_KINDS.get(read(folder / ADAPTER_CONFIG, ADAPTER).get("peft_type") or "", "")


def _kind(folder: Path) -> Finding:
    if own := _own_method(folder):
        return note("adapter", f"learnt by {own}, no PEFT adapter: only that method answers with it")
    told = adapter_config(folder)
    return ok("adapter", f"{told['peft_type']}" + (f" of rank {told['r']}" if "r" in told else ""))


def effect(folder: Path) -> Finding:
    """Whether the update of a LoRA adapter is anything but zero."""
    if _own_method(folder):
        return note("effect", "no LoRA pairs of PEFT's, so only the method's own checks show it")
    if adapter_config(folder).get("peft_type") != "LORA":
        return note("effect", "no LoRA pairs, so only the answers show it: give --base")
    try:
        layers = read_update(folder, remedy="only the answers show its effect: give --base").layers
    except ForgetlessError as error:
        if isinstance(error, RunError):
            raise
        return note("effect", str(error))
    idle = sorted(layer for layer, pair in layers.items() if not norm(pair) > 0)
    if len(idle) == len(layers):
        remedy = "it was never trained, or saved before training: save it again"
        return problem("effect", f"{folder}: changes nothing, B A is zero in every layer; {remedy}")
    if idle:
        return note("effect", f"changes nothing in {len(idle)} of {len(layers)} layers, {idle[0]} among them")
    return ok("effect", f"changes all of its {len(layers)} layers")


def _named_base(folder: Path) -> Finding:
    named = adapter_config(folder).get("base_model_name_or_path")
    if not named:
        return problem("base", f"{folder / ADAPTER_CONFIG}: names no base; say which it is where you load it")
    known = " and the hash of its weights" if _told(folder) else ""
    return note("base", f"was trained on {named!r}, by its configuration{known}; --base MODEL looks whether it fits")


def _told(folder: Path) -> dict[str, str]:
    """The hashes of the base that forgetless writes into an adapter's README.md."""
    card = folder / "README.md"
    return told_in(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else {}


def against_base(folder: Path, base: str) -> Iterator[Finding]:
    """Whether the adapter goes onto this base, is of it, and changes its answers."""
    try:
        plain = _one(base)
        stored = _told(folder)
        if differ := others(stored, plain.identity):
            yield problem("base", f"{folder}: was learnt on a base with another {' and another '.join(differ)} than "
                          f"{base}, by its model card; give the base that it was learnt on")  # fmt: skip
            return
        [subject] = find_subjects(f"{base}+{folder}", base_is=base if stored else None)
    except ForgetlessError as error:
        yield problem("base", str(error))
        return
    yield ok("base", f"goes onto {base}" + (", which is the one that it was learnt on" if stored else ""))
    for said in subject.notes:
        yield note("base", said)
    yield checked("answers", lambda: _answers(plain, subject))


def _one(name: str) -> Subject:
    found = find_subjects(name)
    if len(found) > 1:
        raise UsageError(f"model {name!r}: stands for {len(found)} models; give one")
    return found[0]


def _answers(plain: Subject, subject: Subject) -> Finding:
    """How far the logits move on one fixed prompt."""
    engine = Engine()
    inputs = {"input_ids": torch.tensor([plain.tokenizer(PROMPT)["input_ids"]], device=engine.device)}
    if plain.decoder_start is not None:
        inputs["decoder_input_ids"] = torch.tensor([[plain.decoder_start]], device=engine.device)
    logits = {}
    with closing(opened([plain, subject], engine.dtype, engine.device)) as models:
        for one, model in models:
            with torch.no_grad():
                logits[one.name] = model(**inputs).logits.float().cpu()
    before, after = logits[plain.name], logits[subject.name]
    if not after.isfinite().all():
        return problem("answers", f"{subject.name}: its logits are no numbers; take an earlier checkpoint")
    words = min(before.shape[-1], after.shape[-1])
    moved = float((before[..., :words] - after[..., :words]).abs().max())
    if moved == 0:
        return problem(
            "answers", f"{subject.name}: answers exactly as {plain.name}: it has no effect; train or save it again"
        )
    return ok("answers", f"logits move by up to {moved:.3g} on {PROMPT!r}")


# ---------------------------------------------------------------------------------------- full weights


def _full_findings(place: Place, base: str | None) -> Iterator[Finding]:
    folder = place.folder
    yield checked("configuration", lambda: ok("configuration", type(load_config(folder)).__name__))
    yield checked("tokenizer", lambda: ok("tokenizer", f"{len(load_tokenizer(folder)):,} tokens"))
    if any(folder.glob("*.safetensors")):
        yield checked("shards", lambda: _shards(folder))
        yield checked("numbers", lambda: finite(weight_files(folder)))
        yield checked("identity", lambda: ok("identity", f"weights have sha256 {weights_digest(weight_files(folder))}"))
    if base is not None:
        yield from _full_against(folder, base)


def _shards(folder: Path) -> Finding:
    """All files of the index are there and hold the tensors that it says."""
    places = tensor_files(weight_files(folder))
    if not (folder / INDEX).is_file():
        return ok("shards", f"{len(places)} tensors")
    told = read_json(folder / INDEX)
    wanted = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(wanted, dict):
        return problem("shards", f"{folder / INDEX}: no weight_map; copy it again")
    missing = [name for name, file in wanted.items() if name not in places or places[name].name != file]
    if missing:
        file = wanted[missing[0]]
        return problem(
            "shards", f"{folder / str(file)}: {missing[0]}{_more(missing)} of the index is not there; copy it again"
        )
    return ok("shards", f"{len(wanted)} tensors in {len(set(wanted.values()))} files, as the index says")


def _full_against(folder: Path, base: str) -> Iterator[Finding]:
    try:
        plain, subject = _one(base), _one(str(folder))
    except ForgetlessError as error:
        yield problem("base", str(error))
        return
    yield checked("answers", lambda: _answers(plain, subject))
