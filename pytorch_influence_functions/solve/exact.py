r"""The dense solve: (H + \lambda I)^{-1} from a Cholesky factor, in the space of parameters or of outputs.

With A = [R_i J_i / \sqrt{n}]_i, R_i^T R_i = \nabla^2_y \ell_i, the Gauss-Newton matrix is G = A^T A [P, P]. Where the
n C rows of A are fewer than P, (G + \lambda I)^{-1} v = (v - A^T (A A^T + \lambda I)^{-1} A v) / \lambda.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from ..data.batch import Batch
from ..model.likelihoods import likelihood, roots
from ..model.objective import Objective
from ..model.outputs import numbers_of
from ..utils import progress_bar
from .system import Residual, Solution, Solve, System

logger = logging.getLogger(__name__)
ROW_BLOCK = 64
"""Training samples whose rows are computed together."""


def exact(system: System) -> Solve:
    """Solve with a dense factor of the curvature, or of its dual where that is smaller.

    Raises:
        ValueError: neither fits `max_memory`; the message gives the size and the alternative.
    """
    P, size, need = system.objective.P, *dense_form(system)
    dual = size < P and system.damping > 0
    if need > system.max_bytes:
        raise ValueError(
            f"config['solver'] = 'exact': a dense {system.curvature.kind} of {P} parameters needs about "
            f"{need / 2**20:.0f} MiB of the {system.max_bytes / 2**20:.0f} MiB there are; use config['solver'] = 'cg' "
            "or 'ekfac', fewer config['parameters'], or a larger config['max_memory']"
        )
    inverse = _dual(system) if dual else _primal(system)

    def solve(v: Tensor) -> Solution:
        s, rest = inverse(v.double())
        residual = rest.norm(dim=1) / v.double().norm(dim=1).clamp_min(1e-300)
        report = {"form": "dual" if dual else "primal", "size": size if dual else P}
        return Solution(s.to(v), Residual(residual.to(v), torch.zeros_like(v[:, 0]), rest.to(v)), report=report)

    return solve


def dense_form(system: System) -> tuple[int, float]:
    """Size of the smaller dense form of the curvature, and the bytes that the solve with it takes."""
    P, rows = system.objective.P, dual_rows(system)
    if rows is None or rows >= P:
        return P, 8.0 * 3 * P**2
    return rows, 8.0 * (2 * rows**2 + 2 * rows * P)  # A in double precision, and the blocks it is joined from


Inverse = Callable[[Tensor], tuple[Tensor, Tensor]]
"""v [K, P] -> s and the residual v - (H + lambda I) s, both [K, P], in double precision."""


def _primal(system: System) -> Inverse:
    H = dense_curvature(system).double()
    H = (H + H.T) / 2
    damped = H + system.damping * torch.eye(len(H), dtype=H.dtype, device=H.device)
    L, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) == 0:
        return lambda v: _with_residual(torch.cholesky_solve(v.T, L).T, v, damped)
    LU, pivots = torch.linalg.lu_factor(damped)  # an indefinite Hessian
    return lambda v: _with_residual(torch.linalg.lu_solve(LU, pivots, v.T).T, v, damped)


def _with_residual(s: Tensor, v: Tensor, damped: Tensor) -> tuple[Tensor, Tensor]:
    return s, v - s @ damped


def _dual(system: System) -> Inverse:
    rows = [gauss_newton_rows(system.objective, batch) for batch in system.samples.ordered(ROW_BLOCK)]
    A = torch.cat(rows).double()
    A /= system.samples.n**0.5
    lam = system.damping
    L = torch.linalg.cholesky(A @ A.T + lam * torch.eye(len(A), dtype=A.dtype, device=A.device))

    def inverse(v: Tensor) -> tuple[Tensor, Tensor]:
        s = (v - torch.cholesky_solve(A @ v.T, L).T @ A) / lam
        return s, v - (s @ A.T) @ A - lam * s

    return inverse


def dense_curvature(system: System) -> Tensor:
    """The curvature over the whole training set as a matrix [P, P]."""
    P, theta = system.objective.P, system.objective.theta
    total, text = torch.zeros(P, P, dtype=theta.dtype, device=theta.device), f"Dense {system.curvature.kind}"
    with progress_bar(text, total=system.samples.n, unit="sample", enabled=system.config.progress) as bar:
        for batch in system.samples.ordered(system.batch):
            size = system.curvature.stack(batch)
            for start in range(0, P, size):
                rows = torch.zeros(min(size, P - start), P, dtype=theta.dtype, device=theta.device)
                rows[:, start:].fill_diagonal_(1)
                total[start : start + size] += system.curvature(batch, rows) * (batch.size / system.samples.n)
            bar.update(batch.size)
    return total


def dual_rows(system: System) -> int | None:
    """Rows n C of A, or None where the curvature has no such form."""
    objective = system.objective
    if system.curvature.kind != "ggn":
        return None
    one = system.samples.sample(0)
    leaves, _ = numbers_of(objective.outputs(objective.theta, one))
    if not objective.paths.rows and not system.samples.shapes:
        return None  # samples of different shapes may have different numbers of outputs
    return system.samples.n * sum(leaf.numel() for leaf in leaves)


def gauss_newton_rows(objective: Objective, batch: Batch) -> Tensor:
    r"""R_i J_i of each sample of a batch, R_i^T R_i = \nabla^2_y \ell_i -> [B C, P]."""
    if batch.parts:
        return torch.cat([gauss_newton_rows(objective, one) for one in batch.parts])
    y, rebuild = numbers_of(objective.outputs(objective.theta, batch))
    R = roots(likelihood(objective, y, rebuild, batch).hessians().double())
    J = _jacobians(objective, batch)
    return (R @ J.double()).flatten(0, 1).detach()


def _jacobians(objective: Objective, batch: Batch) -> Tensor:
    """Derivatives of each sample's outputs in the parameters -> [B, C, P]."""
    if objective.paths.vmap:
        try:
            return _jacobians_by_vmap(objective, batch)
        except RuntimeError as error:
            logger.debug("one output at a time: %s", str(error).splitlines()[0])
    return torch.stack([_jacobian(objective, one) for one in batch.singles()])


def _jacobians_by_vmap(objective: Objective, batch: Batch) -> Tensor:
    def output(theta: Tensor, *leaves: Tensor) -> Tensor:
        one = Batch([leaf.unsqueeze(0) for leaf in leaves], batch.rebuild, 1, [0])
        y, _ = numbers_of(objective.outputs(theta, one))
        return torch.cat([part.reshape(-1) for part in y])

    over = tuple(0 for _ in batch.leaves)
    J: Tensor = vmap(jacrev(output), in_dims=(None, *over))(objective.theta, *batch.leaves)
    return J


def _jacobian(objective: Objective, one: Batch) -> Tensor:
    """The same of a single sample, a backward pass for each output -> [C, P]."""
    theta = objective.theta.detach().requires_grad_()
    y, _ = numbers_of(objective.outputs(theta, one))
    flat = torch.cat([part.reshape(-1).to(objective.dtype) for part in y])
    rows = [torch.autograd.grad(part, theta, retain_graph=True, materialize_grads=True)[0] for part in flat]
    return torch.stack(rows)
