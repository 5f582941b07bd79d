r"""`damping="auto"`: the smallest \lambda at which a first-order prediction still holds.

For random halves R_h of the training set the predicted shift of the parameters when R_h counts more is
\Delta_h = (G + \lambda I)^{-1} (1/n) \sum_{i \in R_h} \nabla \ell_i. For up to 200 random training samples j the actual
change a_hj = \ell_j(\theta + \Delta_h) - \ell_j(\theta) takes forward passes only (in double precision: the changes of
well-fitted samples drown in rounding), the predicted one is p_hj = \nabla \ell_j . \Delta_h, and

    error(\lambda) = median_j \sqrt{ \sum_h (a_hj - p_hj)^2 / \sum_h a_hj^2 }.

Too small a \lambda moves the parameters out of the range in which p holds, too large a one forgets the curvature: it is
the smallest above which the error stays below `TARGET`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model.gradients import gradient_products
from ..model.objective import Objective
from .problem import Problem
from .solution import Damping

logger = logging.getLogger(__name__)
TARGET = 0.23
"""The error to stay below; measured on nine tasks with two models each against retraining."""
HALVES, SAMPLES = 16, 200
"""Random halves, and training samples j."""
START = 4.0
"""Where the search begins, in units of G's mean eigenvalue."""
FACTOR, BOUNDS, MOST = 10**0.5, (1e-4, 1e3), 12
"""Its longest first step, how far it goes from the start, and how many values of lambda it tries at most."""
SHORTEST = 0.15
"""Its shortest first step in the logarithm, twice as long each time: near the target the error may be flat."""
CLOSE, APART = 0.04, 0.15
"""An error is as good as the target within this fraction, a bracket as good as a point within this logarithm: the
scores change by less than the choice of the halves changes lambda."""
SMALLEST, MOST_ERROR = 1e-9, 1e6
"""Errors are cut off there before their logarithm is taken: 0 and infinity have none."""
Point = tuple[float, float]
"""lambda and its error."""


def prediction_error(actual: Tensor, predicted: Tensor) -> float:
    """Relative error over the halves, median over the samples; [halves, samples] each; infinite where not finite."""
    tiny = torch.finfo(actual.dtype).tiny
    each = (actual - predicted).square().sum(0) / actual.square().sum(
        0
    ).clamp_min(tiny)
    return float(each.sqrt().nan_to_num(math.inf, math.inf).median())


def search(
    error: Callable[[float], float], start: float, target: float = TARGET
) -> tuple[float, list[Point]]:
    """The lambda at which a falling `error` reaches `target`, and every (lambda, error) that was tried.

    Steps from `start` until two values bracket the target, then regula falsi in the logarithms until they are close
    together or the error is close to the target. A target that is never met (or never missed) gives the end of the
    bounds.
    """
    path: list[Point] = []
    low: Point | None = None  # error above the target
    high: Point | None = None
    damping = start
    while True:
        point = (damping, error(damping))
        path.append(point)
        if _is_close(point, target):
            return damping, path
        if point[1] > target:
            low = point
        else:
            high = point
        tried_all = len(path) >= MOST
        if low is None or high is None:
            before, damping = damping, _next_step(point, target, len(path))
            within = BOUNDS[0] <= damping / start <= BOUNDS[1]
            if tried_all or not within:
                return before, path
        elif tried_all or math.log(high[0] / low[0]) <= APART:
            return high[0], path
        else:
            damping = _between(low, high, target)


def _is_close(point: Point, target: float) -> bool:
    return abs(point[1] / target - 1) < CLOSE


def _next_step(point: Point, target: float, tried: int) -> float:
    """The next lambda on the way to the target: errors fall about with the root of lambda."""
    damping, value = point
    value = min(max(value, SMALLEST), 1 / SMALLEST)
    step = 2 * math.log(value / target)
    longest = math.log(FACTOR if tried < 3 else FACTOR**2)
    shortest = min(SHORTEST * 2 ** (tried - 1), longest)
    size = min(max(abs(step), shortest), longest)
    return float(damping * math.exp(math.copysign(size, step)))


def _between(low: Point, high: Point, target: float) -> float:
    """Where the line through the logarithms of both points meets the target, away from the ends."""
    above = math.log(min(low[1], MOST_ERROR))
    below = math.log(max(high[1], SMALLEST))
    part = (above - math.log(target)) / (above - below)
    part = min(max(part, 0.1), 0.9)
    return float(low[0] * (high[0] / low[0]) ** part)


def choose_damping(
    problem: Problem,
    shift: Callable[[Tensor, float], Tensor],
    mean_eigenvalue: float,
    target: float = TARGET,
) -> Damping:
    """Choose lambda; the curve that led to it is in the report.

    Args:
        problem: the model and its training set.
        shift: ([K, P], lambda) -> (G + lambda I)^-1 of each row, as the solver has it.
        mean_eigenvalue: of G.
        target: the error to stay below.
    """
    start = START * mean_eigenvalue
    if not (math.isfinite(start) and start > 0):
        raise ValueError(
            "config['damping'] = 'auto': the Gauss-Newton matrix of this model is zero (its loss does not depend on "
            "its output, or is linear in it), so no damping can be chosen from it; give config['damping'] a number"
        )
    rule = _Rule(problem, shift)
    damping, curve = search(rule.error, start, target)
    reached = dict(curve)[damping]
    _tell(damping, reached, target, curve)
    chosen = {
        "damping": damping,
        "error": _plain(reached),
        "target": target,
        "curve": [[x, _plain(e)] for x, e in curve],
    }
    return Damping(damping, {"damping_chosen": chosen})


