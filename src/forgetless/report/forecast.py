"""Fitted laws and forecasts in words and tables: in the terminal and as Markdown."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from forgetless.report.audit import Table, rich_table
from forgetless.report.markdown import escaped, pipe_table
from forgetless.report.words import clean, number

INDEPENDENT = "AICc and BIC count the points of a run as if they were independent; errors on held-out points do not."


def print_laws(record: dict, console: Console) -> None:
    """A few sentences and a table for each group of points."""
    for line in left_out(record):
        console.print(Text(f"- {line}"))
    for group in record["laws"]:
        for line in sentences(group):
            console.print(Text(f"- {line}"))
        console.print(rich_table(table(group)))
        console.print(Text(INDEPENDENT, style="dim"))


def laws_markdown(record: dict) -> str:
    """The same as Markdown."""
    parts = ["## Laws of forgetting", "", *(f"- {escaped(line)}" for line in left_out(record))]
    for group in record["laws"]:
        parts += [f"- {escaped(line)}" for line in sentences(group)]
        told = table(group)
        parts += ["", f"#### {escaped(told.title)}", "", *pipe_table(told.head, told.rows), "", INDEPENDENT, ""]
    return "\n".join(parts)


def left_out(record: dict) -> list[str]:
    """The runs that gave no points."""
    return [f"left out: {clean(why)}" for why in record["left_out"]]


def sentences(group: dict) -> list[str]:
    """What stands out."""
    linear, sizes, steps = group["linear"], group["grid"]["sizes"], group["grid"]["steps"]
    between = _between(linear["c_interval"], "no interval from so few runs")
    chosen = next(one for one in group["fits"] if one["law"] == group["chosen"])
    told = [
        f"{_name(group)}: {len(group['points'])} points of {group['runs']} training runs, {len(sizes)} sizes and "
        f"{len(steps)} numbers of steps.",
        f"Linear relation: forgetting = {linear['s']:.4g} - {linear['c']:.4g} x fine-tuning loss (slope {between}), "
        f"R² {linear['r_squared']:.3f}.",
        f"Forecasts use the law '{chosen['law']}': R² {chosen['r_squared'][0]:.3f} of the loss, "
        f"{chosen['r_squared'][1]:.3f} of forgetting.",
    ]
    return told + [f"'{one['law']}' is refused: {one['refused']}." for one in group["fits"] if one["refused"]]


def table(group: dict) -> Table:
    """A line for each law; errors are root mean squares of forgetting, in nats per token."""
    rows = [
        [
            one["law"],
            str(len(one["constants"])),
            f"{one['r_squared'][1]:.4f}",
            number(one["aicc"]),
            number(one["bic"]),
            *(_error(one["held_out"][held]) for held in ("ranks", "steps")),
            "refused" if one["refused"] else "used" if one["law"] == group["chosen"] else "",
        ]
        for one in group["fits"]
    ]
    head = ["law", "constants", "R² of forgetting", "AICc", "BIC", "error, held-out ranks", "held-out steps", ""]
    return Table(f"Laws for {_name(group)}", head, rows)


def _name(group: dict) -> str:
    rate = "" if group["learning_rate"] is None else f"learning rate {group['learning_rate']:g}"
    return clean(", ".join(filter(None, (group["dataset"], group["method"], rate)))) or "these points"


def _error(told: list[float] | None) -> str:
    return "-" if told is None else f"{told[1]:.2g}"


def _between(ends: list[float] | None, missing: str) -> str:
    return missing if ends is None else f"{ends[0]:.4g} to {ends[1]:.4g}"


def forecast_lines(told: dict) -> list[str]:
    """A forecast in words."""
    confidence = f"{100 * told['confidence']:g} %"
    lines = []
    if "forgetting" in told:
        lines.append(f"{told['at']}: forgetting {_said(told['forgetting'], confidence)}")
        lines.append(f"fine-tuning loss {_said(told['loss'], confidence)}")
    if "most" in told:
        lines.append(_most(told, confidence))
    return lines + [f"extrapolation: {one}; the interval does not say how wrong the law may be there"
                    for one in told["beyond"]]  # fmt: skip


def _said(one: dict, confidence: str) -> str:
    if one["mean"] is None:
        return f"{one['value']:.4g} nats per token; no interval from so few runs"
    run, mean = (_between(one[name], "") for name in ("run", "mean"))
    return f"{one['value']:.4g} nats per token; {confidence} interval of a new run {run}, of the mean {mean}"


def _most(told: dict, confidence: str) -> str:
    if told["most"] is None:
        return (
            f"no {told['of']} keeps a new run within {told['max_kl']:g} nats per token at {confidence}, {told['given']}"
        )
    more = " or more" if told["unbounded"] else ""
    return (
        f"at most {told['most']:,}{more} {told['of']} ({told['given']}): with {confidence} confidence a new run then "
        f"forgets no more than {told['max_kl']:g} nats per token"
    )
