r"""EKFAC that holds the largest rows of the Gauss-Newton matrix exactly.

G = (1/n) \sum_{ik} g_{ik} g_{ik}^T, g_{ik} = J_i^T e_{ik}, over the eigenvectors e_{ik} of the loss's Hessian in the
outputs. J [m, P] is made of the m largest g_{ik} / \sqrt{n}, diag(d) is EKFAC of all other rows, both in EKFAC's
eigenbasis. With D = d + \lambda, (diag(D) + J^T J)^{-1} = D^{-1} - D^{-1} J^T (I + J D^{-1} J^T)^{-1} J D^{-1}
(Woodbury): exact where J holds all rows, EKFAC where it holds none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..model.gradients import activation_bytes
from ..model.outer_products import is_one_hot, one_hot_norms
from .cg import iterate
from .damping import HALVES
from .directions import directions
from .ekfac import DAMPING_TARGET
from .errors import NegativeCurvatureError
from .factors import Ekfac, Moments, eigenbasis_rows, fit
from .paired import choose_damping, error_curve
from .passes import Passes, Seen
from .problem import Problem
from .solution import Damping

DIRECTIONS, FEW_DIRECTIONS, DEAR = 9, 2, 3e10
"""Eigenvectors of the loss's Hessian in a sample's outputs that may become rows (the rest is drawn), and how many where
a product takes more floating-point operations than that: each is a backward pass in each of three sweeps."""


ROWS_FOR_DAMPING = 200
"""Rows that are exact in what preconditions the choice of the damping; twice as many where no product follows."""
INVERSE_WORK = 2e9
"""Floating-point operations of one inverse with exact rows in the choice of the damping, which takes up to a dozen."""
COLUMNS = 2**16
"""Of J at a time in the products of its rows."""
EKFAC_STEPS, PLAIN_STEPS = 4, 20
"""Conjugate gradients for the choice of the damping without a low-rank form: EKFAC alone preconditions less well than
it does beside the largest rows, and nothing at all needs many."""
SHARE = 0.99
"""The products with G run over the training samples that hold this share of its trace."""
WORK = 6e10
"""Floating-point operations for all products with G of an automatic choice: some seconds on one core."""


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
    return torch.cat(norms, 1), exact, moments


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


# ---- products with G, and the damping


class Shift:
    r"""(G + \lambda I)^{-1} g: by the low-rank form, and two steps of conjugate gradients where they are cheap."""

    def __init__(self, problem: Problem, basis: LowRank) -> None:
        self.basis = basis
        self.product = heavy_product(problem, basis)
        self.steps = 2 if _steps_are_cheap(problem) else 0
        self._turned: tuple[Tensor, Tensor] | None = None
        self.most = int((INVERSE_WORK / problem.objective.P) ** 0.5)

    def __call__(self, g: Tensor, damping: float) -> Tensor:
        """[K, P] -> [K, P]."""
        rows = ROWS_FOR_DAMPING if self.steps else 2 * ROWS_FOR_DAMPING
        M = self.basis.inverse(damping, min(rows, self.most))
        if self.steps:
            try:
                return iterate(
                    lambda p: self.product(p) + damping * p,
                    g,
                    M,
                    tolerance=0.0,
                    limit=self.steps,
                )[0]
            except NegativeCurvatureError:
                # a loss that is not convex in the model's output
                self.steps = 0
        return M.of_turned(self._in_eigenbasis(g))

    def _in_eigenbasis(self, g: Tensor) -> Tensor:
        """[K, P] -> [K, P], kept for the next damping, which is tried on the same."""
        if self._turned is None or self._turned[0] is not g:
            self._turned = g, self.basis.factors.to_eigenbasis(g)
        return self._turned[1]


def heavy_product(
    problem: Problem, basis: LowRank
) -> Callable[[Tensor], Tensor]:
    """V -> G V over the training samples that hold nearly all of its trace."""
    indices = basis.heaviest(SHARE)
    G = problem.with_gauss_newton().curvature

    def product(v: Tensor) -> Tensor:
        return G.over(problem.samples.ordered(problem.batch, indices), v) * (
            len(indices) / problem.samples.n
        )

    return product


def damping_by_low_rank(
    problem: Problem, basis: LowRank | None = None
) -> Damping:
    """Choose lambda; `basis` is the low-rank form of the problem's G where it is already there."""
    basis = low_rank(problem, ROWS_FOR_DAMPING) if basis is None else basis
    return choose_damping(problem, Shift(problem, basis), basis.mean_eigenvalue)


def damping_by_ekfac(problem: Problem, factors: Ekfac) -> Damping:
    """Choose lambda where EKFAC is all that fits: the same rule, with steps preconditioned by it."""

    def inverse(v: Tensor, damping: float) -> Tensor:
        return factors.power(v, damping, -1)

    if not _steps_are_cheap(problem):
        return choose_damping(
            problem, inverse, factors.mean_eigenvalue, DAMPING_TARGET
        )
    return choose_damping(
        problem,
        _stepped(problem, inverse, EKFAC_STEPS),
        factors.mean_eigenvalue,
    )


def damping_by_steps(problem: Problem) -> Damping:
    """Choose lambda from products with G alone."""
    v = problem.random_vector(problem.config.seed)
    product = problem.product(v.unsqueeze(0))[0]
    # Hutchinson's estimate of tr(G) / P
    mean_eigenvalue = abs(float(product @ v / (v @ v)))
    return choose_damping(
        problem, _stepped(problem, lambda g, _: g, PLAIN_STEPS), mean_eigenvalue
    )


def _stepped(
    problem: Problem, inverse: Callable[[Tensor, float], Tensor], steps: int
) -> Callable[[Tensor, float], Tensor]:
    """(g, lambda) -> (G + lambda I)^-1 g by a few conjugate gradients, preconditioned by `inverse`."""

    def shift(g: Tensor, damping: float) -> Tensor:
        def product(p: Tensor) -> Tensor:
            return problem.product(p).add_(p, alpha=damping)

        def preconditioned(r: Tensor) -> Tensor:
            return inverse(r, damping)

        try:
            return iterate(
                product, g, preconditioned, tolerance=0.0, limit=steps
            )[0]
        except NegativeCurvatureError:
            # the Hessian, at a lambda that is too small for it
            return torch.full_like(g, torch.nan)

    return shift


def _steps_are_cheap(problem: Problem) -> bool:
    return 5 * 2 * HALVES * problem.product_work <= WORK


def error_curve_by_low_rank(
    problem: Problem, dampings: Sequence[float]
) -> list[float]:
    """The prediction error at each of these dampings, as `damping="auto"` sees it."""
    return error_curve(
        problem, Shift(problem, low_rank(problem, ROWS_FOR_DAMPING)), dampings
    )
