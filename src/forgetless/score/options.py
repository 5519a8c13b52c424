"""Option likelihood: log p(option | prompt) for each label word, the prompt computed once for all of them.

The options are laid behind their prompt in one sequence; the attention mask lets each see the prompt and
itself, and position numbers restart after the prompt. One forward pass then gives every option's likelihood:
a row of 100 prompt tokens and 14 options of 2 tokens costs 128 tokens instead of 1,428. Models that cannot
take such a mask are found by trying, and scored one sequence an option. Of an encoder-decoder the encoder reads
each prompt once, and the decoder each option behind it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from forgetless.data.batches import Encoder
from forgetless.data.tasks import Row
from forgetless.model.answers import logits_at, takes_masks
from forgetless.model.attention import window
from forgetless.model.base import transformer
from forgetless.model.encoder_decoder import decoded, encoded, is_encoder_decoder

NO_TOKEN = -100  # where an option is shorter than another
POSITIONS = 128  # whose logits are in memory in fp32 at once


@dataclass(frozen=True)
class Branches:
    """A context and the options that follow it: `options` are (number, tokens)."""

    row: int
    context: tuple[int, ...]
    options: tuple[tuple[int, tuple[int, ...]], ...]

    def __len__(self) -> int:
        """Tokens of the sequence: nothing follows an option's last token."""
        return len(self.context) + sum(len(tokens) - 1 for _, tokens in self.options)

    def apart(self) -> list[Branches]:
        """One sequence an option."""
        return [Branches(self.row, self.context, (option,)) for option in self.options]


