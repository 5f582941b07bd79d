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
from .layers import Layer, gather, joined, scatter
from .objective import Objective
from .outer_products import (
    add_one_hot_products,
    is_one_hot,
    outer_products,
)


def layer_products(
    points: Sequence[Objective],
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    vectors: Tensor,
) -> Tensor:
    """g_i . s_k, summed over the points, for each vector s_k of `vectors` [K, P] and each sample of some batches
    -> [K, samples]."""
    s = [gather(layer, vectors) for layer in layers]
    s = [
        v if layer.classes else v.flatten(1)
        for v, layer in zip(s, layers, strict=True)
    ]
    total = vectors.new_zeros(len(vectors), sum(one.size for one in batches))
    parts = total.split([one.size for one in batches], 1)
    for part, batch in zip(parts, batches, strict=True):
        for v, (a, g) in zip(s, _seen(points, layers, batch), strict=True):
            if is_one_hot(a):
                add_one_hot_products(part, v, a, g)
            else:
                _add_products(part, v, a, g)
    return total


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
        part += v @ outer_products(x, y).flatten(1).mT


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
