"""Correlations, and checks of what is given for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats: TypeAlias = NDArray[np.float64]


def correlation(x: Floats, y: Floats) -> float:
    """Pearson correlation of x and y [m]; 0 where one of them is constant."""
    return float(_cosine(x - x.mean(), y - y.mean()))


def rank_correlation(x: Floats, y: Floats) -> float:
    """Spearman correlation of x and y [m], average ranks for ties; 0 where one of them is constant."""
    return rank_correlations(x, y)[0]


def rank_correlations(x: Floats, y: Floats) -> tuple[float, Floats]:
    r"""Spearman correlation of x and y [m], and without each of the m pairs in turn [m].

    With X_{ij} = sign(x_i - x_j), the row sums of X are twice the centred average ranks, and those of the rest without
    pair j are the row sums less column j.
    """
    p, ranks_without = _centred_ranks(x)
    q, others_without = _centred_ranks(y)
    return float(_cosine(p, q)), _cosine(ranks_without, others_without)


def _centred_ranks(x: Floats) -> tuple[Floats, Floats]:
    """Twice the centred average ranks of x [m], and a row of those without each of the m numbers in turn [m, m]."""
    signs = np.sign(x[:, None] - x)
    ranks = signs.sum(1)
    without = ranks[:, None] - signs
    np.fill_diagonal(without, 0)
    return ranks, without.T


def _cosine(a: Floats, b: Floats) -> Any:
    """Cosine along the last axis; 0 where a vector is 0."""
    product = (a * b).sum(-1)
    squares = (a * a).sum(-1) * (b * b).sum(-1)
    scale = np.sqrt(squares)
    known = scale > 0
    return np.where(known, product / np.where(known, scale, 1), 0.0)


def array_of(values: Any) -> Floats:
    """A tensor, array or list in float64."""
    return np.asarray(
        values.detach().cpu() if isinstance(values, Tensor) else values,
        dtype=np.float64,
    )


def require_finite_scores(scores: Floats, name: str) -> None:
    """Raise where a score is NaN or infinite."""
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        raise ValueError(
            f"{name}: the score of training sample {bad[0][-1]} is NaN or infinite; expected a number"
        )


def check_count(name: str, value: Any, least: int) -> None:
    """Raise where `value` is no whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{name}: expected a whole number of at least {least}, got {value!r}"
        )


def check_indices(name: str, indices: Sequence[int], n: int, most: int) -> None:
    """Raise where these are not 1 to `most` different training indices."""
    wrong = [i for i in indices if not 0 <= i < n]
    if wrong:
        raise ValueError(
            f"{name}: expected training indices from 0 to {n - 1}, got {wrong[0]}"
        )
    if not 0 < len(set(indices)) == len(indices) <= most:
        raise ValueError(
            f"{name}: expected 1 to {most} different training indices, got {len(indices)}: {indices[:8]}"
        )
