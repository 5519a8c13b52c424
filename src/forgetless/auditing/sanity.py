"""Sanity: answers that are no answers, whatever was asked. Pure functions of a generated text.

Compare the counts with the reference's on the same prompts: some of these are rightly given now and then.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable

from forgetless.score.generation import Answer
from forgetless.score.texts import words

REPEATED_SHARE = 0.5  # of the 4-grams
LEAST_GRAMS = 16  # below, a repeated phrase is no loop
COPIES, LOOP_CHARS, LONGEST_UNIT = 5, 30, 120
FOREIGN_SHARE, LEAST_LETTERS = 0.5, 10
EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO")  # written together


def problems(answer: Answer, expected: str) -> tuple[str, ...]:
    """What is wrong with an answer, of "empty", "unfinished", "repeated", "broken_characters", "other_script".

    `expected` is a text in the script that the answer should have: the prompt, or the reference's answer.
    """
    checks = {
        "empty": not answer.text.strip(),
        "unfinished": not answer.finished,
        "repeated": is_repeated(answer.text),
        "broken_characters": has_broken_characters(answer.text),
        "other_script": is_in_another_script(answer.text, expected),
    }
    return tuple(name for name, found in checks.items() if found)


def is_repeated(text: str) -> bool:
    """Half of the 4-grams are repeats (16 or more 4-grams), or the text ends in a loop."""
    enough = len(words(text)) >= LEAST_GRAMS + 3
    return (enough and repeated_share(text) >= REPEATED_SHARE) or ends_in_a_loop(text)


def repeated_share(text: str, n: int = 4) -> float:
    """seq-rep-n: 1 - distinct n-grams / n-grams of the words; 0 for less than n words. (Welleck et al. 2020, eq. 10)

    >>> repeated_share("a b c d a b c d a b c d a b c")  # 12 4-grams, 4 distinct
    0.6666666666666667
    """
    told = words(text)
    grams = [tuple(told[start : start + n]) for start in range(len(told) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_a_loop(text: str) -> bool:
    """Whether the end is one unit of up to 120 characters written five times or more, 30 characters in all.

    The last copy may be cut off, as it is where an answer ran into its limit.
    """
    text = text.rstrip()
    return any(_loop_length(text, unit) >= max(COPIES * unit, LOOP_CHARS) for unit in range(1, LONGEST_UNIT + 1))


def _loop_length(text: str, unit: int) -> int:
    """Characters at the end of which each equals the one `unit` before it, with the first copy."""
    equal = 0
    while equal + unit < len(text) and text[-1 - equal] == text[-1 - equal - unit]:
        equal += 1
    return equal + unit if equal else 0


def has_broken_characters(text: str) -> bool:
    """Replacement characters (U+FFFD, bytes that are no text), or control characters beside tab and line ends."""
    return any(sign == "\ufffd" or (unicodedata.category(sign) == "Cc" and sign not in "\t\n\r") for sign in text)


def is_in_another_script(text: str, expected: str) -> bool:
    """More than half of the letters, ten or more in all, are of a script that `expected` does not have."""
    found, known = scripts(text), scripts(expected)
    foreign = sum(count for script, count in found.items() if script not in known)
    return bool(known) and found.total() >= LEAST_LETTERS and foreign / found.total() > FOREIGN_SHARE


def scripts(text: str) -> Counter[str]:
    """How many letters of each script, by the first word of their Unicode names; East Asian scripts are one.

    >>> scripts("Привет, 世界 カ!")
    Counter({'CYRILLIC': 6, 'EAST ASIAN': 3})
    """
    names = (unicodedata.name(sign, "UNKNOWN").split()[0] for sign in text if sign.isalpha())
    return Counter("EAST ASIAN" if name.startswith(EAST_ASIAN) else name for name in names)


def counted(found: Iterable[tuple[str, ...]]) -> Counter[str]:
    """How many answers have each problem."""
    return Counter(name for names in found for name in names)
