r"""How many numbers of a sample belong to a group below zero: a mixture of normal distributions, in one dimension.

s ~ \sum_k w_k N(\mu_k, \sigma_k^2); the number of components is the one with the least BIC (Schwarz 1978), and what
belongs to components with \mu_k < 0 is the group. Where one component says as much there is no such group.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
STEPS = 500
GAIN = 1e-7
"""Log-likelihood a number below which a step ends the search."""
NARROWEST = 0.05
"""Of a component's width, in standard deviations of all numbers: one number alone would else be a component."""


class Fit(NamedTuple):
    """A mixture after its last step."""

    loglikelihood: float
    means: Floats
    """[K]."""
    parts: Floats
    """Probability that a number comes from each component [n, K]."""

    @property
    def bic(self) -> float:
        """Schwarz's criterion: least for the best mixture."""
        n, k = self.parts.shape
        free = 3 * k - 1
        return float(free * np.log(n) - 2 * self.loglikelihood)


def probability_below(s: Floats) -> Floats:
    """Probability that each number of s [n] belongs to a group around a mean below zero -> [n]."""
    below = s[s < 0]
    above = s[s >= 0]
    if not len(below) or not len(above):
        return np.zeros(len(s))
    lower, upper = np.quantile(above, [0.25, 0.75])
    starts = (
        [s.mean()],
        [below.mean(), above.mean()],
        [below.mean(), lower, upper],
    )
    fits = [fit(s, np.array(means)) for means in starts]
    best = min(fits, key=lambda one: one.bic)
    group: Floats = best.parts[:, best.means < 0].sum(1)
    return group


def fit(
    s: Floats,
    means: Floats,
) -> Fit:
    """The mixture that expectation maximisation finds from these means [K]."""
    narrowest = NARROWEST * s.std() + np.finfo(float).tiny
    widths = np.full(len(means), max(s.std() / len(means), narrowest))
    weights = np.full(len(means), 1 / len(means))
    before = -np.inf
    for _ in range(STEPS):
        total, parts = _expected(s, means, widths, weights)
        if total - before < GAIN * len(s):
            break
        before = total
        sizes = parts.sum(0) + np.finfo(float).tiny
        weights = sizes / len(s)
        means = (parts.T @ s) / sizes
        squares = (s[:, None] - means) ** 2
        widths = np.sqrt((parts * squares).sum(0) / sizes)
        widths = np.maximum(widths, narrowest)
    return Fit(total, means, parts)


def _expected(
    s: Floats,
    means: Floats,
    widths: Floats,
    weights: Floats,
) -> tuple[float, Floats]:
    """Log-likelihood of all numbers, and each component's part of each [n, K]."""
    distances = (s[:, None] - means) / widths
    constant = np.log(2 * np.pi) / 2
    logs = np.log(weights) - np.log(widths) - constant - distances**2 / 2
    top = logs.max(1, keepdims=True)
    whole = top + np.log(np.exp(logs - top).sum(1, keepdims=True))
    return float(whole.sum()), np.exp(logs - whole)
