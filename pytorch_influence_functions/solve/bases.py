r"""Eigenvectors of second moments \sum_r x_r x_r^T.

Of few rows x_r the matrix has a low rank, and is never built. With the rows X = R^T H^T, H a product of Householder
reflectors and R square, it is H R R^T H^T: its eigenvectors are H diag(U, I), U those of the small R R^T, and I stands
for what no row sees.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..model.outer_products import second_moment
from .set_up import Share

FEW_ROWS = 0.5
"""Rows for each of the d numbers of a row up to which the reflectors stand for the eigenvectors: beyond it they are
more work to apply than a matrix [d, d], and as large. Of 1,024 rows of 3,073 they are there in 0.3 s on one core, and a
matrix in 5 s."""


class Basis(NamedTuple):
    """An orthogonal matrix Q [groups, d, d]: U, or H diag(U, I) with r reflectors."""

    U: Tensor
    """[groups, r, r]"""
    V: Tensor | None = None
    """The reflectors beyond the diagonal, a row each, as LAPACK keeps them in columns [groups, r, d]."""
    tau: Tensor | None = None
    """[groups, r]"""

    @property
    def size(self) -> int:
        """d"""
        return (self.U if self.V is None else self.V).shape[-1]

    def turned(self, x: Tensor) -> Tensor:
        """x Q of x [..., groups, T, d]."""
        V, tau = self.V, self.tau
        if V is None or tau is None:
            return _times(x, self.U)
        r = self.U.shape[-1]
        x = _reflected(x, V, tau, forth=True)
        seen = x[..., :r]
        seen.copy_(_times(seen, self.U))
        return x

    def returned(self, x: Tensor) -> Tensor:
        """x Q^T, the inverse of `turned`."""
        V, tau = self.V, self.tau
        back = self.U.mT
        if V is None or tau is None:
            return _times(x, back)
        r = self.U.shape[-1]
        seen = x[..., :r]
        rest = x[..., r:]
        x = torch.cat([_times(seen, back), rest], -1)
        return _reflected(x, V, tau, forth=False)


def _reflected(x: Tensor, V: Tensor, tau: Tensor, *, forth: bool) -> Tensor:
    """x H, or x H^T; of columns, since LAPACK's are one after the other."""
    rows = x.movedim(-3, 0)
    columns = rows.flatten(1, -2).mT
    done = torch.ormqr(V.mT, tau, columns, transpose=forth).mT
    return done.reshape(rows.shape).movedim(0, -3)


def _times(x: Tensor, Q: Tensor) -> Tensor:
    """x Q; one matrix times all rows is one product, and not one a sample, which takes twice the time."""
    if len(Q) > 1:
        return x @ Q
    rows = x.reshape(-1, x.shape[-1])
    return (rows @ Q[0]).view(x.shape)


class Moment:
    """The sum of x x^T over the rows that it is given; these themselves while they are few."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._count = 0
        self._most = 0.0
        self._sum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """The rows of some samples [B, T, groups, d]."""
        self._count += x.shape[:2].numel()
        self._most = FEW_ROWS * x.shape[-1]
        self._rows.append(x)
        if self._count > self._most:
            self._summed()

    def basis(self, share: Share) -> Basis:
        """The eigenvectors, where all processes of the run have given it their rows."""
        count = int(share.total(torch.tensor(self._count)))
        if self._sum is None and 0 < count <= self._most:
            rows = torch.cat([x.flatten(0, 1) for x in self._rows])
            return of_rows(share.joined(rows, 0).transpose(0, 1))
        total = share.total(self._summed())
        return Basis(_eigenvectors(total))

    def _summed(self) -> Tensor:
        """The sum [groups, d, d], in the place of the rows."""
        parts = map(second_moment, self._rows)
        total = next(parts) if self._sum is None else self._sum
        for part in parts:
            total += part
        self._rows, self._sum = [], total
        return total


def of_rows(x: Tensor) -> Basis:
    """The eigenvectors of the second moment of x [groups, r, d], r < d."""
    r = x.shape[1]
    V, tau = torch.geqrf(x.mT)
    R = V[:, :r].triu()
    U = _eigenvectors(R @ R.mT)
    return Basis(U, V.mT.contiguous(), tau)


def _eigenvectors(A: Tensor) -> Tensor:
    """In the order in memory in which they are kept for another start, which finds the same numbers to the last bit."""
    vectors: Tensor = torch.linalg.eigh(A)[1]
    return vectors.contiguous()
