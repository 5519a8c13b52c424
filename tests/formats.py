"""File formats that forgetless reads, with a small intact example: what is fuzzed, and what must come of it.

The others are in `more_formats`, whose `every_format` gives all.

A damaged file gives what the intact one gives, or a ForgetlessError that names the file. Where no hash covers it, it
may also give something else, as an edited file does. Nothing else may happen.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import audit_records
import pyarrow
import pyarrow.parquet
import yaml
from conftest import COLOURS, SIZES, make_task
from damage import BYTES, reshaped

from forgetless.auditing.evidence import verify
from forgetless.auditing.history import begin, end, read_history
from forgetless.auditing.policy import read_policy
from forgetless.checkup.doctor import doctor
from forgetless.cli.learn import parse_learn
from forgetless.config import LearnConfig
from forgetless.data import packages
from forgetless.data.readers import read_options, read_rows
from forgetless.data.streams import load_stream
from forgetless.data.tasks import Stream
from forgetless.errors import ForgetlessError
from forgetless.forgetting.texts import read_text
from forgetless.learning.state import load_state
from forgetless.learning.stream import learn
from forgetless.report.audit_page import redraw
from forgetless.report.page import render_html
from forgetless.report.record import render_json
from forgetless.report.summary import summarise
from forgetless.runs.folder import MANIFEST, TIMES, RunFolder, check_published, read_json
from forgetless.runs.seal import sealed
from forgetless.runs.shapes import read_run
from forgetless.subjects.models import find_adapters, find_subjects
from forgetless.subjects.updates import read_update

POLICY = """
reference: april
tasks:
  - {name: invoices, path: invoices.yaml, sha256: "%s"}
texts:
  - {name: manual, path: manual.jsonl}
probes:
  - {name: mmlu}
budgets: {max-drop: {invoices: 2pp, mmlu: 1.5pp}, max-kl: {manual: 0.05}}
confidence: 0.95
time-limit: 30min
waivers:
  - {max-drop: mmlu, owner: Ana, reason: retired in May, until: 2026-05-31}
""" % ("ab" * 32)
TWO = Stream("two", (make_task("colours", COLOURS, "colour", scorers=("options", "exact_match")),
                     make_task("sizes", SIZES, "size")))  # fmt: skip
STREAM = """
name: support
tasks:
  - {name: topics, train: rows.jsonl, test: rows.json, options: [blue, green, red], limit: 5, validation: "10%"}
  - {name: sizes, train: pairs.parquet, test: rows.jsonl, scorers: [exact_match], max_new_tokens: 4}
"""
CONFIG = """
stream: demo
method: {name: olora, lam: 0.1}
learning_rate: 0.001
target_modules: [q_proj, v_proj]
report_to: [tensorboard]
"""

PACKAGE = packages.Package("rows", "1", "rows.whl", "ab" * 32, 1, ("rows.jsonl",), "rows", "CC0")


@dataclass(frozen=True)
class Format:
    """Files of one kind below `folder`, and what reads them; `covered` by a hash, no damage passes silently."""

    name: str
    folder: Path
    files: tuple[Path, ...]
    read: Callable[[Path, Path], Any]  # (folder, the damaged file)
    covered: bool = False
    seal: Callable[[Path], None] | None = None  # makes the hashes fit again, as whoever edits the file on purpose
    load: Callable[[str], Any] | None = json.loads  # how a file becomes plain data that can be reshaped


def formats(root: Path, tiny: str) -> list[Format]:
    """Intact examples of everything below `root`, from a run on the tiny model."""
    return [*_run_formats(root / "run", tiny), *_audit_formats(root / "audit"), *_users_formats(root / "users"),
            *_adapter_formats(root, tiny)]  # fmt: skip


# --------------------------------------------------------------------------------------- what must happen


def damaged_copy(one: Format, file: Path, draw: random.Random) -> bytes:
    """The file's bytes with one to three damages, one in three times of its shape."""
    data = file.read_bytes()
    if one.load and file.suffix in (".json", ".jsonl", ".yaml") and draw.random() < 0.33:
        try:
            return reshaped(data, draw, one.load)
        except (ValueError, RecursionError):
            pass
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if data:
            data = draw.choice(BYTES)(data, draw)
    return data


def outcome(one: Format, file: Path, data: bytes, intact: Any) -> str:
    """'equal', 'other' or 'error'; AssertionError for a silent success, any other exception as it is."""
    before, rest = file.read_bytes(), _others(one)
    try:
        file.write_bytes(data)
        if one.seal:
            one.seal(file)
        try:
            found = one.read(one.folder, file)
        except ForgetlessError as error:
            named = any(name in str(error) for name in (file.name, str(file.parent), str(one.folder)))
            assert named, f"the error does not name {file.name}: {error}"
            return "error"
        if found == intact:
            return "equal"
        assert not one.covered, f"{file}: read as something else, without a word"
        return "other"
    finally:
        file.write_bytes(before)
        for path, content in rest.items():
            path.write_bytes(content)


