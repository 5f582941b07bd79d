"""Gradients of single samples averaged over several parameters of one model, and their products with vectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

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
from ..model.layer_products import summed_gradients
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
    return torch.cat([_by_layers(problem, points, one) for one in blocks])


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
    parts = [vectors @ mean_gradients(problem, points, b).T for b in blocks]
    return torch.cat(parts, 1)


def _by_layers(problem: Problem, points: Points, batch: Batch) -> Tensor:
    """By the rules of the layers, as many points at a time as the memory holds."""
    together = points_block(
        batch.size, problem.activations, problem.budget.product
    )
    total, count, each = torch.zeros(()), 0, points()
    while some := list(itertools.islice(each, together)):
        found = summed_gradients(some, problem.layers, batch)
        total = total + found if count else found
        count += len(some)
    return total / count
