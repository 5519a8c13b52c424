"""Texts and answers -> windows of tokens, in which each position that counts is measured exactly once.

A window is what goes through a model together. A text longer than a window is cut into several, `stride` tokens apart;
where they overlap, the later one only gives context. A token that begins every text begins every window, as models
that were trained with one read nonsense without it; it counts towards the length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile, zip_longest

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from forgetless.data.batches import Encoder
from forgetless.data.tasks import Row
from forgetless.errors import DataError, UsageError


@dataclass(frozen=True)
class Window:
    """Tokens, and the positions among them at which the distribution over the next token is measured."""

    document: int  # the number of its text or row
    ids: tuple[int, ...]
    measured: tuple[bool, ...]  # one for each token
    places: tuple[int, ...]  # of the next token in its document, one for each measured position
    targets: tuple[int, ...]  # the next token itself


@dataclass(frozen=True)
class Windows:
    """The windows of a corpus in the order of its documents."""

    windows: tuple[Window, ...]
    documents: int  # texts or rows that were given, with those that are left out
    settings: dict[str, int]  # length and stride in tokens, or the longest row
    content: str = field(repr=False)  # sha256 of the texts or rows
    notes: tuple[str, ...] = ()  # counted warnings

    @cached_property
    def borders(self) -> np.ndarray:
        """(windows + 1,): the measured positions of window i have the numbers borders[i] to borders[i + 1]."""
        return np.cumsum([0, *(len(window.targets) for window in self.windows)])

    @property
    def positions(self) -> int:
        return int(self.borders[-1])

    @cached_property
    def document(self) -> np.ndarray:
        """(positions,)"""
        return np.repeat([window.document for window in self.windows], np.diff(self.borders))

    @cached_property
    def place(self) -> np.ndarray:
        """(positions,): the place of the predicted token in its document."""
        return np.concatenate([np.array(window.places, int) for window in self.windows])

    @cached_property
    def target(self) -> np.ndarray:
        """(positions,): the token that follows in the text. The measure does not depend on it."""
        return np.concatenate([np.array(window.targets, int) for window in self.windows])

    @cached_property
    def before(self) -> np.ndarray:
        """(positions,): the token that stands before the predicted one."""
        return np.concatenate([np.array(window.ids)[list(window.measured)] for window in self.windows])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of every token and which of them are measured."""
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(json.dumps([window.document, window.ids, window.measured, window.places]).encode())
        return digest.hexdigest()

    def batches(self, tokens: int) -> list[list[int]]:
        """Numbers of windows that go together, the longest first: rows x longest row is at most `tokens`."""
        batches: list[list[int]] = []
        for i in sorted(range(len(self.windows)), key=lambda i: -len(self.windows[i].ids)):
            if not batches or (len(batches[-1]) + 1) * len(self.windows[batches[-1][0]].ids) > tokens:
                batches.append([])
            batches[-1].append(i)
        return batches

    def collate(self, numbers: Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, mask (1 where there is a token), and True at measured positions: (rows, longest) each."""
        chosen = [self.windows[i] for i in numbers]
        shape = len(chosen), max(len(window.ids) for window in chosen)
        ids, mask, keep = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        for row, window in enumerate(chosen):
            n = len(window.ids)
            ids[row, :n] = torch.tensor(window.ids)
            mask[row, :n] = 1
            keep[row, :n] = torch.tensor(window.measured)
        return ids.to(device), mask.to(device), keep.bool().to(device)


def text_windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int = 512, stride: int | None = None
) -> Windows:
    """Windows of `length` tokens, `stride` apart (default: they do not overlap).

    Every token of a text is predicted once, but for the first, which nothing precedes. Raises `DataError` where no
    text has two tokens.
    """
    stride = length if stride is None else stride
    if length < 2 or not 1 <= stride <= length:
        raise UsageError(
            f"windows of {length} tokens, {stride} apart: a window has at least 2 tokens, and the stride is from 1 to "
            "the window's length, so that no token is left out"
        )
    encoded = [_encode(text, tokenizer) for text in texts]
    windows = [window for i, ids in enumerate(encoded) for window in _cut(i, ids, tokenizer, length, stride)]
    return _of_texts(texts, encoded, windows, {"length": length, "stride": stride})


def continuation_windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, start: int, length: int = 512, stride: int | None = None
) -> Windows:
    """Windows of at most `length` tokens for an encoder-decoder: the encoder reads a piece, the decoder continues it.

    The pieces follow one another and have half a window each, less the end token of the one and the `start` of the
    other; the first is half of a shorter text. Every token behind the first piece is predicted once. Raises
    `DataError` where no text has two tokens.
    """
    half = length // 2 - 1
    if half < 1 or stride is not None:
        raise UsageError(
            f"windows of {length} tokens, {stride or half} apart: of an encoder-decoder's window the decoder continues "
            "what the encoder reads, so it has at least 4 tokens, and no stride"
        )
    encoded = [_encode(text, tokenizer) for text in texts]
    between = (tokenizer.eos_token_id, start)
    windows = [window for i, ids in enumerate(encoded) for window in _continued(i, ids, between, half)]
    return _of_texts(texts, encoded, windows, {"length": length, "stride": half})


def _of_texts(
    texts: Sequence[str], encoded: list[list[int]], windows: list[Window], settings: dict[str, int]
) -> Windows:
    if not windows:
        raise DataError(f"{len(texts)} texts, and none has two tokens: there is nothing to predict; give longer text")
    short, longest = sum(len(ids) < 2 for ids in encoded), max(len(ids) for ids in encoded)
    notes = [f"{short} of {len(texts)} texts have fewer than two tokens and are left out"] if short else []
    if longest < settings["length"]:
        notes.append(f"no text fills a window of {settings['length']} tokens; the longest has {longest}")
    return Windows(tuple(windows), len(texts), settings, _sha256(list(texts)), tuple(notes))


def _continued(document: int, ids: list[int], between: tuple[int, int], half: int) -> Iterator[Window]:
    begin = min(half, len(ids) // 2)
    for border in range(begin, len(ids), half) if begin else ():
        read, said = ids[max(0, border - half) : border], ids[border : border + half]
        inside = (*read, *between, *said[:-1])
        measured = tuple(i > len(read) for i in range(len(inside)))
        yield Window(document, inside, measured, tuple(range(border, border + len(said))), tuple(said))


def row_windows(rows: Sequence[Row], encoder: Encoder) -> Windows:
    """One window a row, measured at the tokens of its answer (a chat's assistant turns) and the token that ends it."""
    if not rows:
        raise DataError("no rows to measure; give at least one")
    examples = [encoder(row) for row in rows]
    windows = []
    for document, example in enumerate(examples):
        places = tuple(i for i, answer in enumerate(example.answer) if answer)
        targets = tuple(example.ids[i] for i in places)
        windows.append(Window(document, example.ids[:-1], example.answer[1:], places, targets))
    truncated = sum(example.truncated for example in examples)
    note = f"{truncated} of {len(rows)} rows are longer than {encoder.max_length} tokens and were cut"
    settings = {"max_length": encoder.max_length}
    content = _sha256([row.content() for row in rows])
    return Windows(tuple(windows), len(rows), settings, content, (note,) if truncated else ())


def measured_alike(windows: Sequence[Windows], ends: Collection[int]) -> list[Windows]:
    """The same rows in several chat templates, measured at the same tokens; the first is the reference's.

    What ends an answer is left out where the templates end it otherwise, and counted: `ends` are the reference's
    special tokens. Raises `DataError` where other tokens differ, or none is left.
    """
    kept = [_common(rows, ends) for rows in zip(*(one.windows for one in windows), strict=True)]
    if not any(numbers for numbers, *_ in kept):
        raise DataError("no answer has a token that all chat templates write: every answer is empty; give other rows")
    out = windows[0].positions - sum(len(numbers) for numbers, *_ in kept)
    note = f"{out} tokens that end an answer are left out: the models' chat templates end it in different ways"
    return [
        replace(
            one,
            windows=tuple(_only(window, numbers[i]) for window, numbers in zip(one.windows, kept, strict=True)),
            notes=(*one.notes, note) if out else one.notes,
        )
        for i, one in enumerate(windows)
    ]


def _common(rows: Sequence[Window], ends: Collection[int]) -> list[list[int]]:
    """Of one row in several templates, the numbers of the measured positions at which all have the same token."""
    kept: list[list[int]] = [[] for _ in rows]
    for turn in zip_longest(*map(_turns, rows), fillvalue=[]):
        said = [[row.targets[i] for i in numbers] for row, numbers in zip(rows, turn, strict=True)]
        same = sum(takewhile(bool, (len(set(tokens)) == 1 for tokens in zip(*said, strict=False))))
        if not set(said[0][same:]) <= set(ends):
            raise DataError(
                "the models' tokenizers or chat templates write the answers in different tokens, so their predictions "
                "cannot be compared; use one for all (chat_template=reference)"
            )
        for numbers, one in zip(kept, turn, strict=True):
            numbers += one[:same]
    return kept


def _turns(window: Window) -> list[list[int]]:
    """The numbers of the measured positions, by turn: those of a turn follow one another."""
    places = np.array(window.places, int)
    return [one.tolist() for one in np.split(np.arange(len(places)), np.flatnonzero(np.diff(places) != 1) + 1)]


def _only(window: Window, kept: Collection[int]) -> Window:
    """The window, measured at these of its positions."""
    numbers = [i for i, measured in enumerate(window.measured) if measured]
    inside = {numbers[i] for i in kept}
    return replace(
        window,
        measured=tuple(i in inside for i in range(len(window.ids))),
        places=tuple(window.places[i] for i in kept),
        targets=tuple(window.targets[i] for i in kept),
    )


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = tokenizer(text, verbose=False).input_ids  # not a word about texts longer than the model's context
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _cut(
    document: int, ids: list[int], tokenizer: PreTrainedTokenizerBase, length: int, stride: int
) -> Iterator[Window]:
    first = 1 if ids and ids[0] == tokenizer.bos_token_id else 0  # tokens that begin every window
    room = length - first
    start, done = first, 0  # where the window's own tokens begin; the last token that has been predicted
    while done < len(ids) - 1:
        end = min(start + room, len(ids) - 1)  # nothing is predicted from the last token
        inside = [*range(first), *range(start, end)]
        places = tuple(i + 1 for i in inside if i + 1 > done)
        measured = tuple(i + 1 > done for i in inside)
        yield Window(document, tuple(ids[i] for i in inside), measured, places, tuple(ids[i] for i in places))
        start, done = start + min(stride, room), end


def _sha256(content: list) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
