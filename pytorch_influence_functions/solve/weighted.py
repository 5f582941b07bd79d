"""Sums of the training samples' gradients with weights, several at a time, and the weights of random halves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..data.batch import Batch
from ..model.gradients import (
    REUSED,
    gradient,
    per_sample_gradients,
    reuse,
)
from .problem import Problem

SEED = 3
"""Added to the run's seed, so that the halves are not those of the damping rule of plain gradients."""


def signs(n: int, count: int, seed: int) -> Tensor:
    """Of random halves [count, n]: one in the half, minus one outside it."""
    generator = torch.Generator().manual_seed(seed + SEED)
    result = -torch.ones(count, n)
    for row in result:
        row[torch.randperm(n, generator=generator)[: (n + 1) // 2]] = 1
    return result


def weighted_gradients(problem: Problem, weights: Tensor) -> Tensor:
    r"""(1/n) \sum_i w_hi \nabla \ell_i for weights w [h, n] -> [h, P]."""
    objective = problem.objective
    total = torch.zeros(
        len(weights),
        objective.P,
        dtype=objective.dtype,
        device=objective.device,
    )
    size = _at_once(problem, len(weights))
    if by_sample(problem):
        size = min(size, problem.gradient_batch)
    share = problem.set_up.share(problem.samples.n)
    for batch in problem.samples.ordered(
        size, share.indices, text="Sums of gradients"
    ):
        own = weights[:, torch.as_tensor(batch.indices)].to(total)
        total += _of_batch(problem, batch, own)
    return share.total(total) / problem.samples.n


def _at_once(problem: Problem, count: int) -> int:
    """Samples of whose losses so many sums are differentiated together."""
    fitting = problem.budget.product / (2 * count * problem.activations)
    return max(1, min(problem.scoring_batch, int(fitting)))


def weighted_loss(
    problem: Problem, shift: Tensor, weights: Tensor
) -> tuple[float, Tensor]:
    r"""(1/n) \sum_i w_i \ell_i at \theta + a shift [P], weights w [n], and its gradient [P]."""
    batches = problem.samples.ordered(_at_once(problem, 1))
    parts = ((one, weights[torch.as_tensor(one.indices)]) for one in batches)
    return summed_loss(problem, shift, parts)


def summed_loss(
    problem: Problem, shift: Tensor, parts: Iterable[tuple[Batch, Tensor]]
) -> tuple[float, Tensor]:
    r"""(1/n) \sum_i w_i \ell_i at \theta + a shift [P] over batches and their weights [B], and its gradient [P]."""
    objective, n = problem.objective, problem.samples.n
    theta = (objective.theta + shift).detach().requires_grad_()
    value, total = 0.0, torch.zeros_like(objective.theta)
    for batch, w in parts:
        losses = objective.losses(theta, batch)
        loss = losses @ w.to(losses) / n
        total += torch.autograd.grad(loss, theta)[0]
        value += float(loss.detach())
    return value, total


def block_gradients(
    problem: Problem,
    blocks: list[list[int]],
    weights: Tensor,
) -> Tensor:
    r"""(1/n) \sum_b w_hb \sum_{i in block b} \nabla \ell_i for weights w [h, blocks], in one pass -> [h, P]."""
    objective = problem.objective
    total = objective.theta.new_zeros(
        len(weights),
        objective.P,
    )
    share = problem.set_up.share(len(blocks))
    mine = share.of(blocks)
    columns = share.of(weights.T)
    for block, column in zip(mine, columns, strict=True):
        size = problem.scoring_batch
        for batch in problem.samples.ordered(size, block):
            g = gradient(objective, batch) * batch.size
            for row, weight in zip(total, column, strict=True):
                row.add_(g, alpha=float(weight))
    total = share.total(total)
    return total / problem.samples.n


def by_sample(problem: Problem) -> bool:
    """Whether the gradient of each sample costs less than one pass for each sum: where weights are used often."""
    uses = reuse(problem.objective, problem.first)
    return problem.objective.paths.vmap and uses >= REUSED


def _of_batch(problem: Problem, batch: Batch, weights: Tensor) -> Tensor:
    """Sums of the batch's gradients with these weights [h, B] -> [h, P]."""
    objective = problem.objective
    if by_sample(problem):
        rows = per_sample_gradients(objective, batch, problem.budget.product)
        return weights @ rows
    theta = objective.theta.detach().requires_grad_()
    losses = objective.losses(theta, batch)
    if objective.paths.vmap:
        (sums,) = torch.autograd.grad(
            losses, theta, weights, is_grads_batched=True
        )
        return sums
    each = [
        torch.autograd.grad(losses, theta, w, retain_graph=True)[0]
        for w in weights
    ]
    return torch.stack(each)
