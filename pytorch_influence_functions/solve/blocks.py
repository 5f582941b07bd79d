"""One layer's block of EKFAC: the eigenvectors of its two factors, and gradients in their basis."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..model.budget import cached_block, outer_block
from ..model.layers import Layer
from ..model.outer_products import one_hot_squares, outer_products
from .bases import Basis


class Block(NamedTuple):
    """Eigenvectors of the two factors of a layer's groups; None are the axes."""

    layer: Layer
    Q_in: Basis | None
    """[groups, in, in]"""
    Q_out: Basis | None
    """[groups, out, out]"""

    def rotated(self, g: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer sees, in the eigenbasis: [..., T, groups, out], [B, T, groups, in] -> [..., groups, T, .]."""
        g = g.transpose(-2, -3)
        a = a.transpose(-2, -3)
        if self.Q_out is not None:
            g = self.Q_out.turned(g)
        if self.Q_in is not None:
            a = self.Q_in.turned(a)
        return g, a

    def to_eigenbasis(self, W: Tensor) -> Tensor:
        """[K, groups, out, in] -> the same shape."""
        return self._by(Basis.turned, W)

    def from_eigenbasis(self, W: Tensor) -> Tensor:
        """The inverse of `to_eigenbasis`."""
        return self._by(Basis.returned, W)

    def _by(self, turn: Callable[[Basis, Tensor], Tensor], W: Tensor) -> Tensor:
        if self.Q_out is not None:
            W = turn(self.Q_out, W.mT).mT
        if self.Q_in is not None:
            W = turn(self.Q_in, W)
        return W

    def squares(self, g: Tensor, a: Tensor, max_bytes: float) -> Tensor:
        """Sum over draws and samples of the squared gradients in the eigenbasis; g and a as they are seen.

        What the layer sees is turned into the eigenbasis, or the gradients are: for many positions of a small layer
        there are fewer of these.
        """
        if self._turns_first(g, a, len(g)):
            left, right = self.rotated(g, a)
            return _squares(left, right, self.layer.classes, max_bytes)
        left = g.transpose(-2, -3)
        right = a.transpose(-2, -3)
        return _squares(left, right, None, max_bytes, self.to_eigenbasis)

    def products(self, g: Tensor, a: Tensor) -> Tensor:
        """Gradients of samples in the eigenbasis; [R, T, groups, out], [R, T, groups, in] -> [R, groups, out, in]."""
        if self._turns_first(g, a, 1):
            left, right = self.rotated(g, a)
            return outer_products(left, right, self.layer.classes)
        left = g.transpose(-2, -3)
        right = a.transpose(-2, -3)
        gradients = outer_products(left, right)
        return self.to_eigenbasis(gradients)

    def _turns_first(self, g: Tensor, a: Tensor, draws: int) -> bool:
        """Whether it is less work to turn what the layer sees than the gradients, of so many draws."""
        if self.layer.classes is not None:
            return True
        T, outputs = g.shape[-3], g.shape[-1]
        inputs = a.shape[-1]
        seen = T * (inputs**2 + draws * outputs**2)
        gradients = draws * outputs * inputs * (outputs + inputs)
        return seen <= gradients


def _squares(
    g: Tensor,
    a: Tensor,
    classes: int | None,
    max_bytes: float,
    turn: Callable[[Tensor], Tensor] = lambda W: W,
) -> Tensor:
    """Sum over draws and samples of (turn(sum_t g_t a_t^T))^2; g [D, B, groups, T, out], a [B, groups, T, in]."""
    if classes is not None:
        return one_hot_squares(g, a, classes)
    if g.shape[3] == 1:
        of_outputs = g[:, :, :, 0].square().sum(0)
        of_inputs = a[:, :, 0].square()
        return of_outputs.permute(1, 2, 0) @ of_inputs.transpose(0, 1)
    size = few(g[0], a, max_bytes)
    total = g.new_zeros(g.shape[2], g.shape[4], a.shape[3])
    size = min(size, cached_block(total.nbytes, a.device.type, len(a)))
    for draw in g:
        for x, y in zip(draw.split(size), a.split(size), strict=True):
            for W in turn(x.mT @ y):
                total.addcmul_(W, W)  # nothing is written but the sum
    return total


def few(g: Tensor, a: Tensor, max_bytes: float) -> int:
    """How many samples' gradients of a layer to hold at once; g [B, groups, T, out], a [B, groups, T, in]."""
    numbers = g.shape[1] * g.shape[3] * a.shape[3]
    size = numbers * a.element_size()
    return outer_block(size, max_bytes)
