"""Where a model forgot: breakdowns of hand-made divergences, their sums, their intervals, and types of tokens."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from forgetless.auditing.where import (
    CERTAINTIES,
    DOCUMENTS,
    MOST_DOMAINS,
    OTHER_DOMAINS,
    PLACES,
    TOKEN_TYPES,
    Breakdown,
    breakdowns,
    by_certainty,
    by_domain,
    by_place,
    by_token_type,
    where,
)
from forgetless.data.batches import Encoder
from forgetless.data.tasks import Row
from forgetless.errors import DataError
from forgetless.forgetting.divergence import Divergence
from forgetless.forgetting.texts import Text, general_prompts, own_answers, read_text, topics
from forgetless.forgetting.windows import Window, Windows, row_windows, text_windows
from forgetless.score.intervals import ratio_intervals


def found(document, kl, agree=None, entropy=None) -> Divergence:
    """A divergence with these numbers at its positions."""
    n = len(kl)
    zeros = np.zeros(n)
    return Divergence(
        np.array(document), np.arange(n), zeros.astype(int), zeros if entropy is None else np.array(entropy, float),
        np.array(kl, float), zeros if agree is None else np.array(agree, float), zeros, zeros, words=9,
    )  # fmt: skip


def text(documents: int) -> Text:
    return Text("notes", tuple(Row("", "x", source=f"notes.txt: paragraph {n + 1}") for n in range(documents)), "")


def lengths(*tokens: int) -> Windows:
    """Documents of this many measured tokens, a window each; the tokens are 1, 2, 3, ... behind a 0."""
    windows = [
        Window(i, tuple(range(n)), (True,) * n, tuple(range(1, n + 1)), tuple(range(1, n + 1)))
        for i, n in enumerate(tokens)
    ]
    return Windows(tuple(windows), len(tokens), {}, "")


# ---------------------------------------------------------------- sums


def test_groups_by_hand():
    """Two documents of 3 and 2 tokens; 4 nats in all, 3 of them in the two tokens of group b."""
    kind = Breakdown(("a", "b", "never"), np.array([0, 1, 0, 0, 1]))
    told = where(
        found([0, 0, 0, 1, 1], [0.5, 1.0, 0.0, 0.5, 2.0], [1, 0, 1, 1, 0]), text(2), {"token_type": kind}
    )  # fmt: skip
    a, b = told["token_type"]
    assert (a.name, a.tokens, a.share_of_tokens, a.share_of_kl, a.agree) == ("a", 3, 0.6, 0.25, 1.0)
    assert a.kl == pytest.approx(1 / 3)
    assert (b.name, b.tokens, b.share_of_tokens, b.share_of_kl, b.kl, b.agree) == ("b", 2, 0.4, 0.75, 1.5, 0.0)
    assert b.low is b.high is None, "two documents say nothing about others"
    [certainty] = told["certainty"]
    assert (certainty.name, certainty.share_of_kl, certainty.kl) == ("below 0.1 nats", 1.0, 0.8)
    furthest = [(one.name, one.kl, one.share_of_kl, one.low) for one in told[DOCUMENTS]]
    assert furthest == [("notes.txt: paragraph 2", 1.25, 0.625, None), ("notes.txt: paragraph 1", 0.5, 0.375, None)]


def test_few_documents_bound_nothing_and_no_change_has_no_shares():
    [one] = where(found(range(9), [0.25] * 8 + [2.5]), text(9), {})["certainty"]
    assert (one.kl, one.low, one.high) == (0.5, None, None)
    [one] = where(found(range(10), [0.25] * 9 + [2.75]), text(10), {})["certainty"]
    assert one.low == 0.25 < one.kl == 0.5 < one.high
    [one] = where(found([0, 1], [0.0, -1e-9]), text(2), {})["certainty"]
    assert one.share_of_kl is None and one.share_of_tokens == 1.0


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_groups_sum_to_the_whole(data):
    """Exactly: the numbers are sixteenths, so that no sum is rounded."""
    n = data.draw(st.integers(1, 40))
    numbers = st.lists(st.integers(0, 160), min_size=n, max_size=n)
    document = sorted(data.draw(st.lists(st.integers(0, 15), min_size=n, max_size=n)))
    kl, entropy = (np.array(data.draw(numbers)) / 16 for _ in range(2))
    agree = np.array(data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)))
    group = np.array(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)))
    told = where(found(document, kl, agree, entropy), text(16), {"place": Breakdown(tuple("abcde"), group)})
    for name in ("place", "certainty"):
        groups = told[name]
        assert sum(one.tokens for one in groups) == n
        assert sum(round(one.kl * one.tokens * 16) for one in groups) == (kl * 16).sum()
        assert sum(round(one.agree * one.tokens) for one in groups) == agree.sum()
        assert sum(one.share_of_tokens for one in groups) == pytest.approx(1)
        if kl.sum():
            assert sum(one.share_of_kl for one in groups) == pytest.approx(1)
        for one in groups:
            own = (group == "abcde".index(one.name)) if name == "place" else within(one.name, entropy)
            assert one.tokens == own.sum() and one.kl == pytest.approx(kl[own].mean())
            assert one.low is None or one.low - 1e-9 <= one.kl <= one.high + 1e-9


def within(name: str, entropy: np.ndarray) -> np.ndarray:
    bounds = [0, 0.1, 1, 3, np.inf]
    i = list(CERTAINTIES).index(name)
    return (entropy >= bounds[i]) & (entropy < bounds[i + 1])


# ---------------------------------------------------------------- intervals


def test_ratio_intervals_are_those_of_the_obvious_bootstrap(monkeypatch):
    """Drawn one after another; the seed gives the same draws, and group 2 is missing from some of them."""
    monkeypatch.setattr("forgetless.score.intervals.FEWEST_CLUSTERS", 2)
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 9, (6, 2)).astype(float)
    counts[:, 1] *= [0, 0, 0, 0, 1, 1]
    sums = counts * rng.exponential(1, (6, 2))
    low, high = ratio_intervals(sums, counts, 0.9, seed=5)
    numbers = np.random.default_rng(5).integers(6, size=(5_000, 6))
    draws = np.stack([np.bincount(one, minlength=6) for one in numbers])
    tails = [0.013647, 0.0]  # Φ(√(6/5) t) with t = -2.015, 5 degrees of freedom; two documents: Φ(-8.93)
    assert (draws[:, 4:].sum(axis=1) == 0).any()
    for group, tail in enumerate(tails):
        ratios = sorted(
            sum(w * s for w, s in zip(one, sums[:, group], strict=True)) / total
            for one in draws
            if (total := sum(w * c for w, c in zip(one, counts[:, group], strict=True)))
        )
        expected = np.quantile(ratios, [tail, 1 - tail])
        np.testing.assert_allclose([low[group], high[group]], expected, rtol=1e-4)


def test_for_many_documents_it_is_the_linearised_interval():
    """k ± 1.96 √(Σ (s_d - k t_d)²) / Σ t_d, the ratio estimator's (Cochran 1977, equation 6.13)."""
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 60, (500, 1)).astype(float)
    sums = counts * rng.gamma(2, 0.1, (500, 1))
    k = sums.sum() / counts.sum()
    half = 1.96 * np.sqrt(((sums - k * counts) ** 2).sum()) / counts.sum()
    [low], [high] = ratio_intervals(sums, counts)
    assert (low, high) == pytest.approx((k - half, k + half), abs=0.1 * half)


