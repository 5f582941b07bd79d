"""Gradients of single samples averaged over several parameters of one model, and their products with vectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..data.batch import Batch
from ..model.budget import points_block
from ..model.gradients import (
    FEW,
    MANY,
    few,
    gradient_blocks,
    gradient_products,
    per_sample_gradients,
)
from ..model.layer_products import layer_products, summed_gradients
from ..model.objective import Objective
from .problem import Problem

Points = Callable[[], Iterator[Objective]]
"""The objective at each of the parameters, made one at a time: all of them are many vectors of their size."""


def mean(points: Points, value: Callable[[Objective], Tensor]) -> Tensor:
    """Mean of a value over the points; that of one point is the value itself."""
    each = points()
    total, count = value(next(each)), 1
    for point in each:
        total += value(point)
        count += 1
    return total / count if count > 1 else total


def mean_gradients(problem: Problem, points: Points, batch: Batch) -> Tensor:
    """The mean of each sample's gradient [B, P]."""
    most = problem.budget.product
    if batch.parts or not problem.layers:
        return mean(points, lambda at: per_sample_gradients(at, batch, most))
    blocks = gradient_blocks(problem.objective, batch, most)

    def gradients(some: Sequence[Objective], one: Batch) -> Tensor:
        return summed_gradients(some, problem.layers, one)

    rows = [_by_layers(problem, points, one, gradients) for one in blocks]
    return torch.cat(rows)


def mean_products(
    problem: Problem, points: Points, batch: Batch, vectors: Tensor
) -> Tensor:
    """The mean of each sample's gradient times each vector [K, P] -> [K, B].

    Gradients are averaged before they are multiplied, but where forward mode has no need of them.
    """
    own, most = problem.objective, problem.budget.product
    fewest = FEW if problem.layers else min(few(own, batch), MANY)
    forward = own.paths.forward and len(vectors) < fewest
    if batch.parts or forward or not (problem.layers or own.paths.vmap):
        return mean(
            points, lambda at: gradient_products(at, batch, vectors, most)
        )
    blocks = gradient_blocks(own, batch, most)
    if not problem.layers:
        parts = (mean_gradients(problem, points, one) for one in blocks)
        return torch.cat([vectors @ part.T for part in parts], 1)

    def products(some: Sequence[Objective], one: Batch) -> Tensor:
        return layer_products(some, problem.layers, [one], vectors)

    found = [_by_layers(problem, points, one, products) for one in blocks]
    return torch.cat(found, 1)


Summed = Callable[[Sequence[Objective], Batch], Tensor]
"""Some points and a batch -> the sum of a value over the points."""


def _by_layers(
    problem: Problem, points: Points, batch: Batch, summed: Summed
) -> Tensor:
    """The mean of what the rules of the layers give, as many points at a time as the memory holds."""
    together = points_block(
        batch.size, problem.activations, problem.budget.product
    )
    each = points()
    some = list(itertools.islice(each, together))
    total, count = summed(some, batch), len(some)
    while some := list(itertools.islice(each, together)):
        total += summed(some, batch)
        count += len(some)
    return total / count
