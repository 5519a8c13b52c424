"""Plain words for the figures of a summary; the page, the Markdown and the terminal say the same sentences."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

from forgetless.forgetting.texts import OWN_ANSWERS
from forgetless.score.scorers import NO_OPTION, RIGHT_OR_WRONG

NOT_SCORED = "not scored"

MEASURES = {
    "likelihood": "Own labels",
    "likelihood_union": "Union of all tasks' labels",
    "completion_per_char": "Own choices, per character",
    "completion": "Own choices",
    "exact_match": "Exact match",
    "next_token": "Next token",
    "number": "Number",
    "choice": "Choice letter",
    "rouge_l": "ROUGE-L",
    "sari": "SARI",
    "code_similarity": "Code similarity",
    "regex": "Regular expression",
    "json_fields": "JSON fields",
    "json_valid": "Valid JSON",
}
"""Measure -> heading."""

IN_POINTS = ("bwt", "bwt_over_all", "fwt", "forgetting")
"""Metrics that are differences of scores."""


def clean(text: object) -> str:
    """Someone's name on one line, without characters that steer a terminal or turn the reading direction."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def number(value: float, digits: int = 1) -> str:
    """Rounded, without a trailing `.0` and never `-0`.

    >>> number(28.04), number(-0.01), number(28.16)
    ('28', '0', '28.2')
    """
    text = f"{value:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def percent(share: float | None) -> str:
    """A score as people say it.

    >>> percent(0.89), percent(None)
    ('89 %', 'not scored')
    """
    return NOT_SCORED if share is None else f"{number(100 * share)} %"


def points(share: float) -> str:
    """The size of a difference of two scores.

    >>> points(-0.28), points(0.01)
    ('28 points', '1 point')
    """
    size = number(abs(100 * share))
    return f"{size} point" if size == "1" else f"{size} points"


def signed(value: float) -> str:
    """A difference with its sign.

    >>> signed(-28.04), signed(3), signed(0)
    ('−28', '+3', '0')
    """
    text = number(abs(value))
    return text if text == "0" else f"{'−' if value < 0 else '+'}{text}"


def p_value(p: float) -> str:
    """A probability as it is shown.

    >>> p_value(0.0004), p_value(0.51)
    ('< 0.001', '0.510')
    """
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def metric_value(key: str, value: float | list[float] | None) -> str | None:
    """A metric as people say it; None where it could not be computed."""
    if value is None:
        return None
    if isinstance(value, list):
        return ", ".join(percent(one) for one in value)
    return f"{number(100 * value)} points" if key in IN_POINTS else percent(value)


def reason(metric: dict) -> str:
    """Why a metric has no value."""
    why = metric.get("why") or "a cell it needs was not scored"
    return why if why.startswith("cannot compute") else f"cannot compute: {why}"


def run_labels(summaries: list[dict]) -> list[str]:
    """A short name for each run: its method where that tells them apart, else what does."""
    ways = (
        [clean(s["method"]["name"]) for s in summaries],
        [clean(s["name"]) for s in summaries],
        [clean(f"{s['method']['name']} ({s.get('folder') or i + 1})") for i, s in enumerate(summaries)],
    )
    for labels in ways:
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} #{i + 1}" for i, label in enumerate(ways[0])]


def title(summaries: list[dict]) -> str:
    """`sequential on demo`, or `sequential and replay on demo`."""
    if len(summaries) == 1:
        return clean(summaries[0]["name"])
    streams = {clean(s["name"]).partition(" on ")[2] for s in summaries}
    runs = run_labels(summaries)
    names = ", ".join(runs[:-1]) + " and " + runs[-1]
    stream = streams.pop()
    return f"{names} on {stream}" if stream and not streams else names


def at_once(summary: dict) -> bool:
    """Were all tasks learnt together?"""
    names = {task["name"] for task in summary["tasks"]}
    return len(summary["learned"]) == 1 and summary["learned"][0] not in names


def row_label(summary: dict, learned: str) -> str:
    """Names a row of the matrix."""
    return "after all at once" if at_once(summary) else f"after {clean(learned)}"


def verdict(summary: dict) -> str:
    """The run in one sentence."""
    nothing = _nothing_to_forget(summary)
    if nothing:
        return nothing
    entries = summary["forgotten"]
    lost = sorted((one for one in entries if one["high"] < 0), key=lambda one: one["change"])
    if not lost:
        return f"No loss that the test rows can show on {_earlier(len(entries))}."
    worst = lost[0]
    most = f"{clean(worst['task'])} lost {points(worst['change'])} (95 % interval {_range(worst)})"
    if len(entries) == 1:
        return f"{most[0].upper()}{most[1:]}." if not worst["task"][:1].islower() else f"{most}."
    return f"{len(lost)} of {len(entries)} earlier tasks lost something; the most: {most}."


