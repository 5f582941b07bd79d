r"""Conjugate gradients on a stack of right-hand sides: each its own iteration, their products taken together.

Hestenes & Stiefel 1952; with a preconditioner M ~ (H + \lambda I)^{-1}, a map of stacks [K, P].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .system import NegativeCurvatureError, Residual, Solution, Solve, System
from .utils import progress_bar

MOST_ITERATIONS = 500
Map = Callable[[Tensor], Tensor]


def conjugate_gradient(system: System) -> Solve:
    """Solve by conjugate gradients over the whole training set; each column stops by itself at the tolerance."""

    def solve(v: Tensor) -> Solution:
        limit, tolerance = min(MOST_ITERATIONS, 2 * v.shape[1]), system.config.tolerance
        with progress_bar("Conjugate gradients", total=limit, unit="step", enabled=system.config.progress) as bar:
            s, rest, steps = iterate(
                lambda p: system.product(p) + system.damping * p, v, system.precondition,
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
    s, rest = torch.zeros_like(v), v.clone()
    steps = torch.zeros(len(v), dtype=torch.long)
    goal = tolerance * v.norm(dim=1)
    rows = (rest.norm(dim=1) > goal).nonzero().squeeze(1)
    r = rest[rows]
    z = M(r) if len(rows) else r
    p, rz = z, (r * z).sum(1)
    for _ in range(limit if len(rows) else 0):
        Ap = product(p)
        pAp = (p * Ap).sum(1)
        _require_positive(pAp, p)
        alpha = rz / pAp
        s[rows] += alpha.unsqueeze(1) * p
        r = r - alpha.unsqueeze(1) * Ap
        rest[rows] = r
        steps[rows.cpu()] += 1
        progress()
        go = r.norm(dim=1) > goal[rows]
        rows, r, p, rz = rows[go], r[go], p[go], rz[go]
        if len(rows) == 0:
            break
        z = M(r)
        last, rz = rz, (r * z).sum(1)
        p = z + (rz / last).unsqueeze(1) * p
    return s, rest, steps


def _require_positive(pAp: Tensor, p: Tensor) -> None:
    along = pAp / p.square().sum(1)
    if bool((along <= 0).any()):
        raise NegativeCurvatureError(
            f"conjugate gradients met the curvature {float(along.min()):.3g} (with damping), which is not positive: "
            "set config['curvature'] = 'ggn', or raise config['damping'] by at least "
            f"{1.5 * abs(float(along.min())):.3g}"
        )
