r"""Sums of outer products \sum_t g_t a_t^T of each sample; of one-hot a_t only their places are kept.

One-hot inputs [B, 1, T, 1] are integers, the place of the one; -1: there is none. The gradients of equal places in a
sample are summed first, so that nothing is larger than g or the result.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

LOOKED_UP = 2**20
"""Numbers of the vectors' rows that are looked up at a time: 4 MiB, as much as stays in a cache."""


def second_moment(x: Tensor) -> Tensor:
    """Sum of x x^T over samples and positions, x [B, T, groups, d] -> [groups, d, d]."""
    flat = x.flatten(0, 1).transpose(0, 1)
    return flat.mT @ flat


def outer_products(g: Tensor, a: Tensor, classes: int | None = None) -> Tensor:
    """Of each sample; g [B, groups, T, out], a [B, groups, T, in] -> [B, groups, out, in].

    With `classes` the inputs are one-hot of so many.
    """
    if classes is None:
        return g.mT @ a
    each = merged(g, a)
    result = g.new_zeros(len(g), classes, g.shape[-1])
    result[each.sample, each.place] = each.sums
    return result.mT.unsqueeze(1)


class Merged(NamedTuple):
    """The M different pairs of a sample and a place."""

    sums: Tensor
    """Gradients, summed over the positions of a pair [..., M, out]."""
    sample: Tensor
    place: Tensor


def is_one_hot(a: Tensor) -> bool:
    """Whether these inputs are places."""
    return not a.is_floating_point()


def merged(g: Tensor, a: Tensor) -> Merged:
    """Sum the gradients g [..., B, 1, T, out] of equal places a [B, 1, T, 1] of a sample."""
    places = a[:, 0, :, 0]
    sample, t = (places >= 0).nonzero(as_tuple=True)
    span = int(places.max()) + 2  # at least 1
    pairs, which = (sample * span + places[sample, t]).unique(
        return_inverse=True
    )
    shape = (*g.shape[:-4], len(pairs), g.shape[-1])
    sums = g.new_zeros(shape)
    each = g[..., sample, 0, t, :]
    sums.index_add_(-2, which, each)
    owner = pairs // span
    place = pairs % span
    return Merged(sums, owner, place)


def one_hot_squares(g: Tensor, a: Tensor, classes: int) -> Tensor:
    """Sum over draws and samples of the squared outer products; g [D, B, 1, T, out] -> [1, out, classes]."""
    each = merged(g, a)
    result = g.new_zeros(classes, g.shape[-1])
    result.index_add_(0, each.place, each.sums.square().sum(0))
    return result.T.unsqueeze(0)


def one_hot_weighted_squares(g: Tensor, a: Tensor, w: Tensor) -> Tensor:
    """Sum of w (outer products)^2 of each sample; g [B, 1, T, out], w [1, out, classes] -> [B]."""
    each = merged(g, a)
    weights = w[0].T[each.place]
    squares = each.sums.square() * weights
    totals = squares.sum(1)
    return g.new_zeros(len(g)).index_add_(0, each.sample, totals)


def one_hot_norms(g: Tensor, a: Tensor) -> Tensor:
    """Squared norm of the outer products of each sample; g [B, 1, T, out] -> [B]."""
    each = merged(g, a)
    squares = each.sums.square()
    totals = squares.sum(1)
    return g.new_zeros(len(g)).index_add_(0, each.sample, totals)


def add_one_hot_products(
    total: Tensor, v: Tensor, a: Tensor, g: Tensor
) -> None:
    """Add v_k . (outer products) of each sample to [K, B]; v [K, 1, out, classes], a [B, 1, T, 1], g [B, 1, T, out].

    The rows of v for the places there are, a few at a time, in place of the outer products, which are mostly zero.
    """
    each = merged(g, a)
    rows = v[:, 0].mT
    numbers = rows[:, 0].numel()
    together = max(1, LOOKED_UP // max(1, numbers))
    parts = zip(
        each.sums.split(together),
        each.sample.split(together),
        each.place.split(together),
        strict=True,
    )
    for sums, sample, place in parts:
        looked_up = rows[:, place]
        products = (looked_up * sums).sum(2)
        total.index_add_(1, sample, products)
