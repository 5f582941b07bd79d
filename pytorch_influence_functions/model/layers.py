r"""The layers of a model whose gradient is a sum of outer products over their positions, trusted where that is true.

Of a layer with inputs a_t and output gradients g_t the weight gradient of one sample is \sum_t g_t a_t^T, t over
sequence or image positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layer_kinds import Products, Sums

Layout = Callable[[Tensor, int], Tensor]
"""[..., groups, d], number of samples B -> [B, T, groups, d]."""


class LayoutError(ValueError):
    """The samples of a batch cannot be found in what a layer sees."""


def _positions(rows: Tensor, size: int) -> int:
    """Positions of each of so many samples, of which a layer may see none at all."""
    count, rest = divmod(rows.shape[:-2].numel(), size)
    if rest:
        raise LayoutError(
            f"a layer sees {rows.shape[:-2].numel()} rows of {size} samples"
        )
    return count


def _samples_first(rows: Tensor, size: int) -> Tensor:
    """Samples in the first dimension, or [B T, ...]."""
    return rows.reshape(size, _positions(rows, size), *rows.shape[-2:])


def _samples_second(rows: Tensor, size: int) -> Tensor:
    """Samples in the second dimension (`batch_first=False`)."""
    if rows.dim() < 4 or rows.shape[1] != size:
        raise LayoutError("no second dimension of that size")
    count = _positions(rows, size)
    return rows.transpose(0, 1).reshape(size, count, *rows.shape[-2:])


def _samples_last(rows: Tensor, size: int) -> Tensor:
    """[T B, ...], the samples running faster than the positions."""
    count = _positions(rows, size)
    return rows.reshape(count, size, *rows.shape[-2:]).transpose(0, 1)


LAYOUTS: tuple[Layout, ...] = (_samples_first, _samples_second, _samples_last)
"""Where a layer's samples may lie, in the order in which they are tried."""


class Layer(NamedTuple):
    """A layer whose gradient is a sum of outer products: where its parameters are, and how to see its inputs."""

    name: str
    module: nn.Module
    weight: slice | None
    """Place in theta; None where there is no weight, or a frozen one."""
    bias: slice | None
    rule: Products | Sums
    layout: Layout = _samples_first
    copied: bool = False
    """Whether the model gets a copy of its output, which it changes in place."""
    shared: bool = False
    """Whether all samples share its input, as they do their positions; the model gets its output once for each."""
    inside: bool = False
    """Whether it is no module that is called: `F.linear` is, with its weight, in a module (`nn.MultiheadAttention`)."""
    alone: bool = False
    """Whether its samples are found in it one at a time only: an expert sees those that are sent to it."""

    @property
    def places(self) -> list[slice]:
        """Where its parameters lie in theta."""
        return [
            place for place in (self.weight, self.bias) if place is not None
        ]

    @property
    def groups(self) -> int:
        """Groups whose outputs see the inputs of their own alone."""
        return 1 if isinstance(self.rule, Sums) else self.rule.groups

    @property
    def fan_out(self) -> int:
        """Outputs of one group."""
        if isinstance(self.rule, Products):
            return self.rule.out
        return sum(place.stop - place.start for place in self.places)

    @property
    def fan_in(self) -> int:
        """Inputs of one group, with the one of the bias."""
        if isinstance(self.rule, Sums) or self.weight is None:
            return 1
        size: int = self.weight.stop - self.weight.start
        inputs = size // (self.rule.groups * self.rule.out)
        return inputs + (self.bias is not None)

    @property
    def classes(self) -> int | None:
        """Of one-hot inputs."""
        return None if isinstance(self.rule, Sums) else self.rule.classes

    def inputs(self, x: Tensor, size: int) -> Tensor:
        """Input as the module gets it, batch size -> [B, T, groups, in (+ 1)]; one-hot ones as their places."""
        if isinstance(self.rule, Sums):
            return x.new_ones(size, 1, 1, 1)
        return self.layout(self._with_bias(self.rule.inputs(x)), size)

    def some_inputs(self, x: Tensor, places: Tensor) -> Tensor | None:
        """Inputs at the positions `places` [B, S] of each sample, where the rule finds them without all the others."""
        if not isinstance(self.rule, Products) or self.rule.some is None:
            return None
        if self.layout is not _samples_first or len(x) != len(places):
            return None
        return self._with_bias(self.rule.some(x, places))

    def _with_bias(self, rows: Tensor) -> Tensor:
        """Inputs with the one that the bias is multiplied with."""
        if self.bias is None:
            return rows
        return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)

    def outputs(self, g: Tensor, x: Tensor, size: int) -> Tensor:
        """Gradient of its output, its input, batch size -> [B, T, groups, out]."""
        if isinstance(self.rule, Products):
            return self.layout(self.rule.outputs(g), size)
        sums = [
            self.layout(rows, size).sum(1, keepdim=True)
            for rows in self.rule.gradients(g, x)
        ]
        return joined(sums, -1)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat` that does not copy a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


# ---- how a layer's parameters lie in theta


def gather(layer: Layer, v: Tensor) -> Tensor:
    """The layer's part of v [K, P] -> [K, groups, out, in (+ 1 for the bias)]."""
    rule, parts = layer.rule, [v[:, place] for place in layer.places]
    if isinstance(rule, Sums):
        return joined(parts, 1)[:, None, :, None]
    W = parts[0]
    if rule.unfolded:
        W = W.unflatten(1, (-1, *rule.unfolded)).mT.flatten(1)
    if rule.inputs_first:
        W = W.reshape(len(v), rule.groups, -1, rule.out).mT
    else:
        W = W.reshape(len(v), rule.groups, rule.out, -1)
    biases = [b.reshape(len(v), rule.groups, rule.out, 1) for b in parts[1:]]
    return joined([W, *biases], -1)


def unfolded(layer: Layer) -> tuple[int, int] | None:
    """Channels and taps of a weight that `gather` puts in another order, if that is all it does."""
    rule = layer.rule
    if not isinstance(rule, Products):
        return None
    if rule.inputs_first or layer.bias is not None:
        return None
    return rule.unfolded


def scatter(layer: Layer, W: Tensor, v: Tensor) -> None:
    """The inverse of `gather`, into v."""
    if isinstance(layer.rule, Sums):
        parts = W.flatten(1).split(
            [place.stop - place.start for place in layer.places], 1
        )
    elif layer.bias is None:
        parts = (W,)
    else:
        parts = (W[..., :-1], W[..., -1])
    if isinstance(layer.rule, Products) and layer.rule.inputs_first:
        parts = (parts[0].mT, *parts[1:])
    if isinstance(layer.rule, Products) and layer.rule.unfolded:
        channels, taps = layer.rule.unfolded
        parts = (parts[0].unflatten(-1, (taps, channels)).mT, *parts[1:])
    for place, part in zip(layer.places, parts, strict=True):
        v[:, place] = part.reshape(len(v), -1)
