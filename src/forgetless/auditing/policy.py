"""A policy: what every audit of a model is held to, in one reviewed file.

    reference: ../releases/april           # what the new model is compared with
    anchor: ../releases/january            # fixed, against slow drift: twelve small losses are one large one
    tasks:
      - {name: invoices, path: invoices.yaml, sha256: 5e1f...}
    texts:
      - {name: manual, path: manual.jsonl, sha256: 09ab...}
    probes:
      - {name: mmlu, sha256: c0de...}      # no path: a packaged probe
    judges:
      - {name: strict, path: judge.py, sha256: 77aa...}   # the function `strict` in it
    budgets: {max-drop: {invoices: 2pp, mmlu: 1pp}, max-kl: 0.05}
    anchor-budgets: {max-drop: {invoices: 5pp}}
    window: 512                            # of plain text, in tokens; and how far apart they begin
    stride: 256
    chat-template: own                     # each model in its own; reference: all in the reference's
    confidence: 0.95
    time-limit: 30min
    waivers:
      - {max-drop: mmlu, owner: Ana, reason: retired in May, until: 2026-05-31}

The hashes are of a text's or judge's file, and of a task's or probe's rows that are measured (each once, and none that
stands in training rows) with their scoring; leave one out, and the error says it. The file is read strictly: an unknown
or doubled key is an error, since a budget that is misspelt would guard nothing.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from forgetless.auditing.budgets import MAX_DROP, MAX_KL, Budget, read_budgets, resolve
from forgetless.auditing.judges import judged_names
from forgetless.auditing.measures import AGAINST, ANCHOR, KL_CLIP, REFERENCE
from forgetless.auditing.probes import SAFETY
from forgetless.auditing.verdict import Terms, Waiver
from forgetless.config import TEMPLATES
from forgetless.data.packages import sha256_of
from forgetless.errors import UsageError, nearest, short

KEYS = (
    "reference", "anchor", "tasks", "texts", "probes", "judges", "window", "stride", "chat-template", "budgets",
    "anchor-budgets",
    "confidence", "time-limit", "kl-clip", "waivers",
)  # fmt: skip
SOURCES = ("tasks", "texts", "probes", "judges")
WAIVER_KEYS = (MAX_DROP, MAX_KL, "against", "owner", "reason", "until")
SECONDS = {"s": 1, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Source:
    """A task, text, probe or judge with the hash of what it must be.

    For a text or judge that of its file, for a task or probe that of its test rows and of how they are scored, which
    also follows rows that lie in other files than the one that is named. Empty where the policy has none yet.
    """

    name: str
    path: Path | None
    sha256: str

    def wrong(self, found: str) -> str | None:
        """What is wrong with data of this hash; None if nothing."""
        if not self.sha256:
            return f"{self.name}: `sha256:` is missing; these data have sha256: {found}"
        if found != self.sha256:
            return (
                f"{self.name}: the policy was made for sha256 {self.sha256[:12]}..., this is {found[:12]}...; restore "
                f"the data, or have the policy changed to sha256: {found}"
            )
        return None


@dataclass(frozen=True)
class Policy:
    """A policy that was read; models and paths of sources are relative to its file."""

    file: Path
    sha256: str  # of the file's bytes
    reference: str
    anchor: str | None
    tasks: tuple[Source, ...]
    texts: tuple[Source, ...]
    probes: tuple[Source, ...]
    judges: tuple[Source, ...]
    budgets: tuple[Budget, ...]
    anchor_budgets: tuple[Budget, ...]
    confidence: float
    time_limit: float | None  # seconds
    kl_clip: float  # nats per token
    window: int | None  # tokens, of plain text
    stride: int | None
    chat_template: str  # "own" or "reference"
    waivers: tuple[Waiver, ...]

    def terms(self, today: datetime.date) -> Terms:
        """What a model is held to on that day."""
        return Terms(today, self.budgets, self.anchor_budgets, self.confidence, self.waivers)

    def check_files(self) -> None:
        """Texts and judges are the files that the policy was made for."""
        files = [*self.texts, *self.judges]
        self._check(files, {one.name: _hash(one.path, f"{self.file}: {one.name}") for one in files if one.path})

    def check_rows(self, found: Mapping[str, str]) -> None:
        """Tasks and probes have the rows that the policy was made for; `found` are their hashes by name."""
        self._check([*self.tasks, *self.probes], found)

    def _check(self, sources: Iterable[Source], found: Mapping[str, str]) -> None:
        if wrong := [said for source in sources if (said := source.wrong(found[source.name]))]:
            raise UsageError("\n".join(f"{self.file}: {said}" for said in wrong))


def read_policy(file: str | Path) -> Policy:
    """The policy of a YAML file; every error names the file and the key."""
    file = Path(file).expanduser()
    content = _bytes(file)
    told = _mapping(_yaml(file, content), KEYS, str(file))
    sources = {
        kind: _sources(told.get(kind), f"{file}: {kind}", file.parent, needs_path=kind != "probes") for kind in SOURCES
    }
    _distinct([source.name for found in sources.values() for source in found], str(file))
    drops = [*(source.name for source in (*sources["tasks"], *sources["probes"])), *_judged(sources)]
    texts = [source.name for source in sources["texts"]]
    budgets = _budgets(told, "budgets", drops, texts, file)
    anchor_budgets = _budgets(told, "anchor-budgets", drops, texts, file)
    anchor = _text(told.get("anchor"), f"{file}: anchor") if "anchor" in told else None
    if anchor_budgets and not anchor:
        raise UsageError(f"{file}: anchor-budgets: there is no `anchor:`; name the model that they compare with")
    waivers = _waivers(told.get("waivers"), f"{file}: waivers", {REFERENCE: budgets, ANCHOR: anchor_budgets})
    return Policy(
        file=file,
        sha256=hashlib.sha256(content).hexdigest(),
        reference=_text(told.get("reference"), f"{file}: reference"),
        anchor=anchor,
        **sources,
        budgets=budgets,
        anchor_budgets=anchor_budgets,
        confidence=_number(told.get("confidence", 0.95), 0.5, 1.0, f"{file}: confidence", "0.95"),
        time_limit=_seconds(told["time-limit"], f"{file}: time-limit") if "time-limit" in told else None,
        kl_clip=_number(told.get("kl-clip", KL_CLIP), 1e-9, 1e9, f"{file}: kl-clip", "1.0 (nats per token)"),
        window=_tokens(told, "window", file),
        stride=_tokens(told, "stride", file),
        chat_template=_one_of(told.get("chat-template", TEMPLATES[0]), TEMPLATES, f"{file}: chat-template"),
        waivers=waivers,
    )


# ---------------------------------------------------------------- the file


class _Loader(yaml.SafeLoader):
    """YAML in which no key hides another of the same name."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for (key, _), name in zip(node.value, keys, strict=True):
            if keys.count(name) > 1:
                raise UsageError(
                    f"line {key.start_mark.line + 1}: {name!r} is there twice; the last would hide the first"
                )
        return super().construct_mapping(node, deep)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"no policy {str(file)!r} ({error.strerror})") from error


