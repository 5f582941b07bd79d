r"""Derivatives by central differences, where automatic ones do not exist or are not to be trusted.

f'(x) u = (f(x + h u) - f(x - h u)) / (2 h) + O(h^2), h near \epsilon^{1/3} (Nocedal & Wright 2006, section 8.1): about
ten digits in double precision, four in single precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Slope = Callable[[list[Tensor]], Sequence[Tensor]]
"""Tensors -> tensors, those of a gradient or of outputs."""


def along(
    slope: Slope, x: Sequence[Tensor], u: Sequence[Tensor], shorter: float = 1.0
) -> list[Tensor]:
    """Derivative of `slope` at x along u, tensors each, from two values; `shorter` divides the step.

    Zero where u is zero.
    """
    size = max(
        (float(part.abs().max()) for part in u if part.numel()), default=0.0
    )
    if size == 0:
        return [torch.zeros_like(part) for part in slope(list(x))]
    h = _step(x) / (size * shorter)
    up = slope([a + h * b for a, b in zip(x, u, strict=True)])
    down = slope([a - h * b for a, b in zip(x, u, strict=True)])
    return [(p - q) / (2 * h) for p, q in zip(up, down, strict=True)]


def _step(x: Sequence[Tensor]) -> float:
    """The longest step of a number of x: a root of the rounding, on the scale of these numbers."""
    eps = max(torch.finfo(part.dtype).eps for part in x)
    scale = max(float(part.abs().max()) for part in x if part.numel())
    return float(eps ** (1 / 3)) * min(1.0, max(scale, 1e-3))
