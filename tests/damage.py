"""Ways in which a file gets broken: bytes that change, go, come twice or change places, and JSON of another shape."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

NESTED = "[" * 2000 + "]" * 2000
PLACEHOLDER = "\ue000nested\ue000"
SPLICED = (
    b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\r\n", b'"', b"}", b"{", b"[", b":", b",",
    b"NaN", b"1e999", b"\\ud800", b"\\u0000", b"- ", b"!!python/object:os.system ", b"&a *a", b"../", b"9" * 5000,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", "x", "\x00",
    "\ud800", "../../etc/passwd", "/etc/passwd", "a" * 5000, "1", [],
    [1], ["x"], {}, {"x": 1}, [[]], [None], PLACEHOLDER,
)  # fmt: skip


# ------------------------------------------------------------------------------------------- bytes


def flip_a_bit(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def set_bytes(data: bytes, draw: random.Random) -> bytes:
    at, count = _piece(data, draw)
    return data[:at] + draw.randbytes(count) + data[at + count :]


def insert(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.choice((*SPLICED, draw.randbytes(draw.randint(1, 9)))) + data[at:]


def delete(data: bytes, draw: random.Random) -> bytes:
    at, count = _piece(data, draw)
    return data[:at] + data[at + count :]


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def double(data: bytes, draw: random.Random) -> bytes:
    at, count = _piece(data, draw)
    return data[: at + count] + data[at:]


def swap(data: bytes, draw: random.Random) -> bytes:
    a, b, c, d = sorted(draw.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def zero(data: bytes, draw: random.Random) -> bytes:
    at, count = _piece(data, draw)
    return data[:at] + bytes(count) + data[at + count :]


def _piece(data: bytes, draw: random.Random) -> tuple[int, int]:
    at = draw.randrange(len(data))
    return at, draw.randint(1, min(len(data) - at, draw.choice((1, 4, 64, len(data)))))


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip_a_bit, set_bytes, insert, delete, truncate, double, swap, zero,
)  # fmt: skip


# -------------------------------------------------------------------------------------------- JSON


def another_shape(value: Any, draw: random.Random) -> Any:
    """The JSON value with one place changed: another type, a key gone or renamed, an entry gone or twice."""
    places = list(_places(value))
    if not places:
        return draw.choice(VALUES)
    holder, key = draw.choice(places)
    match draw.choice(("replace", "replace", "remove", "rename", "double")):
        case "replace":
            holder[key] = draw.choice(VALUES)
        case "remove":
            del holder[key]
        case "rename" if isinstance(holder, dict):
            holder[draw.choice(("x", "", "\x00", "../x", key + "x"))] = holder.pop(key)
        case _ if isinstance(holder, list):
            holder.insert(key, holder[key])
        case _:
            holder[key] = [holder[key]]
    return value


def _places(value: Any):
    """(container, key) of every value inside."""
    told = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(told):
        yield value, key
        yield from _places(inner)


def as_text(value: Any) -> str:
    return json.dumps(value).replace(json.dumps(PLACEHOLDER), NESTED)


def reshaped(data: bytes, draw: random.Random, load: Callable[[str], Any] = json.loads) -> bytes:
    """A JSON file, or a line of a JSONL file, of another shape; `load` reads a format of which JSON is a part."""
    text = data.decode()
    try:
        return as_text(another_shape(load(text), draw)).encode()
    except json.JSONDecodeError:
        lines = text.splitlines()
        at = draw.randrange(len(lines))
        lines[at] = as_text(another_shape(json.loads(lines[at]), draw))
        return ("\n".join(lines) + "\n").encode()
