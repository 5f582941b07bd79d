"""What a model allows: each fast way of computing is tried against the slow one on a few samples before it is used."""

from __future__ import annotations

import logging
import random

import torch

from ..data.batch import Batch
from ..data.samples import Samples, same_numbers, shapes_of
from .alone import first_look, require_repeatable, warn_of_company
from .budget import UNBOUNDED, Budget
from .door import first_gradients, first_losses, require_dependence
from .fast_paths import FastPaths, losses_of_rows
from .gradients import activation_bytes
from .linear import look_at_outputs, precision_of_loss
from .objective import Objective, Paths
from .trial import Large, Trial

logger = logging.getLogger(__name__)
MOST_PROBED = 8
"""Samples of the batch that a model is tried on: one batch, as the loader makes it, up to so many. Two would not tell a
model that branches on the size of its batch from one that does not; more cost more than a short run."""
LARGE = 64
"""Samples of the larger batch in which the same samples are looked for again: a model may branch on the size of its
batch beyond the loader's, and products take as many as fit."""
LOOKED_AT = 32
"""Samples whose shapes are looked at, so that short and long sequences stand in the batch that a model is tried on."""


def probe(
    objective: Objective, samples: Samples, budget: Budget = UNBOUNDED
) -> None:
    """Find which ways of computing give the model's true values, and set `objective.paths` and `samples.apart`.

    Tried on as many samples as the budget allows, two at least.

    Raises:
        NonFiniteError: a loss or gradient of these samples is NaN or infinite.
        TypeError, ValueError: the loss cannot take the batch, or is not the same when it is computed twice.
    """
    objective.paths, samples.apart, samples.shapes = Paths(), False, None
    count = budget.probed(objective.theta.nbytes, _probed(samples))
    indices, uniform = _different(samples, count)
    _look_for_mutation(objective, samples.sample(indices[0]), samples)
    batch, alone = samples.both(indices)
    _choose_precision(objective, alone[0])
    losses = first_losses(objective, alone, samples.name)
    objective.rounded = precision_of_loss(objective, alone[0])
    require_repeatable(objective, samples.name, alone, losses)
    require_dependence(objective, samples)
    truth = first_gradients(objective, alone, samples.name)
    # a masked sample says nothing
    telling = (
        truth.norm(dim=1).argsort(descending=True, stable=True)[:2].tolist()
    )
    look_at_outputs(objective, [alone[i] for i in telling], truth[telling])
    trial = Trial(objective, batch, alone, losses, truth)
    rows = batch.sliceable and trial.holds(losses_of_rows)
    objective.paths = objective.paths._replace(rows=rows)
    warn_of_company(objective, samples, batch, losses, truth, uniform)
    if not objective.paths.rows:
        samples.apart = True
        logger.info(
            "%s: a sample collated with others is not what it is alone (padding, time first), so that samples go "
            "through the model one at a time, which is slow; a collate_fn that pads to a fixed length, or a mask in "
            "the loss, lets them go together",
            samples.name,
        )
        return
    samples.shapes = shapes_of(alone[0]) if uniform else None
    trial.large = _large(objective, samples, batch, budget)
    FastPaths(trial).try_all()
    needless = {"forward", "stacked"} if objective.paths.layers else set()
    slow = [
        name
        for name, allowed in objective.paths._asdict().items()
        if allowed is False and name not in needless
    ]
    if slow:
        logger.info(
            "the model does not allow %s; a slower way gives the same numbers",
            ", ".join(slow),
        )


def _spread(n: int, count: int) -> list[int]:
    """Indices from the whole set, `count` of them (the first one again where there are fewer samples).

    At random, with a fixed seed: labels often repeat with a period, and one class alone does not show its weight.
    """
    chosen = sorted(random.Random(0).sample(range(n), min(n, count)))
    return chosen if len(chosen) > 1 else [0, 0]


def _different(samples: Samples, count: int) -> tuple[list[int], bool]:
    """Indices of `count` samples, of as many shapes as there are; and whether those looked at have one shape."""
    shapes = {
        i: shapes_of(samples.sample(i))
        for i in _spread(samples.n, min(samples.n, LOOKED_AT))
    }
    first_of_each = list(
        {shape: i for i, shape in reversed(shapes.items())}.values()
    )
    if len(first_of_each) == 1:
        return _spread(samples.n, count), True
    others = [i for i in shapes if i not in first_of_each]
    return sorted([*first_of_each, *others][:count]), False


def _look_for_mutation(
    objective: Objective, one: Batch, samples: Samples
) -> None:
    """Give the model copies of its inputs where it changes them in place (`x.div_(255)`, `x.requires_grad_()`)."""
    before = [(t._version, t.requires_grad) for t in one.leaves]
    first_look(objective, samples, one)
    first_losses(objective, [one], samples.name)
    objective.mutates = before != [
        (t._version, t.requires_grad) for t in one.leaves
    ]
    if objective.mutates:
        logger.info(
            "%s: the model changes its inputs in place; it gets copies",
            samples.name,
        )


def _choose_precision(objective: Objective, one: Batch) -> None:
    """Compute a model of half precision in single precision, where it runs in it."""
    lowest = min(objective.dtypes, key=lambda dtype: torch.finfo(dtype).bits)
    if torch.finfo(lowest).bits > 16:
        return
    twin = objective.in_precision(torch.float32)
    own = objective.losses(objective.theta, one).detach()
    try:
        found = twin.losses(twin.theta, one).detach()
    except RuntimeError as error:
        logger.info(
            "the model is computed in %s, single precision is refused: %s",
            lowest,
            str(error).splitlines()[0],
        )
        return
    # the loss itself was rounded to half precision after some layers of it: this only tells another function apart
    if bool(
        (found - own).abs().max()
        <= 64 * torch.finfo(lowest).eps * (1 + own.abs().max())
    ):
        vars(objective).update(vars(twin))
        logger.info(
            "the model has parameters in %s; it is computed in single precision",
            lowest,
        )


def _probed(samples: Samples) -> int:
    """Samples to try at most: a batch of the loader."""
    return max(2, min(samples.batch_size, MOST_PROBED))


def _large(
    objective: Objective, samples: Samples, batch: Batch, budget: Budget
) -> Large | None:
    """A batch as large as products take them, and where the samples of the trial's batch stand in it.

    None where it would be no larger, or where they are others when they are read again.
    """
    one = next(batch.singles())
    fitting = budget.scoring_batch(activation_bytes(objective, one))
    count = min(samples.n, LARGE, fitting)
    rows = sorted({*batch.indices, *_spread(samples.n, count)})
    large = samples.take(rows)
    if not large.sliceable or len(rows) == len(batch.indices):
        return None
    places = torch.tensor([rows.index(i) for i in batch.indices])
    again = [t[places.to(t.device)] for t in large.leaves]
    pairs = zip(batch.leaves, again, strict=True)
    if not all(same_numbers(first, second) for first, second in pairs):
        return None
    return Large(large, places)
