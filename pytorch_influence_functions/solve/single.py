r"""What each training sample, left out or relabelled, does to one loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.labels import with_labels
from ..model.gradients import gradient_products
from .changes import solved
from .leverage import Leverage, times

DEPENDENT = 1e3
"""Units in the last place below which one direction is taken for a multiple of the other, as of two classes."""


def first_order(
    leverage: Leverage,
    s: Tensor,
) -> Tensor:
    """Change of the loss whose solution is s [P] if each sample is left out, to first order -> [n], on the CPU."""
    problem = leverage.problem
    parts = [
        gradient_products(
            problem.objective, batch, s.unsqueeze(0), problem.budget.product
        )[0].cpu()
        for batch in problem.samples.ordered(problem.gradient_batch)
    ]
    return torch.cat(parts) / problem.samples.n


def relabelled(
    leverage: Leverage,
    s: Tensor,
    labels: Sequence[Any],
    indices: Sequence[int],
) -> Tensor:
    """Change of that loss if these samples have another of `labels` [n] -> one for each of them, on the CPU.

    The samples' own equations (`changes`) in two directions of the outputs: those of the gradients with both labels.
    """
    size = leverage.fitting(leverage.outputs.C)
    parts = []
    for batch in leverage.problem.samples.ordered(size, indices):
        new = with_labels(batch, [labels[i] for i in batch.indices])
        parts.append(_in_two_directions(leverage, batch, new, s).cpu())
    return torch.cat(parts)


def _in_two_directions(
    leverage: Leverage,
    batch: Batch,
    new: Batch,
    s: Tensor,
) -> Tensor:
    r"""e = U B x, where B makes the directions U of one length and at right angles in K: B^T U^T K U B = I.

    With V = K U B and z = -V x it is x = (I - V^T R V)^{-1} V^T f(z), f(z) = r'(y + z) - r.
    """
    here = leverage.outputs.local(batch)
    other = leverage.outputs.local(new, here.y)
    U = torch.stack([here.r, other.r - here.r], 1)
    g, KU = leverage.held(leverage.outputs.jacobians(batch), U)
    B = _orthogonal(U @ KU.mT, torch.finfo(s.dtype).eps)
    V = KU.mT @ B
    h, Q = torch.linalg.eigh(V.mT @ here.R @ V)
    M = Q @ (
        (1 - h.clamp(max=leverage.largest)).reciprocal().unsqueeze(2) * Q.mT
    )

    def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
        there = leverage.outputs.local(new, here.y + times(V, x))
        return times(V.mT, there.r - here.r), V.mT @ there.R @ V

    x = solved(torch.eye(2).to(M).expand_as(M), M, slopes)
    slope = (g @ s).to(x) / leverage.problem.samples.n
    return -(slope * times(B, x)).sum(1)


def _orthogonal(A: Tensor, unit: float) -> Tensor:
    """B with B^T A B = I of each [2, 2], but for directions that are rounding or one the other: those are left out."""
    values, Q = torch.linalg.eigh((A + A.mT) / 2)
    rounding = DEPENDENT * unit * values.amax(1, keepdim=True)
    kept = values > rounding
    lengths = torch.where(kept, values, 1).rsqrt() * kept
    B: Tensor = Q * lengths.unsqueeze(1)
    return B
