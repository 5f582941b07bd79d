r"""EKFAC: the Gauss-Newton matrix as one Kronecker-factored block per layer, with corrected eigenvalues.

Of a layer with inputs a_t and output gradients g_t (t over sequence or image positions) the gradient of one sample is
\sum_t g_t a_t^T. Martens & Grosse 2015 take S \otimes A, A = E[a a^T], S = E[g g^T], for its block; George et al.
2018 keep the eigenvectors Q_S \otimes Q_A and replace the eigenvalues by E[(Q_S^T \sum_t g_t a_t^T Q_A)^2]. The g are
drawn so that E[g g^T] is the Gauss-Newton matrix itself (for cross-entropy and Gaussian losses the true Fisher matrix),
or summed over all outputs where there are few. The scale and shift of a norm, and a bias alone, are outputs of a single
input that is one: their block is exact. Parameters outside such layers have a diagonal block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..model.budget import rows_block
from ..model.layers import Layer, gather, scatter
from ..model.objective import Objective
from .bases import Basis, Moment
from .blocks import Block
from .passes import Passes, Seen, output_rows
from .problem import Problem
from .set_up import Kept, Share


class Ekfac:
    r"""The approximation of G: apply (G + \lambda I)^{-1}, G itself, or their quadratic form to stacks [K, P].

    Attributes:
        blocks: the layers with their eigenvectors.
        eigenvalues: [P]; coordinates in the eigenbasis lie where the parameters of their layer do.
        outside: indices of the parameters outside the layers, whose coordinates are themselves.
    """

    def __init__(
        self, blocks: list[Block], eigenvalues: Tensor, outside: Tensor
    ) -> None:
        self.blocks = blocks
        self.eigenvalues = eigenvalues
        self.outside = outside

    def to_eigenbasis(self, v: Tensor) -> Tensor:
        """Each row of v [K, P] in the eigenbasis -> [K, P]."""
        return self._by(Block.to_eigenbasis, v.clone())

    def from_eigenbasis(self, v: Tensor, inplace: bool = False) -> Tensor:
        """The inverse of `to_eigenbasis`."""
        if not inplace:
            v = v.clone()
        return self._by(Block.from_eigenbasis, v)

    def _by(
        self,
        turn: Callable[[Block, Tensor], Tensor],
        v: Tensor,
    ) -> Tensor:
        """Each layer's part of v [K, P] turned, in its place."""
        for block in self.blocks:
            layer = block.layer
            for part, into in _few_rows(layer, v, v):
                W = gather(layer, part)
                turned = turn(block, W)
                scatter(layer, turned, into)
        return v

    def power(self, v: Tensor, damping: float, exponent: float) -> Tensor:
        """(G + damping I)^exponent of each row of v [K, P] -> [K, P]."""
        return self.apply(
            v, lambda eigenvalues: (eigenvalues + damping) ** exponent
        )

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
        """f(G) of each row of v [K, P] -> [K, P], f of the eigenvalues; one layer after the other, for the memory."""
        values = function(self.eigenvalues).unsqueeze(0)
        result = v * values
        for block in self.blocks:
            layer = block.layer
            own = gather(layer, values)
            for part, into in _few_rows(layer, v, result):
                W = gather(layer, part)
                W = block.to_eigenbasis(W)
                W = block.from_eigenbasis(W * own)
                scatter(layer, W, into)
        return result

    @property
    def mean_eigenvalue(self) -> float:
        """Mean of the P eigenvalues."""
        return float(self.eigenvalues.mean())


def _few_rows(
    layer: Layer,
    v: Tensor,
    result: Tensor,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time of two stacks [K, P], of which the layer's part is turned."""
    sizes = [place.stop - place.start for place in layer.places]
    size = rows_block(
        sum(sizes) * v.element_size(),
        v.device.type,
        len(v),
    )
    parts = v.split(size)
    into = result.split(size)
    return zip(parts, into, strict=True)


class Inverses:
    r"""(G + \lambda I)^{-1} of one stack at several \lambda, turned into the eigenbasis once: half the work.

    Args:
        factors: the approximation of G.
    """

    def __init__(self, factors: Ekfac) -> None:
        self.factors = factors
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, v: Tensor, damping: float) -> Tensor:
        """Of each row of v [K, P] -> [K, P]."""
        weights = (self.factors.eigenvalues + damping) ** -1
        scaled = self.turned(v) * weights
        return self.factors.from_eigenbasis(scaled, inplace=True)

    def turned(self, v: Tensor) -> Tensor:
        """v in the eigenbasis, kept as long as the same v is asked for."""
        last = self._last
        if last is not None and last[0] is v:
            return last[1]
        self._last = None
        turned = self.factors.to_eigenbasis(v)
        self._last = v, turned
        return turned


def build(problem: Problem) -> Ekfac:
    """Gather the factors in one pass over the training set and the corrected eigenvalues in a second."""
    passes = Passes(problem)
    found = problem.set_up.kept("ekfac", lambda: Kept(tensors_of(fit(passes))))
    return of_tensors(passes, found.tensors)


