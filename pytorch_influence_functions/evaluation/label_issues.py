r"""Which labels of the training set are wrong, from one training: predictions by the model without each sample.

Classes, by counts (Northcutt et al. 2021, confident learning): t_c is the mean of p_c over the samples labelled c, and
a sample labelled s counts as of the class c of largest p_c among those with p_c >= t_c. The counts [s, c] of samples
that are of one class that surely say how many labels are wrong; those of lowest score among the samples predicted to be
of another class are taken for them: p_s a quarter of the way from the trained model's outputs (`out_of_sample.WAY`).
Scaled to the number of all samples labelled s, as in the paper, they were 7 to
58 % too many in each of 18 cases (three data sets, 5 to 20 % of the labels flipped); as they are, 14 % too few to 29 %
too many, 6 % too many in the mean.

Labels of several outputs, each by itself: the same with two classes. Numbers: the error beside its standard deviation,
z, and a false discovery rate (Benjamini & Hochberg 1995).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import Config
from ..data.frame import frame
from ..data.samples import Samples
from ..member import Member
from ..model.gradients import gradient
from ..out_of_sample import OutOfSample, audited, mean, mean_of
from ..solve.single import first_order, relabelled

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
FALSE_DISCOVERIES = 0.05
"""Share of right numbers among those that are called wrong."""
CONTRADICTING = 3
"""Training samples that are named for each issue."""


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
    z = z / np.maximum(np.median(np.abs(z), 0) / 0.6745, 1e-12)
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


def label_issues(
    model: nn.Module | Sequence[nn.Module],
    train_loader: DataLoader[Any],
    config: Config | dict[str, Any] | None = None,
    *,
    validation: DataLoader[Any] | None = None,
    **options: Any,
) -> Any:
    """Which labels of the training set are wrong, how many, and what to do about each; from one training.

    Args:
        model: the trained model, or several.
        train_loader: over the training set.
        config: options as a dict or `Config`; `damping` is chosen by the evidence where none is named.
        validation: samples with right labels, whose mean loss the two `change` columns are of; None: the training
            samples that are no issue.
        **options: single options on top of `config`.

    Returns:
        A pandas.DataFrame (a dict of arrays where pandas is not installed), one row per training sample:
        `is_label_issue`, `label_score` (in [0, 1], low is bad: the probability of the given label by the model without
        the sample; of numbers, the chance of so large an error), `given_label`, `predicted_label`, `suggested_label`
        (the predicted one of issues), `loss` (without the sample), `change_if_dropped` and `change_if_relabelled` (of
        the mean loss of the validation set, to first order in it; negative: better), `contradicted_by` (of issues,
        the three training samples that the sample's own label has the most against), `leverage`, `self_influence`
        (near zero: the sample does nothing).

    Raises:
        ValueError: there is no one label per sample, or the loss is no function of each sample's own outputs.
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    chosen = Config.of(config, **options)
    members = [Member(one, train_loader, chosen) for one in models]
    each = [audited(member) for member in members]
    found = mean_of([one.found for one in each])
    labels = members[0].samples.labels()
    verdict = _verdict(found, labels, mean([one.between for one in each]))
    suggested = _suggested(verdict, labels)
    changes = [
        _changes(member, verdict, labels, validation, one.inflation)
        for member, one in zip(members, each, strict=True)
    ]
    dropped, changed = np.mean(changes, 0)
    columns = {
        "is_label_issue": verdict.issue,
        "label_score": verdict.score,
        "given_label": _column(labels),
        "predicted_label": _column(verdict.predicted),
        "suggested_label": _column(suggested),
        "loss": found.losses,
        "change_if_dropped": dropped,
        "change_if_relabelled": changed,
        "contradicted_by": _contradicting(members, verdict.issue),
        "leverage": found.leverage,
        "self_influence": mean([one.own for one in each]),
    }
    try:
        return frame(columns)
    except ImportError:
        return columns


def _verdict(
    found: OutOfSample,
    labels: Sequence[Any],
    between: Floats | None,
) -> Verdict:
    p = found.probabilities
    if any(label is None for label in labels):
        raise ValueError(
            "train_loader: no labels are found in its batches; they are the second part of a batch, or 'labels'"
        )
    given = np.asarray(labels)
    if p is None or between is None:
        return verdict_of_numbers(found.outputs, given, found.spread)
    if found.kind == "labels":
        return verdict_of_labels(p, given.reshape(p.shape), between)
    if given.shape != (len(p),) or not np.isin(given, range(p.shape[1])).all():
        raise ValueError(
            f"train_loader: expected one label of {p.shape[1]} classes for each sample, got labels of shape "
            f"{given.shape[1:]}"
        )
    return verdict_of_classes(p, given, between)


def _suggested(
    verdict: Verdict,
    labels: Sequence[Any],
) -> list[Any]:
    rows = zip(verdict.issue, verdict.predicted, labels, strict=True)
    return [new.tolist() if issue else old for issue, new, old in rows]


def _column(values: Any) -> NDArray[Any]:
    """Values as one column, of lists where a label is one."""
    known = np.asarray(values)
    if known.ndim == 1:
        return known
    column = np.empty(len(known), dtype=object)
    column[:] = known.tolist()
    return column


def _changes(
    member: Member,
    verdict: Verdict,
    labels: Sequence[Any],
    validation: DataLoader[Any] | None,
    inflation: Floats,
) -> list[Floats]:
    """Change of the mean loss if each sample is dropped, and if it has its predicted label; [n] each."""
    predicted = verdict.predicted.tolist()
    other = [
        i
        for i, pair in enumerate(zip(predicted, labels, strict=True))
        if pair[0] != pair[1]
    ]
    new = np.zeros(len(labels))
    with member.problem.guard():
        right = np.flatnonzero(~verdict.issue).tolist()
        g = _mean_gradient(member, right, validation)
        leverage = member.leverage()
        s = leverage.solved(g.unsqueeze(0), 1)[0]
        dropped = first_order(leverage, s).double().numpy() * inflation
        if other:
            changes = relabelled(leverage, s, predicted, other)
            new[other] = changes.double().numpy()
    return [dropped, new]


def _mean_gradient(
    member: Member,
    right: list[int],
    validation: DataLoader[Any] | None,
) -> Tensor:
    """Of the loss of the validation set, or of these training samples -> [P]."""
    samples, indices = member.samples, right
    if validation is not None:
        samples = Samples(
            validation,
            device=member.objective.device,
            name="validation",
            progress=member.config.progress,
        )
        indices = list(range(samples.n))
    total = torch.zeros_like(member.objective.theta)
    for batch in samples.ordered(indices=indices):
        total += batch.size * gradient(member.objective, batch)
    return total / len(indices)


def _contradicting(
    members: Sequence[Member],
    issue: Mask,
) -> NDArray[Any]:
    """Of each issue the training samples whose influence on it is the most negative; of others none."""
    result = np.empty(len(issue), dtype=object)
    result[:] = [[] for _ in issue]
    wrong = np.flatnonzero(issue)
    if not len(wrong):
        return result
    each = [member.scores_between(wrong.tolist()) for member in members]
    scores = torch.stack(each).mean(0).double().numpy()
    for i, row in zip(wrong, scores, strict=True):
        row[i] = np.inf
        result[i] = row.argsort()[:CONTRADICTING].tolist()
    return result
