"""What a sample is alone: its loss has to be one number that another look finds again, and not only in company."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.samples import Samples
from ..utils import warn
from .doubts import ModelWarning
from .objective import Objective

logger = logging.getLogger(__name__)


RANDOM = (
    "{name}: the loss of sample {index} is not the same when it is computed twice: the model is random in evaluation "
    "mode too (F.dropout without training=self.training, a latent variable or noise that is always drawn), so that its "
    "gradients are not one number; make it deterministic, e.g. with torch.manual_seed(0) inside "
    "torch.random.fork_rng() around the draw, or with noise that belongs to the sample"
)
ZERO = (
    "{name}: the gradient of each of {count} samples alone is zero: the loss needs the other samples of a batch "
    "(in-batch negatives, batch statistics), so that all scores would be zero; give a config['model_loss'] of one "
    "sample, e.g. against negatives that are fixed"
)
COMPANY = (
    "{name}: the loss of a sample depends on the other samples of its batch (padding without a mask, batch "
    "statistics, in-batch negatives). Each sample is taken alone, as a batch of one, which is slow and may not be what "
    "was trained; a mask in the loss, a collate_fn that pads to a fixed length, or fixed statistics make both the same"
)
WEIGHTS = (
    "{name}: the loss of a batch is not the mean of its samples' losses alone. A mean that is divided by class "
    "weights, or by a count of targets that are not ignored, divides them away where a sample is alone, so that each "
    "counts the same; to keep the weights, leave the division out, e.g. "
    "torch.nn.CrossEntropyLoss(weight=w, reduction='sum')"
)
REFUSED = (
    "{name}: the model or loss refuses sample {index} alone, as a batch of one, and takes it with others ({reason}); "
    "influence is of single samples: batch normalisation needs running statistics (track_running_stats=True), a "
    "squeeze() a dimension"
)


def require_repeatable(
    objective: Objective, name: str, alone: Sequence[Batch], losses: Tensor
) -> None:
    """Raise `ValueError` where a sample as a batch of one has another loss than before, in `losses` [B]."""
    again = torch.cat(
        [objective.losses(objective.theta, one).detach() for one in alone]
    )
    slack = torch.finfo(objective.rounded or losses.dtype).eps ** 0.5 * (
        1e-3 + losses.abs()
    )
    differ = ((losses - again).abs() > slack).nonzero()
    if len(differ):
        raise ValueError(
            RANDOM.format(name=name, index=alone[int(differ[0])].indices[0])
        )


def first_look(objective: Objective, samples: Samples, one: Batch) -> None:
    """Call the loss of a sample; its inputs in the model's precision, where the model takes no other.

    What else may be wrong with it is for `door.first_losses` to say.

    Raises:
        ValueError: the sample is refused alone, and taken with others.
    """
    try:
        _look(objective, one)
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError) or _in_its_precision(
            objective, samples, one
        ):
            return
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if _works_in_company(objective, samples):
            index = one.indices[0]
            raise ValueError(
                REFUSED.format(name=samples.name, index=index, reason=reason)
            ) from error
    except TypeError:
        return


def _look(objective: Objective, batch: Batch) -> None:
    # with gradients, which a loss may take of its own
    objective.loss(objective.theta, batch)


def _in_its_precision(
    objective: Objective, samples: Samples, one: Batch
) -> bool:
    """Cast the inputs where that makes a model run: a data set of NumPy rows is in double precision."""
    own = objective.dtypes[0]
    others = {t.dtype for t in one.leaves if t.is_floating_point()} - {own}
    if not others or objective.cast is not None:
        return False
    objective.cast = own
    try:
        _look(objective, one)
    except RuntimeError:
        objective.cast = None
        return False
    logger.info(
        "%s: %s are given to the model in its precision, %s",
        samples.name,
        others,
        own,
    )
    return True


def _works_in_company(objective: Objective, samples: Samples) -> bool:
    if samples.n < 2:
        return False
    try:
        _look(objective, samples.take(range(min(samples.n, 4))))
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


def warn_of_company(
    objective: Objective,
    samples: Samples,
    batch: Batch,
    losses: Tensor,
    gradients: Tensor,
    uniform: bool,
) -> None:
    """Warn where the loss of a batch as it comes is not made of its samples' losses [B] alone.

    Args:
        objective: of the model.
        samples: the training set.
        batch: samples collated together.
        losses: of each as a batch of one [B].
        gradients: of these [B, P].
        uniform: whether all samples have one shape: where they have not, a mean over positions is no mean over samples.

    Raises:
        ValueError: no sample alone has a gradient, and the batch has a loss.
    """
    whole = _whole_loss(objective, batch)
    if _adds_up(whole, losses):
        return
    if _is_zero(gradients):
        raise ValueError(ZERO.format(name=samples.name, count=len(gradients)))
    if not objective.paths.rows or not _may_be_weighted(whole, losses):
        warn(COMPANY.format(name=samples.name), ModelWarning)
    elif uniform:
        logger.warning(WEIGHTS.format(name=samples.name))


def _whole_loss(objective: Objective, batch: Batch) -> Tensor | None:
    """The user's loss of a batch as it comes; None of samples that do not fit together, or of a loss of each sample."""
    if batch.parts:
        return None
    try:
        return objective.whole_loss(objective.theta, batch).detach()
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None


def _is_zero(gradients: Tensor) -> bool:
    return bool(
        gradients.abs().max() <= torch.finfo(gradients.dtype).eps ** 0.5 / 100
    )


def _adds_up(whole: Tensor | None, losses: Tensor) -> bool:
    """Whether the loss of a batch is the mean, or the sum, of its samples' losses."""
    if whole is None:
        return True
    slack = _slack(losses)
    mean, total = losses.mean(), losses.sum()
    return bool(min((whole - mean).abs(), (whole - total).abs()) <= slack)


def _may_be_weighted(whole: Tensor | None, losses: Tensor) -> bool:
    """Whether the loss of a batch may be a mean of its samples' losses with other weights."""
    if whole is None:
        return True
    slack = _slack(losses)
    least = losses.min() - slack
    most = losses.max() + slack
    return bool(least <= whole <= most)


def _slack(losses: Tensor) -> Tensor:
    largest = losses.abs().max()
    slack: Tensor = largest * (4 * torch.finfo(losses.dtype).eps ** 0.5)
    return slack
