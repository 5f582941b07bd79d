r"""The dense solve: (H + \lambda I)^{-1} from a Cholesky factor, in the space of parameters or of outputs.

With A = [R_i J_i / \sqrt{n}]_i, R_i^T R_i = \nabla^2_y \ell_i, the Gauss-Newton matrix is G = A^T A [P, P]. Where the
n C rows of A are fewer than P, (G + \lambda I)^{-1} v = (v - A^T (A A^T + \lambda I)^{-1} A v) / \lambda. Where the
loss is not convex in the outputs, G = A^T S A with signs S, and \lambda S stands in place of \lambda I beside A A^T.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..data.batch import Batch
from ..model.budget import MIB
from ..model.jacobians import jacobians
from ..model.likelihoods import Categorical, likelihood
from ..model.objective import Objective
from ..model.outputs import numbers_of
from ..model.roots import signed_roots
from ..utils import progress_bar
from .problem import Problem
from .set_up import Kept
from .solution import Damping, Prepared, Solution
from .system import Residual, System

logger = logging.getLogger(__name__)
FASTER = 4.0
"""How many times faster operations of a matrix product are than those of passes through a model: 10 in an MLP of 870
parameters, fewer where a pass is of large matrices itself."""


def exact(problem: Problem, damping: Damping) -> Prepared:
    """Solve with a dense factor of the curvature, or of its dual where that is smaller.

    Raises:
        ValueError: neither fits `max_memory`; the message gives the size and the alternative.
    """
    P = problem.objective.P
    size, need = dense_form(problem)
    if need > problem.budget.held_ways:
        raise ValueError(
            f"config['solver'] = 'exact': a dense {problem.curvature.kind} of {P} parameters needs about "
            f"{need / MIB:.0f} MiB of the {problem.budget.held_ways / MIB:.0f} MiB there are; use config['solver'] = "
            "'cg' or 'ekfac', fewer config['parameters'], or a larger config['max_memory']"
        )
    dual = size < P and damping.value > 0
    inverse, rest_of = (
        _dual(problem, damping.value)
        if dual
        else _primal(problem, damping.value)
    )

    def direct(v: Tensor) -> Tensor:
        return inverse(v.double()).to(v)

    def solve(v: Tensor, tests: int) -> Solution:
        s = inverse(v.double())
        rest = rest_of(v.double(), s)
        residual = Residual.exact(rest, v.double())
        single = Residual(
            *(part.to(v) for part in (residual.relative, residual.stderr, rest))
        )
        return Solution(s.to(v), single)

    form = (
        {"form": "dual", "size": size}
        if dual
        else {"form": "primal", "size": P}
    )
    return Prepared(
        System(problem, damping.value),
        solve,
        {**damping.report, **form},
        again=direct,
        direct=direct,
    )


def dense_form(problem: Problem) -> tuple[int, float]:
    """Size of the smaller dense form of the curvature, and the bytes that the solve with it takes."""
    P, rows = problem.objective.P, dual_rows(problem)
    double = 8.0
    if rows is None or rows >= P:
        matrices = 3 * P**2  # H, its damped copy, its factor
        return P, double * matrices
    # A, its products and their factor
    return rows, double * (2 * rows**2 + rows * P)


Inverse = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
"""v [K, P] -> s, and v, s -> the residual v - (H + lambda I) s, all [K, P], in double precision."""


def _primal(problem: Problem, damping: float) -> Inverse:
    kind = problem.curvature.kind
    kept = problem.set_up.kept(
        f"dense_{kind}", lambda: Kept({"H": _dense(problem, damping)})
    )
    H = kept.tensors["H"].to(problem.objective.device).double()
    H = (H + H.T) / 2
    damped = H + damping * torch.eye(len(H), dtype=H.dtype, device=H.device)

    def rest(v: Tensor, s: Tensor) -> Tensor:
        return v - s @ damped

    L, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) == 0:
        _require_regular(L.diagonal().square(), damped, damping)
        return lambda v: torch.cholesky_solve(v.T, L).T, rest
    # an indefinite Hessian
    LU, pivots, _ = torch.linalg.lu_factor_ex(damped)
    _require_regular(LU.diagonal().abs(), damped, damping)
    return lambda v: torch.linalg.lu_solve(LU, pivots, v.T).T, rest


def _dense(problem: Problem, damping: float) -> Tensor:
    """The curvature, by the cheaper way where both are the same but for rounding that the damping hides.

    Where it does not, it is made of the model's own products: beside these the rounding of rows would not show in the
    residual, nor in the error of the scores.
    """
    if _rows_are_cheaper(problem):
        H = _curvature_of_rows(problem)
        eps = torch.finfo(problem.objective.dtype).eps
        if damping > eps * float(H.trace()):
            return H
    return dense_curvature(problem)


def _require_regular(pivots: Tensor, damped: Tensor, damping: float) -> None:
    """Raise where a pivot is rounding: whether that of a singular matrix is zero, or negative, is the processor's."""
    rounding = len(damped) * torch.finfo(damped.dtype).eps
    if bool(pivots.min() <= rounding * damped.diagonal().abs().max()):
        raise ValueError(
            f"config['damping'] = {damping:g}: the damped curvature of {len(damped)} parameters is singular, so that "
            "the system has no one solution; use a larger config['damping']"
        )


