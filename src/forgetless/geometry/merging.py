"""Adapters merged: one into its base as whole weights, or several into one adapter; never without the measured error.

merge.json     what was merged how, every error and divergence
merge.md       the same in short

stand in the output folder beside a plain PEFT adapter or whole weights, which appear there whole and measured or not
at all. What merging costs each adapter is KL(it || merged) on a text, the KL(it || base) beside it what leaving it out
would cost. A re-compression to rank r is the nearest of that rank, layer by layer:

    ‖ΔW - ΔW'‖ / ‖ΔW‖ = √(Σ_{k>r} σ_k²) / √(Σ_k σ_k²)         (Eckart and Young, 1936)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from forgetless.config import MergeConfig
from forgetless.data.batches import Encoder
from forgetless.data.readers import read_rows
from forgetless.data.streams import JUDGED_SEED, load_stream, sample
from forgetless.data.tasks import Row, Stream
from forgetless.errors import UsageError
from forgetless.forgetting.divergence import Divergence, compare_states, divergence
from forgetless.forgetting.reference import BATCH_TOKENS, Reference, hidden_states, write_states
from forgetless.forgetting.sides import kept_side, side_in
from forgetless.forgetting.texts import LONGEST, Text, general_prompts, own_prompts, read_text
from forgetless.geometry.fisher import fisher
from forgetless.geometry.operators import FISHER, combined, combined_products, fisher_mean, of_product, usual_weights
from forgetless.geometry.whole import copy_tokenizer, write_merged
from forgetless.learning.engine import Engine
from forgetless.learning.fit import fit_rows
from forgetless.model.adapters import Pair
from forgetless.model.base import transformer
from forgetless.model.head import Head
from forgetless.model.loading import FOUR_BIT, loaded_as_told
from forgetless.progress import console, steps
from forgetless.report.merge import merge_markdown
from forgetless.runs.folder import RunFolder, write_json
from forgetless.score.intervals import mean_interval, ratio_intervals, wilson
from forgetless.score.scorers import RIGHT_OR_WRONG, Scorer, headline
from forgetless.subjects.layouts import short_names
from forgetless.subjects.models import Opened, Subject, base_name, dense, find_subjects, opened
from forgetless.subjects.updates import Update, compressed, difference, norm, read_update, write_update
from forgetless.versions import versions

FORMAT = 1
RECORD, MARKDOWN = "merge.json", "merge.md"
FISHER_ROWS = 64
BASE, MERGED = "base alone", "merged result"


@dataclass
class _Session:
    """What is merged, and what the result is measured on."""

    config: MergeConfig
    engine: Engine
    sources: list[Subject]
    base: Subject
    texts: tuple[Text, ...]
    tasks: Stream | None
    weights: list[float]
    notes: list[str]
    rows: list[tuple[Row, ...]]  # for fisher, of each adapter's task
    scores: dict[str, dict] = field(default_factory=dict)  # model -> task -> score

    @property
    def whole(self) -> bool:
        """Whether one adapter goes into its base."""
        return len(self.sources) == 1 and self.config.rank is None and not self.config.weights

    @property
    def on_products(self) -> bool:
        """Whether the method merges whole products, which are of full rank."""
        return self.config.method == FISHER or self.config.method.endswith("_svd")

    @cached_property
    def labels(self) -> list[str]:
        shown = short_names([one.name for one in self.sources])
        return [shown[one.name] for one in self.sources]

    def encoder(self, subject: Subject) -> Encoder:
        return Encoder(subject.tokenizer, min(LONGEST, subject.context or LONGEST), subject.decoder_start)


@loaded_as_told
def merge(config: MergeConfig) -> dict:
    """Merges, measures and writes; gives the content of merge.json, with `path`.

    Raises a ForgetlessError for adapters that cannot be merged, with the reason; nothing is written then.
    """
    session = _prepare(config)
    folder = Path(config.output_dir)
    _check_output(folder, session.sources)
    with RunFolder(folder.parent).publish(folder) as new, TemporaryDirectory() as temporary:
        found = _into_base(session, new) if session.whole else _into_one(session, new, Path(temporary))
        record = _about(session) | found | {"scores": session.scores, "notes": session.notes}
        write_json(new / RECORD, record)
        (new / MARKDOWN).write_text(merge_markdown(record), encoding="utf-8")
    return record | {"path": str(folder)}


# ------------------------------------------------------------------------------------------- what is given


def _source(spec: str, config: MergeConfig) -> Subject:
    """The adapter of this name; UsageError for a run of several tasks."""
    found = find_subjects(spec, base_is=config.base_is, allow_pickle=config.allow_pickle)
    if len(found) > 1:
        raise UsageError(
            f"{spec}: a run of {len(found)} tasks, whose later adapters mostly hold what earlier tasks added too, so "
            f"that their sum would count it twice; give {spec.rstrip('/')}/adapter, which it deploys, or the tasks' "
            "folders where each task has an adapter of its own"
        )
    return found[0]


def _prepare(config: MergeConfig) -> _Session:
    config.check()
    sources = [_source(spec, config) for spec in config.models]
    for one in sources:
        if one.adapter is None:
            raise UsageError(
                f"{one.name}: whole weights, no adapter. `forgetless merge` merges adapters of one base; between whole "
                "weights there is `forgetless blend`"
            )
        if one.runs_as != sources[0].runs_as:
            raise UsageError(
                f"{one.name} is on another base ({one.base}) than {sources[0].name} ({sources[0].base}); adapters of "
                "different bases are not updates of the same weights. If both are one model, say base_is (--base-is)"
            )
    if len(sources) == 1 and config.method != "sum":
        raise UsageError(
            f"--method {config.method} merges several adapters, and there is one; leave it out to merge this one into "
            "its base, or give --weights to scale it"
        )
    weights = list(config.weights) or usual_weights(config.method, len(sources))
    for name, count in (("weights", len(weights)), ("rows", len(config.rows) or len(sources))):
        if count != len(sources):
            raise UsageError(f"{name}: {count} for {len(sources)} adapters; give one for each, in their order")
    if config.method == FISHER and not config.rows:
        raise UsageError("fisher needs rows of each adapter's task: --rows A.jsonl B.jsonl, in the adapters' order")
    notes = list(dict.fromkeys(note for one in sources for note in one.notes))
    for note in notes:
        console.print(f"note: {note}", markup=False)
    engine = Engine(config.device, config.precision)
    [base] = find_subjects(str(sources[0].base))
    texts, rows = _texts(config, sources), [_fisher_rows(file, config.limit) for file in config.rows]
    session = _Session(config, engine, sources, replace(base, name=BASE), texts, None, weights, notes, rows)
    if session.whole and base.decoder_start is not None:
        raise UsageError(
            f"{base.base}: an encoder-decoder, whose files name its embeddings otherwise than the model does; merging "
            "into the base is for decoders alone. Deploy the adapter beside it, or merge by PEFT's merge_and_unload"
        )
    if config.tasks:
        stream = load_stream(config.tasks)
        session.tasks, more = fit_rows(stream, session.encoder(sources[0]), splits=("test",))
        notes += more
    return session


def _texts(config: MergeConfig, sources: Sequence[Subject]) -> tuple[Text, ...]:
    if config.text:
        texts = tuple(read_text(source, config.limit) for source in config.text)
        if len({text.name for text in texts}) < len(texts):
            raise UsageError("text: two files have the same name, by which results are told apart; rename one")
        return texts
    return (own_prompts(general_prompts(config.limit), all(one.chat_template for one in sources)),)


def _fisher_rows(file: str, limit: int | None) -> tuple[Row, ...]:
    rows = read_rows(file).rows
    return sample(rows, limit or FISHER_ROWS, seed=JUDGED_SEED, name=Path(file).stem, purpose="fisher")


def _check_output(folder: Path, sources: Sequence[Subject]) -> None:
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UsageError(f"{folder}: is the folder you are in, or above it, and would be replaced; give one below it")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; give another output_dir")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise UsageError(f"{folder}: holds files that no merge wrote, and would be replaced; give another output_dir")
    for one in sources:
        if folder.resolve() in (one.base.resolve(), one.adapter.resolve() if one.adapter else None):
            raise UsageError(f"{folder}: is {one.name} itself; give another output_dir")


def _about(session: _Session) -> dict:
    config = session.config
    how: dict[str, Any] = {"method": config.method, "weights": session.weights, "rank": config.rank}
    if config.prunes:
        how |= {"density": config.kept_share, "seed": config.seed}
    if config.method == FISHER:
        how["rows"] = [*config.rows]
    return {
        "format": FORMAT,
        "into": "base" if session.whole else "adapter",
        "base": {"name": str(session.base.base), "identity": session.base.identity.as_json()},
        "how": None if session.whole else how,
        "computed_on": session.engine.told,
        "versions": versions(),
    }


# --------------------------------------------------------------------------------------- into the base


def _into_base(session: _Session, new: Path) -> dict:
    [source] = session.sources
    console.print(f"{source.name}: merging into {source.base}, in fp32", markup=False)
    layers = write_merged(source, new)
    [merged] = find_subjects(str(new))
    if source.load_in == FOUR_BIT:
        session.notes.append(
            f"{source.name}: merged into the base's weights in full, without the 4 bits' rounding that the adapter "
            "learnt on: another model than the adapter on the base in 4 bits, by the KL and the logits told here"
        )
        console.print(f"note: {session.notes[-1]}", markup=False)
    [told], logits = _measured(session, replace(dense(merged, "a merge"), name=MERGED), logits=True)
    return {"sources": [told], "logits": logits, "layers": layers, "total": _total(layers)}


@dataclass
class _LogitError:
    """Of logits against the reference's, over positions and words."""

    largest: float = 0.0
    absolute: float = 0.0  # sums
    squared: float = 0.0
    entries: int = 0

    def add(self, reference: Tensor, model: Tensor) -> None:
        gap = (model.float() - reference.float().to(model.device)).abs()
        self.largest = max(self.largest, gap.max().item())
        self.absolute += gap.sum(dtype=torch.float64).item()
        self.squared += reference.double().square().sum().item()
        self.entries += gap.numel()

    def as_json(self) -> dict[str, float]:
        """`largest` and `mean` difference, and the root mean square `size` of the reference's logits."""
        return {
            "largest": self.largest,
            "mean": self.absolute / self.entries,
            "size": math.sqrt(self.squared / self.entries),
        }


