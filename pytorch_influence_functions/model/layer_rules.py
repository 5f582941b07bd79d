r"""How the gradient of a layer follows from its input and its output gradient: one rule a kind of layer.

Of a layer with inputs a_t and output gradients g_t the weight gradient of one sample is \sum_t g_t a_t^T, t over
sequence or image positions; in each of its groups where the outputs of a group see the inputs of that group alone. Its
bias is the weight of an input that is always one. The scale and shift of a norm have a gradient for each channel,
\sum_t g_t x_t and \sum_t g_t with the normalized input x_t: together they are a block of their own, and so is a bias
whose weight is frozen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

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


def _products(rule: Callable[[Any], Products]) -> Rule:
    """A layer with a weight of outer products."""

    def parts(module: nn.Module, weight: bool, bias: bool) -> list[Part]:
        products = rule(module)
        if weight and not (bias and products.shift):
            return [Part(products, True, bias)]
        rows = products.shift or products.outputs
        alone = Part(
            Sums(lambda g, _: [rows(g).flatten(-2).unsqueeze(-2)]), False, True
        )
        return [Part(products, True, False), alone] if weight else [alone]

    return parts


# ---- linear and convolutions


def _linear(linear: nn.Linear) -> Products:
    return Products(1, linear.out_features, _one_group, _one_group)


def _one_group(x: Tensor) -> Tensor:
    """[..., d] -> [..., 1, d]."""
    return x.unsqueeze(-2)


def _convolution(conv: _ConvNd) -> Products:
    def inputs(x: Tensor, places: Tensor | None = None) -> Tensor:
        return _patches(
            _padded(conv, x),
            conv.groups,
            conv.kernel_size,
            conv.dilation,
            conv.stride,
            places,
        )

    outputs = functools.partial(_pixels, groups=conv.groups)
    out = conv.out_channels // conv.groups
    return Products(conv.groups, out, inputs, outputs, some=inputs)


def _transposed(conv: _ConvNd) -> Products:
    """A convolution of the output gradient, whose pixels are what the input is multiplied with."""
    pixels = functools.partial(_pixels, groups=conv.groups)

    def outputs(g: Tensor) -> Tensor:
        return _patches(
            _cut(conv, g),
            conv.groups,
            conv.kernel_size,
            conv.dilation,
            conv.stride,
        )

    out = conv.out_channels // conv.groups * math.prod(conv.kernel_size)
    return Products(
        conv.groups, out, pixels, outputs, inputs_first=True, shift=pixels
    )


def _pixels(g: Tensor, groups: int) -> Tensor:
    """Channels second [B, groups d, pixels...] -> [B, T, groups, d]."""
    pixels: Tensor = g.flatten(2).mT.unflatten(-1, (groups, -1))
    return pixels


def _patches(
    x: Tensor,
    groups: int,
    kernel: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    places: Tensor | None = None,
) -> Tensor:
    """What each output pixel of a convolution sees, [B, groups in, pixels...] -> [B, T, groups, in * taps].

    `places` [B, S] are those pixels of each sample that are wanted; None: all.
    """
    if len(kernel) == 2 and places is None:
        columns: Tensor = F.unfold(
            x, tuple(kernel), tuple(dilation), stride=tuple(stride)
        )
        rows: Tensor = columns.mT.unflatten(-1, (groups, -1))
        return rows
    for i, (k, d, s) in enumerate(zip(kernel, dilation, stride, strict=True)):
        span = d * (k - 1) + 1
        x = x.unfold(2 + i, span, s)[..., ::d]
    dims = len(kernel)
    x = x.movedim(1, 1 + dims)  # [B, pixels..., groups in, kernel...]
    if places is not None:
        samples = torch.arange(len(x), device=x.device).unsqueeze(1)
        pixels = torch.unravel_index(places, x.shape[1 : 1 + dims])
        x, dims = x[(samples, *pixels)], 1
    x = x.unflatten(1 + dims, (groups, -1))
    return x.flatten(2 + dims).flatten(1, dims)


def _padded(conv: _ConvNd, x: Tensor) -> Tensor:
    """The input with its margin."""
    sides = list(_margins(conv))
    if not any(map(any, sides)):
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, _last_first(sides), mode=mode)


def _margins(conv: _ConvNd) -> Sequence[tuple[int, int]]:
    """Pixels before and after each dimension; of an odd number "same" has one more after."""
    if not isinstance(conv.padding, str):
        return [(p, p) for p in conv.padding]
    if conv.padding == "valid":
        return [(0, 0) for _ in conv.kernel_size]
    totals = [
        d * (k - 1)
        for k, d in zip(conv.kernel_size, conv.dilation, strict=True)
    ]
    return [(total // 2, total - total // 2) for total in totals]


def _last_first(sides: Sequence[tuple[int, int]]) -> list[int]:
    """In the order of `F.pad`."""
    return [pixels for side in reversed(sides) for pixels in side]


def _cut(conv: _ConvNd, g: Tensor) -> Tensor:
    """The output gradient with the margin that the output has not, and without the pixels that no input reaches."""
    sides = [
        (p, p - more)
        for (p, _), more in zip(
            _margins(conv), conv.output_padding, strict=True
        )
    ]
    return F.pad(g, _last_first(sides))


# ---- embeddings


def _embedding(embedding: nn.Embedding) -> Products:
    def inputs(x: Tensor) -> Tensor:
        x = x.long()[..., None, None]
        padding = embedding.padding_idx
        return x if padding is None else x.masked_fill(x == padding, -1)

    return Products(
        1,
        embedding.embedding_dim,
        inputs,
        _one_group,
        inputs_first=True,
        classes=embedding.num_embeddings,
    )


# ---- norms


def _scaled(
    normalized: Callable[[Any, Tensor], Tensor],
    channels: Callable[[Any, Tensor], Tensor],
) -> Rule:
    """A layer that scales and shifts its normalized input."""

    def parts(norm: nn.Module, weight: bool, bias: bool) -> list[Part]:
        def gradients(g: Tensor, x: Tensor) -> list[Tensor]:
            found = [g * normalized(norm, x)] if weight else []
            found += [g] if bias else []
            return [channels(norm, part).unsqueeze(-2) for part in found]

        return [Part(Sums(gradients), weight, bias)]

    return parts


def _last(norm: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    """Channels in the last dimensions -> [..., channels]."""
    return x.flatten(-len(norm.normalized_shape))


def _second(_: nn.Module, x: Tensor) -> Tensor:
    """Channels in the second dimension -> [..., channels]."""
    return x.movedim(1, -1)


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, eps=norm.eps)


def _rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.normalized_shape, eps=norm.eps)


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, eps=norm.eps)


def _batch_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    mean, variance = _statistics(norm, x)
    return F.batch_norm(x, mean, variance, training=mean is None, eps=norm.eps)


def _instance_norm(norm: nn.InstanceNorm2d, x: Tensor) -> Tensor:
    mean, variance = _statistics(norm, x)
    return F.instance_norm(
        x, mean, variance, use_input_stats=mean is None, eps=norm.eps
    )


def _statistics(
    norm: nn.BatchNorm2d | nn.InstanceNorm2d, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Running mean and variance, of those that have them."""
    if norm.running_mean is None or norm.running_var is None:
        return None, None
    return norm.running_mean.to(x), norm.running_var.to(x)


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _products(_linear),
    nn.Conv1d: _products(_convolution),
    nn.Conv2d: _products(_convolution),
    nn.Conv3d: _products(_convolution),
    nn.ConvTranspose1d: _products(_transposed),
    nn.ConvTranspose2d: _products(_transposed),
    nn.ConvTranspose3d: _products(_transposed),
    nn.Embedding: _products(_embedding),
    nn.LayerNorm: _scaled(_layer_norm, _last),
    nn.RMSNorm: _scaled(_rms_norm, _last),
    nn.GroupNorm: _scaled(_group_norm, _second),
    nn.BatchNorm1d: _scaled(_batch_norm, _second),
    nn.BatchNorm2d: _scaled(_batch_norm, _second),
    nn.BatchNorm3d: _scaled(_batch_norm, _second),
    nn.SyncBatchNorm: _scaled(_batch_norm, _second),
    nn.InstanceNorm1d: _scaled(_instance_norm, _second),
    nn.InstanceNorm2d: _scaled(_instance_norm, _second),
    nn.InstanceNorm3d: _scaled(_instance_norm, _second),
}
"""The rule of each kind of layer, which raises `NotImplementedError` for what it does not cover."""


def parts_of(module: nn.Module, weight: bool, bias: bool) -> list[Part]:
    """The rules of a layer's weight and bias, those that are trained; none for a layer of another kind."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) or not (
        weight or bias
    ):
        return []
    for kind, rule in RULES.items():
        if isinstance(module, kind):
            return rule(module, weight, bias)
    return []
