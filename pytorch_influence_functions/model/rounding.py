"""How far the true losses and gradients are off themselves, so that a fast way is not refused for the same rounding."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data.batch import Batch
from .gradients import gradient
from .linear import same
from .objective import Objective

logger = logging.getLogger(__name__)
ROUNDINGS = 8
"""Times the rounding of the true numbers, as double precision shows it, that a way may be off: it has its own, the
largest of eight samples' need not be the largest of all."""
MOST_ROUNDED = 1e-3
"""Of the largest number; what is further off is another function in double precision, or a wrong way."""


class Rounding:
    r"""Of the true numbers of a few samples, which are computed one at a time.

    Of a sample that is fitted well, p - e_t and y - t are small differences of larger numbers: its loss and gradient
    are off by more than their last digits, whichever way they are computed. Found in double precision, where a
    comparison in the last digits fails; 0 where the model does not run in it.

    Args:
        objective: of the model.
        alone: the samples, each a batch of one.
        losses: of each [B].
        truth: gradient of each [B, P].
    """

    def __init__(
        self,
        objective: Objective,
        alone: Sequence[Batch],
        losses: Tensor,
        truth: Tensor,
    ) -> None:
        self.objective, self.alone = objective, alone
        self.true_losses, self.truth = losses, truth

    def holds(
        self,
        value: Callable[[], Tensor],
        expected: Tensor,
        rounding: Callable[[], float],
    ) -> bool:
        """Whether a way gives the expected numbers, up to what these are off themselves."""
        if same(self.objective, value, expected):
            return True
        if not expected.numel():
            return False
        most = MOST_ROUNDED * float(expected.abs().max())
        slack = min(ROUNDINGS * rounding(), most)
        return slack > 0 and same(self.objective, value, expected, slack)

    def of_losses(self) -> float:
        """The largest of a loss."""
        return self._largest[0]

    def of_gradients(self) -> float:
        """The largest of a number in a gradient."""
        return self._largest[1]

    def of_products(self) -> float:
        """The largest of a gradient's product with the sum of all."""
        return self._largest[2]

    @functools.cached_property
    def _largest(self) -> tuple[float, float, float]:
        v = self.truth.double().sum(0)
        losses, gradients, products = [0.0], [0.0], [0.0]
        try:
            double = self.objective.double()
            for k, one in enumerate(self.alone):
                loss = double.losses(double.theta, one).detach()
                losses.append(float((loss - self.true_losses[k]).abs().max()))
                off = gradient(double, one) - self.truth[k]
                gradients.append(float(off.abs().max()))
                products.append(float((off @ v).abs()))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # it runs in its own precision only
            logger.debug("no rounding: %s", error)
            return 0.0, 0.0, 0.0
        return max(losses), max(gradients), max(products)
