r"""Smoothed influence: gradients averaged over the points that retraining would reach.

Retraining on a random half of the training set, counted twice, moves the parameters by about

    \Delta = -(G + \lambda I)^{-1} (1/n) \sum_i \varepsilon_i \nabla \ell_i,     \varepsilon_i = 1 in the half, else -1.

By Stein's lemma (Stein 1981) the best linear prediction of f(\theta + \Delta) over such shifts has the gradient
E \nabla f(\theta + \Delta), not \nabla f(\theta). So with M shifts in pairs (\Delta, -\Delta)

    v_k = mean_m \nabla \ell(z_k, \theta + \Delta_m),   g_i = mean_m \nabla \ell(z_i, \theta + \Delta_m),
    influence[k, i] = v_k^T (G + \lambda I)^{-1} g_i / n.

The two averages are taken apart and then multiplied. The score is the predicted effect of leaving sample i out, on
average over random halves of the training set (the first-order form of the Banzhaf value, Wang & Jia 2023); the plain
score is that effect at the full set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..model.objective import Objective
from .groups import split
from .problem import Problem
from .solution import require_solved
from .solvers import Solver
from .weighted import weighted_gradients

SEED = 3
"""Added to the run's seed, so that the halves are not those of the damping rule."""


def signs(n: int, count: int, seed: int) -> Tensor:
    """Of random halves [count, n]: one in the half, minus one outside it."""
    generator = torch.Generator().manual_seed(seed + SEED)
    result = -torch.ones(count, n)
    for row in result:
        row[torch.randperm(n, generator=generator)[: (n + 1) // 2]] = 1
    return result


class Points:
    """The objective at the parameters over which gradients are averaged; without smoothing it is its own alone.

    Args:
        problem: the model and its training set.
        count: of shifted parameters, in pairs; 0: no smoothing.
        solver: by which they are found when they are first needed.

    Attributes:
        report: how many shifts, and how large they are beside the parameters.
    """

    def __init__(self, problem: Problem, count: int, solver: Solver) -> None:
        self._problem, self._count, self._solver = problem, count, solver
        self._shifts: Tensor | None = None
        self.report: dict[str, Any] = {}

    def all(self) -> Iterator[Objective]:
        """One for each point, made one at a time: of a pair only its first shift is held."""
        own = self._problem.objective
        if not self._count:
            yield own
            return
        if self._shifts is None:
            self._shifts = self._find()
        for shift in self._shifts:
            yield own.at(own.theta + shift)
            yield own.at(own.theta - shift)

    def mean(self, value: Callable[[Objective], Tensor]) -> Tensor:
        """Mean of a value over the points; that of one point is the value itself."""
        points = self.all()
        total = value(next(points))
        for point in points:
            total = total + value(point)
        return total / self._count if self._count else total

    def _find(self) -> Tensor:
        r"""The first \Delta of each pair [pairs, P], as many at a time as test samples are solved together."""
        problem, pairs = self._problem, self._count // 2
        halves = signs(problem.samples.n, pairs, problem.config.seed)
        parts = []
        for part in split(range(pairs), self._solver.group_size):
            g = weighted_gradients(problem, halves[list(part)])
            parts.append(self._solver(g, pairs).vectors)
        shifts = torch.cat(parts)
        require_solved(shifts)
        size = float(shifts.norm(dim=1).mean() / problem.objective.theta.norm())
        self.report = {
            "smoothing": {"shifts": self._count, "relative_size": size}
        }
        return shifts
