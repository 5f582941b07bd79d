"""What a classifier says of its training samples: a number for each class, or nothing where it is no classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.batch import Batch
from ..model.objective import Objective
from ..model.outputs import numbers_of


def class_scores(
    objective: Objective,
    batch: Batch,
    labels: Sequence[Any],
    losses: Tensor,
) -> Tensor | None:
    """Scores of the classes (logits, or what grows with them) [B, C], on the CPU; None where there are none.

    Of several outputs they are the one whose cross-entropy the loss is.

    Args:
        objective: of the model.
        batch: of B samples.
        labels: of these samples.
        losses: of these samples [B]; a single output counts as a logit where they are its binary cross-entropy.
    """
    classes = as_classes(labels)
    if classes is None:
        return None
    with torch.no_grad():
        outputs = objective.outputs(objective.theta, batch)
    leaves, _ = numbers_of(outputs)
    rows = [
        leaf.reshape(batch.size, -1).detach().cpu()
        for leaf in leaves
        if _is_row_each(leaf, batch.size)
    ]
    largest = max(classes)
    fit = [row.double() for row in rows if row.shape[1] > max(largest, 1)]
    if len(fit) > 1:
        fit = [row for row in fit if _is_logits(row, classes, losses)]
    if fit:
        return fit[0]
    if len(rows) == 1 and largest <= 1:
        return _two_classes(rows[0].double(), classes, losses)
    return None


def _is_logits(
    scores: Tensor,
    classes: Sequence[int],
    losses: Tensor,
) -> bool:
    """Whether the losses [B] are the cross-entropy of these scores [B, C]."""
    target = torch.tensor(classes)
    own = F.cross_entropy(scores, target, reduction="none")
    return _agree(own, losses)


def _agree(
    own: Tensor,
    losses: Tensor,
) -> bool:
    """Whether losses are the same up to single precision."""
    close = torch.isclose(own, losses.to(own), rtol=1e-3, atol=1e-5)
    return bool(close.all())


def _is_row_each(
    leaf: Tensor,
    size: int,
) -> bool:
    """Whether an output has one row of numbers for each sample, and no positions or other constants."""
    whole = leaf.dim() > 0 and leaf.shape[0] == size
    return whole and leaf.numel() == size * (
        leaf.shape[-1] if leaf.dim() > 1 else 1
    )


def as_classes(labels: Sequence[Any]) -> list[int] | None:
    """Labels as whole numbers from 0 on; None where one of them is something else."""
    found = [one[0] if _is_single(one) else one for one in labels]
    if any(isinstance(x, list | tuple | str) or x is None for x in found):
        return None
    whole = [int(x) for x in found if float(x).is_integer() and x >= 0]
    return whole if len(whole) == len(found) and whole else None


def _is_single(label: Any) -> bool:
    return isinstance(label, list) and len(label) == 1


def _two_classes(
    logit: Tensor,
    classes: Sequence[int],
    losses: Tensor,
) -> Tensor | None:
    """[B, 1] as [B, 2], where the loss takes it as the logit of class 1."""
    target = torch.tensor(classes, dtype=logit.dtype)
    own = F.binary_cross_entropy_with_logits(
        logit[:, 0], target, reduction="none"
    )
    if not _agree(own, losses):
        return None
    return torch.cat([torch.zeros_like(logit), logit], dim=1)