def _yaml(file: Path, content: bytes) -> Any:
    try:
        return yaml.load(content.decode("utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 (byte {error.start + 1}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date such as 2026-02-30 is a ValueError
        raise UsageError(f"{file}: not YAML: {error}") from error
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def _hash(path: Path, where: str) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise UsageError(f"{where}: {path} cannot be read ({error.strerror})") from error


# ---------------------------------------------------------------- its parts


def _sources(told: Any, place: str, folder: Path, needs_path: bool) -> tuple[Source, ...]:
    found = []
    for number, entry in enumerate(_list(told, place), start=1):
        where = f"{place}, entry {number}"
        entry = _mapping(entry, ("name", "path", "sha256"), where)
        name = _text(entry.get("name"), f"{where}: name")
        if needs_path and "path" not in entry:
            raise UsageError(f"{where} ({name}): `path:` is missing")
        path = _path(_text(entry["path"], f"{where}: path"), folder) if "path" in entry else None
        sha256 = str(entry.get("sha256") or "")
        if sha256 and not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise UsageError(f"{where} ({name}): sha256: expected 64 hexadecimal digits, found {sha256!r}")
        found.append(Source(name, path, sha256))
    return tuple(found)


def _path(told: str, folder: Path) -> Path:
    return Path(told) if told.startswith("hub:") else folder / Path(told).expanduser()


def _judged(sources: dict[str, tuple[Source, ...]]) -> list[str]:
    """What other judges than the patterns say about a packaged safety probe."""
    own = [judge.name for judge in sources["judges"]]
    probes = [probe.name for probe in sources["probes"] if probe.path is None and probe.name in SAFETY]
    return [name for probe in probes for name in list(judged_names(probe, own).values())[1:]]


def _budgets(told: dict, key: str, drops: list[str], texts: list[str], file: Path) -> tuple[Budget, ...]:
    if key not in told:
        return ()
    return resolve(read_budgets(told[key], f"{file}: {key}"), drops, texts, f"{file}: {key}: ")


def _waivers(told: Any, place: str, budgets: dict[str, tuple[Budget, ...]]) -> tuple[Waiver, ...]:
    found = []
    for number, entry in enumerate(_list(told, place), start=1):
        where = f"{place}, entry {number}"
        entry = _mapping(entry, WAIVER_KEYS, where)
        options = [option for option in (MAX_DROP, MAX_KL) if option in entry]
        if len(options) != 1:
            raise UsageError(f"{where}: expected one of `{MAX_DROP}: NAME` and `{MAX_KL}: NAME`, found {len(options)}")
        against = str(entry.get("against", REFERENCE))
        if against not in AGAINST:
            raise UsageError(f"{where}: against: no {against!r}{nearest(against, AGAINST)}")
        option, name = options[0], _text(entry[options[0]], f"{where}: {options[0]}")
        known = [budget.name for budget in budgets[against] if budget.option == option]
        if name not in known:
            raise UsageError(f"{where}: {option}: no budget for {name!r}{nearest(name, known) if known else ''}")
        owner, reason = (_text(entry.get(key), f"{where}: {key}") for key in ("owner", "reason"))
        found.append(Waiver(option, name, owner, reason, _date(entry.get("until"), f"{where}: until"), against))
    return tuple(found)


def _mapping(told: Any, keys: tuple[str, ...], place: str) -> dict:
    if not isinstance(told, dict):
        raise UsageError(f"{place}: expected keys such as {', '.join(keys[:3])}; found {short(repr(told))}")
    for key in told:
        if key not in keys:
            raise UsageError(f"{place}: unknown key {key!r}{nearest(str(key), keys)}")
    return told


def _list(told: Any, place: str) -> list:
    if told is None:
        return []
    if not isinstance(told, list):
        raise UsageError(f"{place}: expected a list, one entry a line beginning with '-'; found {short(repr(told))}")
    return told


def _text(told: Any, place: str) -> str:
    if not isinstance(told, str) or not told.strip():
        raise UsageError(f"{place}: expected text, found {short(repr(told))}")
    return told


def _number(told: Any, least: float, below: float, place: str, example: str) -> float:
    if isinstance(told, bool) or not isinstance(told, int | float) or not least <= told < below:
        raise UsageError(
            f"{place}: expected a number from {least:g} to below {below:g}, such as {example}; found {told!r}"
        )
    return float(told)


def _tokens(told: dict, key: str, file: Path) -> int | None:
    if key in told and (isinstance(told[key], bool) or not isinstance(told[key], int) or told[key] < 1):
        raise UsageError(f"{file}: {key}: expected a number of tokens, such as 512; found {told[key]!r}")
    return told.get(key)


def _one_of(told: Any, known: tuple[str, ...], place: str) -> str:
    if told not in known:
        raise UsageError(f"{place}: no {told!r}{nearest(str(told), known)}")
    return told


def _seconds(told: Any, place: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", told.strip()) if isinstance(told, str) else None
    if not found or float(found[1]) == 0:
        raise UsageError(f"{place}: expected a time above 0 with its unit, such as 30min, 90s or 2h; found {told!r}")
    return float(found[1]) * SECONDS[found[2]]


def _date(told: Any, place: str) -> datetime.date:
    if isinstance(told, datetime.date) and not isinstance(told, datetime.datetime):
        return told
    try:
        return datetime.date.fromisoformat(str(told))
    except ValueError:
        raise UsageError(f"{place}: expected a day such as 2026-12-31, found {told!r}") from None


def _distinct(names: list[str], place: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{place}: {names.count(name)} sources are called {name!r}; give each its own name")
