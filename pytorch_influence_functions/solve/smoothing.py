r"""Smoothed influence: gradients averaged over the points that retraining would reach.

Retraining on a random half of the training set, counted twice, moves the parameters by about

    \Delta = -(G + \lambda I)^{-1} (1/n) \sum_i \varepsilon_i \nabla \ell_i,     \varepsilon_i = 1 in the half, else -1.

By Stein's lemma (Stein 1981) the best linear prediction of f(\theta + \Delta) over such shifts has the gradient
E \nabla f(\theta + \Delta), not \nabla f(\theta). So with M shifts in pairs (\Delta, -\Delta), `paired.SIZE` times as
large, since retraining goes further than the first order says,

    v_k = mean_m \nabla \ell(z_k, \theta + \Delta_m),   g_i = mean_m \nabla \ell(z_i, \theta + \Delta_m),
    influence[k, i] = v_k^T (G + \lambda I)^{-1} g_i / n.

The two averages are taken apart and then multiplied. The score is the predicted effect of leaving sample i out, on
average over random halves of the training set (the first-order form of the Banzhaf value, Wang & Jia 2023); the plain
score is that effect at the full set.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch
from ..model.gradients import gradient_products, per_sample_gradients
from ..model.objective import Objective
from .averages import mean, mean_gradients, mean_products
from .damping import prediction_error
from .groups import split
from .paired import NEARLY_LINEAR, SIZE, PairedRule, from_others
from .problem import Problem
from .set_up import Kept, Share
from .solution import require_solved
from .solvers import Solver
from .weighted import signs, weighted_gradients

logger = logging.getLogger(__name__)
LOOKED_AT = 8
"""Pairs that the noise and the errors are estimated from."""
FEWEST_PAIRS = 3
"""So many at least: there is no variance between the others of two."""


class Points:
    """The objective at the parameters over which gradients are averaged; without smoothing it is its own alone.

    Args:
        problem: the model and its training set.
        solver: by which the shifts are found when they are first needed.

    Attributes:
        report: how many shifts, how large they are beside the parameters, and how much of what they say is noise.
    """

    def __init__(self, problem: Problem, solver: Solver) -> None:
        self._problem, self._solver = problem, solver
        self._found: Tensor | None = None
        self.report: dict[str, Any] = {}

    @property
    def shifts(self) -> Tensor:
        """The first of each pair [pairs, P]; none without smoothing, or where `"auto"` saw that it does not pay."""
        return self.prepare()

    def prepare(self) -> Tensor:
        """Find them, if it is not done yet."""
        if self._found is None:
            self._found = self._find()
        return self._found

    def all(self) -> Iterator[Objective]:
        """One for each point, made one at a time: of a pair only its first shift is held."""
        own = self._problem.objective
        if not len(self.shifts):
            yield own
        for shift in self.shifts:
            yield own.at(own.theta + shift)
            yield own.at(own.theta - shift)

    def mean(self, value: Callable[[Objective], Tensor]) -> Tensor:
        """Mean of a value over the points; that of one point is the value itself."""
        return mean(self.all, value)

    def products(self, batch: Batch, vectors: Tensor) -> Tensor:
        """The mean of each sample's gradient times each vector [K, P] -> [K, B]."""
        if len(self.shifts):
            return mean_products(self._problem, self.all, batch, vectors)
        own, most = self._problem.objective, self._problem.budget.product
        return gradient_products(own, batch, vectors, most)

    def gradients(self, batch: Batch) -> Tensor:
        """The mean of each sample's gradient [B, P]."""
        if len(self.shifts):
            return mean_gradients(self._problem, self.all, batch)
        own, most = self._problem.objective, self._problem.budget.product
        return per_sample_gradients(own, batch, most)

    def _find(self) -> Tensor:
        """The shifts; none where `"auto"` sees that the prediction is no better with them."""
        problem, count = self._problem, self._problem.shifts
        if not count:
            return problem.objective.theta.new_zeros(0, problem.objective.P)
        found = problem.set_up.kept("shifts", self._made)
        self.report = {"smoothing": found.facts}
        logger.info("smoothing: %s", found.facts)
        return found.tensors["shifts"].to(problem.objective.device)

    def _made(self) -> Kept:
        """The shifts, and what is said of them."""
        problem, count = self._problem, self._problem.shifts
        shifts = self._solved(count // 2)
        size = float(shifts.norm(dim=1).mean() / problem.objective.theta.norm())
        said = {"shifts": count, "relative_size": size}
        if len(shifts) >= FEWEST_PAIRS:
            said |= self._looked_at(shifts)
        if problem.config.fixed_shifts is None and not _pays(said):
            shifts, said["shifts"] = shifts[:0], 0
        return Kept({"shifts": shifts}, said)

    def _looked_at(self, shifts: Tensor) -> dict[str, float]:
        """What the damping rule says of these shifts, and without smoothing; the noise of the averages."""
        rule = PairedRule(self._problem, lambda v, _: v)
        few = shifts[:LOOKED_AT]
        actual, products = rule.odd_changes(few), rule.products(few)
        smoothed = prediction_error(actual, from_others(products))
        plain = rule.error_without_of(actual, few)
        return {
            "error": smoothed,
            "error_without": plain,
            "noise": noise(products) * len(few) / len(shifts),
        }

    def _solved(self, pairs: int) -> Tensor:
        r"""The first \Delta of each pair [pairs, P], as many at a time as test samples are solved together."""
        problem = self._problem
        halves = signs(problem.samples.n, pairs, problem.config.seed)
        parts = []
        for part in split(range(pairs), self._solver.group_size):
            g = weighted_gradients(problem, halves[list(part)])
            share = problem.set_up.share(len(g))
            if problem.curvature.kind != "ggn":
                # for all: one process alone might have to leave the Hessian
                share = Share(len(g))
            solved = self._solver(share.of(g), pairs).vectors
            parts.append(share.joined(solved))
        shifts = torch.cat(parts).mul_(SIZE)
        require_solved(shifts)
        return shifts


def _pays(said: dict[str, float]) -> bool:
    """Whether the prediction without smoothing leaves something to gain, and is worse than that with it."""
    return said["error_without"] > max(said["error"], NEARLY_LINEAR)


def noise(products: Tensor) -> float:
    """The share of noise in the variance of what averages over all pairs predict, median over the samples.

    Of the gradients of pair q times the shift of pair p [pairs q, pairs p, samples], without q = p.
    """
    pairs = len(products)
    others = ~torch.eye(pairs, dtype=torch.bool, device=products.device)
    rest = (products - from_others(products)) * others.unsqueeze(2)
    variance = rest.square().sum(0) / (pairs - 2)
    total = products.mean(0).square().sum(0)
    tiny = torch.finfo(total.dtype).tiny
    share = variance.sum(0) / pairs / total.clamp_min(tiny)
    return float(share.median())
