"""Scorers of generated answers: what each takes for right, what is refused before training, what a run keeps."""

import doctest
import json
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetless.config import LearnConfig
from forgetless.data import scoring
from forgetless.data.scoring import GENERATED, Scoring, own_function, read_scorers
from forgetless.data.streams import load_stream
from forgetless.data.tasks import Row, Stream, Task
from forgetless.errors import DataError, RunError, UsageError
from forgetless.learning.stream import learn
from forgetless.report.summary import _flips
from forgetless.runs.folder import read_lines
from forgetless.score import scorers, texts
from forgetless.score.rules import RULES, check_row, rules_of
from forgetless.score.texts import (
    _grams,
    choice_letter,
    code_similarity,
    json_value,
    last_number,
    normalise,
    rouge_l,
    same_json,
    same_number,
    sari,
    words,
)

WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat.", "3", "über", "我", "dog's"]), max_size=8).map(
    " ".join
)


def score(scorer, answer, right, prompt="Q?", options=()):
    """The headline score of one answer."""
    row = Row(prompt, right)
    [rule] = rules_of(Task("a", (), (), (row,), options, (scorer,))).values()
    check_row({"it": rule}, row)
    return next(iter(rule.scores(answer, rule.gold(row)).values()))["score"]


def test_the_tables_name_the_same_scorers():
    assert tuple(RULES) == GENERATED and set(scorers.MEASURES) == set(scoring.SCORERS)
    assert {name for names in scorers.MEASURES.values() for name in names} == scorers.MEANINGS.keys()
    assert set(scorers.RIGHT_OR_WRONG) < scorers.MEANINGS.keys()
    for module in (texts, scoring):
        assert doctest.testmod(module).failed == 0


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "text, number",
    [
        ("42", "42"),
        ("The answer is 42.", "42"),
        ("6 x 7 = 42 in 1 step\n#### 42\n\nQ: 5 + 5?", "42"),
        ("#### 1,234", "1234"),
        ("#### Step 1: add\nso 9", "9"),  # a heading, not GSM8K's mark
        ("$1,234.50", "1234.50"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("it fell by −3.5 %", "-3.5"),
        ("10-3", "3"),
        ("10 - 3", "3"),
        ("(-5)", "-5"),
        ("1, 2,3", "3"),
        ("1,2345", "2345"),
        ("version 3.14.15", "3.14"),
        ("x=.5", ".5"),
        ("1.5e-3 m", "1.5e-3"),
        ("3/4 of it", "3/4"),
        ("42kg", "42"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number


def test_numbers_are_compared_exactly():
    assert score("number", "about 0.30", "the answer is .3") == 1
    assert score("number", "0.1 + 0.2 = 0.30000000000000004", "0.3") == 0
    assert score("number", "1,000,000", "1e6") == 1
    assert score("number", "1/4", "3/4") == 0 and score("number", "0.75", "3/4") == 1
    assert score("number", "5", "-5") == 0 and score("number", "no idea", "5") == 0


def test_a_number_of_thousands_of_digits_is_compared_like_any_other():
    """A small model may repeat a digit to its last token; int() refuses more than 4,300 of them."""
    long = "1" * 5000
    assert score("number", f"so {long}", long) == 1 and score("number", long + ".0", long) == 1
    assert score("number", long, "1") == 0 and score("number", f"{long}2", long) == 0
    assert score("number", f"{long}/{long}", "1") == 1 and score("number", f"{long}.{long}", "1") == 0


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_number_is_found_however_it_is_written(value):
    for told in (f"{value}", f"{value:,}", f"so it is {value}.", f"{value}%", f"x\n#### {value:,}"):
        found = last_number(told)
        assert found is not None and same_number(found, str(value)) and Fraction(found) == Fraction(value)


@given(st.text(max_size=60))
def test_any_text_has_a_last_number_or_none(text):
    found = last_number(text)
    assert found is None or same_number(found, found)


# ---------------------------------------------------------------- letters


@pytest.mark.parametrize(
    "text, letter",
    [
        *((text, "B") for text in ("B", "b", "(B)", "B.", "b)", " B\n", "**B**", '"B"', "B: hawk", "B\nBecause")),
        *((text, "B") for text in ("Answer: B", "answer: b", "The answer is (B)", "the correct answer is option B")),
        ("The answer is A because", "A"),
        ("A. The answer is B", "A"),  # what it begins with goes before
        ("The answer isn't A. The answer is B", "B"),
        ("I think B", "B"),
        ("B because", "B"),
        ("Option D", "D"),
        ("A man", None),
        ("A European; the answer is D", "D"),
        ("the answer is a man", None),
        ("A because", "A"),
        ("It is A", "A"),
        ("Apple", None),
        ("A's plan", None),
        ("U.S.A. is C", "C"),
        ("C++ or D", "D"),
        ("vitamin-C", None),
        ("答案：B", "B"),
        ("答案是B。", "B"),
        ("选C", "C"),
        ("（Ａ）", "A"),
        ("J", None),
        ("", None),
    ],
)
def test_the_letter_that_a_text_chooses(text, letter):
    assert choice_letter(text) == letter


def test_letters_are_those_of_the_options():
    assert score("choice", "J.", "J", options=("I", "J")) == 1
    assert choice_letter("I think J", "IJ") == "J"
    assert score("choice", "A", "C. neutral") == 0 and score("choice", "C, as ...", "C. neutral") == 1
    assert score("choice", "b", "B", options=("a", "b")) == 1
    assert score("choice", "B", "B", options=("yes", "no", "B")) == 1  # words among the options: A to H


@given(st.sampled_from("ABCDEFGH"), st.sampled_from(["{}", "({})", "{}.", "Answer: {}", "The answer is {}", "So {}"]))
def test_a_letter_is_found_in_its_usual_forms(letter, form):
    assert choice_letter(form.format(letter)) == letter


# ---------------------------------------------------------------- similar texts


def test_rouge_l_by_hand():
    """'the cat was on' and 'the cat sat on it': the cat on = 3; P = 3/4, R = 3/5, F = 2 (.45) / 1.35."""
    assert score("rouge_l", "The cat was on", "the cat sat on it.") == pytest.approx(2 / 3)
    assert score("rouge_l", "我爱你", "我爱她") == pytest.approx(2 / 3)  # rouge-score's own words would be none
    assert score("rouge_l", "", "the cat") == 0


def test_words_are_those_of_rouge_score_on_ascii():
    from rouge_score.tokenizers import DefaultTokenizer

    text = "".join(map(chr, range(1, 128))) + " It's 3.5-ton_x"
    assert words(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)
    assert words("Größe, 我爱3x") == ["größe", "我", "爱", "3x"]


@settings(deadline=None)  # the first example loads rouge-score
@given(WORDS, WORDS)
def test_rouge_l_and_similarity_are_symmetric_and_one_for_equal_texts(one, other):
    for similarity in (rouge_l(), code_similarity()):
        assert similarity(one, other) == pytest.approx(similarity(other, one))
        assert 0 <= similarity(one, other) <= 1 and (similarity(one, one) == 1 or not words(one))


def test_code_similarity_by_hand():
    """'abcd' and 'abxd' share a b d: 2 x 3 / 8."""
    assert score("code_similarity", "abxd", "abcd") == 0.75
    assert score("code_similarity", "", "x = 1") == 0
    assert score("code_similarity", "f('a', 0)", "f('<STR_LIT:a>', <NUM_LIT>)") == 1  # Py150's placeholders


def test_sari_of_the_published_example():
    """Hugging Face's `sari` gives 26.953601953601954 here."""
    source = "About 95 species are currently accepted ."
    references = [
        "About 95 species are currently known .",
        "About 95 species are now accepted .",
        "95 species are now accepted .",
    ]
    assert sari(source, "About 95 you now get in.", references) == pytest.approx(0.26953601953601954)


def test_sari_counts_the_words_of_mteval():
    """sacrebleu's `13a` of the lower-case text: entities are signs, a hyphen at a line's end joins."""
    text = "<SKIPPED>It&apos;s 3-4 &lt;B&gt;, R&amp;amp;D &quot;co-\nop&quot;\nof 1,000.5 U.S."
    told = 'it & apos ; s 3 - 4 < b > , r & amp ; d " coop " of 1,000.5 u . s .'
    assert [word for (word,) in _grams(text, 1)] == told.split()


def test_sari_by_hand():
    """Source 'a b', right 'a', answer 'a c'.

    1-grams: kept a, to keep a: F 1. Deleted b, rightly: 1. Added c, nothing to add: P 0, R 0/0 = 1, F 0. Sum 2.
    2-grams: kept none, to keep none: 1. Deleted 'a b', rightly: 1. Added 'a c': F 0. Sum 2. 3, 4: all 0/0: 3 each.
    """
    assert score("sari", "a c", "a", prompt="a b") == pytest.approx((2 + 2 + 3 + 3) / 12)


DISTINCT = st.lists(st.sampled_from("abcdef"), max_size=6, unique=True).map(" ".join)


@given(WORDS, WORDS, WORDS)
def test_sari_is_a_share(source, answer, right):
    assert 0 <= sari(source, answer, [right]) <= 1


@given(DISTINCT, DISTINCT)
def test_sari_is_one_for_the_right_answer(source, right):
    """Where no word stands twice: of 'a a a', 'a a' deletes an a that the right 'a a' still has."""
    assert sari(source, right, [right]) == pytest.approx(1)


def test_the_source_of_sari():
    whole, cut = "Simplify. Text: a b\nSimple:", Scoring("sari", (r"Text: (.*)",))
    assert score(cut, "a c", "a", prompt=whole) == pytest.approx(10 / 12)
    row = Row(whole, "a")
    [rule] = rules_of(Task("a", (), (), (row,), (), ("sari",))).values()
    assert rule.gold(row) == (whole, "a")
    chat = Row("", "a", (("system", "Be brief."), ("user", "a b"), ("assistant", "a")))
    [rule] = rules_of(Task("a", (), (), (chat,), (), ("sari",))).values()
    assert rule.gold(chat) == ("a b", "a")
    with pytest.raises(DataError, match="finds no text to simplify in the prompt 'no such'"):
        score(cut, "a", "a", prompt="no such")


# ---------------------------------------------------------------- whole answers


def test_an_answer_of_punctuation_alone_is_compared_as_it_is():
    assert [score("exact_match", answer, "++") for answer in ("++", " ++\n", "", "+", "c")] == [1, 1, 0, 0, 0]
    assert [score("exact_match", answer, "C++") for answer in ("c", "++", "")] == [1, 0, 0]
    last = Scoring("regex", (r"is (.*)",))
    assert [score(last, answer, "++") for answer in ("it is ++", "it is ", "it is --")] == [1, 0, 0]


def test_options_that_a_comparison_cannot_tell_apart_are_refused():
    for scorer in ("exact_match", Scoring("regex", ("is (.*)",))):
        with pytest.raises(UsageError, match=r"task 'a'.*cannot tell the options 'C' and 'C\+\+' apart"):
            score(scorer, "C", "C", options=("C", "C++"))
        assert score(scorer, "it is +" if scorer != "exact_match" else "+", "+", options=("+", "-")) == 1
    assert score("choice", "A", "A", options=("A", "a"))  # compares letters only


# ---------------------------------------------------------------- patterns and JSON


def test_patterns():
    assert score(Scoring("regex", (r"\d{3}",)), "code 123", "x") == 1
    assert score(Scoring("regex", (r"^\d{3}$",)), "code 123", "x") == 0
    total = Scoring("regex", (r"Total: (\w+)",))
    assert [score(total, answer, "Five") for answer in ("Total: five.", "Total: six", "five")] == [1, 0, 0]
    assert score(Scoring("regex", (r"a|(b)",)), "a", "b") == 0  # the group took no part


def both(answer, right, *fields):
    row = Row("Q?", right)
    [rule] = rules_of(Task("a", (), (), (row,), (), (Scoring("json", fields),))).values()
    scores = rule.scores(answer, rule.gold(row))
    return scores["json_fields"]["score"], scores["json_valid"]["score"]


def test_json_fields_and_validity():
    right = '{"name": "Ann", "age": 42, "tags": ["x", "y"], "ok": true}'
    assert both(right, right) == (1, 1)
    assert both('{"age": 42.0, "name": "Ann", "more": 1}', right) == (0.5, 1)
    assert both('{"age": 42.0, "name": "Bob"}', right, "name") == (0, 1)
    assert both('{"ok": 1}', right, "ok") == (0, 1)  # true is not 1
    assert both('{"name": "Ann"', right) == (0, 0)
    assert both('Here you are:\n```json\n{"name": "Ann"}\n```\nBye', right, "name") == (1, 1)
    assert both("[1]", right) == (0, 1) and both("null", right) == (0, 1)
    assert both("[1, 2]", "[1,2]") == (1, 1) and both("[2, 1]", "[1,2]") == (0, 1)
    assert both("{}", "{}") == (1, 1) and both("not", "null") == (0, 0)


@pytest.mark.parametrize("text", ["", "NaN", '{"a": Infinity}', "[" * 100_000, "1" * 5000, "{'a': 1}", "```\n{\n```"])
def test_what_is_no_json(text):
    with pytest.raises(ValueError):
        json_value(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(JSON)
def test_json_equals_itself_in_any_dress(value):
    plain, pretty = json.dumps(value), json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    assert same_json(json_value(plain), json_value(pretty))
    assert both(f"```json\n{plain}\n```", pretty) == (1, 1) or "```" in plain


# ---------------------------------------------------------------- what a stream file may say


def test_scorers_of_a_stream_file(tmp_path):
    (tmp_path / "mine.py").write_text("def polite(answer, row):\n    return 'please' in answer\n")
    told = ["number", {"regex": "x"}, {"json": ["a", "b"]}, "sari", "./mine.py:polite"]
    number, pattern, fields, whole, own = read_scorers(told, tmp_path)
    assert (number, whole) == ("number", "sari")
    assert (pattern, fields) == (Scoring("regex", ("x",)), Scoring("json", ("a", "b")))
    assert (own.name, own.file) == ("mine.py:polite", str(tmp_path / "mine.py")) and len(own.sha256) == 64
    assert read_scorers("choice", tmp_path) == ("choice",) and read_scorers(own, tmp_path) == (own,)
    assert read_scorers({"json": "a"}, tmp_path) == (Scoring("json", ("a",)),)


@pytest.mark.parametrize(
    "told, said",
    [
        (["numbr"], "unknown scorer 'numbr'; did you mean 'number'.*FILE.py:FUNCTION"),
        ([], "names none; leave it out, or name some of options"),
        (["regex"], "'regex' takes a pattern.*found none"),
        ([{"regex": 3}], "'regex' takes a pattern.*found 3"),
        ([{"json": []}], r"'json' takes a list of fields.*found \[\]"),
        ([{"json": ["a", "a"]}], "list of fields"),
        ([{"number": 3}], "'number' takes no argument, found 3"),
        ([{"regex": "a", "json": "b"}], "a name or `NAME: ARGUMENT`"),
        ([3], "a name or `NAME: ARGUMENT`, found 3"),
        ([{"regex": "a"}, {"regex": "b"}], "'regex' is named twice"),
        (["./mine.py"], "names no function; write ./FILE.py:FUNCTION"),
        (["./mine.py:polite()"], "names no function"),
        (["./mien.py:polite"], "mien.py: cannot be read .*did you mean 'mine.py'"),
        ([{"./mine.py:polite": 2}], "takes no argument here"),
    ],
)
def test_scorers_that_cannot_be(told, said, tmp_path):
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(UsageError, match=said):
        read_scorers(told, tmp_path)
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}')
    entry = {"name": "a", "train": "train.jsonl", "test": "test.jsonl", "scorers": told}
    with pytest.raises(UsageError, match=r"stream: task 1 \(a\): "):
        load_stream([entry], base_dir=tmp_path)


@pytest.mark.parametrize(
    "scorer, said",
    [
        (Scoring("regex", ("(",)), r"task 'a': the scorer 'regex': '\(' is no regular expression: missing \)"),
        (Scoring("regex", ("(a)(b)",)), "has 2 groups, wanted is 0 or 1"),
        (Scoring("sari", ("a",)), "has 0 groups, wanted is 1"),
        (Scoring("regex"), "needs a pattern"),
        ("regex", "needs a pattern"),
        ("nubmer", "unknown scorer 'nubmer'; did you mean 'number'"),
    ],
)
def test_rules_that_cannot_be(scorer, said):
    with pytest.raises(UsageError, match=said):
        rules_of(Task("a", (), (), (), (), (scorer,)))


@pytest.mark.parametrize("name, package", [("rouge_l", "rouge_score"), ("code_similarity", "rapidfuzz")])
def test_a_missing_package_is_named(name, package, monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=r'task \'a\': .*pip install "forgetless\[scorers\]"'):
        rules_of(Task("a", (), (), (), (), (name,)))


@pytest.mark.parametrize(
    "scorer, right, said",
    [
        ("number", "none", "'none' holds no number"),
        ("choice", "none", "'none' names none of the letters ABCDEFGH"),
        ("rouge_l", "?!", "holds no word"),
        ("json", "{", "is no JSON"),
        (Scoring("json", ("a",)), '{"b": 1}', "has no field 'a'"),
        (Scoring("json", ("a",)), "[1]", "has no field 'a'"),
    ],
)
def test_right_answers_that_a_rule_cannot_judge_by(scorer, right, said):
    row = Row("Q?", right, source="test.jsonl:7")
    with pytest.raises(DataError, match=rf"test\.jsonl:7: the scorer .* cannot judge this row: .*{said}"):
        check_row(rules_of(Task("a", (), (), (row,), (), (scorer,))), row)


# ---------------------------------------------------------------- the user's own function


def own(tmp_path, code, name="polite"):
    (tmp_path / "mine.py").write_text(code)
    return own_function(f"mine.py:{name}", tmp_path)


@pytest.mark.parametrize(
    "value, expected", [("True", 1), ("0", 0), ("0.25", 0.25), ("np.float32(0.5)", 0.5), ("np.bool_(1)", 1)]
)
def test_what_a_function_may_give(tmp_path, value, expected):
    code = f"import numpy as np\ndef polite(answer, row):\n    assert row.label == 'b'\n    return {value}\n"
    assert score(own(tmp_path, code), "a", " b") == expected


@pytest.mark.parametrize(
    "body, said",
    [
        ("return None", "gave a NoneType; a score is a number from 0 to 1 .divide"),
        ("return answer", "gave a str; a score is a number"),
        ("return float('nan')", "gave nan; a score is a number"),
        ("return float('inf')", "gave inf"),
        ("return 10**400", "gave 1000"),
        ("return 1.5", "gave 1.5; a score is a number from 0 to 1"),
        ("return -1", "gave -1; a score is"),
        ("return row.nothing", "raised AttributeError"),
    ],
)
def test_what_a_function_may_not_give(tmp_path, body, said):
    with pytest.raises(DataError, match=rf"row \w+: mine\.py:polite, for the answer 'hm', {said}"):
        score(own(tmp_path, f"def polite(answer, row):\n    {body}\n"), "hm", "b")


@pytest.mark.parametrize(
    "code, said",
    [
        ("def poltie(answer, row): ...", "mine.py: no function 'polite'; did you mean 'poltie'"),
        ("polite = 3", "no function 'polite'$"),
        ("def polite(", "cannot be run: SyntaxError"),
        ("import nothing_of_this_name", "cannot be run: ModuleNotFoundError"),
        ("raise SystemExit(3)", "cannot be run: SystemExit"),
    ],
)
def test_files_without_the_function(tmp_path, code, said):
    with pytest.raises(UsageError, match=f"task 'a': .*{said}"):
        score(own(tmp_path, code), "a", "b")


def test_functions_are_run_only_as_named(tmp_path):
    code = "from dataclasses import dataclass\n@dataclass\nclass X:\n    a: 'int'\ndef polite(a, r): return X(1).a\n"
    scorer = own(tmp_path, code)
    assert score(scorer, "a", "b") == 1
    (tmp_path / "mine.py").write_text("def polite(a, r): return 0\n")
    assert score(own_function("mine.py:polite", tmp_path), "a", "b") == 0  # same size and time, other bytes
    changed = replace(scorer, sha256="0" * 64)
    with pytest.raises(UsageError, match="has changed since it was read"):
        score(changed, "a", "b")
    moved = tmp_path / "there"
    moved.mkdir()
    there = own(moved, "def polite(a, r): return 0\n")
    told = [Task("a", (), (), (), (), (one,)).fingerprint for one in (own_function("mine.py:polite", tmp_path), there)]
    assert told[0] == told[1] != Task("a", (), (), (), (), (scorer,)).fingerprint
    assert not list(tmp_path.rglob("__pycache__"))


def test_the_fingerprint_knows_the_arguments():
    prints = {
        Task("a", (), (), (), (), scorers).fingerprint
        for scorers in (("json",), (Scoring("json", ("a",)),), (Scoring("json", ("b",)),), ("json", "number"))
    }
    assert len(prints) == 4
    assert Task("a", (), (), ()).fingerprint == "612b8a021eea5116"  # of runs made before there were arguments


# ---------------------------------------------------------------- in a run


def config(tiny, stream, folder, **more):
    told = {"r": 4, "batch_size": 4, "learning_rate": 3e-3, "max_length": 64, "device": "cpu", "precision": "fp32",
            "forgetting_prompts": 0}  # fmt: skip
    return LearnConfig(stream=stream, model=tiny, output_dir=str(folder), **(told | more))


def test_one_answer_for_all_scorers_of_a_run(tiny, tmp_path, monkeypatch):
    rows = [{"prompt": f"{n} and {n + 1}?", "answer": str(2 * n + 1)} for n in range(4)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text("def brief(answer, row):\n    return len(answer) <= 3 * len(row.label)\n")
    told = [
        "rouge_l",
        "exact_match",
        "number",
        "code_similarity",
        {"regex": r"(\d+)"},
        "sari",
        "json",
        "./mine.py:brief",
    ]
    entry = {"name": "sums", "train": "train.jsonl", "test": "test.jsonl", "validation": 0, "max_new_tokens": 4,
             "scorers": told}  # fmt: skip
    (tmp_path / "stream.json").write_text(json.dumps([entry]))
    calls = []
    generate = scorers.generate
    monkeypatch.setattr(scorers, "generate", lambda *told: calls.append(len(told[2])) or generate(*told))
    stream = str(tmp_path / "stream.json")
    summary = learn(config(tiny, stream, tmp_path / "run", num_train_epochs=40.0))
    assert calls == [4, 4]  # the base, and after the task
    measures = ["exact_match", "number", "rouge_l", "sari", "code_similarity", "regex", "json_fields", "json_valid"]
    assert list(summary["measures"]) == [*measures, "mine.py:brief"]
    [line] = summary["headline"]["matrix"]
    assert line == summary["measures"]["rouge_l"]["matrix"][0] and line[0] > 0.5
    [[(low, high)]] = summary["intervals"]  # of ROUGE-L, from its four rows
    assert 0 <= low <= line[0] <= high <= 1
    assert "user's function" in summary["measures"]["mine.py:brief"]["meaning"]
    records = read_lines(tmp_path / "run" / "tasks" / "01-sums" / "scores" / "predictions.jsonl")
    for record in records:
        answer = record["rouge_l"]["answer"]
        assert [name for name, value in record.items() if isinstance(value, dict) and "answer" in value] == ["rouge_l"]
        assert record["exact_match"]["score"] == (normalise(answer) == record["gold"])
        assert record["number"]["found"] == last_number(answer)
    [task] = summary["tasks"]
    assert task["scorers"][:2] == ["rouge_l", "exact_match"] and task["scorers"][4] == ["regex", r"(\d+)"]
    # the same command goes on; another scorer of the same name does not
    learn(config(tiny, stream, tmp_path / "run", num_train_epochs=40.0))
    (tmp_path / "mine.py").write_text("def brief(answer, row):\n    return 1\n")
    with pytest.raises(RunError, match=r"task 1 \(sums\) has changed: scorers were"):
        learn(config(tiny, stream, tmp_path / "run", num_train_epochs=40.0))


def test_a_broken_function_is_said_with_its_stream_before_the_model_is_loaded(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}')
    (tmp_path / "mine.py").write_text("def polite(")
    entry = {"name": "a", "train": "train.jsonl", "test": "test.jsonl", "scorers": ["./mine.py:polite"]}
    (tmp_path / "stream.json").write_text(json.dumps([entry]))
    with pytest.raises(UsageError, match=r"stream\.json: task 'a': .*mine\.py: cannot be run: SyntaxError"):
        learn(config("no such model", str(tmp_path / "stream.json"), tmp_path / "run"))
    with pytest.raises(UsageError, match=r"^stream: task 'a': no scorer; give at least one of options"):
        learn(config("no such model", Stream("s", (Task("a", (), (), (), scorers=()),)), tmp_path / "run"))


def test_letters_are_counted_as_they_are_understood():
    records = [
        {"choice": {"answer": "B. Because", "found": "B", "score": 1}},
        {"choice": {"answer": "A man", "found": None}},
    ]
    counts = scorers.label_counts(scorers.TaskScores({}, records), "choice", ("A", "B"))
    assert counts == {"A": 0, "B": 1, scorers.NO_OPTION: 1}
    # the rows that turned are named by the same labels
    task = {"name": "a", "headline": "choice", "options": ["A", "B"]}
    before, now = ([record | {"row": 0, "key": "k"}] for record in records)
    now[0]["choice"]["score"] = 0
    [lost] = _flips(task, before, now)["lost"]
    assert (lost["before"], lost["now"]) == ("B", scorers.NO_OPTION)


@pytest.mark.parametrize(
    ("told", "measure", "options", "label"),
    [
        ({"answer": "-"}, "likelihood", ("+", "-"), "-"),
        ({"answer": "C++"}, "likelihood", ("C", "C++"), "C++"),
        ({"answer": "c"}, "likelihood_union", ("C", "B"), scorers.NO_OPTION),  # another task's label
        ({"answer": "Yes."}, "exact_match", ("yes", "no"), "yes"),
        ({"answer": "-"}, "exact_match", ("+", "-"), "-"),
        ({"answer": "c."}, "choice", ("C", "C++"), scorers.NO_OPTION),  # either could be meant
        ({"answer": "it is B", "found": "B"}, "choice", ("a", "b"), "b"),
        ({"answer": "yes"}, "exact_match", (), None),
        ({}, "next_token", ("yes", "no"), None),
        ({"answer": ""}, "exact_match", ("+", "-"), scorers.NO_OPTION),
    ],
)
def test_the_label_of_a_record(told, measure, options, label):
    assert scorers.label_of(told, measure, options) == label


def test_errors_come_before_training(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("forgetless.learning.stream.learn_task", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setattr(scorers, "generate", lambda *a, **k: pytest.fail("generated"))
    rows = (Row("a", "1"), Row("b", "two", source="test.jsonl:2"))
    task = Task("sums", rows, (), rows, (), ("number",), max_new_tokens=4)

    def run(task, **more):
        learn(config(tiny, Stream("s", (task,)), tmp_path / "run", **more))

    with pytest.raises(DataError, match=r"test\.jsonl:2: the scorer 'number' cannot judge"):
        run(task)
    with pytest.raises(DataError, match=r"raised TypeError"):
        run(replace(task, scorers=(own(tmp_path, "def polite(answer): return 1\n"),)))
    monkeypatch.setattr("forgetless.learning.prepare.load_base", lambda *a: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=r"task 'sums': .* no regular expression"):
        run(replace(task, scorers=(Scoring("regex", ("[",)),)))


def test_rows_that_cannot_be_judged_can_be_left_out(tiny, tmp_path):
    rows = (Row("a", "1"), Row("b", "two"), Row("c", "3 " * 9))
    task = Task("sums", rows, (), rows, (), ("number",), max_new_tokens=4)
    summary = learn(config(tiny, Stream("s", (task,)), tmp_path / "run", on_bad_row="skip", cells="last"))
    [told] = summary["tasks"]
    assert (told["train"], told["test"]) == (3, 2)
    assert any("1 test rows left out" in note for note in told["notes"])
    assert any("1 of 2 test rows have a right answer of more than max_new_tokens=4" in note for note in told["notes"])
