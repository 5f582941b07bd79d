r"""How much each training sample holds its own outputs, and what they are without it.

With A = G + \lambda I (or H), outputs y_i [C], J_i = \partial y_i / \partial \theta [C, P], r_i and R_i the gradient
and the Hessian of \ell_i in y_i:

    K_i = J_i A^{-1} J_i^T / n,   leverage_i = tr(R_i K_i),   \hat y_i = y_i + K_i (I - R_i K_i)^{-1} r_i.

Without sample i the curvature is A - J_i^T R_i J_i / n, and (Woodbury) its inverse times J_i^T is
A^{-1} J_i^T (I - R_i K_i)^{-1}: \hat y_i is a Newton step without the sample, exact for a quadratic loss of linear
outputs (Cook & Weisberg 1982), and c_i = (I - R_i K_i)^{-1} r_i stands in r_i's place wherever a first-order effect of
leaving i out does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batch import Batch
from ..model.local import Local, Outputs
from .groups import split
from .problem import Problem
from .solution import require_solved
from .solvers import Solver

TRIED = 8
"""Samples by which is told which of a model's outputs count, and what they mean."""
LARGEST, LARGEST_FOUND = 1 - 1e-9, 0.99
"""Of an eigenvalue of R_i K_i, and of one by an approximation. With the curvature itself it is below 1; by EKFAC or low
rank it need not be: the sample would hold more than all of its own outputs."""


KEPT = 8
"""K of all samples is kept in at most that part of the memory for vectors: then only its first pass solves."""


class Block(NamedTuple):
    """Some training samples: J [B, C, P], the losses around their outputs, K and M = (I - R K)^{-1} [B, C, C]."""

    batch: Batch
    J: Tensor
    local: Local
    K: Tensor
    M: Tensor

    @property
    def c(self) -> Tensor:
        """What stands in the place of r where a sample is left out [B, C]."""
        return times(self.M, self.local.r)

    @property
    def outputs(self) -> Tensor:
        """Those of the model without the sample [B, C]."""
        return self.local.y + times(self.K, self.c)

    @property
    def leverage(self) -> Tensor:
        """tr(R K) [B], the number of parameters that a sample uses up; below C."""
        return torch.einsum("bij,bji->b", self.local.R, self.K)


def times(
    matrices: Tensor,
    vectors: Tensor,
) -> Tensor:
    """Of each sample, [B, C, C] and [B, C] -> [B, C]."""
    return (matrices @ vectors.unsqueeze(2)).squeeze(2)


def without(
    W: Tensor,
    signs: Tensor,
    K: Tensor,
    largest: float = LARGEST,
) -> Tensor:
    r"""(I - R K)^{-1} of each sample (or set) from the roots W, signs S of R = W^T S W, [B, C, C] each.

    Of a convex loss it is I + W^T (I - W K W^T)^{-1} W K, where the eigenvalues of W K W^T are held below `largest`.
    """
    eye = torch.eye(K.shape[1], dtype=K.dtype, device=K.device)
    if bool((signs < 0).any()):
        R = W.mT @ (signs.unsqueeze(2) * W)
        M: Tensor = torch.linalg.inv(eye - R @ K)
        return M
    values, Q = torch.linalg.eigh(W @ K @ W.mT)
    QW = Q.mT @ W
    scaled = QW / (1 - values.clamp(0, largest)).unsqueeze(2)
    found: Tensor = eye + QW.mT @ scaled @ K
    return found


class Leverage:
    """The blocks K of a problem, by whatever solver it has.

    Args:
        problem: the model and its training set.
        solver: of it.
        outputs: of the model.

    Attributes:
        largest: eigenvalue of R_i K_i that is taken for one.
    """

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        outputs: Outputs,
    ) -> None:
        self.problem, self.solver, self.outputs = problem, solver, outputs
        self.largest = LARGEST

    def blocks(self, text: str | None = None) -> Iterator[Block]:
        """Of all training samples, in order."""
        for batch in self.problem.samples.ordered(self.at_once, text=text):
            local = self.outputs.local(batch)
            J = self.outputs.jacobians(batch)
            K = self._block(batch, J)
            M = without(*local.roots, K, self.largest)
            yield Block(batch, J, local, K, M)

    @functools.cached_property
    def _kept(self) -> Tensor | None:
        """Room for K of all samples [n, C, C], where it is small beside the memory; NaN is not solved for."""
        n, C = self.problem.samples.n, self.outputs.C
        if 8 * n * C**2 > self.problem.budget.vectors / KEPT:
            return None
        return torch.full((n, C, C), torch.nan, dtype=self.outputs.dtype)

    def _block(
        self,
        batch: Batch,
        J: Tensor,
    ) -> Tensor:
        """K of a batch with derivatives J [B, C, P], solved for once."""
        if self._kept is None:
            return self._of(J)
        rows = torch.as_tensor(batch.indices)
        if bool(self._kept[rows].isnan().any()):
            self._kept[rows] = self._of(J).cpu()
        return self._kept[rows].to(J.device)

    def coefficients(self) -> Tensor:
        """c of all training samples [n, C], on the CPU."""
        blocks = self.blocks("Leverage of the training samples")
        return torch.cat([block.c.cpu() for block in blocks])

    @property
    def damping(self) -> float:
        r"""The \lambda in use."""
        return self.solver.prepared().system.damping

    @property
    def at_once(self) -> int:
        """Training samples whose rows J are held together."""
        row = self.outputs.C * self.problem.row
        size = self.problem.budget.row_block(row + self.problem.activations)
        fitting = max(1, self.solver.group_size // self.outputs.C)
        return min(size, fitting)

    def solved(
        self,
        rows: Tensor,
        tests: int,
    ) -> Tensor:
        """A^{-1} of each row [m, P] -> [m, P]; `tests` of them in all."""
        parts = []
        for part in split(range(len(rows)), self.solver.group_size):
            solution = self.solver(rows[part], tests)
            if solution.residual is None:
                self.largest = LARGEST_FOUND
            parts.append(solution.vectors)
        return torch.cat(parts)

    def _of(self, J: Tensor) -> Tensor:
        """K of samples with derivatives J [B, C, P] -> [B, C, C]."""
        n = self.problem.samples.n
        solved = self.solved(J.flatten(0, 1), n * self.outputs.C)
        require_solved(solved)
        K = solved.view(J.shape) @ J.mT / n
        K = K.to(self.outputs.dtype)
        return (K + K.mT) / 2


def outputs_of(problem: Problem) -> Outputs:
    """What the loss goes by, as some training samples tell; errors as of `Outputs`."""
    samples = problem.samples
    few = sorted({i * samples.n // TRIED for i in range(TRIED)})
    return Outputs(problem.objective, samples.take(few))