def sentences(summary: dict) -> list[str]:
    """What was forgotten, a sentence a task, and what a reader must know beside it."""
    said = [forgotten_sentence(summary, entry) for entry in summary["forgotten"]]
    said = said or [_nothing_to_forget(summary)]
    said += _unscored_changes(summary)
    said += [border_sentence(summary)] if summary.get("forgetting") else []
    if summary["forgotten"] and not at_once(summary):
        said.append(f"{clean(summary['learned'][-1])} was learnt last: nothing of it can be forgotten yet.")
    said += _earlier_tasks(summary) + _learnt_with(summary)
    if summary["status"] != "complete":
        lessons = "1" if at_once(summary) else str(len(summary["tasks"]))
        said.append(f"The run is not finished: {len(summary['learned'])} of {lessons} lessons are done.")
    return said


def _earlier_tasks(summary: dict) -> list[str]:
    """Tasks that came from another trainer, whose rows are gone, or whose kept rows were deleted."""
    adopted, said = summary.get("adopted", []), []
    if adopted:
        kinds = {"continued": "each holds those before it", "summed": "their updates are added up"}
        names = ", ".join(clean(one["name"]) for one in adopted)
        said.append(f"Adopted from adapters of other trainers: {names} ({kinds[adopted[0]['kind']]}).")
    gone = [clean(task["name"]) for task in summary["tasks"] if task.get("gone")]
    if gone:
        said.append(
            f"No rows any more of {', '.join(gone)}: what was scored before stays, and the metrics are over the other "
            "tasks."
        )
    for one in summary.get("forgotten_rows", []):
        kept, task = max(one["rows"].values(), default=0), clean(one["task"])
        if kept:
            said.append(f"The kept rows of {task} ({kept}) were deleted: tasks learnt since replay the others.")
        elif one["texts"]:
            said.append(f"No training rows of {task} were kept; the answers of its test rows were deleted.")
    return said


def _learnt_with(summary: dict) -> list[str]:
    """Where lessons were learnt with other versions, or on another machine, than those before."""
    entries = summary.get("history", [])
    return [
        f"{', '.join(map(clean, now['lessons']))} {'was' if len(now['lessons']) == 1 else 'were'} learnt"
        f"{_after_step(now)} with {clean(difference(now, before))}."
        for before, now in pairwise(entries)
        if now["lessons"]
    ]


def _after_step(entry: dict) -> str:
    """Where a command went on inside a task, of which the steps before are the entry's before."""
    return f" (the first after step {entry['step']})" if "step" in entry else ""


def difference(now: dict, before: dict) -> str:
    """What differs between two entries of a run's history.

    >>> first = {"from": 1, "versions": {"torch": "2.12"}, "threads": 2, "machine": "x86_64 cpu"}
    >>> difference(first | {"from": 3, "versions": {"torch": "2.13"}, "threads": 4}, first)
    'torch 2.13 (before: 2.12), threads 4 (before: 2)'
    """
    new, old = ({**told["versions"], **told} for told in (now, before))
    keys = [key for key in new if key not in ("from", "step", "lessons", "versions") and new[key] != old.get(key)]
    return ", ".join(f"{key} {new[key]} (before: {old.get(key)})" for key in keys)


def forgotten_sentence(summary: dict, entry: dict) -> str:
    """What became of one earlier task.

    A loss or a gain is said as one only where its interval leaves 0 out.
    """
    task, n = clean(entry["task"]), entry["n"]
    then, now = percent(entry["learned"]), percent(entry["now"])
    after = f"After learning {len(summary['learned'])} tasks"
    if entry["low"] <= 0 <= entry["high"]:
        return (
            f"{after}, {task} went from {then} to {now}: no loss that these {n} rows can show "
            f"(95 % interval {_range(entry)}), {_rows(summary, entry)}."
        )
    verb, word = ("fell", "lost") if entry["change"] < 0 else ("rose", "gained")
    return (
        f"{after}, {task} {verb} from {then} to {now}: {points(entry['change'])} {word} "
        f"(95 % interval {_range(entry)}), {_rows(summary, entry)}."
        f"{_no_skill(summary, entry)}{_one_answer(summary, entry)}"
    )


def border_sentence(summary: dict) -> str:
    """How far the last model's predictions are from the untouched base's."""
    last = summary["forgetting"][-1]
    if "not_measured" in last:
        return f"How far predictions moved from the base's is not measured: {last['not_measured']}."
    interval = "" if last["low"] is None else f", 95 % interval {between(last)}"
    return (
        f"A{row_label(summary, last['after'])[1:]}, predictions on {measured_on(last['text'])} are "
        f"{nats(last['kl'])} nats per token from the base's own (KL{interval}); at {percent(last['agree'])} of "
        f"{last['text']['tokens']:,} tokens both hold the same word likeliest."
    )


