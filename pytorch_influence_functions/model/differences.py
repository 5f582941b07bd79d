r"""Derivatives of a function of a few tensors: by automatic differentiation, and by central differences beside it.

Differences stand in where automatic derivatives do not exist or are not to be trusted:

f'(x) u = (f(x + h u) - f(x - h u)) / (2 h) + O(h^2), h near \epsilon^{1/3} (Nocedal & Wright 2006, section 8.1): about
ten digits in double precision, four in single precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[[list[Tensor]], Sequence[Tensor]]
"""Tensors -> tensors, those of a gradient or of outputs."""


def along(
    function: Function,
    x: Sequence[Tensor],
    u: Sequence[Tensor],
    shorter: float = 1.0,
) -> list[Tensor]:
    """Derivative of `function` at x along u, tensors each, from two values; `shorter` divides the step.

    Zero where u is zero.
    """
    size = max(
        (float(part.abs().max()) for part in u if part.numel()), default=0.0
    )
    if size == 0:
        return [torch.zeros_like(part) for part in function(list(x))]
    h = _step(x) / (size * shorter)
    up = function([a + h * b for a, b in zip(x, u, strict=True)])
    down = function([a - h * b for a, b in zip(x, u, strict=True)])
    return [(p - q) / (2 * h) for p, q in zip(up, down, strict=True)]


def _step(x: Sequence[Tensor]) -> float:
    """The longest step of a number of x: a root of the rounding, on the scale of these numbers."""
    eps = max(torch.finfo(part.dtype).eps for part in x)
    scale = max(float(part.abs().max()) for part in x if part.numel())
    return float(eps ** (1 / 3)) * min(1.0, max(scale, 1e-3))


def slope(
    loss: Callable[[list[Tensor]], Tensor], x: Sequence[Tensor]
) -> list[Tensor]:
    """Gradient of a loss in x; zero where it is no function of x, as of a sample that is masked out.

    Without torch.func, which refuses a loss that takes gradients of its own.
    """
    leaves = [part.detach().requires_grad_() for part in x]
    return list(_gradients(loss(leaves), leaves))


def second(
    loss: Callable[[list[Tensor]], Tensor], x: Sequence[Tensor]
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """u -> (Hessian of a loss in x) u, by double backward."""
    leaves = [part.detach().requires_grad_() for part in x]
    slopes = _gradients(loss(leaves), leaves, create_graph=True)
    curved = [part for part in slopes if part.requires_grad]

    def product(u: Sequence[Tensor]) -> list[Tensor]:
        if not curved:
            return [torch.zeros_like(leaf) for leaf in leaves]
        pairs = zip(u, slopes, strict=True)
        directions = [v.to(part) for v, part in pairs if part.requires_grad]
        found = torch.autograd.grad(
            curved,
            leaves,
            directions,
            retain_graph=True,
            materialize_grads=True,
        )
        return list(found)

    return product


def _gradients(
    total: Tensor, leaves: Sequence[Tensor], create_graph: bool = False
) -> Sequence[Tensor]:
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(
        total,
        leaves,
        create_graph=create_graph,
        materialize_grads=True,
        allow_unused=True,
    )