def tensors_of(factors: Ekfac) -> dict[str, Tensor]:
    """By name."""
    result = {"eigenvalues": factors.eigenvalues}
    for i, block in enumerate(factors.blocks):
        pair = {f"Q_in_{i}": block.Q_in, f"Q_out_{i}": block.Q_out}
        for name, Q in pair.items():
            parts = {} if Q is None else Q._asdict()
            for key, part in parts.items():
                if part is not None:
                    result[f"{name}_{key}"] = part
    return result


def of_tensors(passes: Passes, tensors: dict[str, Tensor]) -> Ekfac:
    """The inverse of `tensors_of`."""
    device = passes.problem.objective.device
    here = {name: tensor.to(device) for name, tensor in tensors.items()}

    def basis(name: str) -> Basis | None:
        U, V, tau = (here.get(f"{name}_{key}") for key in Basis._fields)
        if U is None:
            return None
        return Basis(U, V, tau)

    blocks = [
        Block(layer, basis(f"Q_in_{i}"), basis(f"Q_out_{i}"))
        for i, layer in enumerate(passes.layers)
    ]
    return Ekfac(blocks, here["eigenvalues"], passes.outside)


Also = Callable[["Ekfac", Seen], None]
"""What else is made of the pass of the eigenvalues, once the eigenvectors are there."""


class Moments:
    """Second moments of what the layers see, and of the gradients outside them, summed over the training set.

    Args:
        passes: the training set as the layers see it.
        keep: the rows of the layers that count [draws, n]; None: all.
    """

    def __init__(self, passes: Passes, keep: Tensor | None = None) -> None:
        self.passes, self.keep = passes, keep
        self.A: dict[int, Moment] = {}
        self.S: dict[int, Moment] = {}
        self.outside = passes.problem.objective.theta.new_zeros(
            len(passes.outside)
        )

    def add(self, seen: Seen) -> None:
        """Of one more batch."""
        axes = self.passes.axes
        self.outside = self.outside + seen.outside
        pairs = zip(seen.inputs, _kept(seen, self.keep), strict=True)
        for i, (x, g) in enumerate(pairs):
            if (i, "in") not in axes:
                self.A.setdefault(i, Moment()).add(x)
            if (i, "out") not in axes:
                self.S.setdefault(i, Moment()).add(g.flatten(0, 1))

    def factors(self) -> Ekfac:
        """The eigenvectors, each factor let go once they are there; eigenvalues outside the layers only."""
        n, outside = self.passes.problem.samples.n, self.passes.outside
        share = self.passes.share()
        blocks = [
            Block(
                layer,
                _eigenvectors(self.A, i, share),
                _eigenvectors(self.S, i, share),
            )
            for i, layer in enumerate(self.passes.layers)
        ]
        eigenvalues = torch.zeros_like(self.passes.problem.objective.theta)
        if len(outside):
            eigenvalues[outside] += share.total(self.outside) / n
        return Ekfac(blocks, eigenvalues, outside)


def fit(
    passes: Passes,
    keep: Tensor | None = None,
    moments: Moments | None = None,
    also: Also | None = None,
) -> Ekfac:
    """EKFAC of the training set.

    Args:
        passes: the training set as the layers see it.
        keep: the rows of the layers it is of [draws, n] (outside them it is of all); None: all.
        moments: what the eigenvectors are made from; None: those of these rows, in a pass of their own.
        also: what else the pass of the eigenvalues is for.
    """
    if moments is None:
        moments = Moments(passes, keep)
        for seen in passes.first_look():
            moments.add(seen)
    factors = moments.factors()
    squares: dict[int, Tensor] = {}
    max_bytes, n = passes.problem.budget.product, 0
    for seen in passes:
        n += seen.batch.size
        pairs = zip(seen.inputs, _kept(seen, keep), strict=True)
        for i, (x, g) in enumerate(pairs):
            _add(squares, i, factors.blocks[i].squares(g, x, max_bytes))
        if also is not None:
            also(factors, seen)
    eigenvalues, share = factors.eigenvalues.unsqueeze(0), passes.share()
    of_all = int(share.total(torch.tensor(n)))
    for i, layer in enumerate(passes.layers):
        found = share.total(squares.pop(i))
        scatter(layer, found.div_(of_all).unsqueeze(0), eigenvalues)
    return factors


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


def _eigenvectors(
    moments: dict[int, Moment], i: int, share: Share
) -> Basis | None:
    """Those of the i-th moment, which is let go; None where the axes stand for them."""
    return moments.pop(i).basis(share) if i in moments else None


def eigenbasis_rows(
    objective: Objective,
    factors: Ekfac,
    seen: Seen,
    draws: Tensor,
    places: Tensor,
) -> Tensor:
    """The gradients J_i^T e_ik of these (draw, place in the batch) pairs, in the eigenbasis -> [len(draws), P]."""
    rows = torch.zeros(
        len(draws), objective.P, dtype=objective.dtype, device=objective.device
    )
    for block, x, g in zip(
        factors.blocks, seen.inputs, seen.gradients, strict=True
    ):
        scatter(block.layer, block.products(g[draws, places], x[places]), rows)
    if len(factors.outside):
        batch = seen.batch
        e = [part[draws, places] for part in seen.cotangents]
        if batch.size > 1:
            batch = batch._replace(
                leaves=[t[places] for t in batch.leaves],
                size=len(places),
                indices=places.tolist(),
            )
        rows[:, factors.outside] = output_rows(objective, batch, e)[
            :, factors.outside
        ]
    return rows
