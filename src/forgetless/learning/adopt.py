"""Adapters that other trainers made, taken over as the first tasks of a run (`--from`).

    continued    deployed after task k:  ΔW_k              each was trained on from the one before it
    summed       deployed after task k:  Σ_{j<=k} ΔW_j     each was trained by itself on the base

An update s B A is kept exactly: ranks are joined or filled up with zeros, and each scale goes into B.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from forgetless.config import LearnConfig
from forgetless.data.streams import TASK_NAME
from forgetless.errors import RunError, UsageError
from forgetless.learning.checkpoint import refuse_nan
from forgetless.learning.session import Adopted, Session
from forgetless.learning.state import save_state
from forgetless.methods import METHODS
from forgetless.model.adapters import Pair, named
from forgetless.runs.folder import TIMES, RunFolder, complete, write_json, write_lines
from forgetless.subjects.models import find_adapters, find_subjects
from forgetless.subjects.updates import difference, inner, norm, read_update, weighted

MERGED_FIRST = "merge it into full weights, and learn on these"
UNRELATED, RELATED = 0.1, 0.5  # cosines of two updates below and above which the kind looks wrong


def read_adopted(config: LearnConfig, stored: dict | None, run: RunFolder) -> list[Adopted]:
    """The adapters of `--from`, read and on this base; in a run that has some already, those it has.

    Raises UsageError or RunError, with the adapter's place and a remedy.
    """
    given, known = _given(config.from_adapters), stored.get("adopted", []) if stored else []
    if stored and given and [*given] != [one["name"] for one in known]:
        has = ", ".join(one["name"] for one in known) or "none"
        raise RunError(
            f"{run.config}: this run adopted {has} when it was begun, now --from names {', '.join(given)}. Adapters "
            "are adopted before anything is learnt: give another output_dir."
        )
    if stored and known and config.from_kind != known[0]["kind"] and given:
        raise RunError(
            f"{run.config}: the adapters were adopted as {known[0]['kind']}, now from_kind={config.from_kind}; "
            "give the old value, or another output_dir"
        )
    if not known:
        return [_read(config, name, place) for name, place in given.items()]
    return [_again(config, one, given.get(one["name"], ""), run.task(n, one["name"])) for n, one in enumerate(known, 1)]


def _again(config: LearnConfig, known: dict, place: str, folder: Path) -> Adopted:
    """An adapter that the run has adopted; it is read again where it is named and there, or still needed."""
    if complete(folder) and not (place and Path(place).exists()):
        return Adopted(known["name"], known)
    found = _read(config, known["name"], place or known["source"])
    then, now = known["sha256"], found.record["sha256"]
    if then != now:
        raise RunError(
            f"{place or known['source']}: is not the adapter that this run adopted as {known['name']!r} (sha256 then "
            f"{then[:12]}..., now {now[:12]}...); bring the old one back, leave --from out, or give another output_dir"
        )
    return replace(found, record=known)


def _given(told: list[str]) -> dict[str, str]:
    """{name: place} of `april=./trl-april` and `./trl-april`, which is called after its folder."""
    found: dict[str, str] = {}
    for one in told:
        name, equals, place = one.partition("=")
        if not equals or not re.fullmatch(TASK_NAME, name):
            name, place = Path(one.rstrip("/")).name, one
        if not re.fullmatch(TASK_NAME, name) or not place:
            raise UsageError(f"--from {one!r}: {name!r} cannot name a task; give it a name, such as april={one}")
        if name in found:
            raise UsageError(f"--from: two adapters are called {name!r}; give each its own name: NAME={place}")
        found[name] = place
    return found


def _read(config: LearnConfig, name: str, place: str) -> Adopted:
    """One adapter of `--from`: a product of two factors in each layer, made on the base of this run."""
    folders = find_adapters(place, allow_pickle=config.allow_pickle)
    if len(folders) > 1:
        raise UsageError(
            f"--from {name}={place}: a run folder with {len(folders)} tasks; give the adapter of one, such as "
            f"{folders[-1].folder}"
        )
    update = read_update(folders[0].folder, name, remedy=MERGED_FIRST)
    [subject] = find_subjects(f"{config.model}+{folders[0].folder}", base_is=config.base_is or None)
    scales = sorted({round(pair.scale, 6) for pair in update.layers.values()})
    record = {
        "name": name,
        "source": place,
        "kind": config.from_kind,
        "sha256": subject.adapter_sha256,
        "base_named": update.base,
        "ranks": sorted({pair.A.shape[0] for pair in update.layers.values()}),
        "scales": scales,
        "layers": len(update.layers),
    }
    return Adopted(name, record, dict(update.layers), (*folders[0].notes, *subject.notes))


def check_adopted(session: Session) -> None:
    """They fit this run's method and layers; says what is read into them."""
    names = [one.name for one in session.adopted]
    if not names:
        return
    method, layers = session.config.method, session.adapters.layers()
    if [lesson.name for lesson in session.lessons[: len(names)]] != names:
        now = ", ".join(lesson.name for lesson in session.lessons)
        raise UsageError(
            f"--from: the adopted tasks come first ({', '.join(names)}), but {method} would learn {now}: put them "
            "first in the stream, in this order, and choose a method that learns one task after another"
        )
    for number, one in enumerate(session.adopted):
        changed = one.pairs or {}
        if not session.run.task(number + 1, one.name).exists():
            _check_method(session, number)
        if outside := sorted(changed.keys() - layers.keys()):
            wanted = sorted({name.rpartition(".")[2] for name in (*changed, *layers)})
            raise UsageError(
                f"--from {one.name}: it changes {len(outside)} layers that target_modules leaves out ({outside[0]}); "
                f"give --target_modules {','.join(wanted)}"
            )
        session.notes += [f"{one.name}: {note}" for note in (*one.notes, *_rescaled(session, one))]
    session.notes += _looks_otherwise(session)


