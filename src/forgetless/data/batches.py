"""Rows -> token sequences -> the micro-batches of a step.

Every answer token carries a weight; a loss is a weighted sum over them. The weights of a step are fixed
before it is split, so any split into micro-batches and any number of processes gives the same sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from forgetless.data.tasks import Row
from forgetless.errors import DataError, quoted

LEAST_SHARED = 8  # tokens; a shorter common beginning is not worth it


@dataclass(frozen=True)
class Example:
    """A row as tokens. `answer[i]` says that token i is to be predicted; it weighs `weight` in the loss."""

    ids: tuple[int, ...]
    answer: tuple[bool, ...]
    weight: float = 0.0
    memory: bool = False  # a replayed row
    truncated: bool = False

    @property
    def answers(self) -> int:
        return sum(self.answer)


@dataclass
class Part:
    """A micro-batch: right-padded tokens, and one target and weight per answer token, in row-major order."""

    ids: Tensor  # (rows, length)
    mask: Tensor  # (rows, length), 1 where there is a token
    keep: Tensor  # (rows, length), True where the *next* token is an answer token
    targets: Tensor  # (answers,)
    weights: Tensor  # (answers,)
    memory: Tensor  # (rows,) True for replayed rows

    def only(self, rows: Tensor) -> Part:
        """The part without the rows where `rows` is False."""
        inside = rows.unsqueeze(1).expand_as(self.keep)[self.keep]
        return Part(
            self.ids[rows], self.mask[rows], self.keep[rows], self.targets[inside], self.weights[inside],
            self.memory[rows],
        )  # fmt: skip


class Encoder:
    """Turns rows into examples for one tokenizer; remembers what it has encoded.

    `decoder_start`: for an encoder-decoder the token with which its answers start. The encoder then reads the prompt
    and its end token; `max_length` counts what both halves read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, decoder_start: int | None = None):
        self.tokenizer, self.max_length, self.decoder_start = tokenizer, max_length, decoder_start
        self._seen: dict[Row, Example] = {}

    def __call__(self, row: Row) -> Example:
        if row not in self._seen:
            self._seen[row] = self._encode(row)
        return self._seen[row]

    def _encode(self, row: Row) -> Example:
        if self.decoder_start is not None and row.shape != "pair":
            raise DataError(
                f"{row.source}: a {row.shape} row has no prompt for the encoder and no answer for the decoder of an "
                "encoder-decoder; give prompt/completion rows"
            )
        if row.shape == "chat":
            ids, answer = self._chat(row)
            over = len(ids) - self.max_length
            if over > 0:  # like a prompt, a chat loses its beginning; nothing predicts the first token
                ids, answer = self._tail(ids, self.max_length), [False, *answer[len(answer) - self.max_length + 1 :]]
        elif row.shape == "text":
            ids = [*self._ids(row.answer), self.tokenizer.eos_token_id]
            answer = [False] + [True] * (len(ids) - 1)  # nothing predicts the first token
            over = len(ids) - self.max_length
            ids, answer = ids[: self.max_length], answer[: self.max_length]
        else:
            before, after = self.split(row.prompt, row.answer)
            after = [*after, self.tokenizer.eos_token_id]
            over = len(before) + len(after) - self.max_length
            before = self._tail(before, self.max_length - len(after))  # the answer is kept whole
            if len(before) <= len(self._border):
                raise DataError(
                    f"{row.source}: the answer alone has {len(after)} tokens, which leaves no room for the "
                    f"prompt in max_length={self.max_length}; raise max_length or shorten the answer"
                )
            ids, answer = before + after, [False] * len(before) + [True] * len(after)
        if not any(answer):
            raise DataError(
                f"{row.source}: no answer token is left within max_length={self.max_length}; "
                "raise max_length or shorten the row"
            )
        return Example(tuple(ids), tuple(answer), truncated=over > 0)

    def split(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of the prompt and of the answer after it, as if they were one text.

        White space at the prompt's end goes to the answer, where most tokenizers keep it. For an encoder-decoder they
        are two texts, without white space between them.
        """
        stripped = prompt.rstrip(" ")
        if self.decoder_start is not None:
            return [*self._ids(stripped), *self._border], self._plain(answer.lstrip(" "))
        answer = prompt[len(stripped) :] + answer
        before, whole = self._ids(stripped), self._ids(stripped + answer)
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        # The border falls inside a token: the answer is then encoded alone.
        return before, self.tokenizer(answer, add_special_tokens=False).input_ids

    def context(self, row: Row) -> tuple[str, str]:
        """What the model sees before the answer when the row is scored, as text, and the answer's lead."""
        if row.shape != "chat":
            return row.prompt, row.lead
        before = self._template(row.turns_before, generate=True)
        after = self._template((*row.turns_before, ("assistant", row.label)), generate=False)
        place = after.find(row.label, len(before)) if after.startswith(before) else -1
        return after[: max(place, len(before))] if place >= 0 else before, ""

    def scoring_splits(self, row: Row, options: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Tokens of the context and of each option in the answer's place.

        A long context loses its beginning, the same for all options: the longest one sets the room.
        """
        prompt, lead = self.context(row)
        splits = [self._plain_split(prompt, option) if row.shape == "chat" else self.split(prompt, lead + option)
                  for option in options]  # fmt: skip
        longest = max(len(after) for _, after in splits)
        if longest + len(self._border) >= self.max_length:
            option = next(o for o, (_, after) in zip(options, splits, strict=True) if len(after) == longest)
            raise DataError(
                f"{row.source}: the option {quoted(option)} has {longest} tokens, which fills the "
                f"{self.max_length} that go through the model at once; shorten it, or in training raise max_length"
            )
        return [(self._tail(before, self.max_length - longest), after) for before, after in splits]

    def generation_context(self, row: Row, room: int) -> list[int]:
        """Tokens before the answer, leaving `room` tokens for it; a long context loses its beginning."""
        prompt, _ = self.context(row)
        prompt = prompt.rstrip(" ")
        ids = self._plain(prompt) if row.shape == "chat" else self._ids(prompt)
        ids += self._border[:1]  # the decoder's start is not part of what the encoder reads
        if room >= self.max_length:
            raise DataError(
                f"{row.source}: max_new_tokens={room} leaves no room for the prompt in "
                f"max_length={self.max_length}; raise max_length or lower max_new_tokens"
            )
        return self._tail(ids, self.max_length - room)

    @property
    def takes_chats(self) -> bool:
        """Whether rows of turns can be encoded: by a chat template, for a decoder alone."""
        return bool(self.tokenizer.chat_template) and self.decoder_start is None

    @property
    def _border(self) -> list[int]:
        """What stands between prompt and answer: of an encoder-decoder the end of the one, the start of the other."""
        return [] if self.decoder_start is None else [self.tokenizer.eos_token_id, self.decoder_start]

    def answer_length(self, row: Row) -> int:
        """Tokens of the answer that is to be generated, without its end token."""
        return len(self._plain(row.label))

    def _tail(self, ids: list[int], room: int) -> list[int]:
        """The last `room` tokens; a token that begins every sequence stays in front."""
        if len(ids) <= room:
            return ids
        first = ids[:1] if ids[0] == self.tokenizer.bos_token_id and room > 1 else []
        return first + ids[len(ids) - max(room, 0) + len(first) :]

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text).input_ids
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _plain_split(self, prompt: str, option: str) -> tuple[list[int], list[int]]:
        stripped = prompt.rstrip(" ")
        option = prompt[len(stripped) :] + option
        before, whole = self._plain(stripped), self._plain(stripped + option)
        return before, whole[len(before) :] if whole[: len(before)] == before else self._plain(option)

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _template(self, messages: Iterable[tuple[str, str]], generate: bool) -> str:
        if not self.tokenizer.chat_template:
            raise DataError(
                "rows with messages need a chat template, and this model's tokenizer has none; "
                "use prompt/completion rows, or a model with a chat template"
            )
        told = [{"role": role, "content": content} for role, content in messages]
        try:
            return str(self.tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=generate))
        except TemplateError as error:
            roles = ", ".join(role for role, _ in messages)
            raise DataError(
                f"the chat template of {self.tokenizer.name_or_path} cannot write these turns ({roles}): {error}"
            ) from error

    def _chat(self, row: Row) -> tuple[list[int], list[bool]]:
        """The template's text; the tokens that each assistant turn adds to the turns before it are answers."""
        text, ids, answer = "", [], []
        for last, (role, _) in enumerate(row.messages):
            if role != "assistant":
                continue
            before = self._template(row.messages[:last], generate=True)
            after = self._template(row.messages[: last + 1], generate=False).rstrip("\n")
            if not before.startswith(text) or not after.startswith(before):
                raise DataError(
                    f"{row.source}: the chat template rewrites earlier turns (turn {last + 1}), so the "
                    "assistant's tokens cannot be told from the rest; use prompt/completion rows"
                )
            for piece, wanted in ((before[len(text) :], False), (after[len(before) :], True)):
                tokens = self._plain(piece)
                ids += tokens
                answer += [wanted] * len(tokens)
            text = after
        return ids, answer


def weigh(examples: list[Example], total: float, *, memory: bool = False) -> list[Example]:
    """Equal weights for all answer tokens, `total` in all: a mean over the whole step's answer tokens."""
    count = sum(example.answers for example in examples)
    return [replace(example, weight=total / count, memory=memory) for example in examples]


def split(examples: list[Example], size: int) -> list[list[Example]]:
    """Micro-batches of at most `size` examples: those that begin alike together, then by length, the longest first."""
    longest = sorted(examples, key=lambda one: -len(one.ids))
    groups = sorted(alike([one.ids for one in longest]), key=lambda group: (not group.shared, -len(group.rows)))
    ordered = [longest[i] for group in groups for i in group.rows]
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


class Alike(NamedTuple):
    """Places of rows that begin with the same `shared` tokens; 0: a row by itself."""

    rows: list[int]
    shared: int

    @property
    def spared(self) -> int:
        """Tokens that need not be computed if the beginning is computed once."""
        return (len(self.rows) - 1) * self.shared


def alike(rows: Sequence[Sequence[int]]) -> list[Alike]:
    """Rows in the groups that spare the most tokens. A beginning is shared by all of a group, or not at all.

    On the tree of all beginnings, of the rows below a node either none share it, or all that share nothing longer: with
    groups at nodes S a row spares the depth of the deepest of its S, and each of S is computed once.
    """

    @cache
    def best(node: _Node, above: int) -> tuple[int, list[Alike], list[int]]:
        """Tokens spared below a node, the groups there, and the rows that share the beginning `above` it."""
        as_above = below(node, above)
        here, groups, sharing = below(node, node.depth)
        if node.depth < LEAST_SHARED or here - node.depth <= as_above[0]:
            return as_above
        return here - node.depth, [Alike(sorted(sharing), node.depth), *groups], []

    def below(node: _Node, depth: int) -> tuple[int, list[Alike], list[int]]:
        found = [best(one, depth) for one in node.longer]
        groups = [group for _, groups, _ in found for group in groups]
        sharing = [*node.ends, *(row for _, _, rest in found for row in rest)]
        return sum(spared for spared, _, _ in found) + depth * len(node.ends), groups, sharing

    if not rows:
        return []
    _, groups, alone = best(_tree(rows, list(range(len(rows)))), 0)
    return groups + [Alike([row], 0) for row in sorted(alone)]


@dataclass(eq=False)
class _Node:
    """A beginning of `depth` tokens: the rows that end there, and the longer beginnings."""

    depth: int
    ends: list[int]
    longer: list[_Node]


def _tree(rows: Sequence[Sequence[int]], places: list[int]) -> _Node:
    depth = beginning([rows[i] for i in places])
    after: dict[int, list[int]] = {}
    for i in places:
        if len(rows[i]) > depth:
            after.setdefault(rows[i][depth], []).append(i)
    return _Node(depth, [i for i in places if len(rows[i]) == depth], [_tree(rows, part) for part in after.values()])


def beginning(rows: Sequence[Any]) -> int:
    """How many tokens all rows (lists or tuples) begin with."""
    first, last = min(rows), max(rows)  # in the order of a dictionary: what these two share, all do
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def collate(examples: list[Example], pad: int, device: torch.device | str = "cpu") -> Part:
    """Pads a micro-batch to its longest row."""
    rows, length = len(examples), max(len(example.ids) for example in examples)
    ids = torch.full((rows, length), pad)
    mask = torch.zeros((rows, length), dtype=torch.long)
    answer = torch.zeros((rows, length), dtype=torch.bool)
    weights = torch.zeros((rows, length))
    for i, example in enumerate(examples):
        n = len(example.ids)
        ids[i, :n] = torch.tensor(example.ids)
        mask[i, :n] = 1
        answer[i, :n] = torch.tensor(example.answer)
        weights[i, :n] = example.weight
    keep = torch.zeros_like(answer)
    keep[:, :-1] = answer[:, 1:]  # the position before an answer token predicts it
    memory = torch.tensor([example.memory for example in examples])
    return Part(
        ids.to(device), mask.to(device), keep.to(device), ids[answer].to(device), weights[answer].to(device),
        memory.to(device),
    )  # fmt: skip
