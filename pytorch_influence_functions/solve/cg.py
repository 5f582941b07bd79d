r"""Conjugate gradients on a stack of right-hand sides: each its own iteration, their products taken together.

Hestenes & Stiefel 1952; with a preconditioner M ~ (H + \lambda I)^{-1}, a map of stacks [K, P].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..utils import progress_bar
from .system import NegativeCurvatureError, Residual, Solution, Solve, System

MOST_ITERATIONS = 500
Map = Callable[[Tensor], Tensor]


def conjugate_gradient(system: System) -> Solve:
    """Solve by conjugate gradients over the whole training set; each column stops by itself at the tolerance."""

    def solve(v: Tensor) -> Solution:
        limit, tolerance = min(MOST_ITERATIONS, 2 * v.shape[1]), system.config.tolerance
        with progress_bar("Conjugate gradients", total=limit, unit="step", enabled=system.config.progress) as bar:
            s, rest, steps = iterate(
                lambda p: system.product(p).add_(p, alpha=system.damping), v, system.precondition,
                tolerance=tolerance if tolerance is not None else torch.finfo(v.dtype).eps * 8, limit=limit,
                progress=bar.update,
            )  # fmt: skip
        relative = rest.norm(dim=1) / v.norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny)
        return Solution(s, Residual(relative, torch.zeros_like(relative), rest), report={"steps": steps.tolist()})

    return solve


def iterate(
    product: Map, v: Tensor, M: Map, *, tolerance: float, limit: int, progress: Callable[[], object] = lambda: None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Solve product(s) = v for each row of v [K, P] -> s [K, P], residual [K, P], steps taken [K].

    A row that has reached `tolerance` leaves the stack.

    Raises:
        NegativeCurvatureError: a direction p with p . product(p) <= 0.
    """
    solved, rest = torch.zeros_like(v), v.clone()
    steps = torch.zeros(len(v), dtype=torch.long)
    goal = tolerance * v.norm(dim=1)
    rows = (v.norm(dim=1) > goal).nonzero().squeeze(1)
    s, r = solved[rows], rest[rows]
    p = M(r).clone() if len(rows) else r
    rz = torch.linalg.vecdot(r, p)
    for step in range(1, limit + 1 if len(rows) else 1):
        Ap = product(p)
        pAp = torch.linalg.vecdot(p, Ap)
        _require_positive(pAp, p)
        alpha = (rz / pAp).unsqueeze(1)
        s.addcmul_(p, alpha)
        r.addcmul_(Ap, -alpha)
        progress()
        go = r.norm(dim=1) > goal[rows]
        if step == limit or not bool(go.all()):
            done = ~go if step < limit else torch.ones_like(go)
            solved[rows[done]], rest[rows[done]], steps[rows[done].cpu()] = s[done], r[done], step
            rows, s, r, p, rz = rows[~done], s[~done], r[~done], p[~done], rz[~done]
            if len(rows) == 0:
                break
        z = M(r)
        last, rz = rz, torch.linalg.vecdot(r, z)
        p.mul_((rz / last).unsqueeze(1)).add_(z)
    return solved, rest, steps


def _require_positive(pAp: Tensor, p: Tensor) -> None:
    if bool((pAp <= 0).any()):
        along = pAp / p.square().sum(1)
        raise NegativeCurvatureError(
            f"conjugate gradients met the curvature {float(along.min()):.3g} (with damping), which is not positive: "
            "set config['curvature'] = 'ggn', or raise config['damping'] by at least "
            f"{1.5 * abs(float(along.min())):.3g}"
        )
