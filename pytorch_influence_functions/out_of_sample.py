r"""Predictions for each training sample by the model without it, from one training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .data.frame import frame
from .member import Member
from .model.local import Outputs
from .solve.leverage import Along, Block

Array = np.ndarray[Any, np.dtype[Any]]
WAY = 0.25
"""How far from the trained model's outputs to those without the sample its label is judged. The average precision of
flipped labels was highest at 0.1 to 0.35 in the mean of 18 cases (digits, breast cancer, clusters; flips of any class
or to the next one; networks with weight decay and such as had learned the labels by heart): 0.798, where the trained
model's outputs have 0.788, those without the sample 0.763, and 5 folds 0.785. On two sets that it was not
chosen on a quarter of the way had 0.899 (wine) and 0.976 (iris), without the sample 0.883 and 0.958, 5 folds 0.933 and
0.943. The noise of what the sample itself adds costs more there than its memory does."""


@dataclasses.dataclass(frozen=True)
class OutOfSample:
    r"""What the model says of each training sample if it is trained without it, in index order.

    Attributes:
        outputs: \hat y_i = y_i + K_i (I - R_i K_i)^{-1} r_i, laid out as the model's outputs of a sample are, flat
            [n, C].
        probabilities: of the classes, or of each label of a multi-label loss [n, C]; None of regression.
        spread: of regression, the standard deviation of a new target around the prediction [n, C]: the noise and what
            leaving the sample out does not know; else None.
        losses: of each sample at these outputs [n], in the units of the loss.
        leverage: tr(R_i K_i) [n]: how many parameters the sample uses up for itself, 0 to C. The sum over all samples
            is the effective number of parameters.
        kind: `"classes"`, `"labels"` (several of 0 or 1) or `"numbers"`.
        report: what the solver did, as plain values.
    """

    outputs: Array
    probabilities: Array | None
    spread: Array | None
    losses: Array
    leverage: Array
    kind: str
    report: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def mean_loss(self) -> float:
        """An estimate of the loss on new samples."""
        return float(self.losses.mean())

    @property
    def stderr(self) -> float:
        """Standard error of `mean_loss`, from the spread of the losses."""
        n = len(self.losses)
        return float(self.losses.std(ddof=1) / n**0.5) if n > 1 else np.nan

    def to_dataframe(self) -> Any:
        """One row per training sample: loss, leverage, then each output, probability and spread.

        Raises:
            ImportError: pandas is not installed; the message names the extra.
        """
        columns = {"loss": self.losses, "leverage": self.leverage}
        for name in ("output", "probability", "spread"):
            columns |= self._columns(name)
        table = frame(columns)
        table.index.name = "train_index"
        return table

    def _columns(self, name: str) -> dict[str, Array]:
        plural = {"output": "outputs", "probability": "probabilities"}
        rows = getattr(self, plural.get(name, name))
        if rows is None:
            return {}
        return {f"{name}_{c}": rows[:, c] for c in range(rows.shape[1])}


class Audited(NamedTuple):
    """What the audit of labels asks of each training sample beside the predictions, from the same pass."""

    found: OutOfSample
    between: Array | None
    """Probabilities `WAY` from the trained model's outputs to those without the sample [n, C]."""
    inflation: Array
    """1 / (1 - h) [n]."""
    own: Array
    """Influence on its own loss [n]."""
    novelty: Array
    r"""r^T K r / |r|^2 [n]: how little the others say of its output along its gradient, whatever its label."""


def out_of_sample(
    members: Sequence[Member],
    calibrate: bool = False,
) -> OutOfSample:
    """Of one model, or the mean of several: of their outputs, probabilities and losses."""
    if calibrate:
        for member in members:
            with member.problem.guard():
                member.removals.calibrate()
    return mean_of([_of_member(member) for member in members])


def mean_of(found: Sequence[OutOfSample]) -> OutOfSample:
    """The mean of the predictions of several models."""
    if len(found) == 1:
        return found[0]
    means = {
        field.name: mean([getattr(one, field.name) for one in found])
        for field in dataclasses.fields(OutOfSample)
        if field.name not in ("kind", "report")
    }
    first = found[0]
    return OutOfSample(kind=first.kind, report=first.report, **means)


def mean(parts: list[Any]) -> Any:
    """Of arrays, or None where they are None."""
    if parts[0] is None:
        return None
    return sum(parts[1:], parts[0]) / len(parts)


def _of_member(member: Member) -> OutOfSample:
    with member.problem.guard():
        leverage = member.leverage()
        outputs = leverage.outputs
        blocks = leverage.blocks("Out-of-sample predictions")
        rows = _joined(_of_block(outputs, block) for block in blocks)
        member.describe()
    return _predictions(member, outputs, rows)


def audited(member: Member) -> Audited:
    """Along each sample's own gradient: one solution a sample."""
    with member.problem.guard():
        leverage = member.leverage()
        outputs = leverage.outputs
        held = leverage.along("Out-of-sample predictions")
        *rows, y, a, size = _joined(
            (*_of_block(outputs, one), one.local.y, one.a, one.size)
            for one in held
        )
        member.describe()
    found = _predictions(member, outputs, rows)
    between = outputs.probabilities(y + WAY * (rows[0] - y))
    return Audited(
        found,
        None if between is None else between.numpy(),
        (1 / (1 - rows[2])).numpy(),
        a.numpy(),
        torch.where(size > 0, a / size, 0).numpy(),
    )


def _predictions(
    member: Member,
    outputs: Outputs,
    rows: list[Tensor],
) -> OutOfSample:
    y, losses, held, *around = rows
    spread = _spread(*around) if outputs.kind == "numbers" else None
    p = outputs.probabilities(y)
    return OutOfSample(
        outputs=y.numpy(),
        probabilities=None if p is None else p.numpy(),
        spread=None if spread is None else spread.numpy(),
        losses=losses.numpy(),
        leverage=held.numpy(),
        kind=outputs.kind,
        report=member.report,
    )


def _of_block(
    outputs: Outputs,
    block: Block | Along,
) -> tuple[Tensor, ...]:
    r"""Of some samples: \hat y, the loss there, leverage; and r, the diagonal of R, and the inflation."""
    y = block.outputs
    there = outputs.local(block.batch, y)
    d = there.R.diagonal(dim1=1, dim2=2)
    return y, there.losses, block.leverage, there.r, d, block.inflation


def _joined(rows: Iterator[tuple[Tensor, ...]]) -> list[Tensor]:
    parts = [[part.cpu() for part in one] for one in rows]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _spread(
    r: Tensor,
    d: Tensor,
    inflation: Tensor,
) -> Tensor | None:
    r"""\sigma_c (1 - h_{ic})^{-1/2}, \sigma_c^2 the mean product of the errors r / d with and without the sample.

    Where the loss is squared error: else d, its curvature, is taken where it is largest, and r is a robust error.
    """
    curvature = d.amax(0)
    if not bool((curvature > 0).all()):
        return None
    variance = ((r / curvature).square() / inflation).mean(0)
    return (variance * inflation).sqrt()
