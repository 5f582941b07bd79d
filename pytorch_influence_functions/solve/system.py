r"""The linear system (H + \lambda I) s = v, and how far a vector is from solving it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Config
from ..data.batch import Batch
from ..data.samples import Samples
from ..model.curvature import Curvature
from ..model.objective import Objective
from .problem import Problem

FEWEST_PAIRS, MOST_PAIRS = 4, 16
"""Pairs of minibatches that a sampled residual is estimated from: fewer have no spread to speak of, more cost more
calls of the model without a smaller error of the same samples."""


class Residual(NamedTuple):
    """Relative residual of each row [K], its standard error [K], and the residual [K, P] where it is exact."""

    relative: Tensor
    stderr: Tensor
    rows: Tensor | None

    def at(self, rows: Tensor) -> Residual:
        """Those rows."""
        exact = None if self.rows is None else self.rows[rows]
        return Residual(self.relative[rows], self.stderr[rows], exact)

    @classmethod
    def exact(cls, rest: Tensor, v: Tensor) -> Residual:
        """Of the residual `rest` of each row of v, both [K, P]."""
        size = v.abs().amax(1, keepdim=True)
        # the squares of small numbers would be zero
        size.clamp_min_(torch.finfo(v.dtype).tiny)
        relative = (rest / size).norm(dim=1) / row_norms(v / size)
        return cls(relative, torch.zeros_like(relative), rest)


def row_norms(v: Tensor) -> Tensor:
    """Norm of each row [K, P] -> [K], above 0 so that it can divide."""
    norms: Tensor = v.norm(dim=1)
    return norms.clamp_min(torch.finfo(v.dtype).tiny)


@dataclasses.dataclass(frozen=True)
class System:
    r"""A problem with its \lambda."""

    problem: Problem
    damping: float

    @property
    def objective(self) -> Objective:
        """The problem's."""
        return self.problem.objective

    @property
    def samples(self) -> Samples:
        """The problem's."""
        return self.problem.samples

    @property
    def curvature(self) -> Curvature:
        """The problem's."""
        return self.problem.curvature

    @property
    def config(self) -> Config:
        """The problem's."""
        return self.problem.config

    def __call__(self, vectors: Tensor) -> Tensor:
        r"""(H + \lambda I) V over the whole training set, V [K, P] -> [K, P]."""
        return self.problem.product(vectors).add_(vectors, alpha=self.damping)

    def over(self, batch: Batch, vectors: Tensor) -> Tensor:
        r"""(H_B + \lambda I) V over one batch, V [K, P] -> [K, P]."""
        return self.curvature(batch, vectors).add_(vectors, alpha=self.damping)

    def certificate(
        self, v: Tensor, s: Tensor, count: int, seed: int
    ) -> Residual:
        r"""Residual v - (H + \lambda I) s of each row over `count` random training samples; s, v [K, P].

        Over the whole set it is exact. Over m random minibatches with residuals \rho_j the estimate of \|\rho\|^2 is
        (\|\sum_j \rho_j\|^2 - \sum_j \|\rho_j\|^2) / (m (m - 1)), free of the minibatches' own noise.
        """
        if count >= self.problem.run_size:
            return Residual.exact(v - self(s), v)
        few = min(count, self.samples.n)
        squares, error = self._sampled_squares(v, s, few, seed)
        norm = row_norms(v)
        # below its own error the estimate says only that much
        relative = torch.maximum(squares, error).sqrt() / norm
        slope = (2 * relative * norm**2).clamp_min(torch.finfo(v.dtype).tiny)
        return Residual(relative, error / slope, None)

    def _sampled_squares(
        self, v: Tensor, s: Tensor, count: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Estimate of the squared residual [K] and its standard error, from the spread of rho_j . rho_{j+1}."""
        pairs = count // (2 * self.samples.batch_size)
        m = 2 * max(FEWEST_PAIRS, min(MOST_PAIRS, pairs))
        minibatches = self.samples.random(max(1, count // m), seed=seed)
        total, squares = torch.zeros_like(v), torch.zeros_like(v[:, 0])
        products = []
        last = v
        for j, batch in enumerate(take(minibatches, m)):
            rest = v - self.over(batch, s)
            total += rest
            squares += rest.square().sum(1)
            if j % 2:
                products.append((rest * last).sum(1))
            last = rest
        estimate = (total.square().sum(1) - squares) / (m * (m - 1))
        spread = torch.stack(products).std(0) / len(products) ** 0.5
        return estimate, spread


def take(batches: Iterable[Batch], count: int) -> list[Batch]:
    """The first `count` batches of an endless stream."""
    return [batch for _, batch in zip(range(count), batches, strict=False)]
