r"""EKFAC: the Gauss-Newton matrix as one Kronecker-factored block per layer, with corrected eigenvalues.

Of a layer with inputs a_t and output gradients g_t (t over sequence or image positions) the gradient of one sample is
\sum_t g_t a_t^T. Martens & Grosse 2015 take S \otimes A, A = E[a a^T], S = E[g g^T], for its block; George et al.
2018 keep the eigenvectors Q_S \otimes Q_A and replace the eigenvalues by E[(Q_S^T \sum_t g_t a_t^T Q_A)^2]. The g are
drawn so that E[g g^T] is the Gauss-Newton matrix itself (for cross-entropy and Gaussian losses the true Fisher matrix),
or summed over all outputs where there are few. The scale and shift of a norm, and a bias alone, are outputs of a single
input that is one: their block is exact. Parameters outside such layers have a diagonal block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batch import Batch
from ..model.budget import outer_block
from ..model.gradients import per_sample_gradients
from ..model.layers import Layer, backward, forward, gather, layer_inputs, scatter
from ..model.objective import Objective
from ..model.outer_products import (
    is_one_hot,
    one_hot_squares,
    one_hot_weighted_squares,
    outer_products,
    rotated,
    second_moment,
)
from .damping import choose_damping
from .passes import Passes, Seen, batch_size, output_rows
from .problem import Problem
from .solution import Damping, Prepared, Solution
from .system import System

logger = logging.getLogger(__name__)
DAMPING_TARGET = 0.7
"""The error to stay below where EKFAC alone predicts: it is larger at every lambda than that of the true system."""
CERTIFIED = 256
"""Training samples that the residual is measured on."""


class Block(NamedTuple):
    """Eigenvectors of the two factors of a layer's groups; None are the axes."""

    layer: Layer
    Q_in: Tensor | None
    """[groups, in, in]"""
    Q_out: Tensor | None
    """[groups, out, out]"""

    def rotated(self, g: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer sees, in the eigenbasis: [..., T, groups, out], [B, T, groups, in] -> [..., groups, T, .]."""
        return rotated(g, self.Q_out), rotated(a, self.Q_in)

    def to_eigenbasis(self, W: Tensor) -> Tensor:
        """[K, groups, out, in] -> the same shape."""
        W = W if self.Q_out is None else self.Q_out.mT @ W
        return W if self.Q_in is None else W @ self.Q_in

    def from_eigenbasis(self, W: Tensor) -> Tensor:
        """The inverse of `to_eigenbasis`."""
        W = W if self.Q_out is None else self.Q_out @ W
        return W if self.Q_in is None else W @ self.Q_in.mT


class Ekfac:
    r"""The approximation of G: apply (G + \lambda I)^{-1}, G itself, or their quadratic form to stacks [K, P].

    Attributes:
        blocks: the layers with their eigenvectors.
        eigenvalues: [P]; coordinates in the eigenbasis lie where the parameters of their layer do.
        outside: indices of the parameters outside the layers, whose coordinates are themselves.
    """

    def __init__(self, blocks: list[Block], eigenvalues: Tensor, outside: Tensor) -> None:
        self.blocks, self.eigenvalues, self.outside = blocks, eigenvalues, outside

    def to_eigenbasis(self, v: Tensor) -> Tensor:
        """Each row of v [K, P] in the eigenbasis -> [K, P]."""
        result = v.clone()
        for block in self.blocks:
            scatter(block.layer, block.to_eigenbasis(gather(block.layer, v)), result)
        return result

    def from_eigenbasis(self, v: Tensor) -> Tensor:
        """The inverse of `to_eigenbasis`."""
        result = v.clone()
        for block in self.blocks:
            scatter(block.layer, block.from_eigenbasis(gather(block.layer, v)), result)
        return result

    def power(self, v: Tensor, damping: float, exponent: float) -> Tensor:
        """(G + damping I)^exponent of each row of v [K, P] -> [K, P]."""
        return self.apply(v, lambda eigenvalues: (eigenvalues + damping) ** exponent)

    def inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        """The map (G + damping I)^-1 of stacks [K, P] -> [K, P]."""
        return lambda v: self.power(v, damping, -1)

    def __call__(self, v: Tensor) -> Tensor:
        """G of each row of v [K, P] -> [K, P]."""
        return self.apply(v, lambda eigenvalues: eigenvalues)

    def quadratic(self, v: Tensor, damping: float) -> Tensor:
        """v_k . (G + damping I)^-1 v_k of each row of v [K, P] -> [K]."""
        squares = self.to_eigenbasis(v).square()
        return (squares / (self.eigenvalues + damping)).sum(1)

    def apply(self, v: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """f(G) of each row of v [K, P] -> [K, P], f of the eigenvalues."""
        return self.from_eigenbasis(self.to_eigenbasis(v) * function(self.eigenvalues))

    @property
    def mean_eigenvalue(self) -> float:
        """Mean of the P eigenvalues."""
        return float(self.eigenvalues.mean())


def ekfac(problem: Problem, damping: Damping | None = None) -> Prepared:
    r"""Solve with the EKFAC approximation in place of G: no iteration, two passes over the training set."""
    require_gauss_newton(problem)
    factors = build(problem)
    if damping is None:
        damping = choose_damping(problem, _shift(factors), factors.mean_eigenvalue, DAMPING_TARGET)
    return solver(problem, factors, damping)


def require_gauss_newton(problem: Problem) -> None:
    """Raise `ValueError` where the user asks for the Hessian."""
    if problem.curvature.kind != "ggn":
        raise ValueError(
            f"config['curvature'] = 'hessian' with config['solver'] = {problem.config.solver_in_use[0]!r}: EKFAC "
            "approximates the Gauss-Newton matrix; leave config['curvature'] out, or use config['solver'] = 'cg', "
            "which it may precondition"
        )


def _shift(factors: Ekfac) -> Callable[[Tensor, float], Tensor]:
    return lambda v, damping: factors.power(v, damping, -1)


def solver(problem: Problem, factors: Ekfac, damping: Damping) -> Prepared:
    """Solve with these factors; the residual is measured where it is asked for."""
    inverse = factors.inverse(damping.value)

    def solve(v: Tensor, tests: int) -> Solution:
        return Solution(inverse(v))

    def self_products() -> Tensor:
        if len(factors.outside) == 0:
            return _by_layers(problem, factors, damping.value)
        return by_gradients(problem, lambda g: factors.quadratic(g, damping.value))

    facts = {"mean_eigenvalue": factors.mean_eigenvalue, "layers": len(factors.blocks)}
    return Prepared(
        System(problem, damping.value),
        solve,
        report={**damping.report, **facts},
        certified=CERTIFIED,
        self_products=self_products,
    )


def _by_layers(problem: Problem, factors: Ekfac, damping: float) -> Tensor:
    r"""g_i^T (G + \lambda I)^{-1} g_i of each training sample [n], from what its layers see."""
    layers = [block.layer for block in factors.blocks]
    weights = 1 / (factors.eigenvalues + damping).unsqueeze(0)
    result = torch.zeros(problem.samples.n, dtype=problem.objective.dtype)
    for batch in problem.samples.ordered(batch_size(problem, layers), text="Self-influence"):
        for one in batch.parts or (batch,):
            found = _quadratic_by_layers(problem.objective, factors, weights, one, problem.budget.product)
            result[torch.as_tensor(one.indices)] = found.detach().cpu()
    return result


def _quadratic_by_layers(
    objective: Objective, factors: Ekfac, weights: Tensor, batch: Batch, max_bytes: float
) -> Tensor:
    """The quadratic form with `weights` [1, P] in the eigenbasis of each sample's gradient -> [B]."""
    layers = [block.layer for block in factors.blocks]
    seen = forward(objective, layers, batch)
    y = [part.detach().requires_grad_() for part in seen.y]
    losses = objective.output_losses(seen.rebuild(y), batch).sum()
    e = list(torch.autograd.grad(losses, y, materialize_grads=True, allow_unused=True))
    g, _ = backward(layers, seen, e, batch.size)
    total = objective.theta.new_zeros(batch.size)
    for block, x, d in zip(factors.blocks, layer_inputs(layers, seen, batch.size), g, strict=True):
        left, right = block.rotated(d, x)
        total = total + _weighted_squares(left, right, gather(block.layer, weights)[0], max_bytes)
    return total


def _weighted_squares(g: Tensor, a: Tensor, w: Tensor, max_bytes: float) -> Tensor:
    """Sum of w (sum_t g_t a_t^T)^2 of each sample; g [B, groups, T, out], a [B, groups, T, in] -> [B]."""
    if is_one_hot(a):
        return one_hot_weighted_squares(g, a, w)
    if g.shape[2] == 1:
        once = g[:, :, 0].square().unsqueeze(2) @ w
        return (once.squeeze(2) * a[:, :, 0].square()).sum((1, 2))
    size = _few(g, a, max_bytes)
    pairs = zip(g.split(size), a.split(size), strict=True)
    return torch.cat([((p.mT @ q).square() * w).sum((1, 2, 3)) for p, q in pairs])


def by_gradients(problem: Problem, quadratic: Callable[[Tensor], Tensor]) -> Tensor:
    """The quadratic form [K, P] -> [K] of the gradient of each training sample -> [n], on the CPU."""
    result = torch.zeros(problem.samples.n, dtype=problem.objective.dtype)
    for batch in problem.samples.ordered(problem.gradient_batch, text="Self-influence"):
        gradients = per_sample_gradients(problem.objective, batch, problem.max_bytes)
        result[torch.as_tensor(batch.indices)] = quadratic(gradients).detach().cpu()
    return result


# ---- the factors


def build(problem: Problem) -> Ekfac:
    """Gather the factors in one pass over the training set and the corrected eigenvalues in a second."""
    return fit(Passes(problem))


def fit(passes: Passes, keep: Tensor | None = None) -> Ekfac:
    """EKFAC of the training set; `keep` [draws, n]: of these rows of the layers only (outside them it is of all)."""
    layers, n = passes.layers, passes.problem.samples.n
    theta, max_bytes = passes.problem.objective.theta, passes.problem.budget.product
    eigenvalues = torch.zeros_like(theta).unsqueeze(0)
    A: dict[int, Tensor] = {}
    S: dict[int, Tensor] = {}
    for seen in passes:
        eigenvalues[0, passes.outside] += seen.outside / n
        for i, (x, g) in enumerate(zip(seen.inputs, _kept(seen, keep), strict=True)):
            if (i, "in") not in passes.axes:
                _add(A, i, second_moment(x))
            if (i, "out") not in passes.axes:
                _add(S, i, second_moment(g.flatten(0, 1)))
    # each factor is let go once its eigenvectors are there
    blocks = [Block(layer, _eigenvectors(A, i, n), _eigenvectors(S, i, n)) for i, layer in enumerate(layers)]
    squares: dict[int, Tensor] = {}
    for seen in passes:
        for i, (x, g) in enumerate(zip(seen.inputs, _kept(seen, keep), strict=True)):
            left, right = blocks[i].rotated(g, x)
            _add(squares, i, _squares(left, right, layers[i].classes, max_bytes))
    for i, layer in enumerate(layers):
        scatter(layer, squares.pop(i).div_(n).unsqueeze(0), eigenvalues)
    return Ekfac(blocks, eigenvalues[0], passes.outside)


def _add(sums: dict[int, Tensor], i: int, part: Tensor) -> None:
    """Add to the i-th sum."""
    if i in sums:
        sums[i].add_(part)
    else:
        sums[i] = part


def _kept(seen: Seen, keep: Tensor | None) -> list[Tensor]:
    """The gradients of each layer's outputs, zero for the rows that `keep` [D, n] leaves out."""
    if keep is None:
        return seen.gradients
    mask = keep[:, torch.as_tensor(seen.batch.indices, device=keep.device)]
    return [g * mask.to(g).view(*mask.shape, 1, 1, 1) for g in seen.gradients]


def _eigenvectors(sums: dict[int, Tensor], i: int, n: int) -> Tensor | None:
    """Those of the i-th sum over n samples, which is let go; None where the axes stand for them."""
    return torch.linalg.eigh(sums.pop(i).div_(n))[1] if i in sums else None


def _squares(g: Tensor, a: Tensor, classes: int | None, max_bytes: float) -> Tensor:
    """Sum over draws and samples of (sum_t g_t a_t^T)^2; g [D, B, groups, T, out], a [B, groups, T, in]."""
    if classes is not None:
        return one_hot_squares(g, a, classes)
    if g.shape[3] == 1:
        return g[:, :, :, 0].square().sum(0).permute(1, 2, 0) @ a[:, :, 0].square().transpose(0, 1)
    size = _few(g[0], a, max_bytes)
    total = g.new_zeros(g.shape[2], g.shape[4], a.shape[3])
    for draw in g:
        for x, y in zip(draw.split(size), a.split(size), strict=True):
            total += (x.mT @ y).square_().sum(0)
    return total


def _few(g: Tensor, a: Tensor, max_bytes: float) -> int:
    """How many samples' gradients of a layer to hold at once; g [B, groups, T, out], a [B, groups, T, in]."""
    return outer_block(g.shape[1] * g.shape[3] * a.shape[3] * a.element_size(), max_bytes)


def eigenbasis_rows(objective: Objective, factors: Ekfac, seen: Seen, draws: Tensor, places: Tensor) -> Tensor:
    """The gradients J_i^T e_ik of these (draw, place in the batch) pairs, in the eigenbasis -> [len(draws), P]."""
    rows = torch.zeros(len(draws), objective.P, dtype=objective.dtype, device=objective.device)
    for block, x, g in zip(factors.blocks, seen.inputs, seen.gradients, strict=True):
        left, right = block.rotated(g[draws, places], x[places])
        scatter(block.layer, outer_products(left, right, block.layer.classes), rows)
    if len(factors.outside):
        batch = seen.batch
        e = [part[draws, places] for part in seen.cotangents]
        if batch.size > 1:
            batch = batch._replace(leaves=[t[places] for t in batch.leaves], size=len(places), indices=places.tolist())
        rows[:, factors.outside] = output_rows(objective, batch, e)[:, factors.outside]
    return rows
