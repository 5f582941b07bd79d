r"""Per-sample gradients, and products of them with vectors that never build them.

The products g_i . s_k of B samples with K vectors come by one of four ways, all equal in value:
forward mode (one Jacobian-vector product of the B losses per vector), the rules of the layers of a convolutional model,
per-sample gradients of a block of samples times all vectors, or one sample at a time where the model allows none.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from ..data.batch import UNCUT, Batch
from .budget import (
    forward_stack,
    gradient_block,
    layer_block,
    rows_block,
)
from .layer_products import layer_products
from .objective import Objective

logger = logging.getLogger(__name__)


class NonFiniteError(ValueError):
    """A loss or gradient is NaN or infinite."""


def finite_rows(rows: Tensor) -> Tensor:
    """Which rows of [K, P] are finite [K]; a few at a time, since what is made on the way is larger than they are."""
    numbers = rows.shape[1]
    size = rows_block(
        numbers * rows.element_size(),
        rows.device.type,
        len(rows),
    )
    parts = rows.split(size)
    return torch.cat([part.isfinite().all(1) for part in parts])


def require_finite(
    rows: Tensor, indices: Sequence[int], name: str, what: str
) -> None:
    """Raise `NonFiniteError` that names the first sample whose row is NaN or infinite."""
    finite = rows.isfinite() if rows.dim() == 1 else finite_rows(rows)
    if not bool(finite.all()):
        index = int(indices[int((~finite).nonzero()[0])])
        raise NonFiniteError(
            f"{name}: the {what} of sample {index} is NaN or infinite; look at this sample's input and target, "
            "and at whether the model's training diverged"
        )


# ---- gradients


def gradient(objective: Objective, batch: Batch) -> Tensor:
    """Gradient of the mean loss of a batch -> [P]; zero for a parameter that the loss does not reach."""
    theta = objective.theta.detach().requires_grad_()
    loss = objective.loss(theta, batch)
    if not loss.requires_grad:
        return torch.zeros_like(objective.theta)
    (g,) = torch.autograd.grad(
        loss, theta, allow_unused=True, materialize_grads=True
    )
    return g


def per_sample_gradients(
    objective: Objective, batch: Batch, max_bytes: float = math.inf
) -> Tensor:
    """Gradient of each sample's loss -> [B, P]."""
    if batch.size == 1:
        return gradient(objective, batch).unsqueeze(0)
    if not batch.parts and not objective.paths.rows:
        raise ValueError(UNCUT)
    if batch.parts or not objective.paths.vmap:
        return torch.stack(
            [gradient(objective, one) for one in batch.singles()]
        )
    blocks = gradient_blocks(objective, batch, max_bytes)
    return torch.cat([vmap_gradients(objective, block) for block in blocks])


def gradient_products(
    objective: Objective,
    batch: Batch,
    vectors: Tensor,
    max_bytes: float = math.inf,
) -> Tensor:
    """g_i . s_k for each vector s_k of `vectors` [K, P] and each sample of a batch -> [K, B]."""
    paths = objective.paths
    if paths.layers and not batch.parts:
        return by_layers(objective, batch, vectors, max_bytes)
    if batch.parts or not (paths.forward or paths.vmap):
        return torch.cat(
            [
                vectors @ per_sample_gradients(objective, one).T
                for one in batch.singles()
            ],
            dim=1,
        )
    if paths.forward and (
        len(vectors) < few(objective, batch) or not paths.vmap
    ):
        return forward_products(objective, batch, vectors, max_bytes)
    return torch.cat(
        [
            vectors @ per_sample_gradients(objective, block).T
            for block in gradient_blocks(objective, batch, max_bytes)
        ],
        dim=1,
    )


def by_layers(
    objective: Objective,
    batch: Batch,
    vectors: Tensor,
    max_bytes: float = math.inf,
) -> Tensor:
    """The same by the rules of the layers, [K, P] -> [K, B]."""
    size = layer_block(activation_bytes(objective, batch), max_bytes)
    starts = range(0, batch.size, size)
    blocks = [batch.rows(i, min(i + size, batch.size)) for i in starts]
    return layer_products([objective], objective.paths.layers, blocks, vectors)


FEW, MANY = 4, 64
"""From so many vectors on per-sample gradients are cheaper than forward mode: for a convolution, for a small MLP."""
REUSED, SMALL_BYTES = 3.0, 2**18
"""Where a parameter is used fewer times per sample, gradients larger than this cost more to store than to compute."""


def forward_products(
    objective: Objective,
    batch: Batch,
    vectors: Tensor,
    max_bytes: float = math.inf,
) -> Tensor:
    """g_i . s_k by forward mode: the derivative of the B losses along each vector, [K, P] -> [K, B]."""

    def losses(theta: Tensor) -> Tensor:
        return objective.losses(theta, batch)

    def along(s: Tensor) -> Tensor:
        products: Tensor = jvp(losses, (objective.theta,), (s,))[1]
        return products.detach()

    fitting = forward_stack(
        batch.size * activation_bytes(objective, batch), max_bytes
    )
    size = int(min(len(vectors), fitting))
    if size <= 1 or not objective.paths.stacked:
        return torch.stack([along(s) for s in vectors])
    return in_stacks(vmap(along), vectors, size)


