"""What a rule of a layer says: which of its parameters it covers, and how their gradient follows from what it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

Rows = Callable[[Tensor], Tensor]
"""A layer's input or output gradient -> [positions with samples among them..., groups, d]."""


class Products(NamedTuple):
    """A weight, and often a bias, whose gradient is a sum of outer products."""

    groups: int
    out: int
    """Outputs of one group."""
    inputs: Rows
    """What the weight is multiplied with, d inputs of a group; without the one of the bias."""
    outputs: Rows
    inputs_first: bool = False
    """Whether the weight holds [groups, inputs, outputs]."""
    shift: Rows | None = None
    """The output gradient as the bias sees it, where that is something else; the bias is a block of its own then."""
    some: Callable[[Tensor, Tensor], Tensor] | None = None
    """The inputs at some positions [B, S] of each sample alone [B, S, groups, d], where that saves work."""
    unfolded: tuple[int, int] | None = None
    """Channels and taps of a convolution, as the weight holds them; in what is unfolded the taps come first."""
    classes: int | None = None
    """Of one-hot inputs, which are the place of their one instead (an integer, d = 1; -1: there is none)."""


class Sums(NamedTuple):
    """Parameters whose gradient is a sum over positions: outputs of a single input that is always one."""

    gradients: Callable[[Tensor, Tensor], list[Tensor]]
    """Output gradient and input -> the gradient at each position of each parameter [..., 1, its size]."""


class Part(NamedTuple):
    """Which of a layer's parameters a rule covers."""

    rule: Products | Sums
    weight: bool
    bias: bool


Rule = Callable[[Any, bool, bool], list[Part]]
"""A layer and whether its weight and its bias are trained -> the rules of these."""


def plain_linear(outputs: int) -> Products:
    """The rule of `F.linear` with a weight [outputs, inputs]."""
    return Products(1, outputs, one_group, one_group)


def one_group(x: Tensor) -> Tensor:
    """[..., d] -> [..., 1, d]."""
    return x.unsqueeze(-2)
