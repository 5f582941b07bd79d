"""Derivatives of each sample's outputs in the parameters, as whole matrices."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from ..data.batch import Batch
from .gradients import agrees
from .objective import Objective, Theta
from .outputs import numbers_of

logger = logging.getLogger(__name__)


def jacobians(
    objective: Objective,
    batch: Batch,
    kept: Sequence[int] | None = None,
) -> Tensor:
    """Derivatives of each sample's outputs in the parameters -> [B, C, P].

    Args:
        objective: of the model.
        batch: of samples.
        kept: which of the tensors that the model returns count; None is all of them.
    """
    if _may_vmap(objective, batch, kept):
        return _by_vmap(objective, batch, kept)
    return _one_by_one(objective, batch, kept)


def _may_vmap(
    objective: Objective, batch: Batch, kept: Sequence[int] | None
) -> bool:
    """Whether `vmap` gives the true Jacobians, as found on the first two samples; PyTorch has no rule for some
    functions, and a wrong one for others (`torch.cdist`).
    """
    if batch.parts or not objective.paths.vmap:
        return False
    if objective.paths.jacobian is None:
        if batch.size == 1:  # which does not show whether samples mix
            return False
        few = batch.rows(0, 2)
        allowed = agrees(
            lambda: _by_vmap(objective, few, kept),
            _one_by_one(objective, few, kept),
        )
        objective.paths = objective.paths._replace(jacobian=allowed)
        if not allowed:
            logger.info(
                "the model does not allow Jacobians of samples together; a backward pass for each output is slower"
            )
    return bool(objective.paths.jacobian)


def _one_by_one(
    objective: Objective, batch: Batch, kept: Sequence[int] | None
) -> Tensor:
    singles = batch.singles()
    return torch.stack([_of_one(objective, one, kept) for one in singles])


def _by_vmap(
    objective: Objective,
    batch: Batch,
    kept: Sequence[int] | None,
) -> Tensor:
    def output(theta: Tensor, *leaves: Tensor) -> Tensor:
        one = Batch(
            [leaf.unsqueeze(0) for leaf in leaves], batch.rebuild, 1, [0]
        )
        return _flat(objective, theta, one, kept)

    over = tuple(0 for _ in batch.leaves)
    J: Tensor = vmap(jacrev(output), in_dims=(None, *over))(
        objective.theta, *batch.leaves
    )
    return J


def _of_one(
    objective: Objective,
    one: Batch,
    kept: Sequence[int] | None,
) -> Tensor:
    """The same of a single sample, a backward pass for each output -> [C, P]."""
    theta = objective.theta.detach().requires_grad_()
    rows = [
        torch.autograd.grad(
            part, theta, retain_graph=True, materialize_grads=True
        )[0]
        for part in _flat(objective, theta, one, kept)
    ]
    return torch.stack(rows)


def _flat(
    objective: Objective,
    theta: Theta,
    one: Batch,
    kept: Sequence[int] | None,
) -> Tensor:
    """The outputs of a single sample that count -> [C]."""
    y, _ = numbers_of(objective.outputs(theta, one))
    chosen = range(len(y)) if kept is None else kept
    return torch.cat([y[k].reshape(-1).to(objective.dtype) for k in chosen])


def pulled_back(
    objective: Objective,
    batch: Batch,
    c: Tensor,
    kept: Sequence[int] | None = None,
) -> Tensor:
    """J_i^T c_i of each sample, c [B, C] -> [B, P]; `kept` as in `jacobians`."""
    c = c.to(objective.theta)
    if _may_vmap(objective, batch, kept):
        return _pulled_by_vmap(objective, batch, c, kept)
    rows: list[Tensor] = []
    for one, row in zip(batch.singles(), c, strict=True):
        theta = objective.theta.detach().requires_grad_()
        y = _flat(objective, theta, one, kept)
        rows += torch.autograd.grad(y, theta, row, materialize_grads=True)
    return torch.stack(rows)


def _pulled_by_vmap(
    objective: Objective,
    batch: Batch,
    c: Tensor,
    kept: Sequence[int] | None,
) -> Tensor:
    def product(theta: Tensor, row: Tensor, *leaves: Tensor) -> Tensor:
        one = Batch(
            [leaf.unsqueeze(0) for leaf in leaves], batch.rebuild, 1, [0]
        )
        return _flat(objective, theta, one, kept) @ row

    over = tuple(0 for _ in batch.leaves)
    rows: Tensor = vmap(grad(product), in_dims=(None, 0, *over))(
        objective.theta, c, *batch.leaves
    )
    return rows