def in_stacks(
    product: Callable[[Tensor], Tensor], vectors: Tensor, size: int
) -> Tensor:
    """`product` of stacks of at most `size` vectors, all about as large."""
    if len(vectors) <= size:
        return product(vectors)
    return torch.cat(
        [
            product(part)
            for part in vectors.tensor_split(-(-len(vectors) // size))
        ]
    )


def vmap_gradients(objective: Objective, batch: Batch) -> Tensor:
    """Gradient of each sample's loss by `vmap` -> [B, P]."""
    one = grad(
        lambda theta, *leaves: objective.sample_loss(
            theta, leaves, batch.rebuild
        )
    )
    over = vmap(one, in_dims=(None, *(0 for _ in batch.leaves)))
    rows = cast(Tensor, over(objective.theta, *batch.leaves))
    return rows.detach()


def gradient_blocks(
    objective: Objective, batch: Batch, max_bytes: float
) -> Iterator[Batch]:
    """Parts of a batch whose per-sample gradients are held at once."""
    size = gradient_block(
        batch.size,
        objective.theta.nbytes,
        activation_bytes(objective, batch),
        max_bytes,
    )
    if size >= batch.size:
        yield batch
        return
    for start in range(0, batch.size, size):
        yield batch.rows(start, min(start + size, batch.size))


# ---- trust


ULPS = 64
"""Units in the last place that a way of computing may differ in, on the scale of its row: sums over the layers of a
network come in another order. A wrong sample or layer differs by millions of them in single precision."""


def agrees(
    value: Callable[[], Tensor], expected: Tensor, within: float | None = None
) -> bool:
    """Whether a way of computing works and gives the expected numbers in each row (sample).

    `within` is the relative difference that is allowed; None is that of rounding.
    """
    try:
        got = value().detach()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        logger.debug(
            "a faster way is refused: %s",
            (str(error).splitlines() or [type(error).__name__])[0],
        )
        return False
    if got.shape != expected.shape:
        return False
    if not expected.numel():
        return True
    # a row that is small beside the others (a sample that is fitted well) carries the rounding of sums as large as they
    least = 1e-2 * _largest(expected) + 1e-3
    unit = within or ULPS * torch.finfo(expected.dtype).eps
    if expected.dim() == 1:
        slack = unit * (expected.abs() + least)
        return bool(((got - expected).abs() <= slack).all())
    # a row at a time: it may be as long as the parameters
    for row, right in zip(got, expected, strict=True):
        slack = unit * (_largest(right) + least)
        if not bool(row.sub(right).abs_().max() <= slack):
            return False
    return True


def _largest(t: Tensor) -> Tensor:
    """The largest absolute value, without a copy."""
    return torch.maximum(t.max(), -t.min())


# ---- cost


def few(objective: Objective, batch: Batch) -> float:
    """Below this number of vectors forward mode is cheaper than per-sample gradients."""
    if reuse(objective, batch) >= REUSED:
        return FEW
    return MANY if objective.theta.nbytes <= SMALL_BYTES else math.inf


def reuse(objective: Objective, batch: Batch) -> float:
    """How often one sample's forward pass uses each parameter: 1 for an MLP, many for a convolution."""
    return _cost(objective, batch)[0]


def activation_bytes(objective: Objective, batch: Batch) -> int:
    """Bytes that one sample's forward pass keeps for the backward pass, beside its input and the parameters."""
    return _cost(objective, batch)[1]


def _cost(objective: Objective, batch: Batch) -> tuple[float, int]:
    if objective.cost is None:
        one = next(batch.singles())
        theta = objective.theta.detach().requires_grad_()
        held = (theta, *one.leaves, *objective.fixed())
        given = {
            t.untyped_storage().data_ptr() for t in held if _has_storage(t)
        }
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if _has_storage(t) and t.untyped_storage().data_ptr() not in given:
                kept[t.data_ptr()] = t.nbytes
            # the tensor itself would keep its own graph alive
            return t.detach()

        counter = FlopCounterMode(display=False)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            try:
                with counter:
                    objective.losses(theta, one)
            except RuntimeError:  # the counter's hooks refuse a loss that takes gradients of its own
                objective.losses(theta, one)
        objective.cost = (
            counter.get_total_flops() / (2 * objective.P),
            max(sum(kept.values()), 1024),
        )
    return objective.cost


def _has_storage(t: Tensor) -> bool:
    """A sparse tensor, which comes from a batch or a buffer, has none of its own."""
    return t.layout == torch.strided