class OptionScorer:
    """Scores rows against options with one model."""

    def __init__(self, model, encoder: Encoder, device: torch.device, batch_tokens: int = 4096):
        self.model, self.encoder, self.device, self.batch_tokens = model, encoder, device, batch_tokens
        takes_positions = "position_ids" in inspect.signature(transformer(model).forward).parameters
        # A mask of our own replaces the model's: rows longer than its window are scored one option at a time
        self.window = window(transformer(model))
        self.shared: bool | None = None if takes_positions and takes_masks(model) else False  # None: not tried yet

    def __call__(self, rows: list[Row], options: tuple[str, ...]) -> list[list[float]]:
        """log p(option | row's prompt), natural logarithm, summed over the option's tokens: rows x options."""
        return self._score(rows, [options] * len(rows))

    def own(self, rows: list[Row]) -> list[list[float]]:
        """The same among each row's own options, as many numbers as it has of them."""
        return self._score(rows, [row.options for row in rows])

    def _score(self, rows: list[Row], options: list[tuple[str, ...]]) -> list[list[float]]:
        branches = [found for i, row in enumerate(rows) for found in self._branches(i, row, options[i])]
        table = torch.zeros(len(rows), max(map(len, options), default=0), dtype=torch.float64)
        if is_encoder_decoder(self.model):
            for batch in self._batches(branches):
                self._fill_behind_encoder(table, batch)
        else:
            self._fill_all(table, branches)
        return [values[: len(own)] for values, own in zip(table.tolist(), options, strict=True)]

    def _fill_all(self, table: Tensor, branches: list[Branches]) -> None:
        if self.shared is None:
            self.shared = self._try_sharing(branches)
        together, apart = [], []
        for one in branches:
            if self.shared is False or len(one) > self.window:
                apart += one.apart()
            else:
                together.append(one)
        for batch in self._batches(together):
            self._fill(table, batch, shared=self.shared is True)  # while nothing branches, the plain mask does
        for batch in self._batches(apart):
            self._fill(table, batch, shared=False)

    def _branches(self, number: int, row: Row, options: tuple[str, ...]) -> Iterator[Branches]:
        """Options whose context has the same tokens go together: all of them, unless a token spans the border."""
        groups: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
        for i, (context, tokens) in enumerate(self.encoder.scoring_splits(row, options)):
            groups.setdefault(tuple(context), []).append((i, tuple(tokens)))
        return (Branches(number, context, tuple(group)) for context, group in groups.items())

    def _batches(self, branches: list[Branches]) -> Iterator[list[Branches]]:
        batch: list[Branches] = []
        for one in sorted(branches, key=len, reverse=True):
            if batch and (len(batch) + 1) * len(batch[0]) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(one)
        if batch:
            yield batch

    def _try_sharing(self, branches: list[Branches]) -> bool | None:
        """Whether a shared prompt gives what separate sequences give; None while no row can tell.

        An option must not change by a bit when the tokens of those before it do, and it must change with the context.
        Its value is compared as well, loosely in 16 bits: there the rounding of one layer grows in the next.
        """
        telling = [one for one in branches if sum(len(tokens) > 1 for _, tokens in one.options) > 1]
        if not telling:
            return None
        tried = [replace(one, row=i) for i, one in enumerate(telling[:4])]
        last = [max(k for k, (_, tokens) in enumerate(one.options) if len(tokens) > 1) for one in tried]
        size = 1 + max(number for one in tried for number, _ in one.options)

        def scores(changed: list[Branches], shared: bool) -> Tensor:
            table = torch.zeros(len(tried), size, dtype=torch.float64)
            self._fill(table, changed, shared)
            return table

        def other(tokens: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(token - 1 if token else 1 for token in tokens)

        def others_before(one: Branches, k: int) -> Branches:
            return replace(one, options=(*((n, other(t)) for n, t in one.options[:k]), *one.options[k:]))

        try:
            shared = scores(tried, True)
            beside = scores([others_before(one, k) for one, k in zip(tried, last, strict=True)], True)
            after = scores([replace(one, context=other(one.context)) for one in tried], True)
        except (TypeError, ValueError, RuntimeError):  # the model refuses the mask or the positions
            return False
        apart = scores([alone for one in tried for alone in one.apart()], False)
        columns = torch.tensor([one.options[k][0] for one, k in zip(tried, last, strict=True)])
        at = (torch.arange(len(tried)), columns)
        if not torch.equal(shared[at], beside[at]) or (shared[at] == after[at]).any():
            return False
        if self.model.dtype == torch.float32:
            return bool(torch.allclose(shared, apart, rtol=1e-4, atol=1e-3))
        return bool((shared - apart).abs().median() <= 0.5)

    def _fill(self, table: Tensor, batch: list[Branches], shared: bool) -> None:
        rows, length = len(batch), max(len(one) for one in batch)
        ids = torch.full((rows, length), self.encoder.tokenizer.pad_token_id)
        positions = torch.zeros((rows, length), dtype=torch.long)
        segment = torch.full((rows, length), -1)  # 0: context, k: option k, -1: padding
        keep = torch.zeros((rows, length), dtype=torch.bool)
        wanted: list[tuple[int, int, int, int, int]] = []  # batch row, position, token, table row, option
        for b, one in enumerate(batch):
            n = len(one.context)
            ids[b, :n], positions[b, :n], segment[b, :n] = torch.tensor(one.context), torch.arange(n), 0
            start = n
            for k, (number, tokens) in enumerate(one.options, start=1):
                inner = len(tokens) - 1
                ids[b, start : start + inner] = torch.tensor(tokens[:-1], dtype=torch.long)
                positions[b, start : start + inner] = torch.arange(n, n + inner)
                segment[b, start : start + inner] = k
                places = [n - 1, *range(start, start + inner)]
                keep[b, places] = True
                wanted += [(b, p, token, one.row, number) for p, token in zip(places, tokens, strict=True)]
                start += inner
        with torch.no_grad():
            logits = logits_at(
                self.model, keep.to(self.device), input_ids=ids.to(self.device),
                attention_mask=(segment >= 0).long().to(self.device),
                position_ids=positions.to(self.device) if shared else None,
                sees=self._sees(segment) if shared else None,
            )  # fmt: skip
        total = torch.cat([some.float().logsumexp(-1) for some in logits.split(POSITIONS)])
        order = keep.flatten().cumsum(0).view_as(keep) - 1  # place of (row, position) among the kept
        sequence, p, token, row, option = (torch.tensor(column) for column in zip(*wanted, strict=True))
        place = order[sequence, p].to(self.device)
        found = (logits[place, token.to(self.device)].float() - total[place]).cpu().double()  # log softmax
        table.index_put_((row, option), found.to(table.dtype), accumulate=True)

    def _fill_behind_encoder(self, table: Tensor, batch: list[Branches]) -> None:
        """The encoder reads each context once, the decoder the options behind it, some at a time."""
        model, contexts = transformer(self.model), [torch.tensor(one.context[:-1]) for one in batch]
        mask = pad_sequence([torch.ones_like(ids) for ids in contexts], batch_first=True).to(self.device)
        pairs = [(b, number, tokens) for b, one in enumerate(batch) for number, tokens in one.options]
        size = max(1, self.batch_tokens // mask.shape[1])
        with torch.no_grad():
            states = encoded(model, pad_sequence(contexts, batch_first=True).to(self.device), mask)
            for chosen in (pairs[start : start + size] for start in range(0, len(pairs), size)):
                rows = [b for b, _, _ in chosen]
                read = [torch.tensor([batch[b].context[-1], *tokens[:-1]]) for b, _, tokens in chosen]
                said = [torch.tensor(tokens) for _, _, tokens in chosen]
                logits = decoded(model, states[rows], mask[rows], pad_sequence(read, batch_first=True).to(self.device))
                targets = pad_sequence(said, batch_first=True, padding_value=NO_TOKEN).to(self.device)
                losses = cross_entropy(
                    logits.float().transpose(1, 2), targets, ignore_index=NO_TOKEN, reduction="none"
                )  # (options, tokens)
                for (b, number, _), loss in zip(chosen, losses.cpu().double().sum(1), strict=True):
                    table[batch[b].row, number] = -loss

    def _sees(self, segment: Tensor) -> Tensor:
        """(rows, 1, length, length): a token sees the tokens before it that are context or of its own option."""
        length = segment.shape[1]
        query, key = segment.unsqueeze(2), segment.unsqueeze(1)
        before = torch.ones(length, length, dtype=torch.bool).tril()
        sees = before & ((key == 0) | (key == query))
        return sees.unsqueeze(1).to(self.device)
