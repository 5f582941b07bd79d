r"""Hessian-vector products that are true: automatic ones are tried against a difference of gradients.

Some functions have a first derivative and no second one (CTC, `once_differentiable`), some have a silent zero in its
place (a backward pass that leaves the graph). There H v comes from two gradients,
H v = (\nabla L(\theta + h v) - \nabla L(\theta - h v)) / (2 h) + O(h^2).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..data.batch import Batch
from ..utils import warn
from .differences import along
from .doubts import ModelWarning
from .gradients import gradient
from .linear import is_derivative
from .objective import Objective

logger = logging.getLogger(__name__)
Product = Callable[[Objective, Batch, Tensor], Tensor]


MISSING = (
    "the second derivative by automatic differentiation is {:.0%} off from differences of gradients: a part of the "
    "model or loss leaves the graph in its backward pass (a torch.autograd.Function with once_differentiable, detach "
    "or numpy); Hessian products come from differences of gradients instead, two gradients each"
)
SURROGATE = (
    "the model's gradient is not that of its loss (straight-through estimators, custom backward passes): influence is "
    "that of the gradient that was trained with, and its Hessian the derivative by automatic differentiation"
)


def differences_of_gradients(
    objective: Objective, batch: Batch, vectors: Tensor, shorter: float = 1.0
) -> Tensor:
    """H v for each row v of `vectors` [K, P] from two gradients of the mean loss, in double precision if it runs."""
    try:
        found = _differences(
            objective.double(), batch, vectors.double(), shorter
        )
    except (
        RuntimeError,
        TypeError,
    ):
        # a model that runs in its own precision only
        found = _differences(objective, batch, vectors, shorter)
    return found.to(vectors)


def _differences(
    objective: Objective, batch: Batch, vectors: Tensor, shorter: float
) -> Tensor:
    def slope(theta: list[Tensor]) -> list[Tensor]:
        return [gradient(objective.at(theta[0]), batch)]

    return torch.cat(
        [
            along(slope, [objective.theta], [v], shorter)[0].unsqueeze(0)
            for v in vectors
        ]
    )


def try_second_derivative(
    objective: Objective, batch: Batch, v: Tensor, product: Product
) -> None:
    """Set `paths.twice`: whether an automatic product H v, v [P], over a few samples is the gradient's derivative."""
    row = v.unsqueeze(0)
    expected, shorter = (
        differences_of_gradients(objective, batch, row, factor)
        for factor in (1.0, 3.0)
    )
    objective.paths = objective.paths._replace(twice=True)
    try:
        found = product(objective, batch, row)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logger.info(
            "Hessian products come from differences of gradients: %s",
            str(error).splitlines()[0],
        )
        objective.paths = objective.paths._replace(twice=False, hessian=False)
        return
    if is_derivative([found], [expected], [shorter]):
        return
    if not _is_gradient(objective, batch, v):
        logger.warning(SURROGATE)
        return
    warn(
        MISSING.format(float((found - expected).norm() / expected.norm())),
        ModelWarning,
    )
    objective.paths = objective.paths._replace(twice=False, hessian=False)


def _is_gradient(objective: Objective, batch: Batch, v: Tensor) -> bool:
    """Whether the gradient along v is the derivative of the loss."""

    def value(theta: list[Tensor]) -> list[Tensor]:
        return [objective.loss(theta[0], batch).detach().reshape(1)]

    slope = (gradient(objective, batch) @ v).reshape(1)
    expected, shorter = (
        along(value, [objective.theta.detach()], [v], factor)
        for factor in (1.0, 3.0)
    )
    return is_derivative([slope], expected, shorter)
