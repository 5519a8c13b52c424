"""More of the formats of `formats`: checkpoints inside a task, comparisons, forecasts, sweeps, caches, whole models."""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from formats import TWO, Format, drawn, formats, seal_part
from run_folders import made_run
from safetensors.torch import load_file

from forgetless.auditing import served
from forgetless.comparing.comparison import compare
from forgetless.comparing.entries import entry_of, read_entries, write_archive
from forgetless.config import LearnConfig
from forgetless.data.batches import Encoder
from forgetless.data.benchmarks import read_trace
from forgetless.data.packages import cache_dir
from forgetless.data.readers import read_olora, read_rows
from forgetless.errors import ForgetlessError
from forgetless.forecasting import fitting
from forgetless.forecasting.forecast import fit_laws, read_law, write_laws
from forgetless.forecasting.laws import LAWS
from forgetless.forecasting.points import read_points
from forgetless.forgetting.kept import cache_folder, kept
from forgetless.learning.checkpoint import Checkpoints, SaveSettings, fingerprint
from forgetless.learning.engine import Engine
from forgetless.learning.stream import learn
from forgetless.methods import METHODS
from forgetless.model.adapters import Adapters, LoraSettings
from forgetless.model.base import load_base
from forgetless.model.identity import weights_digest
from forgetless.runs.folder import MANIFEST, RunFolder, write_lines
from forgetless.runs.seal import sealed
from forgetless.score.generation import Answer
from forgetless.subjects.models import find_subjects
from forgetless.subjects.pickles import as_safetensors
from forgetless.subjects.updates import read_update
from forgetless.sweeping.definition import read_sweep
from forgetless.sweeping.folder import SweepFolder
from forgetless.sweeping.running import _check_continues

SWEEP = """
stream: demo
model: tiny
learning_rate: 0.001
grid:
  methods: [sequential, {name: olora, choose: {lam: [0.1, 0.5]}}]
  seed: [0, 1]
  orders: 2
choose: {learning_rate: [0.001, 0.01], tasks: 1, equal_trials: false}
max_time: 2h
max_disk: 10GB
"""
MATRIX = {"method": "EWC", "tasks": ["a", "b", "c"], "matrix": [[0.9, 0.4, 0.3], [0.7, 0.9, 0.3], [0.6, 0.7, 0.9]],
          "base": [0.4, 0.4, 0.4], "majority": [0.5, 0.5, None], "test_rows": [40, 40, 40], "seed": 1,
          "settings": {"lam": 3}, "cost": {"seconds": 3.5}, "paper": "1612.00796", "stream": "abc"}  # fmt: skip


def every_format(root: Path, tiny: str) -> list[Format]:
    """Intact examples of everything that is read, below `root`; here those beside the ones of `formats`."""
    return [
        *formats(root, tiny),
        *_checkpoint_formats(root / "stopped", tiny),
        *_record_formats(root),
        *_compared_formats(root / "compared"),
        *_forecast_formats(root / "forecast"),
        *_sweep_formats(root / "sweep"),
        *_cache_formats(root / "kept", tiny),
        *_model_formats(root, tiny),
        *_benchmark_formats(root / "olora" / "TC" / "news", root / "trace" / "FOMC"),
    ]


# --------------------------------------------------------------------------------- a task that was stopped


def _checkpoint_formats(run: Path, tiny: str) -> list[Format]:
    real = METHODS["ilora"].batch

    def stopped(self, examples, step):
        if self.task == 1 and step == 2:
            raise KeyboardInterrupt
        return real(self, examples, step)

    with patch.object(METHODS["ilora"], "batch", stopped), suppress(KeyboardInterrupt):
        learn(LearnConfig(
            model=tiny, stream=TWO, output_dir=str(run), method="ilora", r=2, batch_size=4, forgetting_prompts=0,
            method_options={"memory": 6}, target_modules=["q_proj"], max_length=64, device="cpu", save_steps=1,
            precision="fp32", max_steps=3, cells="last",
        ))  # fmt: skip
    [newest] = run.glob("checkpoints/02-sizes/step-000002")
    files = tuple(sorted(path for path in newest.iterdir() if path.name != "times.json"))
    told = tuple(path for path in files if path.name != MANIFEST and path.suffix in (".json", ".jsonl"))

    @cache
    def method():
        base, made = load_base(tiny, torch.float32), METHODS["ilora"](memory=6)
        lora = LoraSettings(r=2, target_modules=["q_proj"])
        made.start(Adapters(base.model, lora, tiny, 0), Encoder(base.tokenizer, 64), 0)
        return made

    def gone_on(run: Path, file: Path) -> list:
        """The newest checkpoint as it is put back; that an earlier one is used, or none, is told."""
        said: list[str] = []
        found = Checkpoints(
            RunFolder(run), 2, "sizes", method(), Engine("cpu", "fp32"), SaveSettings(), say=said.append,
            follows=fingerprint(run / "tasks" / "01-colours"),
        )  # fmt: skip
        if any("not used" in one for one in said) or found.found != newest:
            raise ForgetlessError(f"{newest}: {said}")
        optimizer = torch.optim.AdamW(method().adapters.parameters())
        step = found.restore(optimizer)
        state = json.dumps(optimizer.state_dict(), default=lambda tensor: tensor.tolist())
        slow = {name: tensor.tolist() for name, tensor in method().slow.items()}
        return [step, found.records, method().k, method().replayed, slow, state]

    return [
        Format("a checkpoint inside a task", run, files, gone_on, covered=True),
        Format("a checkpoint, hashed again", run, told, gone_on, seal=seal_part),
    ]


