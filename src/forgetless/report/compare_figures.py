"""The figures of a comparison: learning against forgetting, and scores against the share of old rows kept."""

from __future__ import annotations

from forgetless.report.charts import COLOURS
from forgetless.report.compare_words import marked, value_of
from forgetless.report.figures import SOFT, Drawing, axes
from forgetless.report.words import clean

WIDTH, HEIGHT, NAMES = 900, 420, 210  # and the room for names


def figures(told: dict, number: int) -> list[tuple[str, Drawing]]:
    """Name of the file and drawing of each; `number`: of the set."""
    found = [(f"pareto-{number}", pareto(told))]
    found += [(f"replay-{number}-{clean(one['method'])}", replay(one)) for one in told["replay"]]
    return [(name, drawing) for name, drawing in found if drawing is not None]


def pareto(told: dict) -> Drawing | None:
    """Score when just learnt against backward transfer, a mark each, hollow if in no ranking; the front as a line."""
    known = [
        (i, one, one["figures"]["bwt"], one["figures"]["learning_accuracy"])
        for i, one in enumerate(told["configurations"])
        if None not in (one["figures"]["bwt"]["mean"], one["figures"]["learning_accuracy"]["mean"])
    ]
    if len(known) < 2:
        return None
    desc = " ".join(
        f"{clean(one['label'])}: learnt {value_of('score', learnt['mean'])} %, changed since by "
        f"{value_of('bwt', kept['mean'])} points." for _, one, kept, learnt in known
    )  # fmt: skip
    drawing = Drawing(WIDTH, HEIGHT, "Learning against forgetting", desc)
    across = [100 * end for *_, kept, _ in known for end in _ends(kept)]
    upwards = [100 * end for *_, learnt in known for end in _ends(learnt)]
    x, y = axes(drawing, across, upwards, "change since learnt (backward transfer), points", "just learnt, %", NAMES)
    front = sorted((100 * kept["mean"], 100 * learnt["mean"]) for _, one, kept, learnt in known if one["front"])
    if len(front) > 1:
        drawing.line([(x(a), y(b)) for a, b in front], SOFT, 1.2, dashed=True)
    for place, (i, one, kept, learnt) in enumerate(known):
        colour = f"line-{i % COLOURS}"
        a, b = 100 * kept["mean"], 100 * learnt["mean"]
        if kept["low"] is not None:
            drawing.line([(x(100 * kept["low"]), y(b)), (x(100 * kept["high"]), y(b))], colour, 1.5)
        if learnt["low"] is not None:
            drawing.line([(x(a), y(100 * learnt["low"])), (x(a), y(100 * learnt["high"]))], colour, 1.5)
        drawing.mark(x(a), y(b), colour, full=one["ranked"], told=clean(one["label"]))
        _name(drawing, place, marked(one), colour, one["ranked"])
    return drawing


def replay(curve: dict) -> Drawing | None:
    """Scores on old tasks and on the newest against the share of old rows that is kept."""
    series = {"old": "old tasks", "new": "newest task"}
    values = [end for one in curve["points"] for key in series for end in _ends(one[key]) if end is not None]
    if not values:
        return None
    desc = " ".join(
        f"{value_of('score', one['share'])} % kept: old tasks {value_of('score', one['old']['mean'])} %, newest "
        f"{value_of('score', one['new']['mean'])} %." for one in curve["points"]
    )  # fmt: skip
    drawing = Drawing(WIDTH, HEIGHT, f"How much old data? {clean(curve['method'])}", desc)
    shares = [100 * one["share"] for one in curve["points"]]
    upwards = [100 * value for value in values]
    x, y = axes(drawing, shares, upwards, "rows kept of each earlier task, %", "score at the end, %", NAMES)
    for place, (key, name) in enumerate(series.items()):
        colour = f"line-{place}"
        known = [(share, one[key]) for share, one in zip(shares, curve["points"], strict=True)
                 if one[key]["mean"] is not None]  # fmt: skip
        drawing.line([(x(share), y(100 * one["mean"])) for share, one in known], colour, 2.0)
        for share, one in known:
            if one["low"] is not None:
                ends = [(x(share), y(100 * one["low"])), (x(share), y(100 * one["high"]))]
                drawing.line(ends, colour, 1.5)
            drawing.mark(x(share), y(100 * one["mean"]), colour, told=f"{name}: {value_of('score', one['mean'])} %")
        _name(drawing, place, name, colour)
    return drawing


def _ends(one: dict) -> list[float]:
    return [value for value in (one["mean"], one["low"], one["high"]) if value is not None]


def _name(drawing: Drawing, place: int, name: str, colour: str, full: bool = True) -> None:
    """A name with its mark, in the room beside the box."""
    y = 30 + 22 * place
    drawing.mark(drawing.width - NAMES + 16, y - 4, colour, full)
    told = clean(name)
    drawing.text(drawing.width - NAMES + 28, y, told if len(told) <= 30 else told[:29] + "…")
