"""What a model allows: each fast way of computing is tried on two samples against the slow one before it is trusted."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp

from .curvature import PRODUCTS
from .data import Batch, Samples
from .gradients import forward_products, gradient, require_finite, vmap_gradients
from .objective import Objective, Paths

logger = logging.getLogger(__name__)


def probe(objective: Objective, samples: Samples) -> None:
    """Find which ways of computing give the model's true values on two samples, and set `objective.paths`.

    Raises:
        NonFiniteError: a loss or gradient of these samples is NaN or infinite.
        TypeError, ValueError: the loss cannot take the batch.
    """
    indices = [0, samples.n // 2] if samples.n > 1 else [0, 0]
    objective.paths = Paths()
    alone = [samples.sample(i) for i in indices]
    losses = torch.cat([objective.losses(objective.theta, one) for one in alone]).detach()
    require_finite(losses, indices, samples.name, "loss")
    truth = torch.stack([gradient(objective, one) for one in alone])
    require_finite(truth, indices, samples.name, "gradient")
    batch = _rows(objective, samples, indices, losses)
    if batch is not None:
        _try_fast_paths(objective, batch, losses, truth)
    slow = [name for name, allowed in objective.paths._asdict().items() if not allowed]
    if slow:
        logger.info("the model does not allow %s; a slower way gives the same numbers", ", ".join(slow))


def _rows(objective: Objective, samples: Samples, indices: list[int], losses: Tensor) -> Batch | None:
    """The samples collated together, if each row of that batch has the loss of the sample collated alone."""
    batch = samples.take(indices)
    objective.paths = Paths(rows=True)
    if batch.sliceable and _agrees(lambda: objective.losses(objective.theta, batch), losses):
        return batch
    objective.paths = Paths()
    return None


def _try_fast_paths(objective: Objective, batch: Batch, losses: Tensor, truth: Tensor) -> None:
    theta, v = objective.theta, truth.sum(0)
    two = torch.stack([v, 2 * v])

    def attempt(path: str, value: Callable[[], Tensor], expected: Tensor) -> None:
        before = objective.paths
        objective.paths = before._replace(**{path: True})
        if not _agrees(value, expected):
            objective.paths = before

    attempt("vmap", lambda: vmap_gradients(objective, batch), truth)
    attempt("batched", lambda: objective.losses(theta, batch), losses)
    attempt("forward", lambda: jvp(lambda t: objective.losses(t, batch), (theta,), (v,))[1], truth @ v)
    attempt("stacked", lambda: forward_products(objective, batch, two), two @ truth.T)
    for kind, product in PRODUCTS.items():
        try:
            expected = torch.cat(
                [product(objective, batch, v.unsqueeze(0)), product(objective, batch, 2 * v.unsqueeze(0))]
            )
        except Exception as error:  # this curvature cannot be had at all; whoever asks for it is told so then
            logger.debug("no %s product: %s", kind, error)
            continue
        attempt(kind, lambda product=product: product(objective, batch, two), expected)  # type: ignore[misc]


def _agrees(value: Callable[[], Tensor], expected: Tensor) -> bool:
    """Whether a way of computing works and gives the expected numbers, up to rounding."""
    try:
        got = value().detach()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        logger.debug("a faster way is refused: %s", (str(error).splitlines() or [type(error).__name__])[0])
        return False
    slack = torch.finfo(expected.dtype).eps ** 0.5
    return got.shape == expected.shape and bool(
        (got - expected).abs().max() <= slack * (1e-3 + 10 * expected.abs().max())
    )
