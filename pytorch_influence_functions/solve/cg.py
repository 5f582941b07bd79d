r"""Conjugate gradients on a stack of right-hand sides: each its own iteration, their products taken together.

Hestenes & Stiefel 1952; with a preconditioner M ~ (H + \lambda I)^{-1}, a map of stacks [K, P].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..utils import progress_bar
from .errors import DivergenceError, NegativeCurvatureError
from .factors import build
from .problem import Problem
from .solution import Damping, Prepared, Solution
from .system import Residual, System

MOST_ITERATIONS = 500
"""Far more than a preconditioned system takes; one without that needs more is better solved otherwise."""
ROUNDING = 8
"""Without a tolerance the iteration ends at so many units in the last place: it gains nothing beyond."""
ULPS = 64
"""Units in the last place that a curvature may be below zero in, on the scale of the largest: a product is a sum over
samples and layers in the precision of the model."""
Map = Callable[[Tensor], Tensor]


def conjugate_gradient(problem: Problem, damping: Damping) -> Prepared:
    """Solve by conjugate gradients over the whole training set; each row stops by itself at the tolerance."""
    system = System(problem, damping.value)
    config = problem.config
    M: Map = (
        build(problem).inverse(damping.value)
        if config.preconditioner
        else _itself
    )

    def solve(v: Tensor, tests: int) -> Solution:
        limit = min(MOST_ITERATIONS, 2 * v.shape[1])
        tolerance = config.tolerance
        if tolerance is None:
            tolerance = torch.finfo(v.dtype).eps * ROUNDING
        with progress_bar(
            "Conjugate gradients",
            total=limit,
            unit="step",
            enabled=config.progress,
        ) as bar:
            s, rest, steps = iterate(
                system,
                v,
                M,
                tolerance=tolerance,
                limit=limit,
                progress=bar.update,
            )
        return Solution(
            s, Residual.exact(rest, v), report={"steps": steps.tolist()}
        )

    return Prepared(system, solve, damping.report)


def _itself(v: Tensor) -> Tensor:
    return v


class _Rows(NamedTuple):
    """The rows that are not done yet, as Hestenes and Stiefel name them."""

    places: Tensor
    """Where they are in the stack [k]."""
    s: Tensor
    r: Tensor
    """Residual [k, P]."""
    p: Tensor
    """Direction [k, P]."""
    rz: Tensor
    """r . M r [k]."""
    largest: Tensor
    """The largest norm of A p / |p| so far, which the largest eigenvalue is not below [k]."""

    def at(self, mask: Tensor) -> _Rows:
        return _Rows(*(t[mask] for t in self))


def iterate(
    product: Map,
    v: Tensor,
    M: Map,
    *,
    tolerance: float,
    limit: int,
    progress: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Solve product(s) = v for each row of v [K, P] -> s [K, P], residual [K, P], steps taken [K].

    A row that has reached `tolerance` leaves the stack, and one that can go no further at this precision: a curvature
    that is zero up to rounding is such an end.

    Raises:
        NegativeCurvatureError: a direction p with p . product(p) < 0, beyond rounding.
        DivergenceError: a product is not finite.
    """
    size = torch.frexp(v.abs().amax(1, keepdim=True))[1]
    # by a power of two, without rounding, so that squares of small numbers stay numbers
    v = torch.ldexp(v, -size)
    solved, rest = torch.zeros_like(v), torch.zeros_like(v)
    steps = torch.zeros(len(v), dtype=torch.long)
    goal = tolerance * v.norm(dim=1)
    wanted = v.norm(dim=1) > goal
    rest[~wanted] = v[~wanted]
    rows = _start(v, wanted, M)
    step = 0
    while step < limit and len(rows.places):
        step += 1
        done = _advance(rows, product(rows.p))
        progress()
        done |= rows.r.norm(dim=1) <= goal[rows.places]
        if step == limit:
            done = torch.ones_like(done)
        if bool(done.any()):
            left = rows.at(done)
            solved[left.places], rest[left.places] = left.s, left.r
            steps[left.places.cpu()] = step
            rows = rows.at(~done)
        if len(rows.places):
            rows = _turn(rows, M(rows.r))
    return torch.ldexp(solved, size), torch.ldexp(rest, size), steps


def _start(v: Tensor, wanted: Tensor, M: Map) -> _Rows:
    """s = 0 for the wanted rows of v."""
    places = wanted.nonzero().squeeze(1)
    r = v[places]
    p = M(r).clone() if len(places) else r
    rz = torch.linalg.vecdot(r, p)
    return _Rows(places, torch.zeros_like(r), r, p, rz, torch.zeros_like(rz))


def _advance(rows: _Rows, Ap: Tensor) -> Tensor:
    """Go along each direction to where the quadratic form is least, in place -> the rows that cannot, as a mask [k]."""
    if not bool(Ap.isfinite().all()):
        raise DivergenceError(
            "conjugate gradients: a product with the curvature is NaN or infinite"
        )
    pAp = torch.linalg.vecdot(rows.p, Ap)
    squares = rows.p.square().sum(1)
    torch.maximum(
        rows.largest, Ap.norm(dim=1) / squares.sqrt(), out=rows.largest
    )
    _require_positive(pAp / squares, rows.largest)
    alpha = rows.rz / pAp
    ended: Tensor = ~((pAp > 0) & (rows.rz > 0) & alpha.isfinite())
    alpha = alpha.masked_fill(ended, 0).unsqueeze(1)
    rows.s.addcmul_(rows.p, alpha)
    rows.r.addcmul_(Ap, -alpha)
    return ended


def _turn(rows: _Rows, z: Tensor) -> _Rows:
    """The next directions, conjugate to the ones before; z = M r [k, P]."""
    rz = torch.linalg.vecdot(rows.r, z)
    beta = (rz / rows.rz).unsqueeze(1)
    rows.p.mul_(beta).add_(z)
    return rows._replace(rz=rz)


def _require_positive(along: Tensor, largest: Tensor) -> None:
    """Raise where a curvature [k] is below zero by more than the rounding of the largest one."""
    negative = along < -ULPS * torch.finfo(along.dtype).eps * largest
    if bool(negative.any()):
        least = float(along[negative].min())
        raise NegativeCurvatureError(
            f"conjugate gradients met the curvature {least:.3g} (with damping), which is not positive"
        )
