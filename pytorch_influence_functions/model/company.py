"""A sample in company against itself alone, batch by batch: what held for the few that a model is tried on may not
hold for the next (a model that branches on its whole batch, padding that only long samples bring)."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.samples import Samples, varies
from ..utils import warn
from .alone import COMPANY
from .door import checked_losses
from .doubts import ModelWarning
from .objective import Objective, Paths

logger = logging.getLogger(__name__)
ONE_OF, MOST = 16, 4
"""One of so many samples of a batch is looked at alone, and not more than so many: what a batch does to its samples it
rarely does to one of them only, and a look costs a forward pass."""
ROUNDING, LARGEST_ROUNDING = 4096, 0.05
"""Units in the last place that a loss in company may differ in, and the largest relative difference, which half
precision would be above: it has the last digits of a whole network in it, and a wrong sample is off by percents."""


def meet_all(
    objective: Objective, samples: Samples, size: Callable[[], int]
) -> None:
    """One pass of losses over a set, `size` samples at a time, and another one each time that a way is given up.

    Raises:
        TypeError, ValueError: the model or the loss cannot take a sample; the first one is named.
        NonFiniteError: its loss is NaN or infinite.
    """
    while objective.paths.rows:
        kept = True
        for batch in samples.ordered(size(), text="Looking at every sample"):
            losses = checked_losses(objective, batch, samples.name)
            kept = keeps_company(objective, samples, batch, losses)
            if not kept:
                break
        if kept:
            return


def keeps_company(
    objective: Objective, samples: Samples, batch: Batch, losses: Tensor
) -> bool:
    """Whether samples of a batch have these losses [B] alone, too; if not, the ways that rest on it are given up."""
    if batch.parts or batch.size == 1 or not objective.paths.rows:
        return True
    for i in _looked_at(batch):
        index = batch.indices[i]
        alone = objective.losses(objective.theta, samples.sample(index))
        if _near(objective, losses[i : i + 1], alone, losses):
            continue
        if varies(samples, index):
            return True  # it is another sample each time, which is warned of
        row = objective.losses(objective.theta, batch.rows(i, i + 1))
        cut = _near(objective, row, alone, losses)
        _give_up(objective, samples, index, cut)
        return False
    return True


def _looked_at(batch: Batch) -> Sequence[int]:
    """Places in the batch, at random with a fixed seed: first and last are often of one class."""
    count = min(max(batch.size // ONE_OF, 1), MOST)
    return random.Random(batch.indices[0]).sample(range(batch.size), count)


def _near(
    objective: Objective, found: Tensor, alone: Tensor, losses: Tensor
) -> bool:
    eps = torch.finfo(objective.rounded or losses.dtype).eps
    within = min(ROUNDING * eps, LARGEST_ROUNDING)
    # what is added is the scale on which a sample that is fitted well is rounded
    size = alone.abs() + 1e-2 * losses.abs().max() + 1e-3
    return bool(((found - alone).abs() <= within * size).all())


def _give_up(
    objective: Objective, samples: Samples, index: int, cut: bool
) -> None:
    """Go on with each row of a batch by itself where that is the sample, else with samples that are collated alone."""
    paths = objective.paths
    kept = Paths(curved=paths.curved, twice=paths.twice)
    objective.cost = None
    if cut:
        # where the losses came by vmap itself, it is given up, too
        vmap = paths.vmap and paths.batched
        objective.paths = kept._replace(rows=True, vmap=vmap)
        logger.warning(
            "%s: sample %d has another loss in its batch than alone, so that the model is called for one sample at a "
            "time, which is slow: a model that branches on its batch, or statistics of it",
            samples.name,
            index,
        )
        return
    objective.paths = kept
    samples.apart, samples.shapes = True, None
    warn(
        f"{COMPANY.format(name=samples.name)} (found at sample {index})",
        ModelWarning,
    )