def _check_method(session: Session, number: int) -> None:
    """Before anything is written: the method takes adapters over, and has the rows that it needs for it."""
    rows = not session.stream.tasks[session.lessons[number].last_task].gone
    try:
        session.method.check_adoption(rows)
    except UsageError as error:
        raise UsageError(f"--from {session.adopted[number].name}: {error}") from error


def _rescaled(session: Session, one: Adopted) -> list[str]:
    scale = next(iter(session.adapters.pairs().values())).scale
    if one.pairs is None or all(math.isclose(pair.scale, scale) for pair in one.pairs.values()):
        return []
    return [
        f"its scale is {', '.join(map(str, one.record['scales']))}, this run's {scale:g}: the difference goes into B"
    ]


def _looks_otherwise(session: Session) -> list[str]:
    """Notes on neighbours whose updates look as if they were of the other kind."""
    notes = []
    for before, after in pairwise(session.adopted):
        if before.pairs is None or after.pairs is None or session.method.task_id:
            continue
        cosine = _cosine(before.pairs, after.pairs)
        told = f"{after.name}: its update has cosine {cosine:.2f} to that of {before.name}"
        if session.config.from_kind == "continued" and cosine < UNRELATED:
            notes.append(
                f"{told}, so it hardly looks trained on from it; if each was trained by itself on the base, say "
                "--from_kind summed"
            )
        if session.config.from_kind == "summed" and cosine > RELATED:
            notes.append(
                f"{told}, as if it held it; if it was trained on from it, say --from_kind continued, or it counts twice"
            )
    return notes


def _cosine(one: dict[str, Pair], other: dict[str, Pair]) -> float:
    sizes = [math.sqrt(sum(norm(pair) ** 2 for pair in pairs.values())) for pairs in (one, other)]
    shared = sum(inner(one[layer], other[layer]) for layer in one.keys() & other.keys())
    return shared / (sizes[0] * sizes[1]) if all(sizes) else 0.0


