"""How the loss depends on what the model returns: through which calls, how curved, and past the outputs too.

A loss that is linear in what the model returns has its curvature elsewhere, which is looked for or named missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..data.batch import Batch, flatten_tree
from ..utils import warn
from .calls import recorded
from .differences import along, second, slope
from .doubts import ModelWarning
from .gradients import agrees
from .objective import Objective
from .outputs import candidates

logger = logging.getLogger(__name__)
HESSIAN = "set config['curvature'] = 'hessian' (with config['solver'] = 'cg', 'exact' or 'lissa')"
INSIDE = (
    "the loss is computed inside the model: it is linear in what the model returns, so that its Gauss-Newton matrix in "
    f"these outputs is zero; {HESSIAN}, or give a config['model_loss'] that computes the loss from the model's logits"
)
LINEAR = (
    "the loss is linear in the model's outputs (as L1 is), so that its Gauss-Newton matrix is zero and scores are "
    "products of gradients divided by the damping; set config['curvature'] = 'hessian', or another loss, for more"
)
UNSEEN = (
    "the loss is no function of what calls of the model and of torch.autograd.grad return ({}), so that it has no "
    "Gauss-Newton matrix; " + HESSIAN
)
ONCE = (
    "the loss has no second derivative in the model's outputs by automatic differentiation ({}): name "
    "config['curvature'] = 'hessian' or 'ggn' to have it from differences of gradients, with config['solver'] = 'cg' "
    "or 'exact' and a config['damping'] that is large enough where the loss is not convex, or use config['solver'] = "
    "'auto'"
)
SILENT = (
    "the loss's second derivative in the model's outputs by automatic differentiation is not that of its gradient: a "
    "part of it leaves the graph in its backward pass (a torch.autograd.Function with once_differentiable, detach or "
    "numpy); it is taken from differences of gradients"
)


CLOSE = 0.02
"""Relative error at which a derivative is taken for another one than a difference: these have four digits at least, and
what is missing of a second derivative is rarely less."""


def look_at_outputs(
    objective: Objective, alone: list[Batch], truth: Tensor
) -> None:
    """Set what an objective says of its outputs: `parts`, `head`, `direct`, `linear`, `refused`, and `paths.curved`.

    Args:
        objective: of the model.
        alone: samples, each as a batch of one.
        truth: their gradients [B, P].
    """
    objective.head = objective.linear = objective.refused = objective.once = (
        None
    )
    objective.direct = False
    _find_calls(objective, alone[0])
    try:
        linear = all(is_linear(objective, one) for one in alone)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        objective.refused = UNSEEN.format(reason)
        return
    if linear and _find_head(objective, alone, truth):
        return
    objective.direct = not same(
        objective, lambda: _gradients_of_outputs(objective, alone), truth
    )
    if objective.direct:
        _take_parameters_as_outputs(objective, alone, truth)
    elif linear:
        if all(_is_an_output(objective, one) for one in alone):
            objective.refused = INSIDE
        else:
            objective.linear = LINEAR


def precision_of_loss(objective: Objective, one: Batch) -> torch.dtype:
    """The precision in which the loss comes, if lower than that of the parameters (`logits.float()` in a model)."""
    with objective._at(objective.theta) as model:
        own = objective._raw_loss(model, objective._tree(one)).dtype
    lower = own == torch.float32 and objective.dtype == torch.float64
    return own if lower else objective.dtype


def same(
    objective: Objective,
    value: Callable[[], Tensor],
    expected: Tensor,
    within: float | None = None,
) -> bool:
    """`agrees`, in the precision that the values of the loss have."""
    dtype = objective.rounded or expected.dtype
    return agrees(lambda: value().to(dtype), expected.to(dtype), within)


def _find_calls(objective: Objective, one: Batch) -> None:
    """Whether the loss calls the model as a whole, or parts of it, or differentiates."""
    objective.parts = False
    if objective.model_loss is None:
        return
    with objective._at(objective.theta) as model, recorded(model, True) as seen:
        objective.model_loss(model, objective._tree(one))
    objective.parts = (
        any(module is not model for module in seen.modules) or not seen.modules
    )


def _find_head(objective: Objective, alone: list[Batch], truth: Tensor) -> bool:
    """Look for a known loss of one of the outputs that has the true gradient."""
    outputs = flatten_tree(
        objective.model_output(objective.theta, alone[0].tree)
    )[0]
    given = objective.loss_func
    for head in candidates(outputs, alone[0].leaves, given):
        objective.head = head
        if same(
            objective, lambda: _gradients_of_outputs(objective, alone), truth
        ):
            logger.info(
                "the loss is the %s of one of the model's outputs; its curvature is taken there",
                head.name,
            )
            return True
    objective.head = None
    return False


def _take_parameters_as_outputs(
    objective: Objective, alone: list[Batch], truth: Tensor
) -> None:
    """The loss takes parameters past the outputs (a penalty): it is a function of both, or of nothing that is seen."""
    if same(objective, lambda: _gradients_of_outputs(objective, alone), truth):
        logger.info(
            "the loss has a part in the parameters themselves (a penalty); its curvature counts, too"
        )
        return
    objective.direct = False
    objective.refused = UNSEEN.format(
        "its gradient through them is not its gradient"
    )


def _is_an_output(objective: Objective, one: Batch) -> bool:
    """Whether a loss that is linear in the outputs y is g . y, with no other part (Euler), g its gradient there."""
    y, slopes = _slopes(objective, one)
    loss = float(objective.losses(objective.theta, one).detach())
    product = sum(
        float((g * part).sum()) for g, part in zip(slopes, y, strict=True)
    )
    return abs(product - loss) <= 1e-4 * abs(loss)


def _gradients_of_outputs(objective: Objective, alone: list[Batch]) -> Tensor:
    """Gradient of each sample's loss through the model's outputs [B, P]."""
    return torch.stack([_gradient_of_outputs(objective, one) for one in alone])


def _gradient_of_outputs(objective: Objective, one: Batch) -> Tensor:
    theta = objective.theta.detach().requires_grad_()
    y, rebuild = objective.all_outputs(theta, one)
    loss = objective.output_losses(rebuild(y), one).sum()
    if not loss.requires_grad:
        return torch.zeros_like(theta)
    return torch.autograd.grad(loss, theta, materialize_grads=True)[0]


def is_linear(objective: Objective, one: Batch) -> bool:
    """Whether the Hessian of one sample's loss in the model's outputs is zero; `paths.curved`: whether autograd has it.

    In double precision where the model runs in it: differences of well-fitted samples drown in rounding.
    """
    try:
        return _is_linear(objective.double(), one, objective)
    except RuntimeError:
        return _is_linear(objective, one, objective)


def _is_linear(twin: Objective, one: Batch, objective: Objective) -> bool:
    y, loss = _loss_in_outputs(twin, one)
    if not y:
        return False
    generator = torch.Generator().manual_seed(0)
    u = [torch.randn(part.shape, generator=generator).to(part) for part in y]
    slopes = slope(loss, y)
    try:
        Ru = _curvature_along(loss, y, u)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        objective.once = ONCE.format(str(error).splitlines()[0])
        Ru = None
    if Ru is None:
        objective.paths = objective.paths._replace(curved=False)
        return False
    size = max(float(part.abs().max()) for part in slopes)
    return all(float(w.abs().max()) <= 1e-6 * size for w in Ru)


def _curvature_along(
    loss: Callable[[list[Tensor]], Tensor], y: list[Tensor], u: list[Tensor]
) -> list[Tensor] | None:
    """Hessian of a loss in y times u by automatic differentiation, or None where that is not the derivative."""
    found = second(loss, y)(u)
    expected, shorter = (
        along(lambda parts: slope(loss, parts), y, u, factor)
        for factor in (1.0, 3.0)
    )
    if is_derivative(found, expected, shorter):
        return found
    warn(SILENT, ModelWarning)
    return None


def is_derivative(
    found: list[Tensor], expected: list[Tensor], shorter: list[Tensor]
) -> bool:
    """Whether a derivative is that of two differences, the second with a shorter step; yes where these disagree."""
    flat, one, other = (
        torch.cat([part.reshape(-1) for part in parts]).double()
        for parts in (found, expected, shorter)
    )
    size = torch.maximum(flat.norm(), one.norm())
    noise = (one - other).norm()
    return bool((flat - one).norm() <= CLOSE * size + 10 * noise)


def _slopes(
    objective: Objective, one: Batch
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of one sample, and the gradient of its loss in them."""
    y, loss = _loss_in_outputs(objective, one)
    return y, slope(loss, y)


def _loss_in_outputs(
    objective: Objective, one: Batch
) -> tuple[list[Tensor], Callable[[list[Tensor]], Tensor]]:
    """Outputs of one sample that are numbers, and its loss as a function of them."""
    y, rebuild = objective.all_outputs(objective.theta, one)
    return [part.detach() for part in y], lambda parts: objective.output_losses(
        rebuild(parts), one
    ).sum()
