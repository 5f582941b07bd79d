"""Convolutions as products: what each output pixel sees, unfolded, times the weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from .layer_kinds import Products


def convolution(conv: _ConvNd) -> Products:
    """What each output pixel sees, times the weight."""

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
    return Products(
        conv.groups,
        out,
        inputs,
        outputs,
        some=inputs,
        unfolded=(conv.in_channels // conv.groups, math.prod(conv.kernel_size)),
    )


def transposed(conv: _ConvNd) -> Products:
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

    channels, taps = (
        conv.out_channels // conv.groups,
        math.prod(conv.kernel_size),
    )
    return Products(
        conv.groups,
        channels * taps,
        pixels,
        outputs,
        inputs_first=True,
        shift=pixels,
        unfolded=(channels, taps),
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
    """What each output pixel of a convolution sees, [B, groups in, pixels...] -> [B, T, groups, taps * in].

    `places` [B, S] are those pixels of each sample that are wanted; None: all.
    """
    dims = len(kernel)
    # channels last, so that a copy takes them in one go: a tenth of `F.unfold`
    x = x.movedim(1, -1).contiguous()
    for i, (k, d, s) in enumerate(zip(kernel, dilation, stride, strict=True)):
        span = d * (k - 1) + 1
        x = x.unfold(1 + i, span, s)[..., ::d]
    # [B, pixels..., groups in, kernel...]
    if places is not None:
        samples = torch.arange(len(x), device=x.device).unsqueeze(1)
        pixels = torch.unravel_index(places, x.shape[1 : 1 + dims])
        x, dims = x[(samples, *pixels)], 1
    x = x.unflatten(1 + dims, (groups, -1)).movedim(2 + dims, -1)
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