def _dual(problem: Problem, damping: float) -> Inverse:
    def make() -> Kept:
        A, signs = _all_rows(problem)
        return Kept({"A": A, "signs": signs})

    kept = problem.set_up.kept("rows", make).tensors
    A, signs = (
        kept[name].to(problem.objective.device) for name in ("A", "signs")
    )
    solve = _factor(A @ A.T, damping * signs)

    def inverse(v: Tensor) -> Tensor:
        inside = solve(A @ v.T).T
        return (v - inside @ A) / damping

    def rest(v: Tensor, s: Tensor) -> Tensor:
        return v - ((s @ A.T) * signs) @ A - damping * s

    return inverse, rest


def _rows_are_cheaper(problem: Problem) -> bool:
    """Whether A^T S A costs less than a product with each unit vector."""
    rows, P = dual_rows(problem), problem.objective.P
    if rows is None:
        return False
    whole = rows * problem.run_size / problem.samples.n
    return 2 * whole * P <= FASTER * problem.product_work


def _curvature_of_rows(problem: Problem) -> Tensor:
    """A^T S A [P, P], of a batch of rows at a time."""
    objective, n = problem.objective, problem.samples.n
    total = torch.zeros(
        objective.P, objective.P, dtype=torch.float64, device=objective.device
    )
    row = (dual_rows(problem) or n) // n * problem.row
    size = problem.budget.row_block(2 * row + problem.activations)
    share = problem.set_up.share(n)
    for batch in problem.samples.ordered(size, share.indices):
        rows, signs = gauss_newton_rows(objective, batch)
        total.addmm_(rows.T, signs.unsqueeze(1) * rows)
    return share.total(total) / n


def _all_rows(problem: Problem) -> tuple[Tensor, Tensor]:
    """A [n C, P], and the sign of each of its rows."""
    objective, n = problem.objective, problem.samples.n
    outputs, done = (dual_rows(problem) or 0) // n, 0
    share = problem.set_up.share(n)
    A = torch.zeros(
        share.count * outputs,
        objective.P,
        dtype=torch.float64,
        device=objective.device,
    )
    signs = torch.ones_like(A[:, 0])
    one_sample = outputs * objective.P * A.element_size()
    size = problem.budget.row_block(one_sample)
    for batch in problem.samples.ordered(size, share.indices):
        rows, sign = gauss_newton_rows(objective, batch)
        end = done + len(rows)
        if end > len(A):  # a sample has more outputs than the first one
            A = torch.cat([A, A.new_zeros(end - len(A), objective.P)])
            signs = torch.cat([signs, signs.new_ones(len(A) - len(signs))])
        A[done:end], signs[done:end] = rows, sign
        done = end
    A, signs = share.joined(A[:done]), share.joined(signs[:done])
    return A.div_(n**0.5), signs


def _factor(gram: Tensor, diagonal: Tensor) -> Callable[[Tensor], Tensor]:
    """The inverse of gram + diag(diagonal), which is indefinite where the loss is not convex in the outputs."""
    gram.diagonal().add_(diagonal)
    if bool((diagonal > 0).all()):
        L = torch.linalg.cholesky(gram)
        return lambda b: torch.cholesky_solve(b, L)
    LU, pivots = torch.linalg.lu_factor(gram)
    return lambda b: torch.linalg.lu_solve(LU, pivots, b)


def dense_curvature(problem: Problem) -> Tensor:
    """The curvature over the whole training set as a matrix [P, P]."""
    P, theta = problem.objective.P, problem.objective.theta
    total = torch.zeros(P, P, dtype=theta.dtype, device=theta.device)
    text = f"Dense {problem.curvature.kind}"
    with progress_bar(
        text,
        total=problem.samples.n,
        unit="sample",
        enabled=problem.config.progress,
    ) as bar:
        own = problem.set_up.share(problem.samples.n)
        for batch in problem.samples.ordered(problem.batch, own.indices):
            size = problem.curvature.stack(batch)
            for start in range(0, P, size):
                rows = theta.new_zeros(min(size, P - start), P)
                rows[:, start:].fill_diagonal_(1)
                product = problem.curvature(batch, rows)
                share = batch.size / problem.samples.n
                total[start : start + size].add_(product, alpha=share)
            bar.update(batch.size)
    return own.total(total)


def dual_rows(problem: Problem) -> int | None:
    """Rows n C of A, or None where the curvature has no such form."""
    objective = problem.objective
    if problem.curvature.kind != "ggn" or objective.direct:
        return None
    one = problem.first
    leaves, _ = numbers_of(objective.outputs(objective.theta, one))
    if problem.samples.shapes is None:
        return None  # samples of different shapes may have different numbers of outputs
    return problem.samples.n * sum(leaf.numel() for leaf in leaves)


def gauss_newton_rows(
    objective: Objective, batch: Batch
) -> tuple[Tensor, Tensor]:
    r"""W_i J_i of each sample of a batch, W_i^T S_i W_i = \nabla^2_y \ell_i, and the signs S_i -> [B C, P], [B C]."""
    if batch.parts:
        parts = [gauss_newton_rows(objective, one) for one in batch.parts]
        return torch.cat([rows for rows, _ in parts]), torch.cat(
            [signs for _, signs in parts]
        )
    y, rebuild = numbers_of(objective.outputs(objective.theta, batch))
    known = likelihood(objective, y, rebuild, batch)
    convex = isinstance(known, Categorical)
    W, signs = signed_roots(known.hessians(), convex)
    J = jacobians(objective, batch)
    return (W.double() @ J.double()).flatten(0, 1).detach(), signs.flatten()
