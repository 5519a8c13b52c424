"""What the rows say of a path between two models: barrier, peak, and how alike the ends' representations are.

barrier     max_λ h(λ),  h(λ) = L(φ(λ)) - ((1 - λ) L(φ(0)) + λ L(φ(1)))
concave     M(λ_{i-1}) - 2 M(λ_i) + M(λ_{i+1}) < 0 at every point between the ends
peak        max_λ min(M(λ) - M(0), M(λ) - M(1)) over the points between the ends, M the mean score
linear CKA  ‖Y^T X‖_F² / (‖X^T X‖_F ‖Y^T Y‖_F), columns centred        (Kornblith et al. 2019, arXiv 1905.00414)

Maxima are looked for on the rows that they are measured on. So the bounds hold for all points together
(`score.intervals.band`): what is said of the largest holds whichever it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forgetless.score.intervals import Band, band

SHOWN, NOT_SHOWN, SHOWN_NOT = "shown", "not shown", "shown that not"


@dataclass(frozen=True)
class TaskRows:
    """One task along a path: the rows of each point."""

    nats: np.ndarray  # (rows, points): -log p(answer tokens), summed
    tokens: np.ndarray  # (rows,): answer tokens
    scores: np.ndarray  # (rows, points): from 0 to 1


def losses(tasks: Sequence[TaskRows], confidence: float) -> Band:
    """L(λ): nats per answer token, the mean over tasks."""
    return band([(task.nats, task.tokens) for task in tasks], confidence)


def scores(tasks: Sequence[TaskRows], confidence: float) -> Band:
    """M(λ): the mean score, each task counts the same."""
    found = band([(task.scores, np.ones(len(task.scores))) for task in tasks], confidence, added=(1.0, 0.0))
    return Band(found.value, np.clip(found.low, 0.0, 1.0), np.clip(found.high, 0.0, 1.0))


def barrier(tasks: Sequence[TaskRows], alphas: Sequence[float], confidence: float) -> dict:
    """The height of the loss above the straight line between its ends, where it is largest; `heights` at every point.

    `found`: a barrier is shown, not shown, or it is shown that no point is above the line.
    """
    told = band([(above_line(task.nats, alphas), task.tokens) for task in tasks], confidence)
    place = int(told.value[1:-1].argmax()) + 1
    low, high = _largest(told.low[1:-1]), _largest(told.high[1:-1])
    return {
        "height": float(told.value[place]),
        "at": alphas[place],
        "low": low,
        "high": high,
        "heights": told.value.tolist(),
        "found": _found(low, high),
    }


def above_line(values: np.ndarray, alphas: Sequence[float]) -> np.ndarray:
    """Values (rows, points) minus the straight line between the first and the last point."""
    t = np.asarray(alphas)
    return values - np.outer(values[:, 0], 1 - t) - np.outer(values[:, -1], t)


def peak(tasks: Sequence[TaskRows], alphas: Sequence[float], confidence: float) -> dict:
    """The point between the ends with the best mean score, and what it gains over the better end."""
    gains = [(np.hstack([_gain(task, 0), _gain(task, -1)]), np.ones(len(task.scores))) for task in tasks]
    told = band(gains, confidence, added=(1.0, -1.0))
    value, low, high = (np.minimum(*np.split(one, 2)) for one in (told.value, told.low, told.high))
    place = int(value.argmax())
    lowest, highest = _largest(low), _largest(high)
    return {
        "at": alphas[place + 1],
        "gain": float(value[place]),
        "low": lowest,
        "high": highest,
        "found": _found(lowest, highest),
    }


def concave(tasks: Sequence[TaskRows], confidence: float) -> str:
    """Whether M(λ_{i-1}) - 2 M(λ_i) + M(λ_{i+1}) < 0 at every point between the ends (they are equally far apart).

    SHOWN where it is at all of them, SHOWN_NOT where it is above 0 at one.
    """
    bends = [(np.diff(task.scores, n=2), np.ones(len(task.scores))) for task in tasks]
    told = band(bends, confidence, added=(2.0, -2.0))
    if (told.high < 0).all():
        return SHOWN
    return SHOWN_NOT if (told.low > 0).any() else NOT_SHOWN


def _gain(task: TaskRows, end: int) -> np.ndarray:
    """Of each point between the ends over an end, row by row."""
    return task.scores[:, 1:-1] - task.scores[:, [end]]


def _largest(bounds: np.ndarray) -> float | None:
    return None if np.isnan(bounds).any() else float(bounds.max())


def _found(low: float | None, high: float | None) -> str:
    """Is it above 0?"""
    if low is None or high is None:
        return NOT_SHOWN
    return SHOWN if low > 0 else SHOWN_NOT if high <= 0 else NOT_SHOWN


def linear_cka(X: Tensor, Y: Tensor) -> float | None:
    """Of representations (positions, width) of the same positions; 1 if equal up to rotation, scale and shift.

    With fewer positions than the width it is too high, whatever the models: n random rows are nearly orthogonal. None
    where one side is constant.
    """
    X, Y = (one.double() - one.double().mean(0) for one in (X, Y))
    if X.shape[0] < X.shape[1]:  # the same from products of rows: <X X^T, Y Y^T> = ‖Y^T X‖²
        K, G = X @ X.T, Y @ Y.T
        cross, norms = (K * G).sum(), torch.linalg.norm(K) * torch.linalg.norm(G)
    else:
        cross, norms = torch.linalg.norm(Y.T @ X) ** 2, torch.linalg.norm(X.T @ X) * torch.linalg.norm(Y.T @ Y)
    return float(cross / norms) if norms > 0 else None
