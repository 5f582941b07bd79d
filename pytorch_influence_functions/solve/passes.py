r"""The training set as the layers of a model see it, for draws of output gradients.

For each sample the output gradients e have \sum_e e e^T = \nabla^2_y \ell_i in the mean, so that the gradients J_i^T e
are the rows of the Gauss-Newton matrix.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vjp, vmap

from ..data.batch import Batch
from ..model.budget import DIAGONAL_BLOCK
from ..model.candidates import parameter_places
from ..model.layer_passes import Inputs, backward, by_parts, forward
from ..model.layers import Layer
from ..model.objective import Objective
from ..model.outputs import attached, numbers_of
from ..model.usable import usable_layers
from .directions import Forms, pseudo_gradients
from .positions import Positions
from .problem import Problem
from .set_up import Share
from .sides import axes_of

logger = logging.getLogger(__name__)
EXPENSIVE = 1e9
"""Floating-point operations of a product above which factors are made from a part of the positions: a tenth of a second
on one core."""


HALVED = 256
"""From so many samples on the eigenvectors come from a random half of them and the eigenvalues from the other where a
pass is expensive. Of a ResNet-18 of width 16 and 256 samples the scores then rank them as exact factors do to 0.990, by
all samples to 0.996; their size is 7 % above that of exact ones, else 4 %."""


class Seen(NamedTuple):
    """What the layers see of one batch, for D draws of output gradients."""

    batch: Batch
    inputs: Inputs | list[Tensor]
    """Of each layer [B, T, groups, in]."""
    cotangents: list[Tensor]
    """The output gradients e [D, B, ...]."""
    gradients: list[Tensor]
    """Those of each layer's outputs [D, B, T, groups, out]."""
    outside: Tensor
    """Estimate of the summed squares of the gradients outside the layers, of the blocks that end here."""

    @property
    def bytes(self) -> int:
        """What it holds."""
        inputs = self.inputs
        seen = (
            inputs.nbytes
            if isinstance(inputs, Inputs)
            else sum(x.nbytes for x in inputs)
        )
        tensors = [
            *self.batch.leaves,
            *self.cotangents,
            *self.gradients,
            self.outside,
        ]
        return seen + sum(t.numel() * t.element_size() for t in tensors)

    @property
    def widest(self) -> int:
        """Bytes of the inputs of one layer at most."""
        return max((x.nbytes for x in self.inputs), default=0)


class Look(NamedTuple):
    """How much of it is looked at."""

    top: int | None
    """Directions of the loss's Hessian that are taken one by one; None: all where they are few, else none."""
    draws: int | None = None
    """Where all directions would be too expensive; None: as many as `draws_of` says."""
    some: bool = False
    """Whether the inputs are those at a random part of their positions."""