def _others(one: Format) -> dict[Path, bytes]:
    """The files that sealing rewrites."""
    if not one.seal:
        return {}
    return {path: path.read_bytes() for path in one.folder.rglob("*.json") if path.name in (MANIFEST, "run.json")}


def examine(one: Format, number: int, seed: int, intact: Any) -> tuple[str, Path]:
    """Input `number` of a seed: a file of this format, a damage, and what came of it."""
    draw = random.Random(f"{seed} {one.name} {number}")
    file = draw.choice(one.files)
    return outcome(one, file, damaged_copy(one, file, draw), intact), file


# ------------------------------------------------------------------------------------------------- runs


def _run_formats(run: Path, tiny: str) -> list[Format]:
    learn(LearnConfig(
        model=tiny, stream=TWO, output_dir=str(run), method="ilora", method_options={"memory": 6},
        learning_rate=2e-2, num_train_epochs=1.0, batch_size=8, r=2, target_modules=["q_proj"], max_length=64,
        device="cpu", precision="fp32", forgetting_prompts=2,
    ))  # fmt: skip
    (run / ".lock").unlink(missing_ok=True)
    for name in ("report.html", "report.md", "report.json"):
        (run / name).unlink()
    covered = [path for path in run.rglob("*") if path.is_file() and not path.name.startswith(TIMES)]
    parts = tuple(sorted(path for path in covered if path.parent != run and "adapter" not in path.parts[-2:-1]))
    told = tuple(path for path in parts if path.suffix in (".json", ".jsonl") and path.name != MANIFEST)
    adapter = tuple(sorted((run / "adapter").iterdir()))
    return [
        Format("run.json", run, (run / "run.json",), drawn, covered=True),
        Format("parts of a run", run, parts, drawn, covered=True),
        Format("parts of a run, going on", run, parts, _gone_on, covered=True),
        Format(
            "a run's adapter",
            run / "adapter",
            tuple(p for p in adapter if p.name != "README.md"),
            _published,
            covered=True,
        ),
        Format("run.json, hashed again", run, (run / "run.json",), drawn, seal=_seal_run),
        Format("parts of a run, hashed again", run, told, _drawn_and_gone_on, seal=seal_part),
        Format("any file of a run, doctor", run, tuple(sorted(covered)), _doctored, covered=True),
    ]


def drawn(run: Path, file: Path) -> str:
    summary = summarise(run)
    return render_json([summary]) + render_html([summary])


def _gone_on(run: Path, file: Path) -> list:
    """What `learn` reads when it goes on."""
    told = read_run(run)
    folders = RunFolder(run).finished([lesson["name"] for lesson in told["lessons"]])
    summarise(run)  # scores and forgetting verify too
    states = [load_state(folder) for folder in folders]
    return [(state.values, sorted(state.tensors), state.memory and state.memory.rows) for state in states]


def _drawn_and_gone_on(run: Path, file: Path) -> list:
    return [drawn(run, file), _gone_on(run, file)]


def _published(folder: Path, file: Path) -> dict:
    check_published(folder)
    [adapter] = find_adapters(str(folder))
    return {layer: pair.B.sum().item() for layer, pair in read_update(adapter.folder).layers.items()}


def _doctored(run: Path, file: Path) -> str:
    """Doctor itself never fails: what it finds is the error."""
    if doctor(run).exit_code:
        raise ForgetlessError(f"{file}: found")
    return "nothing found"


def _seal_run(file: Path) -> None:
    try:
        told = json.loads(file.read_bytes())
        file.write_text(json.dumps(sealed({key: one for key, one in told.items() if key != "sha256"})))
    except (ValueError, AttributeError, RecursionError):
        pass  # no record, so no hash


def seal_part(file: Path) -> None:
    folder = next(parent for parent in file.parents if (parent / MANIFEST).is_file())
    told = read_json(folder / MANIFEST)
    told["files"][file.relative_to(folder).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(told))


# ----------------------------------------------------------------------------------------------- audits


