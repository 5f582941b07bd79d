"""EKFAC as a solver: its approximation of the Gauss-Newton matrix (`factors`) in place of the matrix."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..data.batch import Batch
from ..model.gradients import per_sample_gradients
from ..model.layer_passes import by_parts
from ..model.layer_products import seen_of_loss
from ..model.layers import gather
from ..model.objective import Objective
from ..model.outer_products import (
    is_one_hot,
    one_hot_weighted_squares,
)
from .blocks import few
from .factors import Ekfac, Inverses, build
from .paired import choose_damping
from .passes import batch_size
from .problem import Problem
from .solution import CERTIFIED, Damping, Prepared, Solution
from .system import System

logger = logging.getLogger(__name__)
DAMPING_TARGET = 0.7
"""The error to stay below where EKFAC alone predicts: it is larger at every lambda than that of the true system."""


def ekfac(problem: Problem, damping: Damping | None = None) -> Prepared:
    r"""Solve with the EKFAC approximation in place of G: no iteration, two passes over the training set."""
    require_gauss_newton(problem)
    factors = build(problem)
    if damping is None:
        damping = choose_damping(
            problem,
            Inverses(factors),
            factors.mean_eigenvalue,
            DAMPING_TARGET,
        )
    return solver(problem, factors, damping)


def require_gauss_newton(problem: Problem) -> None:
    """Raise `ValueError` where the user asks for the Hessian."""
    if problem.curvature.kind != "ggn":
        raise ValueError(
            f"config['curvature'] = 'hessian' with config['solver'] = {problem.config.solver_in_use[0]!r}: EKFAC "
            "approximates the Gauss-Newton matrix; leave config['curvature'] out, or use config['solver'] = 'cg', "
            "which it may precondition"
        )


def solver(problem: Problem, factors: Ekfac, damping: Damping) -> Prepared:
    """Solve with these factors; the residual is measured where it is asked for."""
    inverse = factors.inverse(damping.value)

    def solve(v: Tensor, tests: int) -> Solution:
        return Solution(inverse(v), certified=CERTIFIED)

    def self_products() -> Tensor:
        if len(factors.outside) == 0:
            return _by_layers(problem, factors, damping.value)
        return by_gradients(
            problem, lambda g: factors.quadratic(g, damping.value)
        )

    facts = {
        "mean_eigenvalue": factors.mean_eigenvalue,
        "layers": len(factors.blocks),
    }
    return Prepared(
        System(problem, damping.value),
        solve,
        report={**damping.report, **facts},
        self_products=self_products,
        again=inverse,
    )


def _by_layers(problem: Problem, factors: Ekfac, damping: float) -> Tensor:
    r"""g_i^T (G + \lambda I)^{-1} g_i of each training sample [n], from what its layers see."""
    layers = [block.layer for block in factors.blocks]
    weights = 1 / (factors.eigenvalues + damping).unsqueeze(0)
    result = torch.zeros(problem.samples.n, dtype=problem.objective.dtype)

    def quadratic(one: Batch) -> Tensor:
        return _quadratic_by_layers(
            problem.objective, factors, weights, one, problem.budget.product
        )

    for batch in problem.samples.ordered(
        batch_size(problem, layers), text="Self-influence"
    ):
        found = torch.cat(list(by_parts(batch, quadratic)))
        result[torch.as_tensor(batch.indices)] = found.detach().cpu()
    return result


def _quadratic_by_layers(
    objective: Objective,
    factors: Ekfac,
    weights: Tensor,
    batch: Batch,
    max_bytes: float,
) -> Tensor:
    """The quadratic form with `weights` [1, P] in the eigenbasis of each sample's gradient -> [B]."""
    layers = [block.layer for block in factors.blocks]
    inputs, gradients = seen_of_loss(objective, layers, batch)
    total = objective.theta.new_zeros(batch.size)
    for block, x, d in zip(factors.blocks, inputs, gradients, strict=True):
        left, right = block.rotated(d, x)
        total = total + _weighted_squares(
            left, right, gather(block.layer, weights)[0], max_bytes
        )
    return total


def _weighted_squares(
    g: Tensor, a: Tensor, w: Tensor, max_bytes: float
) -> Tensor:
    """Sum of w (sum_t g_t a_t^T)^2 of each sample; g [B, groups, T, out], a [B, groups, T, in] -> [B]."""
    if is_one_hot(a):
        return one_hot_weighted_squares(g, a, w)
    if g.shape[2] == 1:
        once = g[:, :, 0].square().unsqueeze(2) @ w
        return (once.squeeze(2) * a[:, :, 0].square()).sum((1, 2))
    size = few(g, a, max_bytes)
    pairs = zip(g.split(size), a.split(size), strict=True)
    return torch.cat(
        [((p.mT @ q).square() * w).sum((1, 2, 3)) for p, q in pairs]
    )


def by_gradients(
    problem: Problem, quadratic: Callable[[Tensor], Tensor]
) -> Tensor:
    """The quadratic form [K, P] -> [K] of the gradient of each training sample -> [n], on the CPU."""
    result = torch.zeros(problem.samples.n, dtype=problem.objective.dtype)
    for batch in problem.samples.ordered(
        problem.gradient_batch, text="Self-influence"
    ):
        gradients = per_sample_gradients(
            problem.objective, batch, problem.budget.product
        )
        result[torch.as_tensor(batch.indices)] = (
            quadratic(gradients).detach().cpu()
        )
    return result
