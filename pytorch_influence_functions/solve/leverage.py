r"""How much each training sample holds its own outputs, and what they are without it.

With A = G + \lambda I (or H), outputs y_i [C], J_i = \partial y_i / \partial \theta [C, P], r_i and R_i the gradient
and the Hessian of \ell_i in y_i:

    K_i = J_i A^{-1} J_i^T / n,   leverage_i = tr(R_i K_i),   \hat y_i = y_i + K_i (I - R_i K_i)^{-1} r_i.

Without sample i the curvature is A - J_i^T R_i J_i / n, and (Woodbury) its inverse times J_i^T is
A^{-1} J_i^T (I - R_i K_i)^{-1}: \hat y_i is a Newton step without the sample, exact for a quadratic loss of linear
outputs (Cook & Weisberg 1982), and c_i = (I - R_i K_i)^{-1} r_i stands in r_i's place wherever a first-order effect of
leaving i out does.

That takes C solutions a sample. One is enough where c_i is sought among the multiples of r_i (`Along`): with v = K_i
r_i and a = r_i^T v the equation c = r + R K c, projected on v, has the solution c = r / (1 - h), h = v^T R_i v / a, and
\hat y_i = y_i + v / (1 - h). It is the same for one output and for two classes; of networks with 6 and 10 classes that
had learned 10 % wrong labels the mean loss without each sample differed by 1 to 7 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    @property
    def inflation(self) -> Tensor:
        """How much larger the error of each output is without the sample [B, C]."""
        return self.M.diagonal(dim1=1, dim2=2)


class Along(NamedTuple):
    """Some training samples, each held along its own gradient alone: v = K r [B, C], a = r^T K r and h [B]."""

    batch: Batch
    local: Local
    v: Tensor
    a: Tensor
    h: Tensor

    @property
    def outputs(self) -> Tensor:
        """Those of the model without the sample [B, C]."""
        return self.local.y + self.v / (1 - self.h).unsqueeze(1)

    @property
    def leverage(self) -> Tensor:
        """h [B], below 1: how much of the change along its gradient the sample keeps from happening."""
        return self.h

    @property
    def size(self) -> Tensor:
        """|r|^2 [B]."""
        return self.local.r.square().sum(1)

    @property
    def inflation(self) -> Tensor:
        """1 / (1 - h), of each output [B, C]."""
        return (1 / (1 - self.h)).unsqueeze(1).expand_as(self.v)


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

    def blocks(
        self,
        text: str | None = None,
        indices: Sequence[int] | None = None,
    ) -> Iterator[Block]:
        """Of all training samples, in order, or of these."""
        samples = self.problem.samples
        for batch in samples.ordered(self.at_once, indices, text=text):
            local = self.outputs.local(batch)
            J = self.outputs.jacobians(batch)
            K = self._of(J)
            M = without(*local.roots, K, self.largest)
            yield Block(batch, J, local, K, M)

    def along(self, text: str | None = None) -> Iterator[Along]:
        """Of all training samples, in order, by one solution each."""
        size = self.fitting(self.outputs.C)
        for batch in self.problem.samples.ordered(size, text=text):
            local = self.outputs.local(batch)
            J = self.outputs.jacobians(batch)
            _, V = self.held(J, local.r.unsqueeze(1))
            v = V[:, 0]
            a = (local.r * v).sum(1)
            b = (v * times(local.R, v)).sum(1)
            h = torch.where(a > 0, b / a, 0).clamp(max=self.largest)
            yield Along(batch, local, v, a, h)

    def held(
        self,
        J: Tensor,
        directions: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """J^T u and K u of some directions u of the outputs [B, k, C] -> [B, k, P], [B, k, C]."""
        n = self.problem.samples.n
        g = directions.to(J) @ J
        s = self.solved(g.flatten(0, 1), n * g.shape[1]).view_as(g)
        require_solved(s)
        return g, (s @ J.mT / n).to(directions)

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
        """Training samples whose rows J are held, and solved for, together."""
        size = self.fitting(self.outputs.C)
        return min(size, max(1, self.solver.group_size // self.outputs.C))

    def fitting(self, rows: int) -> int:
        """Training samples of which so many rows [P] each fit."""
        row = rows * self.problem.row
        return self.problem.budget.row_block(row + self.problem.activations)

    def solved(
        self,
        rows: Tensor,
        tests: int,
    ) -> Tensor:
        """A^{-1} of each row [m, P] -> [m, P]; `tests` of them in all."""
        direct = self.solver.prepared().direct
        parts = []
        for part in split(range(len(rows)), self.solver.group_size):
            if direct is not None:
                parts.append(direct(rows[part]))
                continue
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
    few = samples.take(samples.spread(TRIED))
    return Outputs(problem.objective, few)
