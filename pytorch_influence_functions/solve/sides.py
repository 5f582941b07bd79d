"""The two factors of each layer's block, and which of them are too large to be built."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..model.budget import MIB
from ..model.layers import Layer, gather
from .problem import Problem

logger = logging.getLogger(__name__)
LARGEST_FACTOR = 2**13
"""Inputs or outputs of a group beyond which the axes stand for the factor's eigenvectors, which then take more than a
minute of one core (measured: 1.0 s for 2048, with the third power of the size) and half a gigabyte."""


class Side(NamedTuple):
    """One factor of a layer's block."""

    place: tuple[int, str]
    """Which layer, and whether of its inputs ("in") or its output gradients ("out")."""
    size: int
    numbers: int
    """Entries of its matrices."""


def axes_of(problem: Problem, layers: Sequence[Layer]) -> set[tuple[int, str]]:
    """Factors that are not built: the axes stand for their eigenvectors.

    Of one-hot inputs they are the eigenvectors, since no two of them are one together. Otherwise it is an
    approximation, for the largest factors, until the others fit the memory.
    """
    theta = problem.objective.theta
    item = problem.objective.theta.element_size()
    one_hot = {
        (i, "in") for i, layer in enumerate(layers) if layer.classes is not None
    }
    sides = [
        side
        for i, layer in enumerate(layers)
        for side in _sides(i, layer, theta)
        if side.place not in one_hot
    ]
    sides.sort(key=lambda side: side.numbers)
    left_out = [side for side in sides if side.size > LARGEST_FACTOR]
    sides = [side for side in sides if side.size <= LARGEST_FACTOR]
    # the eigenvectors of one factor are computed beside all factors and those that are done
    while (
        sides
        and item * (sum(side.numbers for side in sides) + 3 * sides[-1].numbers)
        > problem.budget.factors
    ):
        left_out.append(sides.pop())
    for (i, which), size, numbers in left_out:
        logger.info(
            "EKFAC: the factor of %s (%s, %d, %.0f MiB) is too large, for the work or for config['max_memory']; a "
            "diagonal stands for it",
            layers[i].name,
            which,
            size,
            item * numbers / MIB,
        )
    return one_hot | {side.place for side in left_out}


def _sides(i: int, layer: Layer, theta: Tensor) -> list[Side]:
    _, groups, outputs, inputs = gather(layer, theta.unsqueeze(0)).shape
    return [
        Side((i, "in"), inputs, groups * inputs**2),
        Side((i, "out"), outputs, groups * outputs**2),
    ]
