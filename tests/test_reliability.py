"""Damage to a run folder or a model, kind after kind: a named error with path and remedy, and what was there stays.

Shown elsewhere: options, tasks and rows that changed, another base's weights, a changed adapter, two processes
(test_learn); pickles, other people's adapters (test_subjects); archives whose members would escape (test_packages).
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from forgetless.checkup.doctor import doctor
from forgetless.checkup.environment import TESTED
from forgetless.cli import main
from forgetless.config import LearnConfig
from forgetless.data.tasks import Stream
from forgetless.errors import ForgetlessError, RunError, UsageError
from forgetless.learning.stream import learn
from forgetless.report.summary import summarise
from forgetless.runs import folder as folders
from forgetless.runs.folder import FORMAT, MANIFEST, RunFolder, complete, read_json, read_lines, write_json
from forgetless.runs.seal import read_sealed, sealed
from forgetless.runs.shapes import Each, Maybe, misfit
from forgetless.subjects.models import find_subjects

OPTIONS = {"learning_rate": 2e-2, "num_train_epochs": 1.0, "batch_size": 8, "r": 2, "target_modules": ["q_proj"],
           "max_length": 64, "device": "cpu", "precision": "fp32", "forgetting_prompts": 0,
           "method": "replay"}  # fmt: skip


def config(tiny, stream, folder, **more) -> LearnConfig:
    return LearnConfig(**(OPTIONS | {"model": tiny, "stream": stream, "output_dir": str(folder)} | more))


@pytest.fixture(scope="module")
def ran(tiny, two, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "two"
    learn(config(tiny, two, folder))
    return folder


@pytest.fixture
def run(ran, tmp_path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(ran, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def same(folder: Path, before: dict[str, bytes]) -> bool:
    """Equal but for times and for the report, which names the folder."""
    now = contents(folder)
    return all(now[name] == old for name, old in before.items() if "times" not in name and "report" not in name)


def problems(folder: Path, base: str | None = None) -> str:
    found = doctor(folder, base)
    told = "\n".join(f"{one.check}: {one.said}" for one in found.findings if one.level == "problem")
    assert found.exit_code == (2 if told else 0)
    return told


# ------------------------------------------------------------------------------------------ damaged files

ADAPTER = "tasks/02-sizes/adapter/adapter_model.safetensors"
DAMAGES = {
    "bit flip": (ADAPTER, lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x01"), "has changed"),
    "truncation": (ADAPTER, lambda file: os.truncate(file, 100), "has changed"),
    "missing file": ("tasks/01-colours/method.json", Path.unlink, "is missing"),
    "extra file": ("tasks/01-colours/method.safetensors", lambda file: file.write_bytes(b"x"), "is not listed"),
    "rows of the memory": ("tasks/02-sizes/memory/rows.jsonl", lambda file: os.truncate(file, 50), "has changed"),
    "scores": ("tasks/02-sizes/scores/scores.json", lambda file: file.write_text("{}"), "has changed"),
    "missing manifest": ("tasks/02-sizes/manifest.json", Path.unlink, "is missing beside"),
    "broken manifest": ("tasks/02-sizes/manifest.json", lambda file: os.truncate(file, 40), "broken JSON"),
    "missing task": ("tasks/01-colours", shutil.rmtree, "02-sizes was learnt after it"),
    "record": ("run.json", lambda file: file.write_text(file.read_text().replace("0.02", "0.03")), "has changed"),
    "record of another kind": ("run.json", lambda file: file.write_text("[]"), "holds no object"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_by_whatever_reads_a_run_and_nothing_is_changed(kind, run, tiny, capsys):
    """`learn` (below), `report`, `audit RUN`, `blend BASE RUN` and `doctor` verify before they use."""
    name, damage, said = DAMAGES[kind]
    damage(run / name)
    before = contents(run)
    for command in (["report", str(run)], ["doctor", str(run)]):
        assert main(command) == (1 if command[0] == "report" else 2)
        told = " ".join("".join(capsys.readouterr()).split())
        assert said in told and Path(name).name in told and ("estore" in told or "emove" in told)
    for reads in (lambda: summarise(run), lambda: find_subjects(str(run)), lambda: _blended(tiny, run)):
        if kind == "scores" and reads.__code__.co_names[0] != "summarise":
            continue  # the models are whole
        with pytest.raises(RunError, match=said):
            reads()
    assert contents(run) == before


def _blended(tiny: str, run: Path) -> None:
    from forgetless.config import BlendConfig
    from forgetless.geometry.borders import blend_run

    blend_run(BlendConfig(tiny, str(run), max_kl=("0.05",)))


@pytest.mark.parametrize("kind", ["truncation", "rows of the memory", "missing task", "record"])
def test_learning_does_not_go_on_from_damage(kind, run, tiny, two):
    name, damage, said = DAMAGES[kind]
    damage(run / name)
    before = contents(run)
    with pytest.raises(RunError, match=said):
        learn(config(tiny, two, run))
    assert contents(run) == before


def test_a_base_scored_elsewhere_is_verified_and_must_be_of_the_same_rows(run, tiny, two, tmp_path):
    first, second = two.tasks
    other = Stream("two", (first, replace(second, test=second.test[1:])))
    with pytest.raises(RunError, match="its task sizes has other rows"):
        learn(config(tiny, other, tmp_path / "new"), base_scores=run)
    file = run / "tasks" / "00-base" / "scores" / "predictions.jsonl"
    os.truncate(file, 10)
    with pytest.raises(RunError, match=r"predictions\.jsonl: has changed"):
        learn(config(tiny, two, tmp_path / "newer"), base_scores=run)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../secret", "adapter/../../x", "a\\b", "a\0b"])
def test_a_manifest_cannot_name_what_lies_outside_its_folder(name, run):
    file = run / "tasks" / "01-colours" / MANIFEST
    told = read_json(file)
    write_json(file, told | {"files": told["files"] | {name: "0" * 64}})
    with pytest.raises(RunError, match="which is not a file of this folder; restore"):
        complete(file.parent)


def test_names_in_a_record_cannot_leave_the_run(run):
    told = read_json(run / "run.json")
    told["lessons"][0]["name"] = "../../../elsewhere"
    write_json(run / "run.json", sealed(told))
    with pytest.raises(RunError, match=r"lessons\[0\]\.name: expected a name that can be a folder's"):
        summarise(run)


@pytest.mark.parametrize(
    "found, said",
    [(FORMAT + 1, "of a newer forgetless"), (FORMAT - 1, "of an older forgetless"), (None, "format None")],
)
def test_a_folder_of_another_format(found, said, run):
    for file in (run / "run.json", run / "tasks" / "01-colours" / MANIFEST):
        whole = file.read_text()
        write_json(file, sealed(json.loads(whole) | {"format": found}))
        with pytest.raises(RunError, match=f"{file.name}: format .*{said}" if found is not None else said):
            summarise(run)
        file.write_text(whole)


def test_a_run_may_be_moved_and_copied_and_clocks_may_jump_back(run, ran, tiny, two, tmp_path, monkeypatch):
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    run.rename(moved)
    for path in moved.rglob("*"):
        os.utime(path, (4e9, 4e9))  # written in the year 2096
    monkeypatch.setattr("time.time", lambda: 1.0)  # and now it is 1970
    before = contents(moved)
    learn(config(tiny, two, moved))
    assert (
        same(moved, before) and contents(moved)["tasks/01-colours/times.json"] == before["tasks/01-colours/times.json"]
    )
    learn(config(tiny, two, tmp_path / "third"))
    assert same(tmp_path / "third", contents(ran))


def merge_less(folder: Path) -> None:
    told = json.loads((folder / "tokenizer.json").read_text())
    told["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(told))


def greet(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text("Hello. " + file.read_text())


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def scaled(base: Path) -> None:
    config = read_json(base / "config.json")
    write_json(base / "config.json", config | {"rms_norm_eps": 0.5})


BASES = {"weights": other_weights, "tokenizer": merge_less, "chat template": greet, "configuration": scaled}


@pytest.mark.parametrize("what", [*BASES, "data", "options", "older format", "two processes", "extra file", "NaN"])
def test_what_does_not_fit_is_named_and_leaves_everything_as_it_was(what, ran, run, tiny, two, tmp_path, monkeypatch):
    """One command on a whole run for each: path and remedy in the error, and not a byte of the folder differs."""
    base, told = Path(shutil.copytree(tiny, tmp_path / "base")), config(tiny, two, run)
    remedy = "another output_dir"
    if what in BASES:
        BASES[what](base)
        why = {"configuration": r"equal weights, but config.json has rms_norm_eps \(1e-06, not 0.5\)"}
        said = f"run.json: was learnt on another base: {why.get(what, f'its {what} had')}"
        told = replace(told, model=str(base))
    elif what == "data":
        changed = Stream("two", (replace(two.tasks[0], train=two.tasks[0].train[1:]), two.tasks[1]))
        told, said = replace(told, stream=changed), r"run.json: task 1 \(colours\) has changed: its training rows"
    elif what == "options":
        told, said = replace(told, learning_rate=0.5), "run.json: this run was begun with learning_rate=0.02, now it is"
    elif what == "older format":
        write_json(run / "run.json", sealed(read_json(run / "run.json") | {"format": FORMAT - 1}))
        said, remedy = "run.json: format 0 instead of 1", "go on with the version that wrote it"
    elif what == "two processes":
        monkeypatch.setattr(folders.FileLock, "acquire", _taken)
        said = "run: another process is working in this run folder; wait for it"
    elif what == "extra file":
        (run / "tasks" / "01-colours" / "stray").write_text("x")
        said, remedy = "stray: is not listed since the folder was written", "or remove"
    else:
        shutil.rmtree(run / "tasks" / "02-sizes")
        said = "task 2, step 1: loss nan.*The tasks before and this task's checkpoints are as they were"
        monkeypatch.setattr("forgetless.learning.step.not_finite", lambda *_: "loss nan")
    before = contents(run)
    with pytest.raises(RunError, match=rf"(?s){said}.*{remedy}"):
        learn(told)
    now = contents(run)
    kept = before.keys() if what != "NaN" else [name for name in before if name.startswith("tasks")]
    assert {name: now[name] for name in kept} == {name: before[name] for name in kept}
    assert what == "NaN" or now.keys() == before.keys()


def _taken(lock, timeout: float) -> None:
    raise folders.Timeout(lock.lock_file)


def test_code_that_a_model_brings_is_not_run(tiny, tmp_path, two):
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    told = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "config.json").write_text(json.dumps(told | {"model_type": "evil", "auto_map": names}))
    with pytest.raises(ForgetlessError, match="model"):
        learn(config(str(folder), two, tmp_path / "run"))
    assert not (tmp_path / "ran").exists()
    assert any(one.check == "code" and "not run" in one.said for one in doctor(folder).findings)


# ------------------------------------------------------------------------------- a disk that does not take it


@pytest.mark.parametrize("code, said", [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only"), (errno.EIO, "I")])
def test_a_part_that_cannot_be_written_leaves_what_was_there(code, said, run, monkeypatch):
    before = contents(run)

    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folders.os, "fsync", fail)
    with pytest.raises(RunError, match=rf"adapter: could not be written .*{said}.*unchanged"):  # noqa: SIM117
        with RunFolder(run).publish(run / "adapter") as temporary:
            (temporary / "new").write_text("half")
    with pytest.raises(RunError, match=r"run\.json: could not be written .*unchanged"):
        RunFolder(run).write(run / "run.json", {})
    assert contents(run) == before


@pytest.mark.parametrize("fails", [1, 2])
def test_a_replacement_that_fails_between_its_renames_is_undone(fails, run, monkeypatch):
    """The old folder makes room, the new one takes its name: either may fail."""
    before, real, calls = contents(run), Path.rename, []

    def rename(path: Path, target: Path):
        calls.append(path)
        if len(calls) == fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(RunError, match=r"adapter: could not be written .*unchanged"):  # noqa: SIM117
        with RunFolder(run).publish(run / "adapter") as temporary:
            (temporary / "new").write_text("whole")
    assert contents(run) == before


def test_what_cannot_be_renamed_says_so(run, monkeypatch):
    def rename(path: Path, target: Path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(RunError, match=r"02-sizes: cannot be renamed or removed \(Read-only.*make it writable"):
        folders.discard(run / "tasks" / "02-sizes")


def test_every_new_name_is_flushed_with_the_folder_that_holds_it(tmp_path, monkeypatch):
    """After a power cut a file may be whole and yet have no name, unless the folder that names it was flushed too."""
    flushed, real = [], folders._flush
    monkeypatch.setattr(folders, "_flush", lambda path: flushed.append(path) or real(path))
    run = RunFolder(tmp_path / "runs" / "may" / "one")
    with run.locked():
        assert flushed == [tmp_path / "runs" / "may", tmp_path / "runs", tmp_path]
        flushed.clear()
        run.write(run.config, {})
        assert flushed[-1] == run.root
        flushed.clear()
        with run.publish(run.task(1, "a")) as temporary:
            (temporary / "part").mkdir()
        assert flushed == [run.root, temporary / "manifest.json", temporary / "part", temporary, run.root / "tasks"]
        flushed.clear()
        folders.discard(run.task(1, "a"))
        assert flushed == [run.root / "tasks"]


def test_a_full_disk_stops_learning_and_the_same_command_goes_on(tiny, two, run, capsys):
    """Here the system itself refuses: no file may grow beyond 2 KiB."""
    whole = contents(run)
    shutil.rmtree(run / "tasks" / "02-sizes")
    kept = contents(run / "tasks")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(RunError, match=r"could not be written \(.*File too large.*unchanged. Make room"):
            learn(config(tiny, two, run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(run / "tasks") == kept and read_sealed(run / "run.json")
    learn(config(tiny, two, run))
    assert same(run, whole)


def test_a_folder_that_may_not_be_written(tmp_path, tiny, two, monkeypatch):
    """As root no mode forbids anything, so the system's answer is made up here."""
    real = Path.mkdir

    def forbidden(path: Path, *arguments, **options) -> None:
        if path.name == "run":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        real(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(RunError, match=r"run: cannot be written \(Permission denied\); give another output_dir"):
        learn(config(tiny, two, tmp_path / "run"))


def test_a_file_that_may_not_be_read(run, monkeypatch):
    real = Path.open

    def forbidden(path: Path, *arguments, **options):
        if path.name == "log.jsonl":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(RunError, match=r"log\.jsonl: cannot be read \(Permission denied\); make it readable"):
        summarise(run)


# ------------------------------------------------------------------------------------------------ readers


@pytest.mark.parametrize(
    "text, said",
    [('{"a": NaN}', "NaN is no number"), ('{"a": 1e999}', "1e999 is no number"), ('"\\ud800"', "surrogate"),
     ("[" * 100_000, "broken JSON"), ("9" * 10_000, "digits"), ("", "broken JSON"), ("\ufeff{}", "BOM")],
)  # fmt: skip
def test_what_is_no_json_is_named_with_its_line(text, said, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text("{}\n" + text + "\n")
    if text:
        with pytest.raises(RunError, match=rf"x\.jsonl:2: broken JSON .*{said}|x\.jsonl:2: {said}"):
            read_lines(file)
    file.write_text(text)
    with pytest.raises(RunError, match=rf"x\.jsonl:1: .*{said}"):
        read_json(file)


def test_a_seal_shows_every_change(tmp_path):
    file, told = tmp_path / "x.json", {"format": FORMAT, "b": [1, None, "ü"], "a": 0.1}
    write_json(file, sealed(told))
    assert read_sealed(file) == told
    write_json(file, json.loads(file.read_text()) | {"a": 0.2})
    with pytest.raises(RunError, match="has changed since it was written"):
        read_sealed(file)


def test_misfits_are_told_with_their_place():
    shape = {"tasks": [{"name": str, "rows": int}], "notes": Maybe([str]), "scores": Each((int, float))}
    fits = {"tasks": [{"name": "a", "rows": 3}], "scores": {"x": 0.5}, "more": 1}
    assert misfit(fits, shape) == "" and misfit(fits | {"notes": ["b"]}, shape) == ""
    assert (
        misfit(fits | {"tasks": [{"name": "a", "rows": True}]}, shape)
        == "tasks[0].rows: expected a whole number, found True"
    )
    assert misfit(fits | {"notes": [3]}, shape) == "notes[0]: expected text, found 3"
    assert misfit(fits | {"scores": {"x": None}}, shape) == "scores.x: expected a number, found None"
    assert misfit({"scores": {}}, shape) == "the object has no 'tasks'"
    assert misfit([], shape) == "all of it: expected an object, found []"


# ------------------------------------------------------------------------------------------------- doctor


def test_doctor_finds_a_whole_run_whole(ran, tiny, capsys):
    assert not problems(ran, tiny) and not problems(ran / "adapter", tiny)
    assert not problems(ran / "tasks" / "01-colours") and not problems(Path(tiny))
    assert main(["doctor", str(ran), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "run folder" and told["exit_code"] == 0
    assert {"record", "hashes", "numbers", "effect", "summary", "versions"} <= {
        one["check"] for one in told["findings"]
    }


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda run: shutil.rmtree(run / "adapter"), "adapter: is missing; give the `learn` command again"),
        (lambda run: (run / "adapter" / "manifest.json").unlink(), "adapter/manifest.json: is missing beside"),
        (lambda run: half_a_checkpoint(run), "step-000002/manifest.json: is missing beside"),
    ],
)
def test_doctor_finds_parts_that_are_not_whole(damage, said, run):
    damage(run)
    assert said in problems(run)


def half_a_checkpoint(run: Path) -> None:
    folder = run / "checkpoints" / "02-sizes" / "step-000002"
    folder.mkdir(parents=True)
    (folder / "values.json").write_text("{}")


def test_doctor_on_the_environment(capsys):
    assert main(["doctor"]) in (0, 2)
    told = capsys.readouterr().out
    assert all(word in told for word in ("python", "torch", "peft", "precision", "memory", "cache"))
    pins = dict(
        line.strip().split("==")
        for line in Path(__file__).parents[1].joinpath("constraints.txt").open()
        if "==" in line
    )
    assert {name: pins[name] for name in TESTED} == TESTED


def test_doctor_usage_errors_exit_1(tmp_path, capsys):
    for arguments in (["nowhere/at/all"], [str(tmp_path)], ["--base", "x"], ["--bas", "x"]):
        assert main(["doctor", *arguments]) == 1
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(UsageError, match="nothing to compare it with"):
        doctor(base="x")


def test_doctor_on_adapters(ran, tiny, tmp_path):
    """Bit flips, a base that does not fit, no effect, NaN, an unfinished copy: each is a problem of its own."""
    mine = Path(shutil.copytree(ran / "adapter", tmp_path / "mine"))
    weights = mine / "adapter_model.safetensors"
    tensors = load_file(weights)

    def rewritten(change) -> str:
        save_file({name: change(name, tensor.clone()) for name, tensor in tensors.items()}, weights, {"format": "pt"})
        return problems(mine, tiny)

    assert "unchanged" in rewritten(lambda name, tensor: tensor + 1)
    (mine / MANIFEST).unlink()
    assert not rewritten(lambda name, tensor: tensor)
    idle = rewritten(lambda name, tensor: tensor * ("lora_A" in name))
    assert "effect: " in idle and "changes nothing" in idle and "answers exactly as" in idle
    assert "holds NaN or infinity" in rewritten(lambda name, tensor: tensor.fill_(torch.nan))
    rewritten(lambda name, tensor: tensor)
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    base = load_file(other / "model.safetensors")
    base["model.norm.weight"][0] += 1
    save_file(base, other / "model.safetensors", {"format": "pt"})
    assert "was learnt on a base with another weights than" in problems(mine, str(other))
    assert "which has another weights than" in problems(ran, str(other))
    weights.unlink()
    assert "complete: " in problems(mine)
    torch.save(tensors, mine / "adapter_model.bin")
    assert "the weights are a pickle" in problems(mine)


def test_doctor_compares_tokenizer_and_template_too(ran, tiny, tmp_path):
    """Of a run, by its record; of one of its adapters, by the model card; of another trainer's, which it brings."""
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    template = other / "chat_template.jinja"
    template.write_text("Hello. " + template.read_text())
    told = json.loads((other / "tokenizer.json").read_text())
    told["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(told))
    for place in (ran, ran / "adapter"):
        assert "another tokenizer and another chat template than" in problems(place, str(other))
    theirs = Path(shutil.copytree(ran / "adapter", tmp_path / "theirs"))
    (theirs / "README.md").unlink()
    (theirs / MANIFEST).unlink()
    brought = AutoTokenizer.from_pretrained(other)
    brought.add_tokens(["<new>"])
    brought.save_pretrained(theirs)
    notes = " ".join(one.said for one in doctor(theirs, tiny).findings if one.level == "note")
    assert "its tokenizer has 1 tokens more" in notes and "its chat template differs" in notes


def test_a_folder_that_a_kill_left_under_another_name_is_named_and_put_back(run, tiny, two):
    """Between the two renames of a replacement: readers name it, and the command puts it back, rows gone or not."""
    task = run / "tasks" / "01-colours"
    whole = contents(run)
    task.rename(task.with_name(f".{task.name}.previous"))
    moved = contents(run)
    for reads in (lambda: summarise(run), lambda: find_subjects(str(run))):
        with pytest.raises(RunError, match=r"01-colours: a command is replacing .* command again, which puts it back"):
            reads()
    assert "at work: " in problems(run) and "puts it back" in problems(run)
    assert contents(run) == moved
    learn(config(tiny, Stream("two", (replace(two.tasks[0], train=(), test=(), gone="deleted"), two.tasks[1])), run))
    assert contents(task) == {
        name.removeprefix("tasks/01-colours/"): data for name, data in whole.items() if "01-colours" in name
    }
    (run / "tasks" / ".02-sizes.previous").mkdir()  # a kill after the second one leaves only this
    assert not problems(run) and any(".02-sizes.previous: left by" in one.said for one in doctor(run).findings)


def test_doctor_on_full_weights(tiny, tmp_path):
    mine = Path(shutil.copytree(tiny, tmp_path / "mine"))
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (mine / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors: model.norm.weight of the index is not there" in problems(mine)
    (mine / "model.safetensors.index.json").unlink()
    os.truncate(mine / "model.safetensors", 5000)
    assert "damaged or cut short" in problems(mine)
    (mine / "model.safetensors").unlink()
    assert "complete: " in problems(mine)