def _audit_formats(folder: Path) -> list[Format]:
    folder.mkdir(parents=True)
    record, evidence = audit_records.one()
    (folder / "audit.json").write_text(json.dumps(sealed(record | {"format": 1, "evidence": evidence["sha256"]})))
    (folder / "evidence.json").write_text(json.dumps(evidence))
    history = folder / "history.jsonl"
    for _ in range(2):
        number, _ = begin(history, {"reference": "ab", "model 1": "cd"}, None, "2026-05-04T12:30:00Z")
        end(history, number, None, "2026-05-04T12:40:00Z")
    (folder / ".history.jsonl.lock").unlink(missing_ok=True)
    whole = read_history(history)

    def attempts(folder: Path, file: Path) -> list[dict]:
        lines = read_history(history)
        return whole if lines == whole[: len(lines)] else lines  # a chain does not show that its end is gone

    def page(folder: Path, file: Path) -> str:
        return redraw(folder, folder / "page").read_text()

    files = folder / "audit.json", folder / "evidence.json"
    return [
        Format("audit.json and evidence.json", folder, files, page, covered=True),
        Format("evidence.json, verified", folder, files[1:], lambda _, file: _verified(file), covered=True),
        Format("history.jsonl", folder, (history,), attempts, covered=True),
    ]


def _verified(file: Path) -> str:
    if differences := verify(file):
        raise ForgetlessError(f"{file}: {differences}")
    return "holds"


# ------------------------------------------------------------------------------------ what users write


def _users_formats(folder: Path) -> list[Format]:
    folder.mkdir(parents=True)
    rows = [
        {"prompt": f"What colour has the {key}? Answer:", "completion": f" {value}"} for key, value in COLOURS.items()
    ]
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    chat = [{"messages": turns, "domain": "sums"},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            {"instruction": "Add.", "input": "2 and 2", "output": 4}, {"text": "The sky is blue."},
            {"prompt": "Which?", "answer": "a", "options": ["a", "b"]}]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    (folder / "options.json").write_text(json.dumps(["blue", "green", "red"]))
    (folder / "text.txt").write_text("The sky is blue.\n\nThe grass is green.\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "pairs.parquet")
    data = {"rows.jsonl": {"bytes": (folder / "rows.jsonl").stat().st_size,
                           "sha256": packages.sha256_of(folder / "rows.jsonl")}}  # fmt: skip
    record = {"wheel_sha256": PACKAGE.sha256, "members": list(PACKAGE.members), "files": data}
    (folder / packages.MARKER).write_text(json.dumps(record))
    for name, text in (("policy.yaml", POLICY), ("stream.yaml", STREAM), ("config.yaml", CONFIG)):
        (folder / name).write_text(text)
    files = tuple(folder / name for name in ("rows.jsonl", "chat.jsonl", "rows.json", "pairs.parquet"))
    yaml_files = {name: (folder / f"{name}.yaml",) for name in ("policy", "stream", "config")}
    return [
        Format("rows", folder, files, lambda _, file: read_rows(file).rows),
        Format("rows, bad ones left out", folder, files, lambda _, file: read_rows(file, on_bad_row="skip").rows),
        Format("options", folder, (folder / "options.json",), lambda _, file: read_options(file)),
        Format("text", folder, (folder / "text.txt", files[0]), lambda _, file: read_text(str(file)).rows),
        Format("stream", folder, yaml_files["stream"], lambda _, file: load_stream(file), load=yaml.safe_load),
        Format("rows of a stream", folder, (files[0], *files[2:]), lambda at, _: load_stream(at / "stream.yaml")),
        Format("configuration", folder, yaml_files["config"], lambda _, file: _configured(file), load=yaml.safe_load),
        Format("a package's record", folder, (folder / packages.MARKER,), _whole_package, covered=True),
        Format("policy", folder, yaml_files["policy"], lambda _, file: read_policy(file).budgets, load=_plain_yaml),
    ]


def _whole_package(folder: Path, file: Path) -> bool:
    if not packages._whole(folder, PACKAGE):
        raise ForgetlessError(f"{file}: fetched again")
    return True


def _configured(file: Path) -> LearnConfig | None:
    return parse_learn(["--config", str(file)])


def _plain_yaml(text: str) -> Any:
    return yaml.load(text, yaml.BaseLoader)


# --------------------------------------------------------------------------------- anybody's adapters


def _adapter_formats(root: Path, tiny: str) -> list[Format]:
    folder = root / "adapter"
    shutil.copytree(root / "run" / "adapter", folder, ignore=shutil.ignore_patterns(MANIFEST, "README.md"))
    files = tuple(sorted(folder.iterdir()))
    return [
        Format("an adapter", folder, files, lambda at, _: _update(at)),
        Format("an adapter on its base", folder, files, lambda at, _: _on_its_base(at)),
        Format("an adapter, doctor", folder, files, lambda at, _: doctor(at).exit_code),
    ]


def _update(folder: Path) -> list:
    [adapter] = find_adapters(str(folder))
    return sorted(read_update(adapter.folder).layers)


def _on_its_base(folder: Path) -> str | None:
    [subject] = find_subjects(str(folder))
    return subject.adapter_sha256
