"""A loss that is linear in what the model returns: its curvature lies elsewhere, and is looked for or named missing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import grad, vjp

from ..data.batch import Batch, flatten_tree
from .gradients import agrees
from .objective import Objective
from .outputs import candidates, numbers_of

logger = logging.getLogger(__name__)
INSIDE = (
    "the loss is computed inside the model: it is linear in what the model returns, so that its Gauss-Newton matrix in "
    "these outputs is zero; set config['curvature'] = 'hessian' (with config['solver'] = 'cg', 'exact' or 'lissa'), or "
    "give a config['model_loss'] that computes the loss from the model's logits"
)
LINEAR = (
    "the loss is linear in the model's outputs (as L1 is), so that its Gauss-Newton matrix is zero and scores are "
    "products of gradients divided by the damping; set config['curvature'] = 'hessian', or another loss, for more"
)


def find_head(objective: Objective, alone: list[Batch], truth: Tensor) -> None:
    """Where the loss is linear in what the model returns, look for a known loss of one of its outputs."""
    objective.head = objective.linear = None
    try:
        linear = all(is_linear(objective, one) for one in alone)
    except Exception as error:  # not differentiable twice, no outputs: a solver that needs them says so
        logger.debug("the loss in the outputs: %s", error)
        return
    if not linear:
        return
    outputs = flatten_tree(objective.model_output(objective.theta, alone[0].tree))[0]
    for head in candidates(outputs, alone[0].leaves):
        objective.head = head
        value = lambda: torch.stack([_gradient_of_outputs(objective, one) for one in alone])  # noqa: E731
        if agrees(value, truth):
            logger.info("the loss is the %s of one of the model's outputs; its curvature is taken there", head.name)
            return
    objective.head = None
    objective.linear = INSIDE if all(_is_an_output(objective, one) for one in alone) else LINEAR


def _is_an_output(objective: Objective, one: Batch) -> bool:
    """Whether a loss that is linear in the outputs y is g . y, with no other part (Euler), g its gradient there."""
    y, slopes = _slopes(objective, one)
    loss = float(objective.losses(objective.theta, one).detach())
    along = sum(float((slope * part).sum()) for slope, part in zip(slopes, y, strict=True))
    return abs(along - loss) <= 1e-4 * abs(loss)


def _gradient_of_outputs(objective: Objective, one: Batch) -> Tensor:
    """Gradient of one sample's loss through the model's outputs [P]."""
    theta = objective.theta.detach().requires_grad_()
    loss = objective.output_losses(objective.outputs(theta, one), one).sum()
    return torch.autograd.grad(loss, theta, materialize_grads=True)[0]


def is_linear(objective: Objective, one: Batch) -> bool:
    """Whether the Hessian of one sample's loss in the model's outputs is zero."""
    y, loss = _loss_in_outputs(objective, one)
    generator = torch.Generator().manual_seed(0)
    u = [torch.randn(part.shape, generator=generator).to(part) for part in y]
    slopes, pullback = cast(tuple[list[Tensor], Any], vjp(grad(loss), y))
    size = max(float(slope.abs().max()) for slope in slopes)
    return all(float(w.abs().max()) <= 1e-6 * size for w in pullback(u)[0])


def _slopes(objective: Objective, one: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of one sample, and the gradient of its loss in them."""
    y, loss = _loss_in_outputs(objective, one)
    return y, cast(list[Tensor], grad(loss)(y))


def _loss_in_outputs(objective: Objective, one: Batch) -> tuple[list[Tensor], Callable[[list[Tensor]], Tensor]]:
    """Outputs of one sample that are numbers, and its loss as a function of them."""
    y, rebuild = numbers_of(objective.outputs(objective.theta, one))
    return [part.detach() for part in y], lambda parts: objective.output_losses(rebuild(parts), one).sum()
