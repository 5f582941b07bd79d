r"""Which labels are wrong, and how many, by predictions of each sample from a model without it.

Classes, by counts (Northcutt et al. 2021, confident learning): t_c is the mean of p_c over the samples labelled c, and
a sample labelled s counts as of the class c of largest p_c among those with p_c >= t_c. The counts [s, c] of samples
that are of one class that surely say how many labels are wrong; those of lowest score among the samples predicted to be
of another class are taken for them: p_s a quarter of the way from the trained model's outputs (`out_of_sample.WAY`).
In 18 cases (three data sets, 5 to 20 % of the labels flipped, `benchmarks/label_issues.py`) they were 16 % too few to
35 % too many, 5 % too many in the mean. Scaled to the number of all samples labelled s, as in the paper, more.

Labels of several outputs, each by itself: the same with two classes. Numbers: the error beside its standard deviation,
z, and a false discovery rate (Benjamini & Hochberg 1995).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
FALSE_DISCOVERIES = 0.05
"""Share of right numbers among those that are called wrong."""
NORMAL = 0.6745
"""The median deviation of a standard normal variable."""


class Verdict(NamedTuple):
    """What the labels are said to be, one row per training sample."""

    issue: Mask
    score: Floats
    """In [0, 1], low is bad."""
    predicted: NDArray[Any]
    wrong: float
    """How many labels are estimated to be wrong."""


def confident_counts(
    p: Floats,
    labels: NDArray[np.int64],
) -> Floats:
    """How many samples labelled s are surely of class c -> [C, C]; p [n, C], labels [n]."""
    C = p.shape[1]
    given = np.eye(C)[labels]
    sizes = given.sum(0)
    thresholds = (given * p).sum(0) / np.maximum(sizes, 1)
    sure = np.where(p >= np.maximum(thresholds, 1e-12), p, -1.0)
    counted = sure.max(1) > 0
    classes = np.eye(C)[sure.argmax(1)] * counted[:, None]
    counts: Floats = given.T @ classes
    return counts


def verdict_of_classes(
    p: Floats,
    labels: NDArray[np.int64],
    between: Floats | None = None,
) -> Verdict:
    """Of labels that are one class [n], from probabilities [n, C]; `between` are those that order them."""
    n = np.arange(len(p))
    own = (p if between is None else between)[n, labels]
    predicted = p.argmax(1)
    counts = confident_counts(p, labels)
    wrong = counts.sum(1) - counts.diagonal()
    issue = np.zeros(len(p), dtype=bool)
    for s, count in enumerate(wrong):
        members = np.flatnonzero((labels == s) & (predicted != s))
        worst = members[own[members].argsort(kind="stable")]
        issue[worst[: round(count)]] = True
    return Verdict(issue, own, predicted, float(wrong.sum()))


def verdict_of_labels(
    p: Floats,
    labels: Floats,
    between: Floats,
) -> Verdict:
    """Of several labels of 0 or 1 of each sample [n, C]: an issue where one of them is."""
    columns = zip(p.T, labels.T, between.T, strict=True)
    each = [
        verdict_of_classes(
            _two(own), given.round().astype(np.int64), _two(order)
        )
        for own, given, order in columns
    ]
    issue: Mask = np.stack([one.issue for one in each]).max(0)
    score = np.stack([one.score for one in each], 1).min(1)
    predicted = np.stack([one.predicted for one in each], 1)
    return Verdict(issue, score, predicted, sum(one.wrong for one in each))


def _two(p: Floats) -> Floats:
    """Probabilities of 0 and of 1 [n, 2]."""
    return np.stack([1 - p, p], 1)


def verdict_of_numbers(
    y: Floats,
    labels: Floats,
    spread: Floats | None,
) -> Verdict:
    r"""Of numbers [n, C]: the score is the chance of an error as large, 2 (1 - \Phi(|z|))."""
    errors = labels.reshape(y.shape) - y
    scale = 1.0 if spread is None else spread / np.median(spread, 0)
    z = errors / scale
    # the middle of the errors is free of wrong labels
    z = z / np.maximum(np.median(np.abs(z), 0) / NORMAL, 1e-12)
    chances = np.vectorize(math.erfc)(np.abs(z) / 2**0.5).min(1)
    chances = 1 - (1 - chances) ** y.shape[1]
    order = chances.argsort(kind="stable")
    allowed = FALSE_DISCOVERIES * np.arange(1, len(y) + 1) / len(y)
    below = np.flatnonzero(chances[order] <= allowed)
    count = int(below[-1]) + 1 if len(below) else 0
    issue = np.zeros(len(y), dtype=bool)
    issue[order[:count]] = True
    predicted = y[:, 0] if y.shape[1] == 1 else y
    return Verdict(issue, chances, predicted, count * (1 - FALSE_DISCOVERIES))
