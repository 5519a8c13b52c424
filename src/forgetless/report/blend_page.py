"""The HTML page of a blend: learning drawn against forgetting, the budget, and the point that was chosen."""

from __future__ import annotations

from forgetless.auditing.budgets import MAX_KL
from forgetless.report.blend import amount, headline, points_table, promise, sentences, state, title
from forgetless.report.charts import scale, svg_path, ticks
from forgetless.report.glossary import BLEND_GLOSSARY
from forgetless.report.pieces import render
from forgetless.report.words import clean, figure, number, percent

WIDTH, HEIGHT = 1060, 380
BOX = {"left": 60, "top": 40, "right": WIDTH - 40, "bottom": HEIGHT - 52}
APART = 16  # pixels between marks with labels of their own


def render_blend(record: dict) -> str:
    """The page as text."""
    head, rows = points_table(record)
    budgets = record["points"][0]["budgets"]
    return render(
        "blend_page.html.jinja",
        {
            "title": f"Blend {title(record)}",
            "sign": "good" if record["chosen"] else "unsure",
            "badge": record["outcome"],
            "headline": headline(record),
            "lines": sentences(record),
            "promise": promise(record),
            "charts": [chart(record, i) | {"name": clean(one["text"])} for i, one in enumerate(budgets)],
            "head": head,
            "rows": rows,
            "notes": [clean(note) for note in record["facts"]["settings"]["notes"]],
            "facts": _facts(record),
            "glossary": BLEND_GLOSSARY,
        },
    )


def chart(record: dict, i: int) -> dict:
    """Budget i: each point's loss across and learning upwards, its bar to the most that may be lost."""
    told = [point["budgets"][i] for point in record["points"]]
    budget = told[0]["budget"]
    unit = 1 if budget["option"] == MAX_KL else 100
    learnt = record["learnt"] or [0.0, *(point["alpha"] for point in record["points"])]
    across = ticks(min(0.0, *(unit * one["loss"] for one in told)), max(unit * budget["limit"],
                   *(unit * one["high"] for one in told)))  # fmt: skip
    upwards = ticks(100 * min(learnt), 100 * max(learnt))
    x = scale(across[0], across[-1], BOX["left"], BOX["right"])
    y = scale(upwards[0], upwards[-1], BOX["bottom"], BOX["top"])
    points: list[dict] = [
        {"x": x(0), "y": y(100 * learnt[0]), "high": x(0), "kind": "before", "label": "before", "title": "before"}
    ]
    for point, one, score in zip(record["points"], told, learnt[1:], strict=True):
        known = state(record, point)
        lost, most = (amount(budget["option"], one[key]) for key in ("loss", "high"))
        points.append({
            "x": x(unit * one["loss"]),
            "y": y(100 * score),
            "high": x(unit * one["high"]),
            "kind": known.replace(" ", "-"),
            "label": f"{point['alpha']:g}",
            "title": f"alpha {point['alpha']:g}, {known}: {percent(score)} learnt, {lost} lost, at most {most}",
        })  # fmt: skip
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "box": BOX,
        "budget": x(unit * budget["limit"]),
        "path": svg_path([(point["x"], point["y"]) for point in points]),
        "points": points,
        "labels": _labels(points),
        "x_ticks": [(x(tick), figure(tick)) for tick in across],
        "y_ticks": [(y(tick), number(tick)) for tick in upwards],
        "x_name": "lost, nats per token" if budget["option"] == MAX_KL else "lost, percentage points",
        "y_name": "new tasks, mean score, %" if record["learnt"] else "way from before to after, %",
        "desc": " ".join(f"{point['title']}." for point in points),
    }


def _labels(points: list[dict]) -> list[dict]:
    """A label for each mark, or for several that lie on one another: `0.1 to 0.4`."""
    groups: list[list[dict]] = []
    for point in points:
        last = groups[-1][-1] if groups else None
        if last and abs(point["x"] - last["x"]) + abs(point["y"] - last["y"]) < APART:
            groups[-1].append(point)
        else:
            groups.append([point])
    texts = [" to ".join(dict.fromkeys((group[0]["label"], group[-1]["label"]))) for group in groups]
    return [{"x": group[0]["x"], "y": group[0]["y"], "text": text} for group, text in zip(groups, texts, strict=True)]


def _facts(record: dict) -> list[tuple[str, str]]:
    facts = record["facts"]
    versions = ", ".join(f"{name} {one}" for name, one in facts["versions"].items())
    return [
        ("model before", clean(record["before"]["name"])),
        ("model after", clean(record["after"]["name"])),
        ("new tasks", ", ".join(map(clean, record["new_tasks"])) or "none"),
        ("a document counts", f"{figure(record['kl_clip'])} nats per token at most"),
        ("computed on", facts["settings"]["computed_on"]),
        ("versions", versions),
    ]
