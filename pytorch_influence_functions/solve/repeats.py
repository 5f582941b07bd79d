"""How much of the top of a list would stay if everything random were drawn anew."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Row: TypeAlias = NDArray[np.floating[Any]]


def resolved(chains: Row, k: int, draws: int = 64) -> float:
    """How many of the k largest would be among the k largest again if all chains were run anew.

    The mean of the r chains has the covariance C = sum_c d_c d_c^T / (r (r - 1)), d_c a chain's difference from it, and
    a new mean differs from this one by a draw from 2 C; as C is itself estimated from r chains, the draw is one of
    Student's t with r - 1 degrees of freedom.

    Args:
        chains: scores by each chain [r, n].
        k: length of the list.
        draws: of the new mean.
    """
    r = len(chains)
    mean = chains.mean(0)
    generator = np.random.default_rng(0)
    normal = generator.standard_normal((draws, r))
    weights = normal * (2 / (r * (r - 1))) ** 0.5
    freedom = generator.chisquare(r - 1, (draws, 1))
    weights *= ((r - 1) / freedom) ** 0.5
    differences = chains - mean
    top = _largest(mean, k)
    kept = []
    for w in weights:
        again = _largest(mean + w @ differences, k)
        kept.append(len(top & again))
    return float(np.mean(kept))


def _largest(scores: Row, k: int) -> set[int]:
    """Which k of them are the largest."""
    places: list[int] = np.argpartition(-scores, k - 1)[:k].tolist()
    return set(places)


def resolved_ends(chains: Row, top_k: int) -> dict[str, float]:
    """`resolved` at both ends of the list, for k = `top_k` or a tenth of the training set, whichever is less."""
    k = max(1, min(top_k, chains.shape[1] // 10))
    return {
        "k": k,
        "helpful": resolved(chains, k),
        "harmful": resolved(-chains, k),
    }