def test_tokens_of_a_document_are_no_independent_evidence():
    """The same documents ten times as long say no more about other documents."""
    rng = np.random.default_rng(1)
    each, group = rng.exponential(0.2, 30), {}
    short = where(found(np.arange(30), each), text(30), group)["certainty"][0]
    long = where(found(np.repeat(np.arange(30), 10), np.repeat(each, 10)), text(30), group)["certainty"][0]
    assert (long.low, long.high) == pytest.approx((short.low, short.high))


# ---------------------------------------------------------------- breakdowns


def test_places_count_a_documents_measured_tokens():
    one = by_place(lengths(70, 5))
    assert [(one.group[:70] == i).sum() for i in range(4)] == [4, 12, 48, 6]
    assert one.group[[0, 3, 4, 15, 16, 63, 64]].tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert one.group[70:].tolist() == [0, 0, 0, 0, 1], "from the beginning for every document"
    assert one.names == tuple(PLACES)


def test_certainties_begin_at_their_bound():
    told = by_certainty(found([0] * 7, [0] * 7, entropy=[0, 0.0999, 0.1, 0.999, 1, 3, 9]))
    assert told.group.tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_domains_are_the_documents():
    told = by_domain(["law", "code", "law"], lengths(1, 2, 3))
    assert told.names == ("law", "code") and told.group.tolist() == [0, 1, 1, 0, 0, 0]
    many = by_domain([*"aabb", *map(str, range(MOST_DOMAINS))], lengths(*[1] * (MOST_DOMAINS + 4)))
    assert len(many.names) == MOST_DOMAINS and many.names[:2] == ("a", "b") and many.names[-1] == OTHER_DOMAINS
    assert (many.group == MOST_DOMAINS - 1).sum() == 3, "22 domains; those beyond the 19 with the most documents"


