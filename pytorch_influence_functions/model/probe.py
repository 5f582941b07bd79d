"""What a model allows: each fast way of computing is tried on two samples against the slow one before it is trusted."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp

from ..data.batch import Batch
from ..data.samples import Samples
from .gradients import agrees, forward_products, gradient, require_finite, vmap_gradients
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
    slow = [name for name, allowed in objective.paths._asdict().items() if allowed is False]
    if slow:
        logger.info("the model does not allow %s; a slower way gives the same numbers", ", ".join(slow))


def _rows(objective: Objective, samples: Samples, indices: list[int], losses: Tensor) -> Batch | None:
    """The samples collated together, if each row of that batch has the loss of the sample collated alone."""
    batch = samples.take(indices)
    objective.paths = Paths(rows=True)
    if batch.sliceable and agrees(lambda: objective.losses(objective.theta, batch), losses):
        return batch
    objective.paths = Paths()
    return None


def _try_fast_paths(objective: Objective, batch: Batch, losses: Tensor, truth: Tensor) -> None:
    theta, v = objective.theta, truth.sum(0)
    two = torch.stack([v, 2 * v])

    def attempt(path: str, value: Callable[[], Tensor], expected: Tensor) -> None:
        before = objective.paths
        objective.paths = before._replace(**{path: True})
        if not agrees(value, expected):
            objective.paths = before

    attempt("vmap", lambda: vmap_gradients(objective, batch), truth)
    attempt("batched", lambda: objective.losses(theta, batch), losses)
    attempt("forward", lambda: jvp(lambda t: objective.losses(t, batch), (theta,), (v,))[1], truth @ v)
    attempt("stacked", lambda: forward_products(objective, batch, two), two @ truth.T)