def _plain(error: float) -> float | None:
    """An error as JSON holds it: None where the shifted parameters have no finite loss."""
    return error if math.isfinite(error) else None


def _tell(
    damping: float, error: float, target: float, curve: list[Point]
) -> None:
    missed = abs(error / target - 1) >= 0.3
    note = (
        ": the target is out of reach, so it is the end of the search"
        if missed
        else ""
    )
    logger.info(
        "damping = %.4g, chosen from the model: the error of predicted loss changes is %.3g there (target %.3g)%s; "
        "tried %s",
        damping,
        error,
        target,
        note,
        ", ".join(f"{x:.3g}: {e:.3g}" for x, e in curve),
    )


def error_curve(
    problem: Problem,
    shift: Callable[[Tensor, float], Tensor],
    dampings: Sequence[float],
) -> list[float]:
    """The prediction error at each of these dampings, by which `choose_damping` chooses; arguments as there."""
    rule = _Rule(problem, shift)
    return [rule.error(damping) for damping in dampings]


class _Rule:
    """The halves, the samples, and their losses in double precision.

    Args:
        problem: the model and its training set.
        shift: ([K, P], lambda) -> (G + lambda I)^-1 of each row.
    """

    def __init__(
        self, problem: Problem, shift: Callable[[Tensor, float], Tensor]
    ) -> None:
        self.problem, self.shift, n = problem, shift, problem.samples.n
        generator = torch.Generator().manual_seed(problem.config.seed)
        halves = [
            torch.randperm(n, generator=generator)[: max(1, n // 2)]
            for _ in range(HALVES)
        ]
        self.halves = torch.stack(
            [torch.zeros(n).index_fill(0, half, 1) for half in halves]
        )
        chosen: list[int] = (
            torch.randperm(n, generator=generator)[:SAMPLES]
            .sort()
            .values.tolist()
        )
        size = problem.budget.precise_batch(problem.activations)
        self.batches = list(problem.samples.ordered(size, chosen))
        self.objective, self.losses = self._precise(problem.objective)
        together = problem.budget.halves(problem.row, HALVES)
        self._parts = self.halves.split(together)
        self._gradients = (
            self.gradients(self.halves) if len(self._parts) == 1 else None
        )

    def _precise(self, own: Objective) -> tuple[Objective, Tensor]:
        """The objective in double precision and its losses; in its own where the model runs in no other."""
        double = own.double()
        try:
            return double, self._losses(double)
        except RuntimeError as error:
            logger.info(
                "changes of the loss are computed in %s: %s",
                own.dtype,
                str(error).splitlines()[0],
            )
            return own, self._losses(own)

    def gradients(self, halves: Tensor) -> Tensor:
        """(1/n) of the summed gradients of each of these halves [h, n] -> [h, P]."""
        problem, objective = self.problem, self.problem.objective
        total = torch.zeros(
            len(halves),
            objective.P,
            dtype=objective.dtype,
            device=objective.device,
        )
        size = max(
            1,
            min(
                problem.scoring_batch,
                int(
                    problem.budget.product
                    / (2 * len(halves) * problem.activations)
                ),
            ),
        )
        for batch in problem.samples.ordered(size, text="Damping: gradients"):
            theta = objective.theta.detach().requires_grad_()
            losses = objective.losses(theta, batch)
            weights = halves[:, torch.as_tensor(batch.indices)].to(losses)
            if objective.paths.vmap:
                total += torch.autograd.grad(
                    losses, theta, weights, is_grads_batched=True
                )[0]
            else:
                each = [
                    torch.autograd.grad(losses, theta, w, retain_graph=True)[0]
                    for w in weights
                ]
                total += torch.stack(each)
        return total / problem.samples.n

    def error(self, damping: float) -> float:
        """The prediction error at this damping; as many halves at a time as the memory holds."""
        actual, predicted = [], []
        for halves in self._parts:
            gradients = (
                self.gradients(halves)
                if self._gradients is None
                else self._gradients
            )
            shifts = self.shift(gradients, damping)
            actual.append(self._changes(shifts))
            predicted.append(self._predicted(shifts).to(actual[-1]))
        return prediction_error(torch.cat(actual), torch.cat(predicted))

    def _changes(self, shifts: Tensor) -> Tensor:
        """Actual changes of the samples' losses at the parameters plus each shift [h, P] -> [h, samples]."""
        return torch.stack(
            [
                self._losses(self.objective, shift) - self.losses
                for shift in shifts
            ]
        )

    def _predicted(self, shifts: Tensor) -> Tensor:
        """The same to first order."""
        objective = self.problem.objective
        max_bytes = self.problem.budget.product
        return torch.cat(
            [
                gradient_products(objective, batch, shifts, max_bytes)
                for batch in self.batches
            ],
            1,
        )

    def _losses(
        self, objective: Objective, shift: Tensor | None = None
    ) -> Tensor:
        """Loss of each of the samples at the parameters, shifted by `shift` [P]."""
        theta = (
            objective.theta
            if shift is None
            else objective.theta + shift.to(objective.theta)
        )
        with torch.no_grad():
            return torch.cat(
                [objective.losses(theta, batch) for batch in self.batches]
            )