def measured_on(text: dict) -> str:
    """The text of a border, in words."""
    if text["name"] == OWN_ANSWERS:
        return f"the base's own answers to {text['documents']:,} general prompts"
    many = text["documents"]
    return f"{clean(text['name'])} ({many:,} document{'s' if many != 1 else ''})"


def between(border: dict) -> str:
    """The interval of a KL, which few documents cannot give."""
    return "too few documents" if border["low"] is None else f"{nats(border['low'])} to {nats(border['high'])}"


def nats(value: float) -> str:
    """Three digits, never `-0`: below 0 is rounding.

    >>> nats(0.12345), nats(-1e-9)
    ('0.123', '0')
    """
    return f"{max(value, 0.0):.3g}"


def _nothing_to_forget(summary: dict) -> str:
    """Why there is nothing to say on forgetting; empty where there is."""
    learned, tasks = summary["learned"], len(summary["tasks"])
    if not learned:
        return "Nothing is learnt yet, so nothing can be forgotten yet."
    if at_once(summary):
        many = f"All {tasks} tasks were learnt" if tasks > 1 else "The task was learnt"
        return f"{many} at once: there is no earlier task, so nothing can be forgotten yet."
    if len(learned) == 1:
        return f"Only {clean(learned[0])} is learnt: there is no earlier task, so nothing can be forgotten yet."
    if not summary["forgotten"]:
        return "What was forgotten is not known: no earlier task was scored both when just learnt and now."
    return ""


def _unscored_changes(summary: dict) -> list[str]:
    """Earlier tasks whose change is not known although others' is."""
    if not summary["forgotten"]:
        return []
    known = {entry["task"] for entry in summary["forgotten"]}
    missing = [clean(name) for name in summary["learned"][:-1] if name not in known]
    return [f"{name}: not scored both when just learnt and now, so its change is not known." for name in missing]


def _earlier(many: int) -> str:
    return "the earlier task" if many == 1 else f"any of the {many} earlier tasks"


def _range(entry: dict) -> str:
    """The interval of a change in points: `20 to 36` within a loss or a gain, else with both words."""
    low, high = 100 * entry["low"], 100 * entry["high"]
    if high < 0:
        return f"{number(-high)} to {number(-low)}"
    if low > 0:
        return f"{number(low)} to {number(high)}"
    return f"{number(-low)} lost to {number(high)} gained"


def _rows(summary: dict, entry: dict) -> str:
    """What happened to single rows; a share, as of tokens, can only be higher or lower."""
    if _by_name(summary, entry["task"]).get("headline") not in RIGHT_OR_WRONG:
        return f"{entry['lost']} of {entry['n']} rows score lower and {entry['gained']} higher"
    lost, gained = entry["lost"], entry["gained"]
    return (
        f"{lost} of {entry['n']} answers that {'was' if lost == 1 else 'were'} right {'is' if lost == 1 else 'are'} "
        f"now wrong and {gained} that {'was' if gained == 1 else 'were'} wrong {'is' if gained == 1 else 'are'} "
        "now right"
    )


def _no_skill(summary: dict, entry: dict) -> str:
    majority = _by_name(summary, entry["task"]).get("majority")
    if not majority or entry["now"] > majority["share"]:
        return ""
    return f' Always answering "{clean(majority["label"])}" would give {percent(majority["share"])}.'


def _one_answer(summary: dict, entry: dict) -> str:
    """Says it when the model now gives nearly always the same answer."""
    counts = _last_counts(summary, entry["task"])
    total = sum(counts.values()) if counts else 0
    if not total:
        return ""
    label, many = max(counts.items(), key=lambda item: item[1])
    if many < 0.9 * total:
        return ""
    what = "none of the task's labels" if label == NO_OPTION else f'"{clean(label)}"'
    return f" {many} of its {total} answers are now {what}."


def _by_name(summary: dict, name: str) -> dict:
    return next((task for task in summary["tasks"] if task["name"] == name), {})


def _last_counts(summary: dict, name: str) -> dict[str, int]:
    rows = summary.get("counts", {}).get("after", [])
    for task, counts in zip(summary["tasks"], rows[-1] if rows else [], strict=False):
        if task["name"] == name:
            return counts or {}
    return {}


def figure(value: object) -> str:
    """A checked or configured value, short: `0`, `1,234`, `0.0123`, `1.2e-05`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "none" if value is None else clean(value)
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return f"{str(value)[:12]}..."
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:.4g}"