def _with_logits(reference: Reference, model: Opened, session: _Session) -> tuple[Divergence, dict[str, float]]:
    """`divergence`, and how far the logits are from the reference's."""
    using, error = session.engine.autocast, _LogitError()
    head, rows = Head(model, using), max(1, 2**24 // reference.head.vocabulary)
    with TemporaryDirectory() as temporary:
        write_states(Path(temporary), hidden_states(model, reference.windows, using=using, label=MERGED), {})
        after = Reference(Path(temporary), reference.windows, head)
        batches = reference.windows.batches(BATCH_TOKENS)
        for numbers in batches:
            for known, own in zip(
                reference.states(numbers).split(rows), after.states(numbers).split(rows), strict=True
            ):
                device = reference.head.device
                error.add(reference.head(known.to(device)), head(own.to(head.device)))
        stored = ((numbers, after.states(numbers)) for numbers in batches)
        return compare_states(reference, stored, head, reference.windows), error.as_json()


# ------------------------------------------------------------------------------------- several into one


def _into_one(session: _Session, new: Path, temporary: Path) -> dict:
    config = session.config
    updates = [read_update(one.adapter, one.name) for one in session.sources if one.adapter]
    whole: dict[str, Pair] | _OnDisk = _OnDisk(temporary) if session.on_products else {}
    short, layers, shortened, ranks = {}, {}, set(), _ranks(config, updates)
    for layer, pair in _combined(session, updates):
        short[layer] = pair
        if (config.rank or session.on_products) and ranks[layer] < pair.A.shape[0]:
            short[layer] = compressed(pair, ranks[layer])
            shortened.add(layer)
        layers[layer] = _layer(pair, short[layer])
        whole[layer] = pair
    write_update(short, new, base_name(session.sources), session.sources[0].task_type)
    _bring_tokenizer(session, new)
    merged = replace(session.sources[0], name=MERGED, adapter=new)
    told, _ = _measured(session, merged)
    for one, update in zip(told, updates, strict=True):
        one |= _distance(update.layers, short)
    found = {"sources": told, "layers": layers, "total": _total(layers), "compression": None}
    if shortened:
        found["compression"] = _compression(session, merged, whole.__getitem__, short, layers, temporary)
    return found


def _combined(session: _Session, updates: Sequence[Update]) -> Iterator[tuple[str, Pair]]:
    """Each layer with its merged update; of methods on products one after another, since these are of full rank."""
    config, products = session.config, [one.layers for one in updates]
    how = (config.method, session.weights, config.kept_share, config.seed)
    if not session.on_products:
        yield from combined(products, *how).items()
        return
    by_fisher = config.method == FISHER
    merged = (
        fisher_mean(products, _fishers(session, updates), session.weights)
        if by_fisher
        else combined_products(products, *how)
    )
    for layer, matrix in merged:
        yield layer, of_product(matrix)


@dataclass
class _OnDisk:
    """Pairs by layer, of which only the one that is asked for is in memory."""

    folder: Path
    files: dict[str, Path] = field(default_factory=dict)

    def __setitem__(self, layer: str, pair: Pair) -> None:
        self.files[layer] = self.folder / f"layer-{len(self.files)}.safetensors"
        save_file({"A": pair.A.contiguous(), "B": (pair.scale * pair.B).contiguous()}, self.files[layer])

    def __getitem__(self, layer: str) -> Pair:
        told = load_file(self.files[layer])
        return Pair(told["A"], told["B"], 1.0)


def _fishers(session: _Session, updates: Sequence[Update]) -> Iterator[dict[str, Tensor]]:
    """Each adapter's Fisher information of every layer that any of them changes."""
    engine = session.engine
    shapes = {layer: (pair.B.shape[0], pair.A.shape[1]) for one in updates for layer, pair in one.layers.items()}
    models = opened(session.sources, engine.dtype, engine.device)
    for (subject, model), rows, label in zip(models, session.rows, session.labels, strict=True):
        encoder = session.encoder(subject)
        examples = [encoder(row) for row in rows]
        found = fisher(model, shapes, examples, encoder.tokenizer.pad_token_id, engine.autocast, f"Fisher, {label}")
        if idle := [layer for layer in shapes if layer not in found or not found[layer].any()]:
            session.notes.append(f"{label}: its rows reach none of {', '.join(idle)}; there it weighs next to nothing")
            console.print(f"note: {session.notes[-1]}", markup=False)
        yield {layer: torch.zeros(shape) for layer, shape in shapes.items() if layer not in found} | found


def _ranks(config: MergeConfig, updates: Sequence[Update]) -> dict[str, int]:
    """The most that each layer's rank may be; for products the sum of the adapters', where no other is told."""
    ranks: dict[str, int] = {}
    for update in updates:
        for layer, pair in update.layers.items():
            ranks[layer] = config.rank or ranks.get(layer, 0) + pair.A.shape[0]
    return ranks


def _layer(whole: Pair, short: Pair) -> dict[str, float]:
    size = norm(whole)
    error = 0.0 if short is whole or not size else difference(whole, short) / size
    return {"rank": short.A.shape[0], "norm": size, "error": error}


def _total(layers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Over all layers: ‖ΔW‖, and the error in it."""
    size = math.sqrt(sum(one["norm"] ** 2 for one in layers.values()))
    lost = math.sqrt(sum((one["norm"] * one["error"]) ** 2 for one in layers.values()))
    return {"norm": size, "error": lost / size if size else 0.0}


def _distance(update: Mapping[str, Pair], merged: Mapping[str, Pair]) -> dict[str, float]:
    """‖ΔW_i‖ of an adapter, and ‖ΔW - ΔW_i‖ / ‖ΔW_i‖ of the result, over all layers."""
    size = math.sqrt(sum(norm(pair) ** 2 for pair in update.values()))
    away = [difference(merged[layer], update[layer]) if layer in update else norm(merged[layer]) for layer in merged]
    return {"norm": size, "distance": math.sqrt(sum(one**2 for one in away)) / size if size else 0.0}


def _bring_tokenizer(session: _Session, new: Path) -> None:
    """That of the adapters, where they have the same."""
    identities = {(one.identity.tokenizer, one.identity.chat_template) for one in session.sources}
    if len(identities) > 1:
        session.notes.append("the adapters bring different tokenizers or chat templates; the result brings none")
    elif adapter := session.sources[0].adapter:
        copy_tokenizer(adapter, new)


# ------------------------------------------------------------------------------------------ what it costs


def _measured(session: _Session, merged: Subject, logits: bool = False) -> tuple[list[dict], dict[str, dict]]:
    """For each adapter KL(it || merged) and KL(it || base) on the texts; every model's scores; where asked for, how
    far the logits are from the adapter's, by text.
    """
    engine = session.engine
    told: list[dict] = []
    errors: dict[str, dict] = {}
    references: dict[str, Reference] = {}
    order = [one for source in session.sources for one in (source, session.base, merged)]
    labels = {one.name: label for one, label in zip(session.sources, session.labels, strict=True)}
    for subject, model in _in_order(session, order):
        label = labels.get(subject.name, subject.name)
        console.print(f"measuring {label}", markup=False)
        if subject is session.base or subject is merged:
            found = {}
            for name, reference in references.items():
                if logits and subject is merged:
                    found[name], errors[name] = _with_logits(reference, model, session)
                else:
                    found[name] = divergence(reference, model, using=engine.autocast, label=f"{name}, {label}")
            key = "kl" if subject is merged else "kl_of_base"
            told[-1][key] = {name: _kl(one) for name, one in found.items()}
        else:
            references = {
                text.name: kept_side(model, subject.tokenizer, text, engine.autocast, subject.decided_by, label)
                for text in session.texts
            }
            weight = session.weights[len(told)]
            told.append({"label": label, "weight": weight} | subject.as_json())
        if session.tasks and label not in session.scores:
            session.scores[label] = _scores(session, subject, model)
    return told, errors


def _in_order(session: _Session, subjects: Sequence[Subject]) -> Iterator[tuple[Subject, Opened]]:
    """In this very order; what shares a base has it loaded once."""
    run: list[Subject] = []
    for subject in [*subjects, None]:
        if run and (subject is None or subject.runs_as != run[0].runs_as):
            yield from opened(run, session.engine.dtype, session.engine.device)
            run = []
        if subject is not None:
            run.append(subject)


def _kl(found: Divergence) -> dict[str, float | int | None]:
    """Nats per token with a 95 % interval over documents, and agreement."""
    sums = found.documents
    low, high = ratio_intervals(sums.kl[:, None], sums.tokens[:, None].astype(float))
    return {
        "kl": found.per_token.kl,
        "low": None if np.isnan(low[0]) else float(low[0]),
        "high": None if np.isnan(high[0]) else float(high[0]),
        "agree": found.per_token.agree,
        "tokens": int(sums.tokens.sum()),
        "documents": len(sums.document),
    }


def _scores(session: _Session, subject: Subject, model: Opened) -> dict[str, dict]:
    """The headline score on each task's test rows, with a 95 % interval."""
    assert session.tasks
    options = session.tasks.options
    scorer = Scorer(model, session.encoder(subject), session.engine, options, BATCH_TOKENS)
    found = {}
    for task in session.tasks.tasks:
        rows = sample(task.test, session.config.limit, seed=JUDGED_SEED, name=task.name, purpose="test")
        measure = headline(task)
        values = scorer(task, rows).measures[measure]
        right = measure in RIGHT_OR_WRONG
        low, high = wilson(int(sum(values)), len(values)) if right else mean_interval(values)
        found[task.name] = {"score": sum(values) / len(values), "low": low, "high": high, "measure": measure,
                            "rows": len(values)}  # fmt: skip
    return found


def _compression(
    session: _Session, merged: Subject, whole: Callable[[str], Pair], short: Mapping[str, Pair],
    layers: dict[str, dict], temporary: Path,
) -> dict:  # fmt: skip
    """KL(uncompressed || compressed) on the texts; where asked for, of each layer alone too, into `layers`."""
    engine, found = session.engine, dict[str, dict]()
    references: dict[str, Reference] = {}
    base = replace(merged, name="uncompressed", adapter=None)
    for subject, model in opened([base, merged], engine.dtype, engine.device):
        if subject is base:
            with _updated(model, whole, short):
                for text in session.texts:
                    folder = temporary / f"states-{text.name}"
                    folder.mkdir()
                    references[text.name] = side_in(folder, model, subject.tokenizer, text, engine.autocast)
            if session.config.kl_by_layer:
                _by_layer(session, model, whole, short, references, layers)
        else:
            for name, reference in references.items():
                found[name] = _kl(divergence(reference, model, using=engine.autocast, label="re-compressed"))
    return found


def _by_layer(
    session: _Session, model: Opened, whole: Callable[[str], Pair], short: Mapping[str, Pair],
    references: Mapping[str, Reference], layers: dict[str, dict],
) -> None:  # fmt: skip
    with steps("layers", len(short)) as progress:
        for layer in short:
            with _updated(model, partial(_but_one, layer, short, whole), short):
                found = {
                    name: divergence(reference, model, using=session.engine.autocast)
                    for name, reference in references.items()
                }
            layers[layer]["kl"] = {name: one.per_token.kl for name, one in found.items()}
            progress.advance()


def _but_one(alone: str, short: Mapping[str, Pair], whole: Callable[[str], Pair], layer: str) -> Pair:
    """A layer's uncompressed update, of one alone the compressed."""
    return short[layer] if layer == alone else whole(layer)


@contextmanager
def _updated(base: Opened, update: Callable[[str], Pair], layers: Iterable[str]) -> Iterator[None]:
    """The base with y += ΔW x in each of the layers, asked for one by one as they are computed, as PEFT computes it."""

    def add(layer: str, module: nn.Module, given: tuple, output: Tensor) -> Tensor:
        pair, x = update(layer), given[0]
        A, B = pair.A.to(x.device), pair.B.to(x.device)
        change = pair.scale * functional.linear(functional.linear(x.to(A.dtype), A), B)
        return (output + change).to(output.dtype)

    model = transformer(base)
    handles = [model.get_submodule(layer).register_forward_hook(partial(add, layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