# ------------------------------------------------------------------------------- records beside the parts


def _record_formats(root: Path) -> list[Format]:
    """What no manifest covers: whose rows were deleted, and times."""
    run = root / "told"
    shutil.copytree(root / "run", run)
    record = {"task": "colours", "rows": {"01-colours": 3}, "seen": {}, "texts": 0, "version": "0", "status": "deleted"}
    write_lines(run / "forgotten-rows.jsonl", [record | {"status": "deleting"}, record])
    times = tuple(run.glob("tasks/*/times.json"))
    return [
        Format("forgotten-rows.jsonl", run, (run / "forgotten-rows.jsonl",), drawn),
        Format("times", run, times, lambda at, _: entry_of(at)["cost"]),
    ]


# ------------------------------------------------------------------------------------------ comparisons


def _compared_formats(folder: Path) -> list[Format]:
    made_run(folder / "one")
    write_archive(read_entries([folder / "one"]), folder / "all.zip")
    (folder / "matrix.json").write_text(json.dumps([MATRIX, MATRIX | {"seed": 2}]))
    return [
        Format("archive of a comparison", folder, (folder / "all.zip",), lambda _, file: compare([file]), covered=True),
        Format("matrices of other code", folder, (folder / "matrix.json",), lambda _, file: compare([file])),
    ]


# -------------------------------------------------------------------------------------------- forecasts


