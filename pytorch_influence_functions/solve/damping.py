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

import functools
import logging
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..data.batch import Batch
from ..model.gradients import gradient_products, per_sample_gradients
from ..model.objective import Objective
from ..model.outputs import numbers_of
from .problem import Problem
from .search import ROUGHLY, Point, between, search
from .set_up import Share
from .solution import Damping
from .weighted import block_gradients, weighted_gradients

logger = logging.getLogger(__name__)
TARGET = 0.23
"""The error to stay below; measured on nine tasks with two models each against retraining."""
HALVES, SAMPLES = 16, 200
"""Random halves, and training samples j."""
FEWER_HALVES, FEWER_SAMPLES, TRY_WORK = 8, 50, 1e11
"""The same where the forward passes for one value of lambda would take more floating-point operations than that, some
seconds on one core."""
BLOCKS = 16
"""A half is made of so many random blocks then, of which one backward pass each gives the gradients: those of single
samples take three times as long, in a ResNet-18 a fifth of the whole choice. A half of random blocks is as random."""
ROUGH_HALVES, ROUGH_EVERY = 2, 3
"""Halves that the search begins with, until it is near, and the samples beside which it leaves out where they are
expensive, one of so many stays: the start may be thousands of times too small."""
HELD = 5
"""Vectors of each half at the worst moment where no steps are taken: in the eigenbasis, scaled, corrected, returned."""
ROWS_HELD = 4
"""So many times the gradients of all samples j have to fit: as they come, joined, and what else there is."""
START = 4.0
"""Where the search begins, in units of G's mean eigenvalue."""


def prediction_error(actual: Tensor, predicted: Tensor) -> float:
    """Relative error over the halves, median over the samples; [halves, samples] each; infinite where not finite."""
    tiny = torch.finfo(actual.dtype).tiny
    each = (actual - predicted).square().sum(0) / actual.square().sum(
        0
    ).clamp_min(tiny)
    return float(each.sqrt().nan_to_num(math.inf, math.inf).median())


def first_damping(mean_eigenvalue: float) -> float:
    """Where the search begins."""
    start = START * mean_eigenvalue
    if not (math.isfinite(start) and start > 0):
        raise ValueError(
            "config['damping'] = 'auto': the Gauss-Newton matrix of this model is zero (its loss does not depend on "
            "its output, or is linear in it), so no damping can be chosen from it; give config['damping'] a number"
        )
    return start