# ------------------------------------------------------------------------------- taking one over


def adopt_lesson(session: Session, number: int, folder: Path) -> None:
    """Puts an adapter into the model and the method, and publishes it as a finished lesson."""
    one, lesson, method = session.adopted[number], session.lessons[number], session.method
    update = deployed(session, number)
    rows = None if session.stream.tasks[lesson.last_task].gone else lesson.rows
    try:
        pairs = method.adopt(number, update, rows)
    except UsageError as error:
        raise UsageError(f"--from {one.name}: {error}{_rank_remedy(session, one, update)}") from error
    with torch.no_grad():
        _check_taken(session, one, update, pairs)
    state = method.state()
    refuse_nan(named(pairs) | state.tensors, folder)
    if session.engine.is_main:
        with session.run.publish(folder) as temporary:
            session.adapters.save(temporary / "adapter", pairs)
            (temporary / "adapter" / "README.md").write_text(_card(session, one), encoding="utf-8")
            save_state(temporary, state)
            write_lines(temporary / "log.jsonl", [])
            learned = {"lesson": one.name, "rows": len(rows or ()), "steps": 0, "checks": [], "adopted": one.record}
            write_json(temporary / "learned.json", learned)
            write_json(temporary / f"{TIMES}.json", {"seconds": 0.0, "cpu_seconds": 0.0})
    session.engine.wait()
    session.say(f"{folder.name}: adopted from {one.record['source']} ({one.record['kind']})")


def deployed(session: Session, number: int) -> dict[str, Pair]:
    """The update after adopted task `number`: its own, or with those before it."""
    given = []
    for one in session.adopted[: number + 1]:
        if one.pairs is None:
            raise RunError(f"--from {one.name}: {one.record['source']} is not there, and it is needed to go on")
        given.append(one.pairs)
    if session.config.from_kind == "continued" or session.method.task_id:
        return given[-1]
    return weighted(given, [1.0] * len(given))


def _rank_remedy(session: Session, one: Adopted, update: dict[str, Pair]) -> str:
    rank, mine = max(pair.A.shape[0] for pair in update.values()), session.config.r
    if rank <= mine:
        return ""
    joining = ", ".join(name for name, kind in METHODS.items() if kind.adopt is METHODS["incremental"].adopt)
    return (f". Give --r {rank}, make it smaller first (forgetless merge {one.record['source']} --rank {mine} "
            f"--output_dir {one.name}-{mine}), or choose a method that takes any rank: {joining}")  # fmt: skip


def _check_taken(session: Session, one: Adopted, update: dict[str, Pair], pairs: dict[str, Pair]) -> None:
    """What will be deployed is what was given; a method that cannot do this must not go on."""
    taken = {layer: Pair(A.cpu(), B.cpu(), scale) for layer, (A, B, scale) in pairs.items()}
    for layer in taken.keys() | update.keys():
        ends = [side[layer] for side in (taken, update) if layer in side]
        size = norm(update[layer]) if layer in update else 0.0
        away = difference(*ends) if len(ends) == 2 else norm(ends[0])
        if away > 1e-4 * max(size, 1e-6):
            raise RunError(
                f"--from {one.name}: {session.config.method} cannot take it over: in {layer} it would deploy another "
                f"update (‖ΔW - ΔW'‖ = {away:.3g}, ‖ΔW‖ = {size:.3g}); choose another method"
            )


def _card(session: Session, one: Adopted) -> str:
    base = session.base
    return f"""---
library_name: peft
base_model: {base.name}
tags: [peft, lora, "base_model:adapter:{base.name}", forgetless]
---
LoRA adapter {one.name}, made by another trainer and adopted by forgetless as an earlier task ({one.record["kind"]});
sha256 of what was given: {one.record["sha256"]}. {base.identity.told()}
"""
