"""Where a model forgot: the divergence on a text, broken down by groups of its tokens, and by document.

With s_dg the nats and t_dg the tokens that document d has in group g,

    mean KL of a group       k_g = Σ_d s_dg / Σ_d t_dg
    its share of all KL            Σ_d s_dg / Σ_d Σ_h s_dh      over the groups h of a breakdown 1 in all

The tokens of a document are not independent, so the interval of k_g resamples documents (`ratio_intervals`). Groups say
where the change is, not why: where the reference is unsure, for example, a model has more room to differ.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from forgetless.auditing.sanity import scripts
from forgetless.forgetting.divergence import Divergence
from forgetless.forgetting.texts import Text
from forgetless.forgetting.windows import Windows
from forgetless.score.intervals import ratio_intervals

DOMAIN, TOKEN_TYPE, PLACE, CERTAINTY, DOCUMENTS = "domain", "token_type", "place", "certainty", "documents"
MOST_DOMAINS = 20  # beyond, the smallest are one
OTHER_DOMAINS = "other domains"
MOST_DOCUMENTS = 5
PLACES = {"1 to 4": 4, "5 to 16": 16, "17 to 64": 64, "from 65 on": np.inf}
"""Which of a document's measured tokens -> the last one."""
CERTAINTIES = {"below 0.1 nats": 0.1, "0.1 to 1 nats": 1.0, "1 to 3 nats": 3.0, "from 3 nats on": np.inf}
"""The reference's entropy -> what it is below."""
TOKEN_TYPES = (
    "word beginnings", "insides of words", "words in another script", "numbers", "punctuation and symbols",
    "white space and line ends", "parts of characters", "special tokens",
)  # fmt: skip
BEGINNING, INSIDE, OTHER_SCRIPT, NUMBER, PUNCTUATION, WHITE_SPACE, PART, SPECIAL = range(len(TOKEN_TYPES))
APOSTROPHES = ("'", "\u2019")


@dataclass(frozen=True)
class Breakdown:
    """Every measured position in one group."""

    names: tuple[str, ...]
    group: np.ndarray  # (positions,): the number of each position's group


@dataclass(frozen=True)
class Group:
    """What happened in a group of tokens. None: no share of a change that is none, no interval from few documents."""

    name: str
    tokens: int
    share_of_tokens: float
    share_of_kl: float | None
    kl: float  # nats per token
    low: float | None  # its interval
    high: float | None
    agree: float  # share of the tokens where both models hold the same word likeliest


def breakdowns(text: Text, windows: Windows, tokenizer: PreTrainedTokenizerBase) -> dict[str, Breakdown]:
    """What can be said of a text's positions before any model is measured: domain, type of token, place."""
    return {
        DOMAIN: by_domain([row.domain or text.name for row in text.rows], windows),
        TOKEN_TYPE: by_token_type(windows, tokenizer),
        PLACE: by_place(windows),
    }


def where(
    found: Divergence, text: Text, groups: Mapping[str, Breakdown], confidence: float = 0.95
) -> dict[str, list[Group]]:
    """Every breakdown, the one by the reference's entropy too, and the documents where predictions moved furthest.

    Groups without a token are left out; those of a breakdown hold every measured token once.
    """
    groups = {**groups, CERTAINTY: by_certainty(found)}
    cells = {name: _cells(found, one) for name, one in groups.items()}
    tokens, kl, _ = np.concatenate(list(cells.values()), axis=2)
    bounds = np.stack(ratio_intervals(kl, tokens, confidence))  # of all groups at once
    ends = np.cumsum([len(one.names) for one in groups.values()])[:-1]
    result = {
        name: _groups(one.names, cells[name].sum(axis=1), ours)
        for (name, one), ours in zip(groups.items(), np.split(bounds, ends, axis=1), strict=True)
    }
    return result | {DOCUMENTS: _furthest(found, text)}


# ---------------------------------------------------------------- breakdowns


def by_domain(domains: Sequence[str], windows: Windows) -> Breakdown:
    """By the domain of each document, (documents,); those of the most documents first."""
    common = [name for name, _ in Counter(domains).most_common()]
    names = common if len(common) <= MOST_DOMAINS else [*common[: MOST_DOMAINS - 1], OTHER_DOMAINS]
    number = {name: i for i, name in enumerate(names)}
    groups = np.array([number.get(name, len(names) - 1) for name in domains])
    return Breakdown(tuple(names), groups[windows.document])


def by_place(windows: Windows) -> Breakdown:
    """By the number of a token among its document's measured ones, from 1 on: in a row, those of its answer."""
    _, first, inverse = np.unique(windows.document, return_index=True, return_inverse=True)
    number = np.arange(windows.positions) - first[inverse] + 1
    return Breakdown(tuple(PLACES), np.searchsorted(list(PLACES.values()), number, side="left"))