def smallest_damping(
    error: Callable[[float], float], start: float, target: float
) -> Damping:
    """The smallest lambda at which an error stays below a target; the curve that led to it is in the report.

    Args:
        error: that of predicted changes at a lambda.
        start: the lambda to begin with.
        target: the error to stay below.
    """
    damping, curve = search(error, start, target)
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
        count, most = _sizes(problem)
        self.dear = count < HALVES
        generator = torch.Generator().manual_seed(problem.config.seed)
        self.blocks: list[list[int]] = []
        self.halves = self._halves(count, generator)
        chosen: list[int] = (
            torch.randperm(n, generator=generator)[:most].sort().values.tolist()
        )
        size = problem.budget.precise_batch(problem.activations)
        self.batches = list(problem.samples.ordered(size, chosen))
        self._every = ROUGH_EVERY if self.dear else 1
        few = chosen[:: self._every]
        self._few = list(problem.samples.ordered(size, few))
        self._at, self.losses = self._precise(problem.objective)
        self._parts = self.halves.split(self._together())

    def _together(self) -> int:
        """How many halves are shifted at a time."""
        count, row = len(self.halves), self.problem.row
        budget = self.problem.budget
        if self.dear:  # no steps are
            return budget.beside(count * row).halves(row, count, HELD)
        return budget.halves(row, count)

    def _halves(self, count: int, generator: torch.Generator) -> Tensor:
        """The weight of each training sample in each half [count, n]."""
        n = self.problem.samples.n
        if self.dear and n >= BLOCKS:
            order = torch.randperm(n, generator=generator)
            self.blocks = [
                part.sort().values.tolist() for part in order.chunk(BLOCKS)
            ]
        units = self.blocks or [[i] for i in range(n)]
        halves = torch.zeros(count, n)
        for half in halves:
            chosen = torch.randperm(len(units), generator=generator)
            few = chosen[: max(1, len(units) // 2)].tolist()
            half[[i for k in few for i in units[k]]] = 1
        return halves

    def _precise(self, own: Objective) -> tuple[Losses, Tensor]:
        """Losses in double precision at parameters [P], and those at theta; where it runs in no other, in its own.

        Where a forward pass in double precision is expensive, the loss alone is computed in it: what rounding does to
        the outputs of a sample that is fitted well reaches its loss times a slope that is as small.
        """
        ways: list[Losses] = [functools.partial(_losses_at, own.double())]
        if self.dear and own.paths.outputs:
            ways.insert(0, functools.partial(_losses_of_outputs_at, own))
        for way in ways:
            try:
                return way, self._losses(way)
            except (RuntimeError, TypeError) as error:
                logger.info(
                    "changes of the loss are not computed in double precision: %s",
                    (str(error).splitlines() or [""])[0],
                )
        way = functools.partial(_losses_at, own)
        return way, self._losses(way)

    def begin(self, start: float, target: float) -> float:
        """Where the search for a target begins: near the end of one by a few of the halves, if all are expensive."""
        if not self.dear:
            return start
        path = search(self._rough_error, start, target, ROUGHLY)[1]
        return between(path, target)

    def roughly(self, start: float, target: float) -> float:
        """Near the end of a search, by a few of the halves."""
        return search(self._rough_error, start, target, ROUGHLY)[0]

    @functools.cached_property
    def _few_gradients(self) -> Tensor:
        """The sum of the gradients of a few of the halves [h, P]."""
        if self.blocks:
            return self._gradients[:ROUGH_HALVES]
        return weighted_gradients(self.problem, self.halves[:ROUGH_HALVES])

    def _rough_error(self, damping: float) -> float:
        """`error` by a few halves."""
        shifts = self.shift(self._few_gradients, damping)
        few, rows = self._few, self._rows
        before = self.losses[:: self._every]
        actual = torch.stack(
            [self._losses(self._at, d, few) - before for d in shifts]
        )
        if rows is not None:
            rows = rows[:: self._every]
        predicted = self._products(shifts, few, rows)
        return prediction_error(actual, predicted.to(actual))

    def error(self, damping: float) -> float:
        """The prediction error at this damping; as many halves at a time as the memory holds."""
        actual, predicted = [], []
        for shifts, share in self._shifts(damping):
            changes = self._changes(shifts)
            actual.append(share.joined(changes))
            predicted.append(share.joined(self._predicted(shifts).to(changes)))
        return prediction_error(torch.cat(actual), torch.cat(predicted))

    def _shifts(self, damping: float) -> Iterator[tuple[Tensor, Share]]:
        """The shifts of this process's share of the halves, as many at a time as the memory holds [h, P]."""
        for gradients, share in self._kept or map(self._part, self._parts):
            yield self.shift(gradients, damping), share

    def _part(self, halves: Tensor) -> tuple[Tensor, Share]:
        """The sums of some halves that are this process's."""
        return self._shared(weighted_gradients(self.problem, halves))

    def _shared(self, gradients: Tensor) -> tuple[Tensor, Share]:
        share = self.problem.set_up.share(len(gradients))
        return share.of(gradients), share

    @functools.cached_property
    def _kept(self) -> list[tuple[Tensor, Share]]:
        """The same of all halves, the same tensors each time; nothing where all of them do not fit.

        Where they are expensive they are few, and each is a part of a pass: they are kept.
        """
        if len(self._parts) > 1 and not self.dear:
            return []
        together = len(self._parts[0])
        return [self._shared(part) for part in self._gradients.split(together)]

    @functools.cached_property
    def _gradients(self) -> Tensor:
        """The sum of the gradients of each half [halves, P]."""
        if not self.blocks:
            return weighted_gradients(self.problem, self.halves)
        weights = self.halves[:, [block[0] for block in self.blocks]]
        return block_gradients(self.problem, self.blocks, weights)

    def _changes(self, shifts: Tensor) -> Tensor:
        """Actual changes of the samples' losses at the parameters plus each shift [h, P] -> [h, samples]."""
        changes = [
            self._losses(self._at, shift) - self.losses for shift in shifts
        ]
        return torch.stack(changes)

    def _predicted(self, shifts: Tensor) -> Tensor:
        """The same to first order, by the gradients at theta [h, samples]."""
        return self._products(shifts, self.batches, self._rows)

    def _products(
        self,
        shifts: Tensor,
        batches: list[Batch],
        rows: Tensor | None,
    ) -> Tensor:
        """Gradients at theta times each shift [h, samples], by these gradients [samples, P] where they are kept."""
        if rows is not None:
            return shifts @ rows.T
        own, most = self.problem.objective, self.problem.budget.product
        parts = [gradient_products(own, one, shifts, most) for one in batches]
        return torch.cat(parts, 1)

    @functools.cached_property
    def _rows(self) -> Tensor | None:
        """The gradients at theta of the samples [samples, P], where they are expensive and fit."""
        problem = self.problem
        count = sum(batch.size for batch in self.batches)
        fits = problem.budget.vectors >= ROWS_HELD * count * problem.row
        if not (self.dear and fits):
            return None
        rows = [
            per_sample_gradients(
                problem.objective, batch, problem.budget.product
            )
            for batch in self.batches
        ]
        return torch.cat(rows)

    def _losses(
        self,
        way: Losses,
        shift: Tensor | float = 0.0,
        batches: list[Batch] | None = None,
    ) -> Tensor:
        """Loss of each of the samples, or of those in these batches, at the parameters, shifted by `shift` [P]."""
        with torch.no_grad():
            return torch.cat(
                [way(batch, shift) for batch in batches or self.batches]
            )


Losses = Callable[[Batch, Tensor | float], Tensor]
"""A batch and a shift of the parameters [P] -> losses [B]."""


def _losses_at(
    objective: Objective, batch: Batch, shift: Tensor | float
) -> Tensor:
    """Of the whole model in the objective's precision."""
    if isinstance(shift, Tensor):
        shift = shift.to(objective.theta)
    return objective.losses(objective.theta + shift, batch)


def _losses_of_outputs_at(
    objective: Objective, batch: Batch, shift: Tensor | float
) -> Tensor:
    """In double precision from outputs in the objective's own."""
    outputs = objective.batch_outputs(objective.theta + shift, batch)
    y, rebuild = numbers_of(outputs)
    precise = rebuild([part.double() for part in y])
    return objective.double().output_losses(precise, batch)


def _sizes(problem: Problem) -> tuple[int, int]:
    """How many halves, and how many samples."""
    forward = problem.product_work / (3 * problem.samples.n)
    if forward * HALVES * min(SAMPLES, problem.samples.n) <= TRY_WORK:
        return HALVES, SAMPLES
    return FEWER_HALVES, FEWER_SAMPLES
