"""Forgetting against a reference's own predictions: what two models say of the next word.

At each position, with p the reference's distribution over the next word, q the model's, and natural logarithms,

    cross-entropy   -Σ_v p(v) log q(v)  =  H + KL   the forgetting loss, after Kalajdzievski (2024), arXiv:2401.05605
    entropy      H  =  -Σ_v p(v) log p(v)           its floor, which is not 0
    divergence  KL  =  Σ_v p(v) log (p(v) / q(v))   what was forgotten
    agreement       whether both hold the same word likeliest

Where one of the two has words more than the other (added tokens, padded embeddings), p and q are taken over the words
that both have, and -log(1 - m) is added to the KL, m the probability that the model, or the reference, gives to words
the other lacks. For a model with more words this is the KL over all of them, since p is 0 there. For a reference with
more words the KL over all is infinite however little they weigh, and this stands in for it.

in fp32 from the logits, a chunk of positions at a time, so that memory does not grow with positions x vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from forgetless.errors import DataError, RunError
from forgetless.forgetting.reference import BATCH_TOKENS, Reference, Stream, hidden_states
from forgetless.forgetting.windows import Windows
from forgetless.model.head import Head, Using


class Measures(NamedTuple):
    """What is measured at each position, (n,) each; entropies in nats."""

    entropy: Tensor
    kl: Tensor
    agree: Tensor  # 1 or 0
    outside_reference: Tensor  # probability of words that the other lacks
    outside_model: Tensor


def compare(reference: Tensor, model: Tensor, words: int) -> Measures:
    """Compares logits (n, V), (n, V') on their first `words` words, both renormalised there; V and V' may differ.

    With a and b the logits less their largest, e and f their exponentials, s and t the sums of those:

        H  = log s - Σ e a / s
        KL = Σ p (log p - log q) + q - p = Σ (e (a - b - log r) + f r - e) / s    with r = s/t

    q - p sums to 0, and takes the first-order rounding of a, b and r with it: what is left is some 1e-8 nats of either
    sign, and 0 for equal logits. The sums are torch's pairwise ones; its `log_softmax` adds up 50,000 words with an
    error of 2e-5 on CPU. The words outside add -log(1 - m) to the KL, and none of them is held likeliest by both.
    """
    x, y = reference[:, :words].float(), model[:, :words].float()
    before, after = _outside(reference, words), _outside(model, words)
    a, b = _finite(x - x.amax(-1, keepdim=True)), _finite(y - y.amax(-1, keepdim=True))
    buffer = a + b
    agree = (buffer.amax(-1) == 0) & ~(before.likeliest | after.likeliest)  # some word is at 0 in both
    gap = torch.sub(a, b, out=buffer)
    e, f = a.exp(), b.exp_()
    s, t = e.sum(-1, keepdim=True), f.sum(-1, keepdim=True)
    entropy = s.log() - a.mul_(e).sum(-1, keepdim=True) / s
    r = s / t
    kl = gap.sub_(r.log()).mul_(e).addcmul_(f, r).sub_(e).sum(-1, keepdim=True) / s
    kl = kl.squeeze(-1) + before.nats + after.nats
    return Measures(entropy.squeeze(-1), kl, agree.float(), before.mass, after.mass)


def _finite(logits: Tensor) -> Tensor:
    """Words that a model forbids (-inf) get the lowest number, in place: p is 0 all the same. NaN stays."""
    return logits.clamp_(min=torch.finfo(logits.dtype).min)


class _Outside(NamedTuple):
    """Of the words that the other lacks, (n,) each."""

    mass: Tensor  # m = Σ_out e^x / Σ_all e^x
    nats: Tensor  # -log(1 - m)
    likeliest: Tensor  # whether one of them is likelier than all others


def _outside(logits: Tensor, words: int) -> _Outside:
    if logits.shape[-1] == words:
        zero = logits.new_zeros(len(logits), dtype=torch.float32)
        return _Outside(zero, zero, zero.bool())
    inside, outside = logits[:, :words].float(), logits[:, words:].float()
    odds = outside.logsumexp(-1) - inside.logsumexp(-1)  # log (m / (1 - m))
    return _Outside(odds.sigmoid(), functional.softplus(odds), outside.amax(-1) > inside.amax(-1))


# ---------------------------------------------------------------- over a corpus


@dataclass(frozen=True)
class Means:
    """Averages; entropies in nats, the rest as shares."""

    entropy: float
    kl: float
    agree: float
    outside_reference: float
    outside_model: float

    @property
    def cross_entropy(self) -> float:
        return self.entropy + self.kl

    def as_json(self) -> dict[str, float]:
        return {"cross_entropy": self.cross_entropy, **asdict(self)}


@dataclass(frozen=True)
class Documents:
    """Sums over each document's measured tokens, (documents,) each, without documents that have none."""

    document: np.ndarray  # its number among the texts or rows
    tokens: np.ndarray
    entropy: np.ndarray
    kl: np.ndarray
    agree: np.ndarray
    outside_reference: np.ndarray
    outside_model: np.ndarray

    @property
    def cross_entropy(self) -> np.ndarray:
        return self.entropy + self.kl


@dataclass(frozen=True)
class Divergence:
    """One number a measured position, (positions,) each; a position is named by the token it predicts."""

    document: np.ndarray  # the number of its text or row
    place: np.ndarray  # the token's place in its document
    target: np.ndarray  # the token, in the reference's text
    entropy: np.ndarray  # nats
    kl: np.ndarray  # nats
    agree: np.ndarray  # 1 where both hold the same word likeliest (one of them, of equals), else 0
    outside_reference: np.ndarray  # the reference's probability of words that the model lacks
    outside_model: np.ndarray
    words: int  # how many words of the vocabulary both have, from the first on

    @property
    def cross_entropy(self) -> np.ndarray:
        """The forgetting loss at each position, in nats."""
        return self.entropy + self.kl

    @cached_property
    def documents(self) -> Documents:
        number, inverse = np.unique(self.document, return_inverse=True)
        sums = {name: np.bincount(inverse, getattr(self, name)) for name in Measures._fields}
        return Documents(number, np.bincount(inverse), **sums)

    @property
    def per_token(self) -> Means:
        """Every token weighs the same."""
        return Means(**{name: float(getattr(self, name).mean()) for name in Measures._fields})

    @property
    def per_document(self) -> Means:
        """Every document weighs the same: the mean over documents of the mean over a document's tokens."""
        sums, tokens = self.documents, self.documents.tokens
        return Means(**{name: float((getattr(sums, name) / tokens).mean()) for name in Measures._fields})


def divergence(
    reference: Reference, model, windows: Windows | None = None,
    batch_tokens: int = BATCH_TOKENS, using: Using = nullcontext, label: str | None = None,
) -> Divergence:  # fmt: skip
    """What `model` says of the next word at the reference's positions, against what the reference says.

    `windows`: the model's own, where they differ from the reference's in what comes before the measured tokens
    (another chat template). Raises `DataError` where the measured tokens differ, `RunError` where logits are not
    numbers.
    """
    windows = windows or reference.windows
    states = hidden_states(model, windows, batch_tokens, using, label)
    return compare_states(reference, states, Head(model, using), windows)


def compare_states(
    reference: Reference, states: Stream, head: Head, windows: Windows, chunk_bytes: int | None = None
) -> Divergence:  # fmt: skip
    """`divergence` for states that are there already. `chunk_bytes` bounds one model's logits in fp32."""
    _check_targets(reference.windows, windows)
    words = min(reference.head.vocabulary, head.vocabulary)
    vocabulary = max(reference.head.vocabulary, head.vocabulary)
    size = max(1, (chunk_bytes or _budget(head.device).chunk) // (4 * vocabulary))
    results = np.zeros((len(Measures._fields), windows.positions))
    for numbers, hidden in states:
        known = reference.states(numbers)
        places = np.concatenate([np.arange(*windows.borders[[i, i + 1]]) for i in numbers])
        for start in range(0, len(places), size):
            chunk = slice(start, start + size)
            results[:, places[chunk]] = _chunk(reference.head, known[chunk], head, hidden[chunk], words)
    measured = dict(zip(Measures._fields, results, strict=True))
    found = Divergence(windows.document, windows.place, reference.windows.target, **measured, words=words)
    _check_numbers(found, head.name)
    return found


class Budget(NamedTuple):
    """Bytes in fp32 of one model's logits that are held at once, and of the block that is worked on."""

    chunk: int
    block: int


def _budget(device: torch.device) -> Budget:
    """On CPU a block stays in the processor's cache; elsewhere it is large enough to be worth a kernel."""
    return Budget(2**26, 2**19) if device.type == "cpu" else Budget(2**29, 2**26)


def _chunk(reference: Head, known: Tensor, head: Head, hidden: Tensor, words: int) -> np.ndarray:
    """`compare` on the logits of some positions, a few rows at a time: (measures, n)."""
    after = head(hidden.to(head.device))
    before = reference(known.to(reference.device)).to(after.device)
    rows = max(1, _budget(after.device).block // (4 * words))
    blocks = zip(before.split(rows), after.split(rows), strict=True)
    return torch.cat([torch.stack(compare(x, y, words)) for x, y in blocks], dim=1).cpu().numpy()


def _check_targets(reference: Windows, model: Windows) -> None:
    if reference is model:
        return
    same = reference.positions == model.positions and all(
        np.array_equal(mine, theirs)
        for mine, theirs in (
            (reference.borders, model.borders),
            (reference.target, model.target),
            (reference.document, model.document),
        )
    )
    if not same:
        raise DataError(
            f"the reference is measured at {reference.positions} tokens and the model at {model.positions}, and they "
            "are not the same ones: their tokenizers or chat templates write the answers otherwise. Use one for both "
            "(chat_template=reference)"
        )


def _check_numbers(found: Divergence, name: str) -> None:
    wrong = np.isnan(found.cross_entropy)
    if wrong.any():
        raise RunError(
            f"{name}: the reference's or the model's logits are not numbers at {wrong.sum()} of {wrong.size} "
            f"positions, first in text or row {found.document[wrong.argmax()]}; try fp32, and look whether the "
            "weights are whole"
        )