def by_certainty(found: Divergence) -> Breakdown:
    """By the entropy of the reference's distribution."""
    return Breakdown(tuple(CERTAINTIES), np.searchsorted(list(CERTAINTIES.values()), found.entropy, side="right"))


def by_token_type(windows: Windows, tokenizer: PreTrainedTokenizerBase) -> Breakdown:
    """By what the predicted token is in the text, whatever tokenizer cut it: decided from the decoded characters.

    A token with a letter is inside a word if no white space and no sign parts it from a letter or digit before it. In
    scripts that put no space between words, a run of letters is one word. Another script is one that is not the text's
    commonest, one with a digit and no letter a number; a byte that is no whole character is a part of one.
    """
    ids, places = np.unique(np.concatenate([windows.target, windows.before]), return_inverse=True)
    target, before = np.split(places, 2)
    texts, special = _texts(tokenizer, ids.tolist()), _special(tokenizer)
    kinds = np.array([SPECIAL if one in special else _kind(text) for one, text in zip(ids, texts, strict=True)])
    script = np.array([_script(text) for text in texts])
    kinds[(kinds == BEGINNING) & (script != _commonest(script[target]))] = OTHER_SCRIPT
    goes_on = np.array([_is_of_a_word(text[:1]) or text[:1] in APOSTROPHES for text in texts])
    is_open = np.array([_is_of_a_word(text[-1:]) for text in texts]) & (kinds != SPECIAL)
    found = kinds[target]
    found[(found == BEGINNING) & goes_on[target] & is_open[before]] = INSIDE
    return Breakdown(TOKEN_TYPES, found)


def _texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Each token's characters behind a word: at the beginning of a text, decoders strip its space."""
    word = tokenizer("a", add_special_tokens=False).input_ids[-1:]
    [lead, *texts] = tokenizer.batch_decode([word, *([*word, one] for one in ids)], clean_up_tokenization_spaces=False)
    return [text.removeprefix(lead) for text in texts]


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _kind(text: str) -> int:
    """What a token is by itself; one with a letter is a beginning until what stands before it is known."""
    if "\ufffd" in text:
        return PART
    if any(sign.isalpha() for sign in text):
        return BEGINNING
    if any(sign.isnumeric() for sign in text):
        return NUMBER
    return PUNCTUATION if text.strip() else WHITE_SPACE


def _is_of_a_word(sign: str) -> bool:
    """A letter, a digit or a mark on one; bytes that are no whole character are nearly always of a letter."""
    return sign == "\ufffd" or (sign != "" and unicodedata.category(sign)[0] in "LMN")


def _script(text: str) -> str:
    """The script of most of its letters; "" without letters."""
    return max(scripts(text).items(), key=lambda item: item[1], default=("", 0))[0]


def _commonest(script: np.ndarray) -> str:
    names, counts = np.unique(script[script != ""], return_counts=True)
    return str(names[counts.argmax()]) if len(names) else ""


# ---------------------------------------------------------------- sums


def _cells(found: Divergence, one: Breakdown) -> np.ndarray:
    """Tokens, nats and agreements, (3, documents, groups)."""
    numbers, document = np.unique(found.document, return_inverse=True)
    shape = len(numbers), len(one.names)
    cell = np.ravel_multi_index((document, one.group), shape)
    return np.stack([
        np.bincount(cell, each, minlength=shape[0] * shape[1]).reshape(shape)
        for each in (np.ones_like(found.kl), found.kl, found.agree)
    ])  # fmt: skip


def _groups(names: Sequence[str], sums: np.ndarray, bounds: np.ndarray) -> list[Group]:
    """From sums (3, groups) of tokens, nats and agreements and bounds (2, groups); NaN are not known."""
    tokens, kl, agree = sums
    share = kl / kl.sum() if kl.sum() > 0 else np.full_like(kl, np.nan)
    return [
        Group(
            name=name,
            tokens=int(tokens[i]),
            share_of_tokens=float(tokens[i] / tokens.sum()),
            share_of_kl=_known(share[i]),
            kl=float(kl[i] / tokens[i]),
            low=_known(bounds[0, i]),
            high=_known(bounds[1, i]),
            agree=float(agree[i] / tokens[i]),
        )
        for i, name in enumerate(names)
        if tokens[i]
    ]


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _furthest(found: Divergence, text: Text) -> list[Group]:
    """The documents with the most nats per token, named by their row's place in its file or their prompt's number."""
    sums = found.documents
    names = [text.rows[number].source for number in sums.document]
    documents = _groups(names, np.stack([sums.tokens, sums.kl, sums.agree]), np.full((2, len(names)), np.nan))
    return sorted(documents, key=lambda one: -one.kl)[:MOST_DOCUMENTS]
