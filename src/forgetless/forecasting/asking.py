"""What `forgetless forecast LAW` answers, as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from forgetless.errors import UsageError
from forgetless.forecasting.forecast import Forecaster, read_law


def ask(
    law: Path, *, rank: float | None = None, parameters: float | None = None, steps: float | None = None,
    max_kl: float | None = None, confidence: float = 0.95, dataset: str | None = None, method: str | None = None,
    learning_rate: float | None = None,
) -> dict:  # fmt: skip
    """Forgetting and loss at a size and a number of steps, or with `max_kl` the one of the two that is left out.

    Raises `UsageError` for values out of range, or where it is not clear what is asked for.
    """
    _check(rank=rank, parameters=parameters, steps=steps, max_kl=max_kl)
    if not 0.5 <= confidence < 1:
        raise UsageError(f"confidence must be from 0.5 to below 1, not {confidence}")
    if rank is not None and parameters is not None:
        raise UsageError("give --rank or --parameters, not both")
    forecaster = read_law(law, dataset, method, learning_rate)
    size = forecaster.size_of(rank) if rank is not None else parameters
    told = {"confidence": confidence, "law": forecaster.law.name}
    if max_kl is not None:
        if (size is None) == (steps is None):
            raise UsageError("--max-kl needs a rank, for the most steps, or steps, for the largest rank; not both")
        return told | _inverse(forecaster, max_kl, size, steps, confidence)
    if size is None or steps is None:
        raise UsageError("a forecast needs --rank (or --parameters) and --steps; or one of them and --max-kl")
    found = {curve: forecaster(size, steps, confidence, curve) for curve in ("forgetting", "loss")}
    named = f"rank {rank:g}" if rank is not None else f"{size:,.0f} parameters"
    return told | {
        "at": f"{named}, {steps:,.0f} steps",
        **{curve: {key: asdict(one)[key] for key in ("value", "mean", "run")} for curve, one in found.items()},
        "beyond": list(found["forgetting"].beyond),
        "doubts": forecaster.doubts(found["forgetting"]),
    }


def _check(**given: float | None) -> None:
    for name, value in given.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} must be above 0, not {value:g}")


def _inverse(forecaster: Forecaster, max_kl: float, size: float | None, steps: float | None, confidence: float) -> dict:
    """The most steps for a size, or the largest rank for steps."""
    if size is not None:
        told, of = forecaster.most_steps(max_kl, size, confidence), "steps"
        given = f"with {forecaster.record['size']} {size:,.0f}"
    else:
        assert steps is not None
        told, of = forecaster.largest_size(max_kl, steps, confidence), "rank" if forecaster.has_ranks else "parameters"
        given = f"with {steps:,.0f} steps"
    return {"max_kl": max_kl, "of": of, "given": given} | asdict(told)
