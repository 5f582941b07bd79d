r"""Which labels of the training set are wrong, from one training, and what to do about each; how many: `verdicts`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import Config
from ..data.duplicates import Duplicate, duplicates, twins
from ..data.frame import frame
from ..data.samples import Samples
from ..member import Member
from ..model.gradients import gradient
from ..out_of_sample import Audited, OutOfSample, audited, mean, mean_of
from ..solve.single import first_order, relabelled
from .verdicts import (
    NORMAL,
    Floats,
    Mask,
    Verdict,
    verdict_of_classes,
    verdict_of_labels,
    verdict_of_numbers,
)

CONTRADICTING = 3
"""Training samples that are named for each issue."""
NOTHING = 1e-4
"""Self-influence, as a share of the mean, up to which a sample is said to have none."""
FAR = 3.5
"""Robust standard deviations from the middle of what is called an outlier."""


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
        `is_label_issue`, `label_score` (in [0, 1], low is bad: the probability of the given label at outputs a quarter
        of the way from the model's to those without the sample; of numbers, the chance of so large an error),
        `given_label`, `predicted_label`, `suggested_label` (the predicted one of issues), `loss` (without the sample),
        `change_if_dropped` and `change_if_relabelled` (of the mean loss of the validation set, to first order in it;
        negative: better), `contradicted_by` (of issues, the three training samples that the sample's own label has the
        most against), `leverage` (0 to 1: how much of its own output the sample holds), `self_influence`,
        `is_without_influence` (it does nothing), `novelty` (how little the others say of it, whatever its label) and
        `is_outlier`, `near_duplicate_of` (another training sample, or -1), and with a validation set
        `duplicate_in_validation`.

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
        **_other_issues(each, train_loader, validation),
    }
    try:
        return frame(columns)
    except ImportError:
        return columns


def _other_issues(
    each: Sequence[Audited],
    train_loader: DataLoader[Any],
    validation: DataLoader[Any] | None,
) -> dict[str, NDArray[Any]]:
    """Columns of what a sample may have beside a wrong label."""
    own = mean([one.own for one in each])
    novelty = mean([one.novelty for one in each])
    train_set = train_loader.dataset
    columns = {
        "self_influence": own,
        "is_without_influence": own <= NOTHING * own.mean(),
        "novelty": novelty,
        "is_outlier": _outliers(novelty),
        "near_duplicate_of": _places(len(own), lambda: twins(train_set)),
    }
    if validation is not None:
        held, order = validation.dataset, range(len(own))
        columns["duplicate_in_validation"] = _places(
            len(own), lambda: duplicates(held, train_set, order)
        )
    return columns


def _outliers(novelty: Floats) -> Mask:
    """Whose logarithm is far above the middle, in robust standard deviations (Iglewicz & Hoaglin 1993)."""
    z = np.log(np.maximum(novelty, np.finfo(float).tiny))
    z = z - np.median(z)
    spread = np.median(np.abs(z)) / NORMAL
    far: Mask = z > FAR * max(float(spread), 1e-12)
    return far


def _places(
    n: int,
    search: Callable[[], list[Duplicate]],
) -> NDArray[np.int64]:
    """Index of the near-duplicate of each sample [n]; -1 where there is none, or the set cannot be indexed."""
    places = np.full(n, -1)
    try:
        found = search()
    except (TypeError, NotImplementedError, KeyError):
        return places
    for one in found:
        places[one.test] = one.train
    return places


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
        issue = verdict.issue
        # where every label is said to be wrong none is better than another
        right = np.flatnonzero(~issue | issue.all()).tolist()
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
