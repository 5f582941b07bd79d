"""Extreme eigenvalues of a symmetric map, from its products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Spectrum(NamedTuple):
    """Extreme eigenvalues of a symmetric map, and what gives the vector [P] of the smallest."""

    largest: float
    smallest: float
    lowest: Callable[[], Tensor]


def extreme_eigenvalues(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    steps: int = 12,
    change: float = 0.02,
) -> Spectrum:
    """Largest and smallest Ritz value of a symmetric map by Lanczos, with the last two vectors of the basis alone.

    The basis loses its orthogonality only along a Ritz vector that has converged (Paige 1976), which makes copies of
    that value but no false end. To hold the basis would take `steps` vectors; the vector of the smallest value, which
    is rarely asked for, comes from a second run over the same products.

    Args:
        product: [1, P] -> [1, P], the same each time.
        start: a random vector [P].
        steps: at most this many products.
        change: stop once neither end moves by more than this fraction of the largest.
    """
    alphas: list[float] = []
    betas: list[float] = []
    ends = (0.0, 0.0)
    for step, (alpha, beta, _) in enumerate(
        _lanczos(product, start, min(steps, len(start)))
    ):
        alphas.append(alpha)
        ritz, vectors = torch.linalg.eigh(_tridiagonal(alphas, betas))
        last, ends = ends, (float(ritz[0]), float(ritz[-1]))
        size = max(abs(ends[0]), abs(ends[1]), 1e-30)
        settled = (
            step > 3
            and max(abs(a - b) for a, b in zip(last, ends, strict=True))
            < change * size
        )
        if settled or beta <= 1e-6 * size:
            break
        betas.append(beta)
    weights = vectors[:, 0].tolist()

    def lowest() -> Tensor:
        total = torch.zeros_like(start)
        for weight, (_, _, q) in zip(
            weights, _lanczos(product, start, len(weights)), strict=True
        ):
            total.add_(q, alpha=weight)
        return total

    return Spectrum(ends[1], ends[0], lowest)


def _lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, steps: int
) -> Iterator[tuple[float, float, Tensor]]:
    """The entries on and beside the diagonal of the tridiagonal matrix, and the vector of the basis, step by step."""
    q, before = start / start.norm(), torch.zeros_like(start)
    beta = 0.0
    for _ in range(steps):
        w = product(q.unsqueeze(0))[0].sub(before, alpha=beta)
        alpha = float(w @ q)
        w.sub_(q, alpha=alpha)
        beta = float(w.norm())
        yield alpha, beta, q
        q, before = w.div_(beta), q


def _tridiagonal(alphas: Sequence[float], betas: Sequence[float]) -> Tensor:
    T = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    off = torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64)
    return T + torch.diag(off, 1) + torch.diag(off, -1) if len(off) else T
