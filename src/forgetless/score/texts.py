"""What a text says, and how alike two texts are: pure functions of text, each with its source."""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from forgetless.errors import UsageError

LETTERS = "ABCDEFGH"
MISSING = 'the scorer {} needs {}; install it: pip install "forgetless[scorers]"'


def normalise(text: str) -> str:
    """The O-LoRA benchmark's rule: lower case, no punctuation, single spaces.

    >>> normalise(" Science or  Technology.")
    'science or technology'
    """
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(bare.split())


def compared(text: str) -> str:
    """What exact match compares: the normal form, or where punctuation is all there is, the text itself.

    >>> compared("Yes."), compared(" ++ ")
    ('yes', '++')
    """
    return normalise(text) or text.strip()


# ---------------------------------------------------------------- what a text says


NUMBER = re.compile(
    r"""(?<!\d) (?<!\d\.)
    (?P<sign> (?<![\w)]) [-−] (?=[$€£¥]?\.?\d) )? [$€£¥]?
    (?P<digits> \d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)? | \d+(?:\.\d+)? | (?<!\w)\.\d+ )
    (?P<power> [eE][-+]?\d{1,3}(?!\w) )? (?P<below> /[1-9]\d*(?![\d/]) )?""",
    re.VERBOSE,
)
GSM8K = re.compile(r"####[ \t]*([-−$€£¥\d.,/]*\d)[ %.]*$", re.MULTILINE)


def last_number(text: str) -> str | None:
    """The last number of a text, written plainly; where a line "#### 42" stands, as in GSM8K, the first such line's.

    Commas between thousands, a currency sign and a percent sign are left out, so 50% is 50; a/b is a fraction. A minus
    sign counts where it touches the number and nothing stands before it: "10-3" ends with 3.

    >>> last_number("7 x 6 = 42, so the answer is -$1,234.50."), last_number("so 6\\n#### 42\\n(in 3 steps)")
    ('-1234.50', '42')
    """
    marked = GSM8K.search(text)
    found = list(NUMBER.finditer(marked[1] if marked else text))
    if not found:
        return None
    sign, digits, power, below = (found[-1][part] or "" for part in ("sign", "digits", "power", "below"))
    return ("-" if sign else "") + digits.replace(",", "") + power + below


def same_number(one: str, other: str) -> bool:
    """Exactly: 0.1 is 1/10, 42 is 42.0.

    >>> same_number("0.30", "3/10"), same_number("1e3", "1000"), same_number("0.3", "0.3000001")
    (True, True, False)
    """
    return _value(one) == _value(other)


def _value(number: str) -> Fraction:
    above, _, below = number.partition("/")
    # through Decimal: int() refuses more than 4,300 digits, and a model may well repeat one for ever
    return Fraction(Decimal(above)) / Fraction(Decimal(below or 1))


CJK = "\u3040-\u30ff\u3400-\u9fff"
LATIN = "A-Za-zÀ-ɏ"
OPENING = r"[\s(\[{<\"'“‘*_:=#]*"
# a letter after which nothing or punctuation comes, and one that is in no word or abbreviation
CLOSED = rf"([LETTERS])(?=\s*$|[.):\],;*_\"”}}>。、\n])(?!\.[A-Z](?![{LATIN}]))"
ALONE = (
    rf"(?<![\d_{LATIN}])(?<![A-Z]\.)(?<![{LATIN}]-)([LETTERS])"
    rf"(?![\d_{LATIN}+#]|-[{LATIN}]|['’][{LATIN}]|\.[A-Z](?![{LATIN}]))"
)
ANNOUNCED = re.compile(r"\banswer\b(?:\s+is)?(?:\s+(?:option|choice))?|答案(?:\s*是)?|选", re.IGNORECASE)
A_WORD = re.compile(rf"[ ]+(?!(?:because|since|is|and|or)\b)[{LATIN}]", re.IGNORECASE)


def choice_letter(text: str, letters: str = LETTERS) -> str | None:
    """The letter that a text chooses, as a capital. The first rule that finds one decides:

    1. The text begins with the letter, and ends there or goes on after punctuation or a new line: "b", "(B)", "B. So".
    2. The same after "answer", "answer is", "answer is option", "答案"; there a capital may also go on with a word:
       "I think the answer is B because ...".
    3. The first capital that stands alone: not in a word or an abbreviation ("U.S."), not in "C++" or "vitamin-C".
       "A" and "I" before another word are words: "A man" chooses nothing, "A because" chooses A.

    >>> choice_letter("B"), choice_letter("So (C)."), choice_letter("A man"), choice_letter("A man; the answer is D")
    ('B', 'C', None, 'D')
    """
    text = unicodedata.normalize("NFKC", text)  # full-width letters and brackets
    text = re.sub(rf"(?<=[{CJK}])(?=[A-Za-z])|(?<=[A-Za-z])(?=[{CJK}])", " ", text)
    closed = re.compile(OPENING + CLOSED.replace("LETTERS", letters + letters.lower()))
    alone = re.compile(ALONE.replace("LETTERS", letters))
    announced = re.compile(OPENING + alone.pattern)
    if found := closed.match(text):
        return found[1].upper()
    for told in ANNOUNCED.finditer(text):
        if found := closed.match(text, told.end()) or announced.match(text, told.end()):
            return found[1].upper()
    capitals = (one for one in alone.finditer(text) if one[1] not in "AI" or not A_WORD.match(text, one.end()))
    return next((one[1] for one in capitals), None)


