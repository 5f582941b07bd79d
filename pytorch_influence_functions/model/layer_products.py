r"""Per-sample gradients, summed over several points, and their products with many vectors, by layer rules.

Of a layer with inputs a_t and output gradients g_t the gradient of a sample is M = \sum_t g_t a_t^T, and its product
with the layer's part W of a vector <M, W>: one forward pass, one backward pass to the layers' outputs, and for each
layer one more product, whatever the number of vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..data.batch import Batch
from .budget import cached_block
from .layer_passes import Inputs, backward, forward
from .layers import Layer, gather, joined, scatter, unfolded
from .objective import Objective
from .outer_products import (
    add_one_hot_products,
    is_one_hot,
    outer_products,
)

LONGER = 4
"""What a convolution sees of the samples is put in the order of its weight, up to so many times as long as the vectors:
they need not be copied then, and the copying is little beside the products."""


def layer_products(
    points: Sequence[Objective],
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    vectors: Tensor,
) -> Tensor:
    """g_i . s_k, summed over the points, for each vector s_k of `vectors` [K, P] and each sample of some batches
    -> [K, samples]."""
    total = vectors.new_zeros(len(vectors), sum(one.size for one in batches))
    parts = total.split([one.size for one in batches], 1)
    gathered: dict[int, Tensor] = {}
    for part, batch in zip(parts, batches, strict=True):
        for i, (a, g) in enumerate(_seen(points, layers, batch)):
            layer = layers[i]
            if is_one_hot(a):
                add_one_hot_products(part, gather(layer, vectors), a, g)
                continue
            rows = total.shape[1] * a.shape[2]
            kernel = unfolded(layer)
            if kernel and rows < LONGER * len(vectors) * layer.fan_out:
                v = vectors[:, layer.weight]
                a = _folded(a, *kernel)
            elif i in gathered:
                v = gathered[i]
            else:
                v = gather(layer, vectors).flatten(1)
                gathered[i] = v
            _add_products(part, v, a, g)
    return total


def _folded(a: Tensor, channels: int, taps: int) -> Tensor:
    """Unfolded inputs [..., taps channels], as the weight has them [..., channels taps]."""
    a = a.unflatten(-1, (taps, channels))
    return a.mT.flatten(-2)


def summed_gradients(
    points: Sequence[Objective], layers: Sequence[Layer], batch: Batch
) -> Tensor:
    """The gradient of each sample, summed over the points -> [B, P]."""
    rows = points[0].theta.new_zeros(batch.size, points[0].P)
    each = zip(layers, _seen(points, layers, batch), strict=True)
    for layer, (a, g) in each:
        scatter(layer, outer_products(g, a, layer.classes), rows)
    return rows


def _seen(
    points: Sequence[Objective], layers: Sequence[Layer], batch: Batch
) -> Iterator[tuple[Tensor, Tensor]]:
    """What each layer sees: inputs [B, groups, T, in] and gradients of its outputs [B, groups, T, out].

    What it sees at another of several parameters of one model counts as further positions, so that the sum over these
    is one product a layer.
    """
    seen = [seen_of_loss(at, layers, batch) for at in points]
    for k in range(len(layers)):
        a = joined([inputs[k] for inputs, _ in seen], 1)
        g = joined([gradients[k] for _, gradients in seen], 1)
        yield a.transpose(1, 2), g.transpose(1, 2)


def _add_products(total: Tensor, v: Tensor, a: Tensor, g: Tensor) -> None:
    """Add v_k . (sum_t g_t a_t^T) to [K, B]; v [K, numbers], a [B, groups, T, in], g [B, groups, T, out]."""
    size = cached_block(v[0].nbytes, a.device.type, len(a))
    pairs = zip(total.split(size, 1), g.split(size), a.split(size), strict=True)
    for part, x, y in pairs:
        gradients = outer_products(x, y)
        part += v @ gradients.flatten(1).mT


def seen_of_loss(
    objective: Objective, layers: Sequence[Layer], batch: Batch
) -> tuple[Inputs, list[Tensor]]:
    """Inputs of each layer [B, T, groups, in], and the gradient of each sample's loss in its outputs."""
    seen = forward(objective, layers, batch)
    y = [part.detach().requires_grad_() for part in seen.y]
    losses = objective.output_losses(seen.rebuild(y), batch).sum()
    e = torch.autograd.grad(
        losses, y, materialize_grads=True, allow_unused=True
    )
    g, _ = backward(layers, seen, list(e), batch.size, last=True)
    return Inputs(layers, seen, batch.size), g
