"""The true numbers of a few samples, one at a time, which every fast way of computing is compared with."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batch import Batch
from .gradients import ULPS, gradient
from .linear import precision_of_loss, same
from .objective import Objective

logger = logging.getLogger(__name__)
IN_DOUBLE = {
    torch.float32: ULPS * torch.finfo(torch.float32).eps,
    torch.float64: 1e-10,
}
"""Relative difference in double precision of a way that is right: what is tried in single precision, and for a model in
double precision enough for samples that are fitted to a loss of 1e-6. A wrong sample or layer differs by thousands."""
COARSE = 0.05
"""Relative difference in the model's own precision, in the norm of all: it is rounding where a sign of a ReLU's input
turns with it, as a few of a deep network's do; measured on a ResNet-18, 0.008 of the largest number."""


class Large(NamedTuple):
    """A larger batch of samples, and where those of the trial stand in it; a model may branch on the size."""

    batch: Batch
    places: Tensor


class Trial:
    r"""Samples collated together, and the true losses and gradients of each alone.

    Args:
        objective: of the model.
        batch: samples collated together.
        alone: the same samples, each a batch of one.
        losses: of each alone [B].
        truth: gradient of each alone [B, P].
        large: a larger batch that holds them too.
    """

    def __init__(
        self,
        objective: Objective,
        batch: Batch,
        alone: list[Batch],
        losses: Tensor,
        truth: Tensor,
        large: Large | None = None,
    ) -> None:
        self.objective, self.batch, self.alone = objective, batch, alone
        self.losses, self.truth, self.large = losses, truth, large

    def holds(self, way: Way) -> bool:
        """Whether a way gives the true numbers.

        They are compared in the last digits first. Of a sample that is fitted well, p - e_t and y - t are small
        differences of larger numbers, and a ReLU's input near zero may have either sign: there the true numbers are
        off themselves, and double precision decides, in which a wrong way is as wrong and a right one is not.
        """
        value, expected = way(self)
        if same(self.objective, value, expected):
            return True
        twin = self._in_double
        if twin is None or not self._is_near(value, expected):
            return False
        twin.objective.paths = self.objective.paths
        within = IN_DOUBLE[self.objective.dtype]
        return same(twin.objective, *way(twin), within)

    def _is_near(self, value: Callable[[], Tensor], expected: Tensor) -> bool:
        try:
            got = value().detach()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # said where it was compared first
            return False
        if got.shape != expected.shape:
            return False
        off = float((got - expected).norm())
        return off <= COARSE * float(expected.norm())

    @functools.cached_property
    def _in_double(self) -> Trial | None:
        """The same trial in double precision, or None where the model runs in its own only."""
        own = self.objective
        if own.dtype not in IN_DOUBLE or own.rounded not in (None, own.dtype):
            return None
        double = self.objective.double()
        try:
            losses = [double.losses(double.theta, one) for one in self.alone]
            truth = double.theta.new_empty(self.truth.shape)
            for i, one in enumerate(self.alone):
                truth[i] = gradient(double, one)
            double.rounded = precision_of_loss(double, self.alone[0])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            logger.debug("nothing in double precision: %s", error)
            return None
        if double.rounded != torch.float64:
            return None
        return Trial(
            double,
            self.batch,
            self.alone,
            torch.cat(losses).detach(),
            truth,
            self.large,
        )


Way = Callable[[Trial], tuple[Callable[[], Tensor], Tensor]]
"""What a way computes of a trial's samples, and what is right."""
