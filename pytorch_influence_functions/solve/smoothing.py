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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..model.objective import Objective
from .problem import Problem
from .weighted import weighted_gradients

SEED = 3
"""Added to the run's seed, so that the halves are not those of the damping rule."""
Solve = Callable[[Tensor], Tensor]
"""[K, P] -> (G + lambda I)^-1 of each row."""


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
        count: of shifted parameters, in pairs; None: no smoothing.
        solve: the solver, by which they are found when they are first needed.

    Attributes:
        report: how many shifts, and how large they are beside the parameters.
    """

    def __init__(
        self, problem: Problem, count: int | None, solve: Solve
    ) -> None:
        self._problem, self._count, self._solve = problem, count, solve
        self._found: list[Objective] = []
        self.report: dict[str, Any] = {}

    def all(self) -> list[Objective]:
        """One for each point."""
        if not self._found:
            self._found = self._find()
        return self._found

    def mean(self, value: Callable[[Objective], Tensor]) -> Tensor:
        """Mean of a value over the points; that of one point is the value itself."""
        points = self.all()
        total = value(points[0])
        for point in points[1:]:
            total = total + value(point)
        return total if len(points) == 1 else total / len(points)

    def _find(self) -> list[Objective]:
        problem, own = self._problem, self._problem.objective
        if self._count is None:
            return [own]
        halves = signs(problem.samples.n, self._count // 2, problem.config.seed)
        shifts = self._solve(weighted_gradients(problem, halves))
        size = float(shifts.norm(dim=1).mean() / own.theta.norm())
        self.report = {
            "smoothing": {"shifts": self._count, "relative_size": size}
        }
        return [
            own.at(own.theta + sign * shift)
            for shift in shifts
            for sign in (1, -1)
        ]