def test_a_domain_is_told_in_the_row_or_is_the_text(tmp_path):
    rows = [{"text": "one two", "domain": " law "}, {"text": "three four"}, {"text": "five", "domain": 7}]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [row.domain for row in read_text(str(tmp_path / "mixed.jsonl")).rows] == ["law", "", ""]
    (tmp_path / "bad.jsonl").write_text('{"text": "one", "domain": "\\ud800"}')
    with pytest.raises(DataError, match=r"bad.jsonl:1: 'domain' holds half of a surrogate"):
        read_text(str(tmp_path / "bad.jsonl"))


def test_the_packaged_prompts_have_topics_and_are_what_they_were():
    assert len(general_prompts()) == len(topics()) == 157 and all(topics().values())
    digest = hashlib.sha256(json.dumps(general_prompts()).encode()).hexdigest()
    assert digest.startswith("0b4471c85b506d6d"), "every cache of own answers is void if a prompt changes"
    told = own_answers(["What is photosynthesis?", "How do I swat a fly?"], ["Light.", "Do not."], chat=False)
    assert [(row.source, row.domain) for row in told.rows] == [("prompt 1", "science"), ("prompt 2", "")]


# ---------------------------------------------------------------- types of tokens


def word_tokenizer(pieces: list[str]) -> PreTrainedTokenizerFast:
    """SentencePiece's way: "▁" is a space, a decoder strips the first one, and bytes stand for what is missing."""
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "</s>", "▁a", *pieces])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


PIECES = ["▁Over", "ride", "▁", "12", "th", ",", "▁don", "'t", "<0x0A>", "<0xC3>", "▁мир", "x1", "(", "é", "▁½"]
TYPES = {
    "▁Over": 0, "ride": 1, "▁": 5, "12": 3, "th": 1, ",": 4, "▁don": 0, "'t": 1, "<0x0A>": 5, "<0xC3>": 6, "▁мир": 2,
    "x1": 1, "(": 4, "é": 0, "▁½": 3, "</s>": 7,
}  # fmt: skip


def test_types_of_tokens_by_hand():
    """Of a tokenizer whose single tokens decode without their space, one after another as in PIECES."""
    tokenizer = word_tokenizer(PIECES)
    ids = [2, *range(3, 3 + len(PIECES)), 1]
    windows = Windows((Window(0, tuple(ids[:-1]), (True,) * (len(ids) - 1), tuple(range(1, len(ids))),
                              tuple(ids[1:])),), 1, {}, "")  # fmt: skip
    told = by_token_type(windows, tokenizer)
    assert {piece: TOKEN_TYPES[i] for piece, i in zip([*PIECES, "</s>"], told.group, strict=True)} == {
        piece: TOKEN_TYPES[i] for piece, i in TYPES.items()
    }


def test_types_of_tokens_of_a_byte_level_tokenizer(tokenizer):
    """Whole words or bytes: a beginning is what no letter precedes, whether or not a space is in the token."""
    row = Row("", "", (("user", "hi"), ("assistant", "Q9: The sky\n\nis (blue) é")))
    windows = row_windows([row], Encoder(tokenizer, 128))
    told = [TOKEN_TYPES[i].split()[0] for i in by_token_type(windows, tokenizer).group]
    pieces = tokenizer.convert_ids_to_tokens(windows.target.tolist())
    assert list(zip(pieces, told, strict=True)) == [
        ("Q", "word"), ("9", "numbers"), (":", "punctuation"), ("Ġ", "white"), ("The", "word"), ("Ġsky", "word"),
        ("Ċ", "white"), ("Ċ", "white"), ("is", "word"), ("Ġ", "white"), ("(", "punctuation"), ("b", "word"),
        ("l", "insides"), ("ue", "insides"), (")", "punctuation"), ("Ġ", "white"), ("Ã", "parts"), ("©", "parts"),
        ("<|end|>", "special"),
    ]  # fmt: skip


def test_what_stands_before_a_token_is_known_across_windows(tokenizer):
    """Windows cut words; the first predicted token of a text has a token before it too."""
    whole = text_windows(["abcdefgh 12 xyz"] * 2, tokenizer, length=512)
    cut = text_windows(["abcdefgh 12 xyz"] * 2, tokenizer, length=3, stride=2)
    assert cut.before.tolist() == whole.before.tolist()
    np.testing.assert_array_equal(by_token_type(cut, tokenizer).group, by_token_type(whole, tokenizer).group)
    assert TOKEN_TYPES[by_token_type(whole, tokenizer).group[0]] == "insides of words"


def test_every_position_has_a_group(tokenizer):
    rows = (Row("", "One 2, three.\nПривет", source="a", domain="x"), Row("", "four five", source="b"))
    notes = Text("notes", rows, "")
    windows = notes.windows(tokenizer, 128)
    told = breakdowns(notes, windows, tokenizer)
    assert told["domain"].names == ("x", "notes")
    assert all(one.group.shape == (windows.positions,) and one.group.max() < len(one.names) for one in told.values())
