r"""How far scores are off: a small residual says how well the system is solved, not that its solution is right.

With \rho = v - (H + \lambda I) s the score of training sample i is off by \rho . (H + \lambda I)^{-1} g_i / n, which
is the score that the residual itself would have. It is at most \|\rho\| \|g_i\| / (\lambda n) where no eigenvalue is
below \lambda, and that is all a residual promises: less than it seems to by the largest eigenvalue over \lambda. Where
this bound is not small, the residual is solved for once more, by another way than the iteration that left it, for it
lies in the directions that the iteration does not reach (a second solve for the error of a functional, Becker &
Rannacher 2001).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.reader import UnreadableError
from ..model.gradients import NonFiniteError, per_sample_gradients
from ..utils import random_state
from .cg import iterate
from .errors import DivergenceError
from .factors import build
from .lissa import sampled_scores
from .sides import LARGEST_FACTOR
from .solution import Prepared
from .system import Residual

SMALL = 0.1
"""Relative to the scores: a bound below it is reported as it is, and an error above it is warned of."""
PILOTS = 4
"""Test samples of a group, those with the largest residuals, that stand for it."""
SAMPLED = 64
"""Training samples whose scores are compared."""
STEPS, PLAIN_STEPS = 2, 10
"""Conjugate gradients of the second solve, with EKFAC and without. On linear, logistic and small tanh models with
conditions of 10^2 to 10^12 two with EKFAC gave 0.5 to 1.6 times the true error, as eight did; without it is as little
as a sixth, where they cannot converge."""
EIGENVECTORS = 1.2
"""Times the third power of a factor's size: the work of its eigenvectors in operations of a product (`LARGEST_FACTOR`).
EKFAC is left out where it costs more than the steps without."""


class ScoreErrors:
    """The error of the scores of solutions of one prepared system; what it takes is made when it is first needed.

    Args:
        prepared: the system and its solver.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.system = prepared, prepared.system
        self.problem = prepared.system.problem

    def __call__(
        self, v: Tensor, s: Tensor, residual: Residual
    ) -> dict[str, Any]:
        """The error of the scores of s [K, P] for v [K, P], relative to their size, as plain values.

        Returns:
            `score_error`, the largest of a few test samples (root of the mean square over some training samples), and
            `score_error_by`, "bound" or "estimate". Nothing where the residual is known of a part of the training set
            only, or the curvature is negative somewhere.
        """
        if residual.rows is None:
            return {}
        most = residual.relative.topk(min(PILOTS, len(v))).indices
        v, s = v[most], s[most]
        with random_state(self.problem.config.seed):
            rest = v - self.system(s)
            bound = self._bound(rest, s)
            if bound <= SMALL:
                return {"score_error": bound, "score_error_by": "bound"}
            try:
                error = self._estimate(rest, s)
            except DivergenceError:
                return {}
            return {"score_error": error, "score_error_by": "estimate"}

    def _bound(self, rest: Tensor, s: Tensor) -> float:
        r"""\|\rho\| \|g\| / \lambda over the scores, both as roots of mean squares; the largest of the rows."""
        damping = self.system.damping
        if damping <= 0 or self.system.curvature.kind != "ggn":
            return math.inf
        (scores,) = self._scores(s.unsqueeze(0))
        most = rest.norm(dim=1).cpu().numpy() * self._gradient_size / damping
        return _worst(most, _size(scores))

    def _estimate(self, rest: Tensor, s: Tensor) -> float:
        """What a second solve adds to the scores, over what they are with it; the largest of the rows."""
        missing = self._again(rest)
        errors, scores = self._scores(torch.stack([missing, s + missing]))
        return _worst(_size(errors), _size(scores))

    def _scores(self, vectors: Tensor) -> Any:
        """n times the scores of some training samples [r, K, samples], as an array."""
        return sampled_scores(self.problem, vectors, SAMPLED).astype(np.float64)

    @functools.cached_property
    def _gradient_size(self) -> float:
        """Root of the mean squared norm of training samples' gradients."""
        few = self.problem.samples.spread(SAMPLED)
        squares = [
            per_sample_gradients(
                self.problem.objective, batch, self.problem.budget.product
            )
            .square()
            .sum(1)
            for batch in self.problem.samples.ordered(
                self.problem.gradient_batch, few
            )
        ]
        return float(torch.cat(squares).mean().sqrt())

    def _again(self, rest: Tensor) -> Tensor:
        r"""(H + \lambda I)^{-1} of the residuals [K, P], about."""
        if self.prepared.again is not None:
            return self.prepared.again(rest)
        M, steps = self._preconditioner
        return iterate(self.system, rest, M, tolerance=0.0, limit=steps)[0]

    @functools.cached_property
    def _preconditioner(self) -> tuple[Callable[[Tensor], Tensor], int]:
        """EKFAC's inverse and how many steps follow it; nothing and more steps where the model has none."""
        work = EIGENVECTORS * sum(size**3 for size in self._factors())
        if work > PLAIN_STEPS * self.problem.product_work:
            return _itself, PLAIN_STEPS
        try:
            return build(self.problem).inverse(self.system.damping), STEPS
        except (UnreadableError, NonFiniteError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, ArithmeticError):
            return _itself, PLAIN_STEPS

    def _factors(self) -> Iterator[int]:
        """Sizes of EKFAC's factors, about."""
        for shape in self.problem.objective.shapes:
            if len(shape) > 1:
                sizes = shape[0], math.prod(shape[1:])
                yield from (size for size in sizes if size <= LARGEST_FACTOR)


def _itself(v: Tensor) -> Tensor:
    return v


def _size(scores: Any) -> Any:
    """Root of the mean square of each row [K, samples] -> [K]."""
    return np.sqrt(np.square(scores).mean(-1))


def _worst(errors: Any, sizes: Any) -> float:
    """The largest of the quotients [K]; nothing is off where both are zero."""
    wrong = errors > 0
    if not wrong.any():
        return 0.0
    tiny = np.finfo(np.float64).tiny
    return float((errors[wrong] / np.maximum(sizes[wrong], tiny)).max())
