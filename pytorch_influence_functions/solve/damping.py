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
from .system import System

logger = logging.getLogger(__name__)
TARGET = 0.23
"""The error to stay below; measured on nine tasks with two models each against retraining."""
HALVES, SAMPLES = 16, 200
"""Random halves, and training samples j."""
START = 4.0
"""Where the search begins, in units of G's mean eigenvalue."""
FACTOR, BOUNDS, MOST = 10**0.5, (1e-4, 1e3), 12
"""Its longest first step, how far it goes from the start, and how many values of lambda it tries at most."""
Point = tuple[float, float]
"""lambda and its error."""


def prediction_error(actual: Tensor, predicted: Tensor) -> float:
    """Relative error over the halves, median over the samples; [halves, samples] each; infinite where not finite."""
    tiny = torch.finfo(actual.dtype).tiny
    each = (actual - predicted).square().sum(0) / actual.square().sum(0).clamp_min(tiny)
    return float(each.sqrt().nan_to_num(math.inf, math.inf).median())


def search(error: Callable[[float], float], start: float, target: float = TARGET) -> tuple[float, list[Point]]:
    """The lambda at which a falling `error` reaches `target`, and every (lambda, error) that was tried.

    Steps from `start` until two values bracket the target, then regula falsi in the logarithms until they are 15 %
    apart or the error is within 4 %. A target that is never met (or never missed) gives the end of the bounds.
    """
    path = [(start, error(start))]
    low: Point | None = None  # error above the target
    high: Point | None = None
    while low is None or high is None:
        damping, value = path[-1]
        if value > target:
            low = path[-1]
        else:
            high = path[-1]
        if abs(value / target - 1) < 0.04:
            return damping, path
        if low is None or high is None:
            most = math.log(FACTOR if len(path) < 3 else FACTOR**2)
            step = 2 * math.log(min(max(value, 1e-9), 1e9) / target)  # errors fall about with the root of lambda
            least = 0.15 * 2 ** (len(path) - 1)
            damping *= math.exp(math.copysign(min(max(abs(step), least), most), step))
            if len(path) == MOST or not BOUNDS[0] <= damping / start <= BOUNDS[1]:
                return path[-1][0], path
            path.append((damping, error(damping)))
    while math.log(high[0] / low[0]) > 0.15 and len(path) < MOST:
        rise = math.log(min(low[1], 1e6)) - math.log(max(high[1], 1e-9))
        part = min(max((math.log(min(low[1], 1e6)) - math.log(target)) / rise, 0.1), 0.9)
        damping = low[0] * (high[0] / low[0]) ** part
        path.append((damping, error(damping)))
        if abs(path[-1][1] / target - 1) < 0.04:
            return path[-1][0], path
        low, high = (path[-1], high) if path[-1][1] > target else (low, path[-1])
    return high[0], path


def choose_damping(
    system: System, shift: Callable[[Tensor, float], Tensor], mean_eigenvalue: float, target: float = TARGET
) -> None:
    """Choose lambda, put it into the system, and the curve that led to it into its report.

    Args:
        system: the model and its training set.
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
    rule = _Rule(system)
    gradients = rule.gradients()
    damping, curve = search(lambda value: rule.error(shift(gradients, value)), start, target)
    error = dict(curve)[damping]
    note = "" if abs(error / target - 1) < 0.3 else ": the target is out of reach, so it is the end of the search"
    logger.info(
        "damping = %.4g, chosen from the model: the error of predicted loss changes is %.3g there (target %.3g)%s; "
        "tried %s", damping, error, target, note, ", ".join(f"{x:.3g}: {e:.3g}" for x, e in curve),
    )  # fmt: skip
    system.damping = damping
    system.report["damping_chosen"] = {
        "damping": damping, "error": error, "target": target, "curve": [list(point) for point in curve],
    }  # fmt: skip


def error_curve(system: System, shift: Callable[[Tensor, float], Tensor], dampings: Sequence[float]) -> list[float]:
    """The prediction error at each of these dampings, by which `choose_damping` chooses; arguments as there."""
    rule = _Rule(system)
    gradients = rule.gradients()
    return [rule.error(shift(gradients, damping)) for damping in dampings]


class _Rule:
    """The halves, the samples, and their losses in double precision."""

    def __init__(self, system: System) -> None:
        self.system, n = system, system.samples.n
        generator = torch.Generator().manual_seed(system.config.seed)
        halves = [torch.randperm(n, generator=generator)[: max(1, n // 2)] for _ in range(HALVES)]
        self.halves = torch.stack([torch.zeros(n).index_fill(0, half, 1) for half in halves])
        chosen: list[int] = torch.randperm(n, generator=generator)[:SAMPLES].sort().values.tolist()
        self.batches = list(system.samples.ordered(system.scoring_batch, chosen))
        self.objective, self.losses = self._precise(system.objective)

    def _precise(self, own: Objective) -> tuple[Objective, Tensor]:
        """The objective in double precision and its losses; in its own where the model runs in no other."""
        double = own.double()
        try:
            return double, self._losses(double)
        except RuntimeError as error:
            logger.info("changes of the loss are computed in %s: %s", own.dtype, str(error).splitlines()[0])
            return own, self._losses(own)

    def gradients(self) -> Tensor:
        """(1/n) of the summed gradients of each half -> [halves, P]."""
        system, objective = self.system, self.system.objective
        total = torch.zeros(HALVES, objective.P, dtype=objective.dtype, device=objective.device)
        size = max(1, min(system.scoring_batch, int(system.max_bytes / (2 * HALVES * system.activations))))
        for batch in system.samples.ordered(size, text="Damping: gradients"):
            theta = objective.theta.detach().requires_grad_()
            losses = objective.losses(theta, batch)
            weights = self.halves[:, torch.as_tensor(batch.indices)].to(losses)
            if objective.paths.vmap:
                total += torch.autograd.grad(losses, theta, weights, is_grads_batched=True)[0]
            else:
                each = [torch.autograd.grad(losses, theta, w, retain_graph=True)[0] for w in weights]
                total += torch.stack(each)
        return total / system.samples.n

    def error(self, shifts: Tensor) -> float:
        """The prediction error of these shifts [halves, P]."""
        system = self.system
        predicted = [gradient_products(system.objective, b, shifts, system.max_bytes) for b in self.batches]
        changes = [self._losses(self.objective, shift) - self.losses for shift in shifts]
        actual = torch.stack(changes)
        return prediction_error(actual, torch.cat(predicted, 1).to(actual))

    def _losses(self, objective: Objective, shift: Tensor | None = None) -> Tensor:
        """Loss of each of the samples at the parameters, shifted by `shift` [P]."""
        theta = objective.theta if shift is None else objective.theta + shift.to(objective.theta)
        with torch.no_grad():
            return torch.cat([objective.losses(theta, batch) for batch in self.batches])
