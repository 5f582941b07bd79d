r"""Products of the curvature over one batch with stacks of vectors, one function a kind.

H = \nabla^2 L(\theta) and its Gauss-Newton part G = (1/B) \sum_i J_i^T (\nabla^2_y \ell_i) J_i (Schraudolph 2002),
which is positive semi-definite where the loss is convex in the model's output.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp, vmap

from ..data.batch import Batch
from .budget import STACK
from .differences import along
from .gradients import REUSED, in_stacks, reuse
from .likelihoods import loss_hessian, loss_hessian_in_double
from .objective import Objective, Rebuild
from .twice import differences_of_gradients

logger = logging.getLogger(__name__)
MANY = 16
"""From so many vectors on `torch.func` costs less than batched double backward also where parameters are used once."""


def hessian_products(
    objective: Objective, batch: Batch, vectors: Tensor, stack: int = STACK
) -> Tensor:
    """H v for each row v of `vectors` [K, P], H over the batch, `stack` of them at a time -> [K, P]."""
    if objective.paths.twice is False:
        return differences_of_gradients(objective, batch, vectors)
    together = min(len(vectors), stack) > 1 and objective.paths.hessian
    if together and (len(vectors) >= MANY or reuse(objective, batch) >= REUSED):
        slope: Callable[[Tensor], Tensor] = grad(
            lambda theta: objective.loss(theta, batch)
        )
        pullback = vjp(slope, objective.theta)[1]
        return in_stacks(
            lambda part: cast(Tensor, vmap(pullback)(part)[0]), vectors, stack
        )
    if not together:
        return _double_backward(objective, batch, vectors)
    theta = objective.theta.detach().requires_grad_()
    (g,) = torch.autograd.grad(
        objective.loss(theta, batch), theta, create_graph=True
    )
    return (
        in_stacks(lambda part: _pulled_back(g, theta, part), vectors, stack)
        if g.requires_grad
        else 0 * vectors
    )


def _double_backward(
    objective: Objective, batch: Batch, vectors: Tensor
) -> Tensor:
    """H v one vector at a time, in the parameters' own shapes."""
    theta = objective.leaves
    first = torch.autograd.grad(
        objective.loss(theta, batch),
        theta,
        create_graph=True,
        materialize_grads=True,
    )
    curved = [i for i, g in enumerate(first) if g.requires_grad]
    if not curved:
        return torch.zeros_like(vectors)
    slopes = [first[i] for i in curved]
    rows = []
    for k, v in enumerate(vectors):
        parts = objective.unflatten(v)
        along = [parts[i] for i in curved]
        more = k + 1 < len(vectors)
        second = torch.autograd.grad(
            slopes, theta, along, retain_graph=more, materialize_grads=True
        )
        rows.append(torch.cat([part.reshape(-1) for part in second]))
    return torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)


def _pulled_back(g: Tensor, theta: Tensor, vectors: Tensor) -> Tensor:
    (products,) = torch.autograd.grad(
        g,
        theta,
        vectors,
        is_grads_batched=True,
        materialize_grads=True,
        retain_graph=True,
    )
    return products.detach()


def gauss_newton_products(
    objective: Objective, batch: Batch, vectors: Tensor, stack: int = STACK
) -> Tensor:
    """G v for each row v of `vectors` [K, P], G over the batch, `stack` of them at a time -> [K, P]."""
    if min(len(vectors), stack) == 1 or not (
        objective.paths.ggn and objective.paths.curved
    ):
        return torch.stack(
            [_gauss_newton_product(objective, batch, v) for v in vectors]
        )

    def outputs(theta: Tensor) -> list[Tensor]:
        leaves, rebuild = objective.all_outputs(theta, batch)
        rebuilders.append(rebuild)
        return leaves

    rebuilders: list[Rebuild] = []
    y, pullback = cast(
        tuple[list[Tensor], Callable[..., tuple[Tensor]]],
        vjp(outputs, objective.theta),
    )
    loss_hessian = _loss_hessian(objective, batch, y, rebuilders[0])

    def product(v: Tensor) -> Tensor:
        return pullback(
            loss_hessian(jvp(outputs, (objective.theta,), (v,))[1])
        )[0]

    return in_stacks(vmap(product), vectors, stack)


def _gauss_newton_product(
    objective: Objective, batch: Batch, v: Tensor
) -> Tensor:
    """G v for one vector [P]: the outputs and their derivative along v, the loss's Hessian, then back."""
    theta = objective.theta.detach().requires_grad_()
    y, u, rebuild = _outputs_along(objective, batch, theta, v)
    w = _mean_loss_hessian(
        objective, batch, [part.detach() for part in y], rebuild
    )(u)
    reached = [(a, b) for a, b in zip(y, w, strict=True) if a.requires_grad]
    if not reached:
        return torch.zeros_like(v)
    return torch.autograd.grad(
        [a for a, _ in reached],
        theta,
        [b for _, b in reached],
        materialize_grads=True,
    )[0]


def _outputs_along(
    objective: Objective, batch: Batch, theta: Tensor, v: Tensor
) -> tuple[list[Tensor], list[Tensor], Rebuild]:
    """Outputs y at theta [P] with their graph, J v, and how to build what the model returned from y."""
    if objective.paths.tangent is None:
        way = _true_tangent(
            objective, batch, theta.detach().requires_grad_(), v
        )
        objective.paths = objective.paths._replace(tangent=way)
    return TANGENTS[objective.paths.tangent or ""](objective, batch, theta, v)


