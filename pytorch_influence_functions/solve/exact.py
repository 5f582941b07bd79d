r"""The dense solve: (H + \lambda I)^{-1} from a Cholesky factor, in the space of parameters or of outputs.

With A = [R_i J_i / \sqrt{n}]_i, R_i^T R_i = \nabla^2_y \ell_i, the Gauss-Newton matrix is G = A^T A [P, P]. Where the
n C rows of A are fewer than P, (G + \lambda I)^{-1} v = (v - A^T (A A^T + \lambda I)^{-1} A v) / \lambda.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from ..data.batch import Batch, flatten_tree
from ..model.objective import Objective
from ..utils import progress_bar
from .system import Residual, Solution, Solve, System

ROW_BLOCK = 64


def exact(system: System) -> Solve:
    """Solve with a dense factor of the curvature, or of its dual where that is smaller.

    Raises:
        ValueError: neither fits `max_memory`; the message gives the size and the alternative.
    """
    P, rows = system.objective.P, dual_rows(system)
    dual = rows is not None and rows < P and system.damping > 0
    need = 8 * ((rows or 0) ** 2 * 2 + (rows or 0) * P) if dual else 8 * 3 * P**2
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
        report = {"form": "dual" if dual else "primal", "size": rows if dual else P}
        return Solution(s.to(v), Residual(residual.to(v), torch.zeros_like(v[:, 0]), rest.to(v)), report=report)

    return solve


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
    A = torch.cat([gauss_newton_rows(system.objective, batch) for batch in system.samples.ordered(ROW_BLOCK)]).double()
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
    if system.curvature.kind != "ggn" or not (objective.paths.rows and objective.paths.vmap):
        return None
    one = system.samples.sample(0)
    leaves, _ = flatten_tree(objective.outputs(objective.theta, one))
    return system.samples.n * sum(leaf.numel() for leaf in leaves)


def gauss_newton_rows(objective: Objective, batch: Batch) -> Tensor:
    r"""R_i J_i of each sample of a batch, R_i^T R_i = \nabla^2_y \ell_i -> [B C, P]."""
    rebuilders: list[Callable[..., object]] = []
    shapes: list[list[torch.Size]] = []

    def one(leaves: tuple[Tensor, ...]) -> Batch:
        return Batch([leaf.unsqueeze(0) for leaf in leaves], batch.rebuild, 1, [0])

    def output(theta: Tensor, *leaves: Tensor) -> Tensor:
        y, rebuild = flatten_tree(objective.outputs(theta, one(leaves)))
        rebuilders.append(rebuild)
        shapes.append([part.shape for part in y])
        return torch.cat([part.reshape(-1) for part in y])

    def loss(y: Tensor, *leaves: Tensor) -> Tensor:
        parts = y.split([shape.numel() for shape in shapes[0]])
        tree = rebuilders[0]([part.view(shape) for part, shape in zip(parts, shapes[0], strict=True)])
        return objective.output_losses(tree, one(leaves))[0]

    over = tuple(0 for _ in batch.leaves)
    J = vmap(jacrev(output), in_dims=(None, *over))(objective.theta, *batch.leaves)
    y = vmap(output, in_dims=(None, *over))(objective.theta, *batch.leaves)
    values, vectors = torch.linalg.eigh(vmap(jacrev(jacrev(loss)))(y, *batch.leaves).double())
    R = values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT
    rows: Tensor = (R @ J.double()).flatten(0, 1).detach()
    return rows
