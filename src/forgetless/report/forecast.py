"""Fitted laws and forecasts in words and tables: in the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from forgetless.forecasting.points import TRAINING
from forgetless.report.audit import Table, rich_table
from forgetless.report.markdown import escaped, pipe_table
from forgetless.report.words import clean, number

INDEPENDENT = "AICc and BIC count the points of a run as if they were independent; errors on held-out points do not."
FEW = "no interval from so few runs"
FORM = ("a", "b", "alpha", "beta", "c", "rho", "s")


def print_laws(record: dict, console: Console) -> None:
    """A few sentences and tables for each group of points."""
    for line in left_out(record):
        console.print(Text(f"- {line}"))
    for group in record["laws"]:
        for line in sentences(group):
            console.print(Text(f"- {line}"))
        for told, note in tables(group):
            console.print(rich_table(told))
            console.print(Text(note, style="dim"))


def laws_markdown(record: dict) -> str:
    """The same as Markdown."""
    parts = ["## Laws of forgetting", "", *(f"- {escaped(line)}" for line in left_out(record))]
    for group in record["laws"]:
        parts += [f"- {escaped(line)}" for line in sentences(group)]
        for told, note in tables(group):
            parts += ["", f"#### {escaped(told.title)}", "", *pipe_table(told.head, told.rows), "", note, ""]
    return "\n".join(parts)


def left_out(record: dict) -> list[str]:
    """The runs and steps that gave no points."""
    early = [f"left out: points before step {record['from_step']:g}"] if record["from_step"] else []
    return [f"left out: {clean(why)}" for why in record["left_out"]] + early


def sentences(group: dict) -> list[str]:
    """What stands out."""
    linear, sizes, steps = group["linear"], group["grid"]["sizes"], group["grid"]["steps"]
    between = _between(linear["c_interval"], FEW)
    used = [one["law"] for one in group["used"]]
    chosen = next(one for one in group["fits"] if one["law"] == used[0])
    told = [
        f"{_name(group)}: {len(group['points'])} points of {group['runs']} training runs, {len(sizes)} sizes and "
        f"{len(steps)} numbers of steps.",
        f"The loss is {'that on ' + group['loss_kind'] if group['loss_kind'] else 'the one of the table'}.",
        f"Linear relation: forgetting = {linear['s']:.4g} - {linear['c']:.4g} x fine-tuning loss (slope {between}), "
        f"R² {linear['r_squared']:.3f}.",
        f"Forecasts use the law '{used[0]}': R² {chosen['r_squared'][0]:.3f} of the loss, "
        f"{chosen['r_squared'][1]:.3f} of forgetting.",
    ]
    if group["loss_kind"] == TRAINING:
        told.insert(2, "Such a loss lags behind the point, so the slope of forgetting against it can be far off.")
    if len(used) > 1:
        told.append(f"Err about as much on points they had not seen: {', '.join(used[1:])}. The intervals hold what "
                    "these laws disagree on.")  # fmt: skip
    told += _matters(chosen, "size", ("e_P", "p", "k_P"))
    told += _matters(chosen, "number of steps", ("e_N", "n", "k_N"))
    told += [_fits(chosen)]
    if chosen["below_zero"]:
        told.append(f"Up to step {chosen['below_zero']:,} '{used[0]}' is below 0 at a measured size, where no KL can "
                    "be: it knows nothing there.")  # fmt: skip
    if chosen["loss_refused"]:
        told.append(f"The points do not identify its curve of the loss: {chosen['loss_refused']}.")
    return told + [f"'{one['law']}' is refused: {one['refused']}." for one in group["fits"] if one["refused"]]


def _matters(chosen: dict, what: str, names: tuple[str, ...]) -> Iterator[str]:
    """Does forgetting depend on the size (the number of steps)?"""
    for name in (f"{one}{ending}" for one in names for ending in ("_f", "")):
        if name not in chosen["constants"]:
            continue
        ends = chosen.get("intervals", {}).get(name)
        told = f"{name} of '{chosen['law']}' is {chosen['constants'][name]:.3g} ({_between(ends, FEW)})"
        if ends is None:
            yield f"Whether forgetting depends on the {what}, so few runs do not tell: {told}."
        elif ends[0] > 0:
            yield f"Forgetting grows with the {what}: {told}."
        elif ends[1] < 0:
            yield f"Forgetting falls with the {what}: {told}."
        else:
            yield f"That forgetting depends on the {what} is not shown: {told}."


def _fits(chosen: dict) -> str:
    """How well the law follows the points."""
    told = chosen["lack_of_fit"]
    means, steps = (
        " / ".join(f"{one:{form}}" for one in told[key]) for key, form in (("means", ".2f"), ("steps", ",.0f"))
    )
    said = (
        f"At steps {steps} forgetting lies {means} above '{chosen['law']}' in the mean, in units of what runs differ "
        f"by ({told['spread']:.2g} nats)"
    )
    return said + (": the law bends otherwise than the points do, so do not rely on it." if told["lacks"] else ".")


def tables(group: dict) -> list[tuple[Table, str]]:
    """A line for each law, with a note below: how good it is, its constants, and those of the published form."""
    used = [one["law"] for one in group["used"]]
    states = dict(zip(used, ["used", *["in the intervals"] * len(used)], strict=False))
    good = [
        [
            one["law"],
            one["formula"],
            _both(one["r_squared"], ".4f"),
            _both(one["residual"], ".2g"),
            number(one["aicc"]),
            number(one["bic"]),
            *(_both(one["held_out"][held], ".2g") for held in ("ranks", "steps")),
            "refused" if one["refused"] else states.get(one["law"], ""),
        ]
        for one in group["fits"]
    ]
    head = ["law", "forgetting", "R²", "residual", "AICc", "BIC", "held-out ranks", "held-out steps", ""]
    constants = [[one["law"], *(_constants(one, ending) for ending in ("_ft", "_f"))] for one in group["fits"]]
    published = [
        [one["law"], curve, *("-" if form[key] is None else f"{form[key]:.4g}" for key in FORM)]
        for one in group["fits"] if "published_form" in one and not one["refused"]
        for curve, form in one["published_form"].items()
    ]  # fmt: skip
    name = _name(group)
    P0, N0 = group["centre"]
    told = [
        (Table(f"Laws for {name}", head, good), f"Loss / forgetting, in nats per token. {INDEPENDENT}"),
        (Table(f"Constants for {name}", ["law", "of the loss", "of forgetting"], constants),
         f"With intervals over runs; at P/P0 and N/N0, P0 = {P0:.4g} and N0 = {N0:.4g}."),
    ]  # fmt: skip
    if published:
        told.append((Table(f"The published form for {name}", ["law", "curve", *FORM], published),
                     "s + c [(a/P)^α + (b/N)^β]^ρ; c of forgetting is taken away."))  # fmt: skip
    return told


def _both(values: list[float] | None, form: str) -> str:
    return "-" if values is None else " / ".join(f"{value:{form}}" for value in values)


def _constants(one: dict, ending: str) -> str:
    """'e_P 0.12 (0.1 to 0.14), ...' of one curve; constants of both curves are in both."""
    other = "_f" if ending == "_ft" else "_ft"
    shown = ((name, value) for name, value in one["constants"].items() if not name.endswith(other))
    ends = one.get("intervals", {})
    return ", ".join(
        f"{name.removesuffix(ending)} {value:.4g}" + (f" ({_between(ends[name], '')})" if name in ends else "")
        for name, value in shown
    )


def _name(group: dict) -> str:
    rate = "" if group["learning_rate"] is None else f"learning rate {group['learning_rate']:g}"
    return clean(", ".join(filter(None, (group["dataset"], group["method"], rate)))) or "these points"


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
    lines += [f"extrapolation: {one}; the interval does not say how wrong the law may be there"
              for one in told["beyond"]]  # fmt: skip
    return [*lines, *told.get("doubts", ()), *told.get("uneven", ())]


def _said(one: dict, confidence: str) -> str:
    if one["mean"] is None:
        return f"{one['value']:.4g} nats per token; {FEW}"
    run, mean = (_between(one[name], "") for name in ("run", "mean"))
    return f"{one['value']:.4g} nats per token; {confidence} interval of a new run {run}, of the mean {mean}"


def _most(told: dict, confidence: str) -> str:
    if told["most"] is None:
        return (
            f"no {told['of']} keeps a new run within {told['max_kl']:g} nats per token at {confidence}, {told['given']}"
        )
    more = " or more" if told["end"] else ""
    number = f"rank {told['most']:,}{more}" if told["of"] == "rank" else f"{told['most']:,}{more} {told['of']}"
    return (
        f"at most {number} ({told['given']}): with {confidence} confidence a new run then forgets no more than "
        f"{told['max_kl']:g} nats per token"
    )