def _true_tangent(
    objective: Objective, batch: Batch, theta: Tensor, v: Tensor
) -> str:
    """The first way to J v that exists and is true: w . (J v) = (J^T w) . v for some w."""
    for name, tangent in TANGENTS.items():
        try:
            true = _is_adjoint(tangent(objective, batch, theta, v), theta, v)
            reason = "it is not what the backward pass says"
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            true, reason = False, str(error).splitlines()[0]
        if true:
            return name
        logger.info(
            "the model's outputs have no derivative by %s: %s", name, reason
        )
    raise NotImplementedError(NO_TANGENT)


def _is_adjoint(
    found: tuple[list[Tensor], list[Tensor], Rebuild], theta: Tensor, v: Tensor
) -> bool:
    y, u, _ = found
    generator = torch.Generator().manual_seed(0)
    w = [torch.randn(part.shape, generator=generator).to(part) for part in y]
    reached = [i for i, part in enumerate(y) if part.requires_grad]
    if not reached:
        return True
    (pulled,) = torch.autograd.grad(
        [y[i] for i in reached],
        theta,
        [w[i] for i in reached],
        materialize_grads=True,
    )
    products = torch.stack([(a * b).sum() for a, b in zip(w, u, strict=True)])
    size = float(pulled.norm() * v.norm())
    size += sum(float(a.norm() * b.norm()) for a, b in zip(w, u, strict=True))
    slack: float = 64 * torch.finfo(theta.dtype).eps ** 0.5 * size
    return abs(float(products.sum()) - float(pulled @ v)) <= slack


def _dual_outputs(
    objective: Objective, batch: Batch, theta: Tensor, v: Tensor
) -> tuple[list[Tensor], list[Tensor], Rebuild]:
    """J v by forward mode, in the pass that computes y."""
    with forward_ad.dual_level():
        leaves, rebuild = objective.all_outputs(
            forward_ad.make_dual(theta, v), batch
        )
        duals = [forward_ad.unpack_dual(leaf) for leaf in leaves]
    y = [dual.primal for dual in duals]
    u = [
        torch.zeros_like(dual.primal)
        if dual.tangent is None
        else dual.tangent.detach()
        for dual in duals
    ]
    return y, u, rebuild


def _twice_backward(
    objective: Objective, batch: Batch, theta: Tensor, v: Tensor
) -> tuple[list[Tensor], list[Tensor], Rebuild]:
    """J v as the derivative in w of (J^T w) . v, for layers that have no forward mode (grid_sample)."""
    y, rebuild = objective.all_outputs(theta, batch)
    reached = [part for part in y if part.requires_grad]
    w = [torch.zeros_like(part).requires_grad_() for part in reached]
    (pulled,) = torch.autograd.grad(
        reached, theta, w, create_graph=True, materialize_grads=True
    )
    along = iter(
        torch.autograd.grad(
            pulled, w, v, retain_graph=True, materialize_grads=True
        )
    )
    u = [
        next(along).detach() if part.requires_grad else torch.zeros_like(part)
        for part in y
    ]
    return y, u, rebuild


def _differences_of_outputs(
    objective: Objective, batch: Batch, theta: Tensor, v: Tensor
) -> tuple[list[Tensor], list[Tensor], Rebuild]:
    """J v from the outputs at two places, for backward passes that leave the graph."""

    def values(at: list[Tensor]) -> list[Tensor]:
        return [
            part.detach() for part in objective.all_outputs(at[0], batch)[0]
        ]

    y, rebuild = objective.all_outputs(theta, batch)
    return y, along(values, [theta.detach()], [v]), rebuild


Tangent = Callable[
    [Objective, Batch, Tensor, Tensor],
    tuple[list[Tensor], list[Tensor], Rebuild],
]
TANGENTS: dict[str, Tangent] = {
    "forward mode": _dual_outputs,
    "two backward passes": _twice_backward,
    "differences": _differences_of_outputs,
}
"""Outputs at theta, their derivative along v and the way to build them again; the cheapest first."""


def _loss_hessian(
    objective: Objective, batch: Batch, y: list[Tensor], rebuild: Rebuild
) -> Callable[[list[Tensor]], list[Tensor]]:
    """u -> (Hessian of the mean loss in the outputs y) u, under vmap."""

    def mean_loss(leaves: list[Tensor]) -> Tensor:
        return objective.output_losses(rebuild(leaves), batch).mean()

    pullback = vjp(grad(mean_loss), y)[1]
    return lambda u: cast(list[Tensor], pullback(u)[0])


def _mean_loss_hessian(
    objective: Objective, batch: Batch, y: list[Tensor], rebuild: Rebuild
) -> Callable[[list[Tensor]], list[Tensor]]:
    """The same without torch.func, which refuses a loss that takes gradients of its own; by differences if need be."""
    by = loss_hessian if objective.paths.curved else loss_hessian_in_double
    product = by(objective, y, rebuild, batch)
    return lambda u: [
        w.to(part) / batch.size for w, part in zip(product(u), y, strict=True)
    ]


NO_TANGENT = (
    "the derivative of the model's outputs along a vector is not that of its backward pass: a part of the model (a "
    "torch.autograd.Function) has a backward pass that is not the derivative of what it computes and leaves the graph, "
    "so that there are no Gauss-Newton products; write its backward pass with differentiable operations"
)