def _forecast_formats(folder: Path) -> list[Format]:
    trained = folder / "out" / "checkpoint-50"
    trained.mkdir(parents=True)
    points = [
        {"rank": r, "steps": steps, "loss": 2 - 0.1 * i, "kl": steps / 5000 * r**0.1, "base": "b", "run": f"{r}"}
        for r in (8, 16, 32) for i, steps in enumerate((50, 100, 150))
    ]  # fmt: skip
    with (folder / "points.csv").open("w", newline="") as out:
        table = csv.DictWriter(out, points[0])
        table.writeheader()
        table.writerows(points)
    (folder / "points.json").write_text(json.dumps({"points": points}))
    write_lines(folder / "points.jsonl", points)
    with patch.object(fitting, "LAWS", {name: LAWS[name] for name in ("constant", "log-linear")}):
        record = fit_laws([folder / "points.csv"], draws=20, starts=2)
    write_laws(record, folder / "law.json")
    log = [
        {"step": 25, "loss": 3.0, "learning_rate": 1e-4},
        {"step": 50, "loss": 2.0},
        {"step": 50, "forgetting/kl": 0.1},
    ]
    (trained / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (trained / "adapter_config.json").write_text(json.dumps({"r": 4, "base_model_name_or_path": "some/base"}))
    head = json.dumps({"A": {"dtype": "F32", "shape": [4, 10], "data_offsets": [0, 160]}}).encode()
    (trained / "adapter_model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(160))
    tables = tuple(folder / f"points.{kind}" for kind in ("csv", "json", "jsonl"))
    return [
        Format("points", folder, tables, lambda _, file: read_points([file])),
        Format("a trainer's folder", folder, tuple(trained.iterdir()), lambda at, _: read_points([at / "out"])),
        Format("a law", folder, (folder / "law.json",), lambda _, file: _asked(file), covered=True),
    ]


def _asked(file: Path) -> Any:
    law = read_law(file)
    return [np.round(asdict(law(law.size_of(8), 100, 0.95))["value"], 12), law.record]


# ----------------------------------------------------------------------------------------------- sweeps


def _sweep_formats(folder: Path) -> list[Format]:
    (folder / "attempts").mkdir(parents=True)
    (folder / "sweep.yaml").write_text(SWEEP)
    attempt = folder / "attempts" / "a.json"
    attempt.write_text(json.dumps(sealed({"format": 1, "status": "done", "config": {"seed": 0}, "attempts": 1})))
    record = folder / "sweep.json"
    record.write_text(json.dumps(sealed({"format": 1, "tasks": {"a": "ab" * 32}, "cells": []})))
    tasks = SimpleNamespace(tasks=[SimpleNamespace(name="a", fingerprint="ab" * 32)])
    run: Any = SimpleNamespace(id="a")
    return [
        Format("sweep", folder, (folder / "sweep.yaml",), lambda _, file: read_sweep(file), load=yaml.safe_load),
        Format("how a run of a sweep was tried", folder, (attempt,), lambda at, _: SweepFolder(at).attempt(run),
               covered=True),
        Format("sweep.json", folder, (record,), lambda at, _: _check_continues(SweepFolder(at), tasks),  # type: ignore[arg-type,func-returns-value]
               covered=True),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------- caches


def _cache_formats(folder: Path, tiny: str) -> list[Format]:
    """A damaged cache gives what the whole one gives, since it is made again."""
    folder.mkdir()
    answers = ["blue", "green", "ünd so weiter"]
    with patch.dict(os.environ, FORGETLESS_CACHE=str(folder)):
        kept({"rows": "ab"}, lambda: answers)
        [scores] = cache_folder().glob("*.json")
        weights = [Path(tiny) / "model.safetensors"]
        digest = weights_digest(weights)
        [identity] = (cache_dir() / "identity").iterdir()
    begun = folder / "begun.jsonl"
    lines = [sealed({"asked": f"{i}", "text": text, "finished": True}) for i, text in enumerate(answers)]
    write_lines(begun, lines)

    def again(at: Path, file: Path) -> Any:
        with patch.dict(os.environ, FORGETLESS_CACHE=str(at)):
            return [kept({"rows": "ab"}, lambda: answers), weights_digest(weights) == digest]

    def begun_again(at: Path, file: Path) -> bool:
        """What is kept of an audit that was cut off are answers that it had, and no others."""
        os.utime(file, (time.time(), time.time()))
        known = {str(i): Answer(text, True) for i, text in enumerate(answers)}
        return served._begun(file).items() <= known.items()

    return [
        Format("cached results", folder, (scores, identity), again, covered=True),
        Format("answers of an audit that was cut off", folder, (begun,), begun_again, covered=True),
    ]


# ----------------------------------------------------------------------------------------------- models


def _model_formats(root: Path, tiny: str) -> list[Format]:
    """What others write: a whole model, a pickled adapter, a data set's folder."""
    from datasets import Dataset

    model, pickled, saved = root / "model", root / "pickled", root / "data set"
    shutil.copytree(tiny, model)
    shutil.copytree(
        root / "run" / "adapter", pickled, ignore=shutil.ignore_patterns(MANIFEST, "README.md", "*.safetensors")
    )
    torch.save(load_file(root / "run" / "adapter" / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    Dataset.from_list([{"prompt": f"It has {i}:", "completion": " one"} for i in range(4)]).save_to_disk(str(saved))
    files = tuple(sorted(path for path in model.iterdir() if path.suffix in (".json", ".jinja", ".safetensors")))
    return [
        Format("a model", model, files, lambda at, _: find_subjects(str(at))[0].identity),
        Format("a pickled adapter", pickled, (pickled / "adapter_model.bin",), lambda at, _: _unpickled(at)),
        Format("a data set's folder", saved, tuple(sorted(saved.iterdir())), lambda at, _: read_rows(at).rows),
    ]


def _unpickled(folder: Path) -> list:
    copy = as_safetensors(folder, True)
    try:
        return sorted(read_update(copy).layers)
    except ForgetlessError as error:  # what was read as tensors is no adapter: its copy in the cache is named
        assert str(copy) in str(error)
        raise ForgetlessError(f"{folder}: {error}") from error


def _benchmark_formats(news: Path, views: Path) -> list[Format]:
    """Task folders in the layouts of the O-LoRA benchmark and of TRACE."""
    news.mkdir(parents=True)
    views.mkdir(parents=True)
    rows = [{"label": ("sport", "war")[i % 2], "sentence": f"Row {i}"} for i in range(6)]
    (news / "labels.json").write_text(json.dumps(["sport", "war"]))
    (news / "train.json").write_text(json.dumps(rows))
    (views / "train.json").write_text(json.dumps([{"prompt": f"View {i}?", "answer": "ABC"[i % 3]} for i in range(6)]))
    olora = news / "labels.json", news / "train.json"
    return [
        Format("a folder of the O-LoRA benchmark", news, olora, lambda at, _: read_olora(at, "train").rows),
        Format("a folder of TRACE", views, (views / "train.json",), lambda at, _: read_trace(at, "train").rows),
    ]
