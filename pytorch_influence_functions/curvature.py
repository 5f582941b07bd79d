r"""Products of the curvature with stacks of vectors, its extreme eigenvalues, and the residual of a solution.

H = \nabla^2 L(\theta) (`"hessian"`) and its Gauss-Newton part G = (1/B) \sum_i J_i^T (\nabla^2_y \ell_i) J_i
(`"ggn"`, Schraudolph 2002), which is positive semi-definite where the loss is convex in the model's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from .data import Batch, flatten_tree
from .gradients import REUSED, activation_bytes, reuse
from .objective import Objective

Product = Callable[[Objective, Batch, Tensor], Tensor]
STACK = 32
"""Vectors that go through the model together."""


def hessian_products(objective: Objective, batch: Batch, vectors: Tensor) -> Tensor:
    """H v for each row v of `vectors` [K, P], H over the batch -> [K, P]."""
    if len(vectors) > 1 and objective.paths.hessian and reuse(objective, batch) >= REUSED:
        slope = grad(lambda theta: objective.loss(theta, batch))
        return cast(Tensor, vmap(lambda v: jvp(slope, (objective.theta,), (v,))[1])(vectors))
    theta = objective.theta.detach().requires_grad_()
    (g,) = torch.autograd.grad(objective.loss(theta, batch), theta, create_graph=True)
    if not g.requires_grad:
        return torch.zeros_like(vectors)
    if len(vectors) > 1 and objective.paths.hessian:
        products = torch.autograd.grad(g, theta, vectors, is_grads_batched=True, materialize_grads=True)[0]
        return products.detach()
    each = (torch.autograd.grad(g, theta, v, retain_graph=True, materialize_grads=True)[0] for v in vectors)
    return torch.stack([product.detach() for product in each])


def gauss_newton_products(objective: Objective, batch: Batch, vectors: Tensor) -> Tensor:
    """G v for each row v of `vectors` [K, P], G over the batch -> [K, P]."""

    def outputs(theta: Tensor) -> list[Tensor]:
        leaves, rebuild = flatten_tree(objective.outputs(theta, batch))
        rebuilders.append(rebuild)
        return leaves

    rebuilders: list[Callable[..., object]] = []
    y, pullback = cast(tuple[list[Tensor], Callable[..., tuple[Tensor]]], vjp(outputs, objective.theta))

    def mean_loss(leaves: list[Tensor]) -> Tensor:
        return objective.output_losses(rebuilders[0](leaves), batch).mean()

    # the loss's Hessian in the outputs by double backward, which every loss has
    slope_pullback = vjp(grad(mean_loss), y)[1]

    def product(v: Tensor) -> Tensor:
        u = jvp(outputs, (objective.theta,), (v,))[1]
        return pullback(*slope_pullback(u))[0]

    if len(vectors) > 1 and objective.paths.ggn:
        return vmap(product)(vectors)
    return torch.stack([product(v) for v in vectors])


PRODUCTS: dict[str, Product] = {"hessian": hessian_products, "ggn": gauss_newton_products}


class Curvature:
    """The curvature of an objective as a map of stacks of vectors [K, P], at any batches.

    Args:
        objective: what is differentiated.
        kind: `"hessian"` or `"ggn"`.
        max_bytes: for the working tensors of one product; decides how many vectors go through the model together.
    """

    def __init__(self, objective: Objective, kind: str, max_bytes: float = math.inf) -> None:
        self.objective, self.kind, self.max_bytes = objective, kind, max_bytes
        self._product = PRODUCTS[kind]

    def __call__(self, batch: Batch, vectors: Tensor) -> Tensor:
        """Curvature over one batch times each row of `vectors` [K, P] -> [K, P]."""
        size = self.stack(batch)
        if len(vectors) <= size:
            return self._product(self.objective, batch, vectors)
        return torch.cat([self._product(self.objective, batch, part) for part in vectors.split(size)])

    def over(self, batches: Iterable[Batch], vectors: Tensor) -> Tensor:
        """Curvature over all samples of `batches`, each batch by its size, times `vectors` [K, P] -> [K, P]."""
        total, count = torch.zeros_like(vectors), 0
        for batch in batches:
            total.add_(self(batch, vectors), alpha=batch.size)
            count += batch.size
        return total.div_(count)

    def stack(self, batch: Batch) -> int:
        """How many vectors go through the model together on this batch."""
        per_vector = 6 * batch.size * activation_bytes(self.objective, batch)
        per_vector += 4 * self.objective.P * self.objective.theta.element_size()
        return max(1, int(min(STACK, self.max_bytes / per_vector)))


class Spectrum(NamedTuple):
    """Extreme eigenvalues of a symmetric map, and the vector of the smallest."""

    largest: float
    smallest: float
    lowest: Tensor


def extreme_eigenvalues(
    product: Callable[[Tensor], Tensor], start: Tensor, steps: int = 12, change: float = 0.02
) -> Spectrum:
    """Largest and smallest Ritz value of a symmetric map by Lanczos with full reorthogonalisation.

    Args:
        product: [1, P] -> [1, P].
        start: a random vector [P].
        steps: at most this many products.
        change: stop once neither end moves by more than this fraction of the largest.
    """
    basis = [start / start.norm()]
    alphas: list[float] = []
    betas: list[float] = []
    ends = (0.0, 0.0)
    for step in range(min(steps, len(start))):
        w = product(basis[-1].unsqueeze(0))[0]
        alphas.append(float(w @ basis[-1]))
        Q = torch.stack(basis)
        for _ in range(2):
            w = w - (Q @ w) @ Q
        ritz, vectors = torch.linalg.eigh(_tridiagonal(alphas, betas))
        last, ends = ends, (float(ritz[0]), float(ritz[-1]))
        size = max(abs(ends[0]), abs(ends[1]), 1e-30)
        beta = float(w.norm())
        settled = step > 3 and max(abs(a - b) for a, b in zip(last, ends, strict=True)) < change * size
        if settled or beta <= 1e-6 * size:
            break
        betas.append(beta)
        basis.append(w / beta)
    return Spectrum(ends[1], ends[0], vectors[:, 0].to(Q) @ Q)


def _tridiagonal(alphas: Sequence[float], betas: Sequence[float]) -> Tensor:
    T = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    off = torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64)
    return T + torch.diag(off, 1) + torch.diag(off, -1) if len(off) else T
