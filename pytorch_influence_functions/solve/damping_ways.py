r"""\lambda by the rule of `damping`, with (G + \lambda I)^-1 as the low-rank form, EKFAC or products alone give it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cg import iterate
from .damping import HALVES
from .ekfac import DAMPING_TARGET
from .errors import NegativeCurvatureError
from .factors import Ekfac, Inverses
from .low_rank import LowRank, Woodbury, low_rank
from .paired import choose_damping, error_curve
from .problem import Problem
from .set_up import Share
from .solution import Damping

ROWS_FOR_DAMPING = 200
"""Rows that are exact in what preconditions the choice of the damping; twice as many where no product follows."""
INVERSE_WORK = 2e9
"""Floating-point operations of one inverse with exact rows in the choice of the damping, which takes up to a dozen."""
EKFAC_STEPS, PLAIN_STEPS = 4, 20
"""Conjugate gradients for the choice of the damping without a low-rank form: EKFAC alone preconditions less well than
it does beside the largest rows, and nothing at all needs many."""
SHARE = 0.99
"""The products with G run over the training samples that hold this share of its trace."""
WORK = 6e10
"""Floating-point operations for all products with G of an automatic choice: some seconds on one core."""


class Shift:
    r"""(G + \lambda I)^{-1} g: by the low-rank form, and two steps of conjugate gradients where they are cheap."""

    def __init__(self, problem: Problem, basis: LowRank) -> None:
        self.basis, self.set_up = basis, problem.set_up
        self.product = heavy_product(problem, basis)
        self.steps = 2 if _steps_are_cheap(problem) else 0
        self._turned = Inverses(basis.factors).turned
        self.most = int((INVERSE_WORK / problem.objective.P) ** 0.5)

    def __call__(self, g: Tensor, damping: float) -> Tensor:
        """[K, P] -> [K, P]."""
        rows = ROWS_FOR_DAMPING if self.steps else 2 * ROWS_FOR_DAMPING
        M = self.basis.inverse(damping, min(rows, self.most))
        if self.steps:
            stepped = self._stepped(g, damping, M)
            if not self.set_up.any(stepped is None):
                return stepped  # type: ignore[return-value]
            self.steps = 0
        return M.of_turned(self._turned(g))

    def _stepped(self, g: Tensor, damping: float, M: Woodbury) -> Tensor | None:
        """None where the loss is not convex in the model's output."""
        try:
            return iterate(
                lambda p: self.product(p) + damping * p,
                g,
                M,
                tolerance=0.0,
                limit=self.steps,
            )[0]
        except NegativeCurvatureError:
            return None


def heavy_product(
    problem: Problem, basis: LowRank, together: bool = False
) -> Callable[[Tensor], Tensor]:
    """V -> G V over the training samples that hold nearly all of its trace.

    Args:
        problem: the model and its training set.
        basis: where the trace lies.
        together: all processes that set up the run ask for the product of the same V, each takes a part of the samples.
    """
    G = problem.with_gauss_newton().curvature
    indices = basis.heaviest(SHARE)
    shared = problem.set_up.share if together else Share
    share = shared(len(indices))

    def product(v: Tensor) -> Tensor:
        batches = problem.samples.ordered(problem.batch, share.of(indices))
        part = G.over(batches, v) * (share.count / problem.samples.n)
        return share.total(part)

    return product


def damping_by_low_rank(
    problem: Problem, basis: LowRank | None = None
) -> Damping:
    """Choose lambda; `basis` is the low-rank form of the problem's G where it is already there."""
    basis = low_rank(problem, ROWS_FOR_DAMPING) if basis is None else basis
    return choose_damping(problem, Shift(problem, basis), basis.mean_eigenvalue)


def damping_by_ekfac(problem: Problem, factors: Ekfac) -> Damping:
    """Choose lambda where EKFAC is all that fits: the same rule, with steps preconditioned by it."""
    if not _steps_are_cheap(problem):
        return choose_damping(
            problem,
            Inverses(factors),
            factors.mean_eigenvalue,
            DAMPING_TARGET,
        )

    def inverse(v: Tensor, damping: float) -> Tensor:
        return factors.power(v, damping, -1)

    return choose_damping(
        problem,
        _stepped(problem, inverse, EKFAC_STEPS),
        factors.mean_eigenvalue,
    )


def damping_by_steps(problem: Problem) -> Damping:
    """Choose lambda from products with G alone."""
    v = problem.random_vector(problem.config.seed)
    product = problem.product(v.unsqueeze(0))[0]
    # Hutchinson's estimate of tr(G) / P
    mean_eigenvalue = abs(float(product @ v / (v @ v)))
    return choose_damping(
        problem, _stepped(problem, lambda g, _: g, PLAIN_STEPS), mean_eigenvalue
    )


def _stepped(
    problem: Problem, inverse: Callable[[Tensor, float], Tensor], steps: int
) -> Callable[[Tensor, float], Tensor]:
    """(g, lambda) -> (G + lambda I)^-1 g by a few conjugate gradients, preconditioned by `inverse`."""

    def shift(g: Tensor, damping: float) -> Tensor:
        def product(p: Tensor) -> Tensor:
            return problem.product(p).add_(p, alpha=damping)

        def preconditioned(r: Tensor) -> Tensor:
            return inverse(r, damping)

        try:
            return iterate(
                product, g, preconditioned, tolerance=0.0, limit=steps
            )[0]
        except NegativeCurvatureError:
            # the Hessian, at a lambda that is too small for it
            return torch.full_like(g, torch.nan)

    return shift


def _steps_are_cheap(problem: Problem) -> bool:
    return 5 * 2 * HALVES * problem.product_work <= WORK


def error_curve_by_low_rank(
    problem: Problem, dampings: Sequence[float]
) -> list[float]:
    """The prediction error at each of these dampings, as `damping="auto"` sees it."""
    return error_curve(
        problem, Shift(problem, low_rank(problem, ROWS_FOR_DAMPING)), dampings
    )