class Passes:
    """The training set as its layers see it, the same in each pass: kept where the memory allows, else read again.

    Args:
        problem: the model and its training set.
        top: directions of the loss's Hessian that are taken one by one; None: all where they are few, else none.

    Attributes:
        layers: those that can be seen.
        axes: their factors that are not built, as (place of the layer, "in" or "out").
        outside: places in theta of the parameters outside the layers.
        expensive: whether a pass costs so much that factors are made from a part of the positions.
    """

    def __init__(self, problem: Problem, top: int | None = None) -> None:
        self.problem, self.top, objective = problem, top, problem.objective
        # those that were tried already for the scores are all there are
        self.layers = [*objective.paths.layers] or usable_layers(
            objective, problem.tried
        )
        self.axes = axes_of(problem, self.layers)
        outside = torch.ones(objective.P, dtype=torch.bool)
        for layer in self.layers:
            for place in layer.places:
                outside[place] = False
        self.outside = outside.nonzero().squeeze(1).to(objective.device)
        self._kept: list[Seen] | None = None
        self._forms: Forms = {}
        self.expensive = problem.product_work > EXPENSIVE
        _tell(objective, outside)

    def __iter__(self) -> Iterator[Seen]:
        look = Look(self.top)
        if self._kept is not None:
            yield from self._kept
            return
        if self.expensive and self.top is None:
            yield from self._read(look, half=1)  # it is the last time
            return
        kept: list[Seen] | None = []
        count = self.share().count
        for seen in self._read(look):
            yield seen
            if kept is not None:
                kept.append(seen)
                if (
                    seen.bytes / seen.batch.size * count
                    > self.problem.budget.product / 4
                ):
                    kept = None
        self._kept = kept

    def first_look(self) -> Iterator[Seen]:
        """What the factors are made from: where a pass is expensive a part of the positions, and one draw."""
        if not self.expensive:
            yield from self
            return
        if self._kept is None:
            # the diagonal outside the layers comes from this pass alone
            many = None if len(self.outside) else 1
            yield from self._read(Look(self.top, many, some=True), half=0)
            return
        yield from map(self.some, self._kept)

    def some(self, seen: Seen) -> Seen:
        """With the inputs at a random part of their positions, where a pass is expensive."""
        if not (self.expensive and isinstance(seen.inputs, Inputs)):
            return seen
        positions = positions_of(self.problem)
        counts = [g.shape[2] for g in seen.gradients]
        inputs = positions.some_inputs(
            self.layers, seen.inputs, counts, seen.batch
        )
        return seen._replace(inputs=inputs)

    def share(self) -> Share:
        """The part of the training set that this process passes over."""
        return self._share_of(self.problem.samples.n)

    def _share_of(self, count: int) -> Share:
        _, block = self._sizes
        return self.problem.set_up.share(count, block)

    def _chosen(self, which: int | None) -> Sequence[int]:
        """One random half of the samples, where they are many and all that is made of them is in the layers; or all."""
        n = self.problem.samples.n
        if which is None or n < HALVED or len(self.outside):
            return range(n)
        generator = torch.Generator().manual_seed(self.problem.config.seed)
        order = torch.randperm(n, generator=generator)
        chosen: list[int] = order.chunk(2)[which].sort().values.tolist()
        return chosen

    def _read(self, look: Look, half: int | None = None) -> Iterator[Seen]:
        size, block = self._sizes
        total: Tensor | float = 0.0
        chosen = self._chosen(half)
        mine = self._share_of(len(chosen)).of(chosen)
        for batch in self.problem.samples.ordered(size, mine, text="EKFAC"):
            for seen, sums in self._seen(batch, look):
                total = total + sums
                end = seen.batch.indices[-1] + 1
                if end % block and end < self.problem.samples.n:
                    yield seen
                    continue
                # draws are independent over the samples: the square of the sum has the sum of squares as its mean
                yield seen._replace(outside=total.square().sum(0))
                total = 0.0

    def _seen(self, batch: Batch, look: Look) -> Iterator[tuple[Seen, Tensor]]:
        """What the layers see of a batch, and the sums of gradients outside them."""

        def seen(one: Batch) -> tuple[Seen, Tensor]:
            return seen_by_layers(
                self.problem,
                self.layers,
                one,
                look,
                self.outside,
                self._forms,
            )

        return by_parts(batch, seen)

    @functools.cached_property
    def _sizes(self) -> tuple[int, int]:
        """Training samples at a time, and those whose gradients outside the layers are summed."""
        size = batch_size(self.problem, self.layers, self.top)
        if not len(self.outside):
            return size, 1
        if _one_at_a_time(self.problem, self.layers):
            return 1, 1
        while DIAGONAL_BLOCK % size:
            size -= 1
        return size, DIAGONAL_BLOCK


