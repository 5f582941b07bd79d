r"""The training set as the layers of a model see it, for draws of output gradients.

For each sample the output gradients e have \sum_e e e^T = \nabla^2_y \ell_i in the mean, so that the gradients J_i^T e
are the rows of the Gauss-Newton matrix.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vjp, vmap

from ..data.batch import Batch
from ..model import draws
from ..model.layers import Forward, Layer, backward, forward, layer_inputs, parameter_places, usable_layers
from ..model.likelihoods import DENSE_OUTPUTS, likelihood, roots
from ..model.objective import Objective
from ..model.outputs import attached, numbers_of
from .problem import Problem

logger = logging.getLogger(__name__)
FEW_OUTPUTS = 16
"""Up to this many outputs of a sample the expectation over g is a sum over all of them; beyond it, g is drawn."""
SIGNS = 1
"""The stream of random signs, apart from that of the draws."""


class Seen(NamedTuple):
    """What the layers see of one batch, for D draws of output gradients."""

    batch: Batch
    inputs: list[Tensor]
    """Of each layer [B, T, groups, in]."""
    cotangents: list[Tensor]
    """The output gradients e [D, B, ...]."""
    gradients: list[Tensor]
    """Those of each layer's outputs [D, B, T, groups, out]."""
    outside: Tensor
    """Estimate of the summed squares of all gradients [P]; [1] where no parameter is outside the layers."""

    @property
    def bytes(self) -> int:
        """What it holds."""
        tensors = [*self.batch.leaves, *self.inputs, *self.cotangents, *self.gradients, self.outside]
        return sum(t.numel() * t.element_size() for t in tensors)


class Passes:
    """The training set as its layers see it, the same in each pass: kept where the memory allows, else read again.

    Args:
        problem: the model and its training set.
        top: directions of the loss's Hessian that are taken one by one; None: all where they are few, else none.
    """

    def __init__(self, problem: Problem, top: int | None = None) -> None:
        self.problem, self.top, objective = problem, top, problem.objective
        self.layers = usable_layers(objective, problem.samples.take([0, problem.samples.n // 2]))
        self.outside = torch.ones(objective.P, dtype=torch.bool)
        for layer in self.layers:
            for place in (layer.weight, layer.bias):
                if place is not None:
                    self.outside[place] = False
        self._kept: list[Seen] | None = None
        _tell(objective, self.outside)

    def __iter__(self) -> Iterator[Seen]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Seen] | None = []
        for seen in self._read():
            yield seen
            if kept is not None:
                kept.append(seen)
                if seen.bytes / seen.batch.size * self.problem.samples.n > self.problem.max_bytes / 4:
                    kept = None
        self._kept = kept

    def _read(self) -> Iterator[Seen]:
        size = batch_size(self.problem, self.layers)
        for batch in self.problem.samples.ordered(size, text="EKFAC"):
            for one in batch.parts or (batch,):
                yield self._seen(one)

    def _seen(self, batch: Batch) -> Seen:
        problem, whole = self.problem, bool(self.outside.any())
        one = forward(problem.objective, self.layers, batch)
        es = pseudo_gradients(problem.objective, one, batch, problem.config.seed, self.top)
        gradients, squares = [], problem.objective.theta.new_zeros(1)
        for e in es:
            g, of_all = backward(self.layers, one, e, batch.size, whole)
            gradients.append(g)
            if of_all is not None:
                # draws are independent over the samples: the square of the sum has the sum of squares as its mean
                squares = squares + of_all.square()
        return Seen(batch, layer_inputs(self.layers, one, batch.size), _stacked(es), _stacked(gradients), squares)


def _stacked(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Lists of tensors of the same shapes -> one list of their stacks."""
    return [torch.stack(tensors) for tensors in zip(*lists, strict=True)]


def batch_size(problem: Problem, layers: Sequence[Layer]) -> int:
    """Training samples in one pass of the layers."""
    if not (problem.objective.paths.rows and problem.objective.paths.outputs):
        return 1
    covered = sum(layer.weight.stop - layer.weight.start for layer in layers)
    # with much outside the layers small batches keep the noise of its diagonal low
    most = 1024 if covered > 0.5 * problem.objective.P else 32
    return max(1, min(most, int(problem.max_bytes / (8 * problem.activations))))


# ---- one batch


def pseudo_gradients(
    objective: Objective, seen: Forward, batch: Batch, seed: int, top: int | None = None
) -> list[list[Tensor]]:
    r"""Output gradients e whose second moment is the loss's Hessian in the outputs: \sum_e e e^T = \nabla^2_y \ell_i.

    First its `top` largest eigenvectors (None: all where there are few outputs, which is exact, else none), then one
    draw of the rest. Random signs and draws are keyed by the sample, so that they do not depend on the batch.
    """
    y = [part.detach() for part in seen.y]
    count = sum(part[0].numel() for part in y)
    if top is None and count <= FEW_OUTPUTS:
        top = count
    top = directions(count, top or 0)
    known = likelihood(objective, y, seen.rebuild, batch)
    if top == 0:
        return [_split_like(known.draw(seed, batch.indices), y)]
    W = roots(known.hessians())
    signs = draws.signs(seed, batch.indices, top, W.device, SIGNS).to(W)
    es = [_split_like(W[:, k] * signs[:, k : k + 1], y) for k in range(top)]
    if top < count:
        numbers = draws.normal(seed, batch.indices, count - top, W.device).to(W)
        es.append(_split_like((numbers.unsqueeze(1) @ W[:, top:]).squeeze(1), y))
    return es


def directions(count: int, top: int) -> int:
    """How many directions of `count` outputs are taken one by one: the last costs no more than a draw of it."""
    if count > DENSE_OUTPUTS:
        return 0
    return count if count <= top + 1 else top


def _split_like(flat: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([leaf[0].numel() for leaf in leaves], 1)
    return [part.reshape(leaf.shape).to(leaf) for part, leaf in zip(parts, leaves, strict=True)]


def output_rows(objective: Objective, batch: Batch, e: Sequence[Tensor]) -> Tensor:
    """J_i^T e_i of each sample of a batch (or of its only one), e its output gradients [rows, ...] -> [rows, P]."""
    if batch.size == 1 or not objective.paths.vmap:
        return torch.cat([_output_row(objective, batch, e, i) for i in range(len(e[0]))])

    def one(cotangents: tuple[Tensor, ...], *leaves: Tensor) -> Tensor:
        single = Batch([leaf.unsqueeze(0) for leaf in leaves], batch.rebuild, 1, [0])
        pullback = vjp(lambda theta: numbers_of(objective.outputs(theta, single))[0], objective.theta)[1]
        row: Tensor = pullback([part.unsqueeze(0) for part in cotangents])[0]
        return row

    rows: Tensor = vmap(one)(tuple(e), *batch.leaves)
    return rows


def _output_row(objective: Objective, batch: Batch, e: Sequence[Tensor], i: int) -> Tensor:
    one = batch if batch.size == 1 else batch.rows(i, i + 1)
    theta = objective.theta.detach().requires_grad_()
    y = attached(numbers_of(objective.batch_outputs(theta, one))[0], theta)
    cotangents = [part[i : i + 1] for part in e]
    (row,) = torch.autograd.grad(y, theta, cotangents, allow_unused=True, materialize_grads=True)
    return row.unsqueeze(0)


def _tell(objective: Objective, outside: Tensor) -> None:
    places = parameter_places(objective)
    names = [name for name, place in places.items() if bool(outside[place].any())]
    if names:
        logger.info("EKFAC: a diagonal block is used for %s", ", ".join(names))
