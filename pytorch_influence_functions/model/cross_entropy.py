"""Cross-entropy, the loss where none is named, with messages for targets it cannot take."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

IGNORED_CLASS = -100
"""The class id that cross-entropy leaves out."""


def calc_loss(y: Tensor, t: Tensor) -> Tensor:
    """Mean cross-entropy of logits `y` [B, C, ...] with targets `t`: class ids [B, ...] or probabilities like `y`.

    Raises:
        TypeError, ValueError: targets that cross-entropy cannot take.
    """
    if not isinstance(y, Tensor) or not isinstance(t, Tensor):
        raise TypeError(
            f"cross-entropy takes tensors (logits, targets), got {type(y).__name__} and {type(t).__name__}; "
            "pass config['loss_func'] or config['model_loss'] for other outputs"
        )
    if t.is_floating_point() and t.shape != y.shape:
        raise TypeError(
            f"cross-entropy takes whole class ids, or probabilities shaped like the output {tuple(y.shape)}, got "
            f"{t.dtype} targets of shape {tuple(t.shape)}; pass config['loss_func'], e.g. torch.nn.MSELoss()"
        )
    if not t.is_floating_point() and t.shape != y.shape[:1] + y.shape[2:]:
        raise ValueError(
            f"cross-entropy with output {tuple(y.shape)} takes class ids of shape {tuple(y.shape[:1] + y.shape[2:])}, "
            f"got {tuple(t.shape)}; pass config['loss_func'] for another loss"
        )
    return cross_entropy_of(y, t, "mean")


def cross_entropy_of(y: Tensor, t: Tensor, reduction: str) -> Tensor:
    """Cross-entropy of logits y [B, C, ...]; a target out of range is named."""
    try:
        return F.cross_entropy(
            y, t if t.is_floating_point() else t.long(), reduction=reduction
        )
    except IndexError as error:
        wrong = t[(t >= y.shape[1]) | ((t < 0) & (t != IGNORED_CLASS))]
        raise ValueError(
            f"cross-entropy with {y.shape[1]} outputs takes class ids from 0 to {y.shape[1] - 1}, got {int(wrong[0])}; "
            "look at the targets and at the model's last layer"
        ) from error


def cross_entropies(y: Tensor, t: Tensor) -> Tensor:
    """Cross-entropy of each row of logits [B, C, ...], mean over the positions of one sample -> [B]."""
    each = cross_entropy_of(y, t, "none")
    if each.dim() == 1:
        return each
    if t.is_floating_point():
        return each.flatten(1).mean(1)
    return each.flatten(1).sum(1) / (t != IGNORED_CLASS).flatten(1).sum(1)


def with_class_weights(loss: Callable[..., Any]) -> Callable[..., Any]:
    r"""The loss, or instead of one that divides by its class weights w one that divides by the number of targets.

    \sum_i w_{t_i} l_i / \sum_i w_{t_i} is l_i where sample i is alone, as if there were no weights. What was trained is
    the sum with the weights, and w_t l is a sample's part in it.
    """
    if not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return loss
    if loss.weight is None or loss.reduction != "mean":
        return loss
    logger.info(
        "the loss of a sample is multiplied by the weight of its class and not divided by it again, as the mean of "
        "%s would for a sample alone",
        type(loss).__name__,
    )
    return Weighted(loss)


class Weighted:
    """Sum of the weighted losses over the number of targets that count."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.summed = loss, copy.copy(loss)
        self.summed.reduction = "sum"

    @property
    def of_logits(self) -> Weighted:
        """The same loss of logits, where this one is of log-probabilities."""
        given = {
            "weight": self.loss.weight,
            "ignore_index": self.loss.ignore_index,
        }
        return Weighted(nn.CrossEntropyLoss(**given))

    def __call__(self, y: Tensor, t: Tensor) -> Any:
        if t.is_floating_point():  # probabilities: divided by their number
            return self.loss(y, t)
        count = (t != self.loss.ignore_index).sum()
        return self.summed(y, t) / count
