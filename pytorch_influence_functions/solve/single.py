r"""What each training sample, left out or relabelled, does to one loss, and which others hold against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.labels import with_labels
from .changes import solved
from .leverage import Block, Leverage


class Single(NamedTuple):
    """Of each training sample [n], in index order, on the CPU."""

    dropped: Tensor
    """Change of the loss if it is left out, corrected."""
    relabelled: Tensor
    """Change of the loss if it has its other label."""
    own: Tensor
    """Influence on its own loss."""


def single_changes(
    leverage: Leverage,
    s: Tensor,
    labels: Sequence[Any],
) -> Single:
    """Changes of a loss whose solution is s [P], by dropping each sample and by giving it another of `labels` [n]."""
    parts = [
        _of_block(leverage, block, s, [labels[i] for i in block.batch.indices])
        for block in leverage.blocks("Changes by single samples")
    ]
    columns = zip(*parts, strict=True)
    return Single(*(torch.cat(column).cpu() for column in columns))


def _of_block(
    leverage: Leverage,
    block: Block,
    s: Tensor,
    labels: Sequence[Any],
) -> tuple[Tensor, Tensor, Tensor]:
    n = leverage.problem.samples.n
    along = (block.J @ s).to(block.K) / n
    slopes = _slopes(leverage, block, labels)
    e = solved(block.K, block.M, slopes)
    dropped = (along * block.c).sum(1)
    Kr = (block.K @ block.local.r.unsqueeze(2)).squeeze(2)
    return dropped, -(along * e).sum(1), (block.local.r * Kr).sum(1)


def _slopes(
    leverage: Leverage,
    block: Block,
    labels: Sequence[Any],
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """z -> r'(y + z) - r and R'(y + z) with the other labels."""
    altered = with_labels(block.batch, labels)

    def slopes(z: Tensor) -> tuple[Tensor, Tensor]:
        there = leverage.outputs.local(altered, block.local.y + z)
        return there.r - block.local.r, there.R

    return slopes
