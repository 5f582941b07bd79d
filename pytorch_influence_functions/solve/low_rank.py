r"""EKFAC that holds the largest rows of the Gauss-Newton matrix exactly.

G = (1/n) \sum_{ik} g_{ik} g_{ik}^T, g_{ik} = J_i^T e_{ik}, over the eigenvectors e_{ik} of the loss's Hessian in the
outputs. J [m, P] is made of the m largest g_{ik} / \sqrt{n}, diag(d) is EKFAC of all other rows, both in EKFAC's
eigenbasis. With D = d + \lambda, (diag(D) + J^T J)^{-1} = D^{-1} - D^{-1} J^T (I + J D^{-1} J^T)^{-1} J D^{-1}
(Woodbury): exact where J holds all rows, EKFAC where it holds none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from ..model.gradients import activation_bytes
from ..model.outer_products import is_one_hot, one_hot_norms
from .directions import directions
from .factors import (
    Ekfac,
    Moments,
    eigenbasis_rows,
    fit,
    of_tensors,
    tensors_of,
)
from .passes import Passes, Seen
from .problem import Problem
from .set_up import Kept

DIRECTIONS, FEW_DIRECTIONS, DEAR = 9, 2, 3e10
"""Eigenvectors of the loss's Hessian in a sample's outputs that may become rows (the rest is drawn), and how many where
a product takes more floating-point operations than that: each is a backward pass in each of three sweeps."""


COLUMNS = 2**16
"""Of J at a time in the products of its rows."""


class LowRank:
    """EKFAC's eigenbasis, the diagonal d in it, the largest rows J, and where the trace of G lies.

    Attributes:
        factors: EKFAC of the rows that are not in `J`; its eigenvalues are d.
        J: the largest rows in the eigenbasis, the largest in the layers first [m, P].
        weights: the share of each training sample in the trace of G [n].
    """

    def __init__(self, factors: Ekfac, J: Tensor, weights: Tensor) -> None:
        self.factors, self.J, self.weights = factors, J, weights
        self._diagonals: dict[int, Tensor] = {}

    @property
    def mean_eigenvalue(self) -> float:
        """tr(G) / P."""
        return (
            self.factors.mean_eigenvalue
            + float(self.J.norm()) ** 2 / self.J.shape[1]
        )

    def held(self, rows: int) -> float:
        """The share of the trace of G in the so many largest rows."""
        trace = self.J.shape[1] * self.mean_eigenvalue
        return float(self.J[:rows].norm()) ** 2 / trace if trace else 1.0

    def heaviest(self, share: float) -> list[int]:
        """The fewest training samples that hold this share of the trace of G, in order."""
        order = self.weights.argsort(descending=True, stable=True)
        count = (
            int(
                (
                    self.weights[order].cumsum(0) < share * self.weights.sum()
                ).sum()
            )
            + 1
        )
        indices: list[int] = order[:count].sort().values.tolist()
        return indices

    def inverse(self, damping: float, rows: int | None = None) -> Woodbury:
        """(G + damping I)^-1 with the `rows` largest rows exact (None: all), the others on the diagonal."""
        J = self.J[:rows]
        return Woodbury(self.factors, self._diagonal(len(J)) + damping, J)

    def _diagonal(self, rows: int) -> Tensor:
        """That of all but the `rows` largest rows [P], kept for the next damping."""
        if rows not in self._diagonals:
            total = self.factors.eigenvalues.clone()
            for row in self.J[rows:]:
                total.addcmul_(row, row)
            self._diagonals[rows] = total
        return self._diagonals[rows]


@dataclasses.dataclass
class Woodbury:
    """(diag(D) + J^T J)^{-1} in the eigenbasis of `factors`, as a map of stacks [K, P]."""

    factors: Ekfac
    D: Tensor
    J: Tensor

    def __post_init__(self) -> None:
        gram = self.J.new_zeros(len(self.J), len(self.J), dtype=torch.double)
        # a part at a time: no second J
        for J, D in zip(
            self.J.split(COLUMNS, 1), self.D.split(COLUMNS), strict=True
        ):
            B = J / D.sqrt()
            gram += B @ B.T
        gram.diagonal().add_(1)
        self.L = torch.linalg.cholesky(gram).to(self.J)

    def __call__(self, v: Tensor) -> Tensor:
        """The inverse of each row of v [K, P] -> [K, P]."""
        return self.of_turned(self.factors.to_eigenbasis(v))

    def of_turned(self, v: Tensor) -> Tensor:
        """The same of rows that are in the eigenbasis already."""
        scaled = v / self.D
        inside: Tensor = torch.cholesky_solve(self.J @ scaled.T, self.L)
        return self.factors.from_eigenbasis(
            scaled - (inside.T @ self.J) / self.D
        )

    def quadratic(self, v: Tensor) -> Tensor:
        """v_k . (its inverse) of each row of v [K, P] -> [K]."""
        v = self.factors.to_eigenbasis(v)
        scaled = v / self.D
        inside: Tensor = torch.linalg.solve_triangular(
            self.L, self.J @ scaled.T, upper=False
        )
        return (v * scaled).sum(1) - inside.square().sum(0)


def low_rank(problem: Problem, rows: int) -> LowRank:
    """Find the largest `rows` rows of G, and fit EKFAC to the others."""
    dear = problem.product_work > DEAR
    passes = Passes(problem, FEW_DIRECTIONS if dear else DIRECTIONS)

    def make() -> Kept:
        basis = _fitted(passes, rows)
        own = {"J": basis.J, "weights": basis.weights}
        return Kept({**tensors_of(basis.factors), **own})

    tensors = problem.set_up.kept(f"low_rank_{rows}", make).tensors
    theta = problem.objective.theta
    J, weights = (tensors[name].to(theta.device) for name in ("J", "weights"))
    return LowRank(of_tensors(passes, tensors), J, weights)


def _fitted(passes: Passes, rows: int) -> LowRank:
    problem = passes.problem
    norms, exact, moments = _first_pass(passes)
    weights, candidates = norms.sum(0), norms[:exact]
    largest = candidates.flatten().topk(min(rows, candidates.numel())).indices
    places = torch.full_like(norms, -1, dtype=torch.long)
    places.view(-1)[largest] = torch.arange(len(largest), device=places.device)
    J = problem.objective.theta.new_zeros(len(largest), problem.objective.P)
    taken = places >= 0
    factors = fit(
        passes,
        ~taken,
        moments,
        lambda found, seen: _keep_rows(J, passes, found, places, seen),
    )
    passes.share().total(J)
    J /= problem.samples.n**0.5
    outside = factors.outside
    factors.eigenvalues[outside] = (
        factors.eigenvalues[outside] - J[:, outside].square().sum(0)
    ).clamp_min(0)
    if bool(taken.all()):
        factors.eigenvalues.zero_()  # no row is left, only rounding, and noise outside the layers
    return LowRank(factors, J, weights)


def _first_pass(passes: Passes) -> tuple[Tensor, int, Moments | None]:
    r"""\|g_ik\|^2 of all rows [D, n], and how many of the D draws are eigenvectors, which come first.

    Where a pass is expensive what the factors are made from comes from the same one, of all rows.
    """
    moments = Moments(passes) if passes.expensive else None
    norms, exact = [], 0
    for seen in passes:  # samples come in order
        norms.append(_norms(seen))
        outputs = sum(part[0, 0].numel() for part in seen.cotangents)
        exact = directions(outputs, passes.top or 0)
        if moments is not None:
            moments.add(passes.some(seen))
    return passes.share().joined(torch.cat(norms, 1), 1), exact, moments


def _norms(seen: Seen) -> Tensor:
    r"""\|g_ik\|^2 in the layers; without any \|e_ik\|^2 in its place -> [D, B]."""
    if not seen.inputs:
        return torch.stack(
            [e.flatten(2).square().sum(2) for e in seen.cotangents]
        ).sum(0)
    layers = [
        _outer_norms(x, g)
        for x, g in zip(seen.inputs, seen.gradients, strict=True)
    ]
    return torch.stack(layers).sum(0)


def _outer_norms(a: Tensor, g: Tensor) -> Tensor:
    r"""\|\sum_t g_t a_t^T\|^2 of each draw and sample, all groups; a [B, T, groups, in], g [D, B, T, groups, out]
    -> [D, B]."""
    a, g = a.transpose(1, 2), g.transpose(2, 3)
    if is_one_hot(a):
        return torch.stack([one_hot_norms(draw, a) for draw in g])
    if a.shape[2] == 1:
        return (a.square().sum((2, 3)) * g.square().sum((3, 4))).sum(2)
    if a.shape[2] ** 2 < a.shape[3] * g.shape[4]:
        pairs = a @ a.mT
        return torch.stack(
            [(pairs * (draw @ draw.mT)).sum((1, 2, 3)) for draw in g]
        )
    return torch.stack(
        [
            torch.stack(
                [_squared(x.mT @ y) for x, y in zip(draw, a, strict=True)]
            )
            for draw in g
        ]
    )


def _squared(W: Tensor) -> Tensor:
    """Its squared norm, without a copy."""
    flat = W.flatten()
    return flat @ flat


def _keep_rows(
    J: Tensor, passes: Passes, factors: Ekfac, places: Tensor, seen: Seen
) -> None:
    """Put the rows of a batch that are taken into J, at their places there [D, n], in the eigenbasis."""
    own = places[:, torch.as_tensor(seen.batch.indices, device=places.device)]
    draws, samples = (own >= 0).nonzero(as_tuple=True)
    at = own[draws, samples]
    for k, rows in _rows(passes, factors, draws, samples, seen):
        J[at[k]] = rows


def _rows(
    passes: Passes, factors: Ekfac, draws: Tensor, places: Tensor, seen: Seen
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of these (draw, place in the batch) pairs in the eigenbasis [., P], some at a time."""
    objective = passes.problem.objective
    row = 8 * (
        objective.P * objective.theta.element_size()
        + activation_bytes(objective, seen.batch)
    )
    size = max(1, int(passes.problem.budget.product / row))
    for start in range(0, len(draws), size):
        some = slice(start, start + size)
        yield (
            some,
            eigenbasis_rows(
                objective, factors, seen, draws[some], places[some]
            ),
        )
