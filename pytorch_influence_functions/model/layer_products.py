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
from .layer_passes import backward, forward, layer_inputs
from .layers import Layer, gather, joined, scatter
from .objective import Objective
from .outer_products import outer_products


def layer_products(
    points: Sequence[Objective],
    layers: Sequence[Layer],
    batch: Batch,
    vectors: Tensor,
) -> Tensor:
    """g_i . s_k for each vector s_k of `vectors` [K, P] and each sample of a batch, over points -> [K, B]."""
    total = vectors.new_zeros(len(vectors), batch.size)
    for layer, M in _summed(points, layers, batch):
        total += gather(layer, vectors).flatten(1) @ M.flatten(1).mT
    return total


def summed_gradients(
    points: Sequence[Objective], layers: Sequence[Layer], batch: Batch
) -> Tensor:
    """The gradient of each sample, summed over the points -> [B, P]."""
    rows = points[0].theta.new_zeros(batch.size, points[0].P)
    for layer, M in _summed(points, layers, batch):
        scatter(layer, M, rows)
    return rows


def _summed(
    points: Sequence[Objective], layers: Sequence[Layer], batch: Batch
) -> Iterator[tuple[Layer, Tensor]]:
    """Each layer and the gradient of its weight, of each sample, summed over several parameters of one model.

    What a layer sees at another point counts as further positions, so that the sum is one product a layer.
    """
    seen = [seen_of_loss(at, layers, batch) for at in points]
    for k, layer in enumerate(layers):
        a = joined([inputs[k] for inputs, _ in seen], 1)
        g = joined([gradients[k] for _, gradients in seen], 1)
        yield layer, outer_products(g.transpose(1, 2), a.transpose(1, 2))


def seen_of_loss(
    objective: Objective, layers: Sequence[Layer], batch: Batch
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of each layer [B, T, groups, in], and the gradient of each sample's loss in its outputs."""
    seen = forward(objective, layers, batch)
    y = [part.detach().requires_grad_() for part in seen.y]
    losses = objective.output_losses(seen.rebuild(y), batch).sum()
    e = torch.autograd.grad(
        losses, y, materialize_grads=True, allow_unused=True
    )
    g, _ = backward(layers, seen, list(e), batch.size)
    return layer_inputs(layers, seen, batch.size), g
