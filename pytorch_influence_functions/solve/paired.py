r"""The damping rule of smoothed gradients: the smallest \lambda at which their prediction holds.

Of the shifts in pairs (\Delta_p, -\Delta_p) that gradients are averaged over (`smoothing`), the change that these are
to predict is the odd part a_pj = (\ell_j(\theta + \Delta_p) - \ell_j(\theta - \Delta_p)) / 2: an even part is the same
for a half and for the rest, and tells nothing about the samples in it. The prediction p_pj = g_pj . \Delta_p takes the
gradient averaged over the *other* pairs, as a retraining is not one of the points that the scores average over. The
error is that of `damping`, the median over j of \sqrt{\sum_p (a_pj - p_pj)^2 / \sum_p a_pj^2}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..data.batch import Batch
from ..model.objective import Objective
from .averages import mean_products
from .damping import (
    TARGET,
    first_damping,
    prediction_error,
    smallest_damping,
)
from .damping import _Rule as PlainRule
from .problem import Problem
from .set_up import Kept, Share
from .solution import Damping
from .weighted import signs

SIZE = 1.5
"""The shifts that gradients are averaged over, beside those of first order to random halves: retraining goes further.
Datamodeling score at one lambda with 16 shifts of 1 | 1.5 times the size, and 32 of 1.5 | 1.75: digits (three models)
0.801 | 0.803, 0.806 | 0.804; a two-class table 0.684 | 0.705, 0.710 | 0.717; cancer 0.710 | 0.714, 0.718 | 0.718;
twelve classes of clusters 0.672 | 0.687, 0.690 | 0.694. With fewer shifts larger ones are noisier."""
SMOOTHED_TARGET = 0.2
"""The error to stay below: the best lambda of a grid lay at 0.18, 0.2 (digits, two models), 0.18, 0.14 (cancer), 0.25
(twelve classes of clusters), 0.32, 0.3 (a two-class table), 0.24 (a CNN); the scores are flat about it: at 0.2 at most
0.007 below the best, but for the two-class table (0.012). A table of 26 classes, not looked at for it: 0.2."""
NEARLY_LINEAR = 0.1
"""Where plain gradients predict the odd changes as well as this, the lambda of the plain rule stays and `"auto"` does
not smooth: the gradient is nearly linear over the shifts, so that its mean is that at theta, and the odd part alone
sets no bound to lambda. Of logistic regression it is 0.045 and less, of networks 0.2 to 0.36 at the plain lambda."""
SMALLER = 0.5
"""The smoothed rule begins at so much of the plain lambda; of digits, tables and CNNs it ends at 0.4 to 0.8 of it."""
Shift = Callable[[Tensor, float], Tensor]
"""[K, P], lambda -> (G + lambda I)^-1 of each row, as the solver has it."""


class PairedRule(PlainRule):
    """Pairs of shifts, and samples; a half and the rest of the training set are one pair."""

    def _halves(self, count: int, generator: torch.Generator) -> Tensor:
        """The signs of the pairs that gradients are averaged over, of which a half is the positive part."""
        n, seed = self.problem.samples.n, self.problem.config.seed
        return signs(n, count // 2, seed)

    def _shifts(self, damping: float) -> Iterator[tuple[Tensor, Share]]:
        """To the points that gradients are averaged over."""
        for shifts, share in super()._shifts(damping):
            yield SIZE * shifts, share

    def error(self, damping: float) -> float:
        """The prediction error at this damping."""
        return self.error_of(self._all_shifts(damping))

    def _all_shifts(self, damping: float) -> Tensor:
        """That of each pair [pairs, P]."""
        parts = self._shifts(damping)
        return torch.cat([share.joined(shifts) for shifts, share in parts])

    def error_of(self, shifts: Tensor) -> float:
        """The prediction error of gradients that are averaged over pairs of these shifts [pairs, P]."""
        actual = self.odd_changes(shifts)
        return prediction_error(actual, from_others(self.products(shifts)))

    def error_without(self, damping: float) -> float:
        """The same of the gradients at theta alone, by a few of the pairs."""
        shifts = SIZE * self.shift(self._few_gradients, damping)
        return self.error_without_of(self.odd_changes(shifts), shifts)

    def error_without_of(self, actual: Tensor, shifts: Tensor) -> float:
        """The same for changes that are known [pairs, samples]."""
        return prediction_error(actual, self._predicted(shifts).to(actual))

    def odd_changes(self, shifts: Tensor) -> Tensor:
        """Half the difference of the losses at both points of each pair [pairs, samples]."""
        share = self.problem.set_up.share(len(shifts))
        mine = share.of(shifts)
        changes = (self._changes(mine) - self._changes(-mine)) / 2
        return share.joined(changes)

    def products(self, shifts: Tensor) -> Tensor:
        """Gradients, averaged over each pair, times each shift [pairs of the gradients, pairs, samples]."""
        own = self.problem.objective
        found = []
        share = self.problem.set_up.share(len(shifts))
        for shift in share.of(shifts):
            ends = own.at(own.theta + shift), own.at(own.theta - shift)
            parts = [self._averaged(ends, one, shifts) for one in self.batches]
            found.append(torch.cat(parts, 1))
        return share.joined(torch.stack(found).to(self.losses))

    def _averaged(
        self, ends: Sequence[Objective], batch: Batch, shifts: Tensor
    ) -> Tensor:
        """Gradients of a batch, averaged over the ends of a pair, times each shift [pairs, B]."""
        return mean_products(self.problem, lambda: iter(ends), batch, shifts)


def from_others(products: Tensor) -> Tensor:
    """The prediction for each pair by the mean over the other pairs [pairs, samples]."""
    own = products.diagonal().T
    return (products.sum(0) - own) / (len(products) - 1)


def rule_of(problem: Problem, shift: Shift) -> PlainRule:
    """The rule for the gradients as they are used: averaged over shifts, or not."""
    rule = PairedRule if problem.shifts else PlainRule
    return rule(problem, shift)


def choose_damping(
    problem: Problem,
    shift: Shift,
    mean_eigenvalue: float,
    target: float = TARGET,
) -> Damping:
    """Choose lambda; the curve that led to it is in the report.

    Args:
        problem: the model and its training set.
        shift: ([K, P], lambda) -> (G + lambda I)^-1 of each row, as the solver has it.
        mean_eigenvalue: of G.
        target: the error of plain gradients to stay below; that of smoothed ones is as much smaller as `TARGET` is.
    """

    def make() -> Kept:
        found = _chosen(problem, shift, mean_eigenvalue, target)
        return Kept({}, [found.value, found.report])

    kind = problem.curvature.kind
    return Damping(*problem.set_up.kept(f"damping_{kind}", make).facts)


def _chosen(
    problem: Problem, shift: Shift, mean_eigenvalue: float, target: float
) -> Damping:
    start = first_damping(mean_eigenvalue)
    plain = PlainRule(problem, shift)
    if problem.shifts:
        rule = PairedRule(problem, shift)
        near = plain.roughly(start, target)
        if rule.error_without(near) > NEARLY_LINEAR:
            target *= SMOOTHED_TARGET / TARGET
            return smallest_damping(rule.error, SMALLER * near, target)
    return smallest_damping(plain.error, plain.begin(start, target), target)


def error_curve(
    problem: Problem, shift: Shift, dampings: Sequence[float]
) -> list[float]:
    """The prediction error at each of these dampings, by which `choose_damping` chooses; arguments as there."""
    rule = rule_of(problem, shift)
    return [rule.error(damping) for damping in dampings]
