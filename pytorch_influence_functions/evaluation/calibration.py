"""Predicted changes with their errors beside the changes that retraining finds."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .statistics import Floats, array_of, correlation


class Calibration(NamedTuple):
    """How predictions hold beside retraining.

    Attributes:
        correlation: Pearson's r of predicted and actual changes.
        slope: of the actual over the predicted ones, through the origin; above 1: predictions fall short.
        coverage: share of the actual changes within `errors` standard errors of the predicted ones.
        ceiling: Pearson's r of each retraining with the mean of the others, in the mean: what the noise of retraining
            leaves to any prediction; None of a single one.
    """

    correlation: float
    slope: float
    coverage: float
    ceiling: float | None


def calibration(
    predicted: Any,
    stderr: Any,
    actual: Any,
    errors: float = 2.0,
) -> Calibration:
    """Compare predicted changes, as of `InfluenceFunction.effect`, with those by retraining.

    Args:
        predicted: changes [S, K], of any shape.
        stderr: their standard errors [S, K].
        actual: changes by retraining [S, K], or by several retrainings [R, S, K], whose mean is compared.
        errors: how many standard errors have to cover an actual change.

    Raises:
        ValueError: the shapes differ, or a number is NaN or infinite.
    """
    p, s, a = (array_of(part) for part in (predicted, stderr, actual))
    if s.shape != p.shape or a.shape[-p.ndim :] != p.shape:
        raise ValueError(
            f"calibration: expected predicted, stderr and the last dimensions of actual of one shape, got {p.shape}, "
            f"{s.shape} and {a.shape}"
        )
    if not all(np.isfinite(part).all() for part in (p, s, a)):
        raise ValueError("calibration: a change or an error is NaN or infinite")
    rows = a.reshape(-1, p.size)
    p, s, mean = p.ravel(), s.ravel(), rows.mean(0)
    size = float(p @ p)
    return Calibration(
        correlation(p, mean),
        float(p @ mean) / size if size else 0.0,
        float((np.abs(mean - p) <= errors * s).mean()),
        _ceiling(rows),
    )


def _ceiling(rows: Floats) -> float | None:
    """Of retrainings [R, m]."""
    count = len(rows)
    if count < 2:
        return None
    others = (rows.sum(0) - rows) / (count - 1)
    pairs = zip(rows, others, strict=True)
    return float(np.mean([correlation(one, rest) for one, rest in pairs]))
