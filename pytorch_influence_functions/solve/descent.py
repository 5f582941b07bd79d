r"""A few steps down a smooth function whose curvature is nearly known: L-BFGS (Nocedal & Wright 2006, algorithm 7.4).

The known inverse of the curvature stands where a multiple of I does in the textbook, and the pairs of steps and changes
of the gradient correct it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SUFFICIENT = 1e-4
"""Share of the fall that the slope promises that a step has to have (Nocedal & Wright 2006, equation 3.4)."""
HALVINGS = 12
"""Of a step at most: what does not fall then has come to rounding."""


class Place(NamedTuple):
    """A point x [P], the value there and the gradient [P]."""

    x: Tensor
    value: float
    g: Tensor


Function = Callable[[Tensor], tuple[float, Tensor]]
"""x [P] -> value and gradient [P]."""
Inverse = Callable[[Tensor, Tensor], Tensor]
"""x [P] and v [P] -> about the inverse of the curvature there times v [P]."""


def descend(
    f: Function,
    inverse: Inverse,
    start: Tensor,
    steps: int,
) -> Tensor:
    """The point after so many steps from `start`, or from nearer to zero where f is above f(0) there -> [P]."""
    here = _nearer(f, start)
    pairs: list[tuple[Tensor, Tensor]] = []
    for _ in range(steps):
        step = _direction(inverse, pairs, here)
        there = _fallen(f, here, step)
        if there is None:
            break
        s, y = there.x - here.x, there.g - here.g
        if float(s @ y) > 0:
            pairs.append((s, y))
        here = there
    return here.x


def _nearer(
    f: Function,
    start: Tensor,
) -> Place:
    zero = torch.zeros_like(start)
    most, _ = f(zero)
    for _ in range(HALVINGS):
        value, g = f(start)
        if value <= most:
            return Place(start, value, g)
        start = start / 2
    return Place(zero, *f(zero))


def _direction(
    inverse: Inverse,
    pairs: list[tuple[Tensor, Tensor]],
    here: Place,
) -> Tensor:
    """The two loops over the pairs (s, y)."""
    q, shares = here.g, []
    for s, y in reversed(pairs):
        share = (s @ q) / (s @ y)
        shares.append(share)
        q = q - share * y
    step = inverse(here.x, q)
    for (s, y), share in zip(pairs, reversed(shares), strict=True):
        step = step + s * (share - (y @ step) / (s @ y))
    return step


def _fallen(
    f: Function,
    here: Place,
    step: Tensor,
) -> Place | None:
    """Down the step, halved until the value falls; None where it does not."""
    slope, share = float(here.g @ step), 1.0
    for _ in range(HALVINGS):
        x = here.x - share * step
        value, g = f(x)
        if value < here.value - SUFFICIENT * share * slope:
            return Place(x, value, g)
        share /= 2
    return None