def seen_by_layers(
    problem: Problem,
    layers: Sequence[Layer],
    batch: Batch,
    look: Look,
    outside: Tensor,
    forms: Forms | None = None,
) -> tuple[Seen, Tensor]:
    """What the layers see of a batch, and for each draw the summed gradients outside them [D, outside]."""
    objective = problem.objective
    one = forward(objective, layers, batch)
    every = Inputs(layers, one, batch.size)
    inputs: Inputs | list[Tensor] = every
    es = pseudo_gradients(problem, one, batch, look.top, look.draws, forms)
    gradients, sums = [], []
    for k, e in enumerate(es):
        last = k == len(es) - 1
        g, of_all = backward(layers, one, e, batch.size, len(outside) > 0, last)
        gradients.append(g)
        sums.append(
            objective.theta.new_zeros(0) if of_all is None else of_all[outside]
        )
    if look.some:
        counts = [g.shape[1] for g in gradients[0]]
        rule = positions_of(problem)
        inputs = rule.some_inputs(layers, every, counts, batch)
    none = objective.theta.new_zeros(len(outside))
    return Seen(
        batch, inputs, _stacked(es), _stacked(gradients), none
    ), torch.stack(sums)


def positions_of(problem: Problem) -> Positions:
    """Which positions are taken where a part is enough."""
    return Positions(problem.samples.n, problem.config.seed)


def _stacked(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Lists of tensors of the same shapes -> one list of their stacks."""
    if len(lists) == 1:
        return [t.unsqueeze(0) for t in lists[0]]
    return [torch.stack(tensors) for tensors in zip(*lists, strict=True)]


def together(problem: Problem) -> bool:
    """Whether several samples go through the layers together."""
    return problem.objective.paths.rows and problem.objective.paths.outputs


def _one_at_a_time(problem: Problem, layers: Sequence[Layer]) -> bool:
    return not together(problem) or any(layer.alone for layer in layers)


def batch_size(
    problem: Problem, layers: Sequence[Layer], top: int | None = None
) -> int:
    """Training samples in one pass of the layers, by what they see of the first one."""
    if _one_at_a_time(problem, layers):
        return 1
    seen, _ = seen_by_layers(
        problem,
        layers,
        problem.first,
        Look(top),
        problem.objective.theta.new_zeros(0).long(),
    )
    count = sum(part[0, 0].numel() for part in seen.cotangents)
    # the loss's Hessian in the outputs, its eigenvectors and what they are computed in, all in double precision
    dense = 5 * 8 * count**2 if len(seen.cotangents[0]) > 1 else 0
    return problem.budget.layer_batch(
        seen.bytes, seen.widest, problem.activations, dense
    )


# ---- one batch


def output_rows(
    objective: Objective, batch: Batch, e: Sequence[Tensor]
) -> Tensor:
    """J_i^T e_i of each sample of a batch (or of its only one), e its output gradients [rows, ...] -> [rows, P]."""
    if batch.size == 1 or not objective.paths.vmap:
        return torch.cat(
            [_output_row(objective, batch, e, i) for i in range(len(e[0]))]
        )

    def one(cotangents: tuple[Tensor, ...], *leaves: Tensor) -> Tensor:
        single = Batch(
            [leaf.unsqueeze(0) for leaf in leaves], batch.rebuild, 1, [0]
        )
        pullback = vjp(
            lambda theta: numbers_of(objective.outputs(theta, single))[0],
            objective.theta,
        )[1]
        row: Tensor = pullback([part.unsqueeze(0) for part in cotangents])[0]
        return row

    rows: Tensor = vmap(one)(tuple(e), *batch.leaves)
    return rows


def _output_row(
    objective: Objective, batch: Batch, e: Sequence[Tensor], i: int
) -> Tensor:
    one = batch if batch.size == 1 else batch.rows(i, i + 1)
    theta = objective.theta.detach().requires_grad_()
    y = attached(numbers_of(objective.batch_outputs(theta, one))[0], theta)
    cotangents = [part[i : i + 1] for part in e]
    (row,) = torch.autograd.grad(
        y, theta, cotangents, allow_unused=True, materialize_grads=True
    )
    return row.unsqueeze(0)


def _tell(objective: Objective, outside: Tensor) -> None:
    places = parameter_places(objective)
    names = [
        name for name, place in places.items() if bool(outside[place].any())
    ]
    if names:
        logger.info("EKFAC: a diagonal block is used for %s", ", ".join(names))