def json_value(text: str) -> Any:
    """The JSON value that a text is, or that its first fenced block (```json) holds; ValueError where there is none.

    Strict: NaN and Infinity are no JSON. 1.0 is read as 1.
    """
    fenced = re.search(r"```(?:json)?[ \t]*\n(.*?)```", text, re.DOTALL | re.IGNORECASE)
    if fenced and not text.lstrip().startswith(("{", "[")):
        text = fenced[1]
    try:
        return json.loads(text, parse_float=_number, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _number(digits: str) -> int | float:
    value = float(digits)
    return int(value) if value.is_integer() else value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def same_json(one: Any, other: Any) -> bool:
    """Equal as JSON: the order of keys does not count, and true is not 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


# ---------------------------------------------------------------- how alike two texts are


def words(text: str) -> list[str]:
    """What ROUGE counts: rouge-score's words on ASCII text, the same of any script elsewhere; CJK signs one by one.

    rouge-score's own rule drops all letters but a-z, which leaves nothing of a Chinese text.
    """
    return re.findall(rf"[{CJK}]|[^\W_{CJK}]+", text.lower())


class _Words:
    """`words` as rouge-score wants it."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def rouge_l() -> Callable[[str, str], float]:
    """(answer, right answer) -> ROUGE-L: F1 of their longest common subsequence of words, no stemming. (Lin 2004)

    With l the length of that subsequence: P = l / words of the answer, R = l / words of the right answer,
    F = 2 P R / (P + R). UsageError where rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UsageError(MISSING.format("rouge_l", "rouge-score")) from error
    scorer = RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_Words())
    return lambda answer, right: float(scorer.score(right, answer)["rougeL"].fmeasure)


def code_similarity() -> Callable[[str, str], float]:
    """(answer, right answer) -> 2 m / (their characters), m = those of their longest common subsequence.

    TRACE's measure for Py150 (`fuzz.ratio` / 100), there rounded to whole per cents. As there, the placeholders of
    that data set are taken out first: <STR_LIT:x> becomes x. UsageError where rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.fuzz import ratio
    except ImportError as error:
        raise UsageError(MISSING.format("code_similarity", "rapidfuzz")) from error
    return lambda answer, right: ratio(_literals(answer), _literals(right)) / 100


def _literals(code: str) -> str:
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return re.sub(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", r"\1", code, flags=re.DOTALL)


def sari(source: str, answer: str, references: Sequence[str]) -> float:
    """SARI = (F_keep + P_delete + F_add) / 3, each the mean over n-grams of 1 to 4 words. (Xu et al. 2016, TACL 4:401)

    Of the source's n-grams: which were kept and should be (F1), which were deleted and should be (precision); of the
    new ones: which the references have (F1). 0/0 is 1. This is the form of Hugging Face's `sari`, which TRACE uses,
    from 0 to 1 instead of 100; the paper takes F of the mean precision and recall instead of the mean F.
    """
    total = 0.0
    for n in (1, 2, 3, 4):
        i, o = (Counter(_grams(text, n)) for text in (source, answer))
        r: Counter = sum((Counter(_grams(text, n)) for text in references), Counter())
        # each n-gram of source and answer counts once per reference
        i, o = (Counter({gram: len(references) * count for gram, count in grams.items()}) for grams in (i, o))
        kept, to_keep, deleted = i & o, i & r, i - o
        good = kept & r
        p_keep = _share(sum(good[gram] / kept[gram] for gram in good), len(kept))
        r_keep = _share(good.total(), to_keep.total())
        rightly = deleted - r
        p_delete = _share(sum(rightly[gram] / deleted[gram] for gram in rightly), len(deleted))
        added, to_add = o.keys() - i.keys(), r.keys() - i.keys()
        p_add, r_add = (_share(len(added & to_add), len(whole)) for whole in (added, to_add))
        total += _f1(p_keep, r_keep) + p_delete + _f1(p_add, r_add)
    return total / 12


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    """n-grams of the lower-case words, split as mteval-v13a (sacrebleu's default) does."""
    text = text.lower()
    for told, meant in UNWRAPPED:
        text = text.replace(told, meant)
    text = f" {text} "
    for pattern, spaced in MTEVAL:
        text = re.sub(pattern, spaced, text)
    tokens = text.split()
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


UNWRAPPED = (
    ("<skipped>", ""), ("-\n", ""), ("\n", " "), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"),
)  # fmt: skip
"""mteval-v13a's replacements, in its order, before a text is split."""
MTEVAL = (
    (r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 "),
    (r"([^0-9])([\.,])", r"\1 \2 "),
    (r"([\.,])([^0-9])", r" \1 \2"),
    (r"([0-9])(-)", r"\1 \2 "),
)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
