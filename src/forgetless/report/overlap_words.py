"""What stands out in the overlap of adapters, in plain words, and how its numbers are written."""

from __future__ import annotations

from collections.abc import Sequence

from forgetless.report.words import clean
from forgetless.subjects import layouts

TABLE_PAIRS = 12  # of a table in the terminal
ALIGNED = 0.1  # cosines below are told as none
CAUTION = (
    "These are different things: adapters without a collision have an inner product of 0, but may still write to the "
    "same outputs or read the same inputs. What was forgotten they do not say; forgetless audit measures it."
)


def names_of(record: dict) -> list[str]:
    """What tables call the adapters."""
    given = [one["name"] for one in record["adapters"]]
    short = layouts.short_names(given)
    return [clean(short[name]) for name in given]


def named_pair(one: dict, names: Sequence[str]) -> str:
    first, second = one["pair"]
    return f"{names[first]} and {names[second]}"


def pairs_first(record: dict, most: int) -> list[dict]:
    """All pairs in their order, or those with the largest cosines where there are more."""
    pairs = record["pairs"]
    if len(pairs) <= most:
        return pairs
    return sorted(pairs, key=lambda one: -abs(one["cosine"] or 0.0))[:most]


def ratio(one: dict, at: int) -> float | None:
    """How often a pair collides, over how often unrelated updates would."""
    return one["collision_rate"][at] / one["by_chance"][at] if one["by_chance"][at] else None


def level(record: dict) -> str:
    """The threshold that is shown, in words."""
    k = record["shown_at"]
    return f"{k:g} times the rms entry of their layer".removeprefix("1 times ") if k else "0"


def share(value: float | None) -> str:
    """A small share with three digits: '0.0123 %'."""
    return "-" if value is None else f"{100 * value:.3g} %"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}×"


def figure(value: float | None) -> str:
    """Three digits; rounding of a zero is 0.

    >>> figure(0.12345), figure(-1e-12), figure(1234.5)
    ('0.123', '0', '1,234')
    """
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else "0" if abs(value) < 1e-9 else f"{value:.3g}"


def sentences(record: dict) -> list[str]:
    """The largest of each kind, with what chance gives beside it."""
    return [line for line in (_collisions(record), _cosine(record), *_directions(record)) if line]


def _collisions(record: dict) -> str:
    at, names = record["thresholds"].index(record["shown_at"]), names_of(record)
    average, chance = record["average_collision_rate"][at], record["average_by_chance"][at]
    if not chance:
        return f"No two adapters can collide: there are no entries above {level(record)} in a layer that two change."
    said = f"Two adapters both change {share(average)} of all entries by more than {level(record)}; unrelated ones "
    said += f"would change {share(chance)}."
    ratios = {named_pair(one, names): found for one in record["pairs"] if (found := ratio(one, at)) is not None}
    most = max(ratios, key=lambda name: ratios[name])
    return said + (f" Most over chance: {most}, {times(ratios[most])}." if len(ratios) > 1 else "")


def _cosine(record: dict) -> str:
    known = [one for one in record["pairs"] if one["cosine"] is not None]
    if not known:
        return ""
    names, most = names_of(record), max(known, key=lambda one: abs(one["cosine"]))
    pair, cosine = named_pair(most, names), most["cosine"]
    if abs(cosine) < ALIGNED:
        return f"No two updates point the same or the opposite way: the largest cosine is {figure(cosine)} ({pair})."
    how = "point most the same way" if cosine > 0 else "are most opposed"
    among = how if len(known) > 1 else how.replace(" most", "")
    return f"{pair} {among}: cosine {figure(cosine)}."


def _directions(record: dict) -> list[str]:
    said, names = [], names_of(record)
    for space, verb in (("column_spaces", "write to"), ("row_spaces", "read from")):
        known = [one for one in record["pairs"] if one[space]["shared"] is not None]
        if not known:
            continue
        most = max(known, key=lambda one: one[space]["shared"])
        told = most[space]
        said.append(
            f"{named_pair(most, names)} {verb} {'the most ' if len(known) > 1 else ''}shared directions: "
            f"{share(told['shared'])} of them, random ones {share(told['by_chance'])}."
        )
    return said
