"""What a model allows: each fast way of computing is tried against the slow one on a few samples before it is used."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp

from ..data.batch import Batch, flatten_tree
from ..data.samples import Samples, shapes_of
from .door import first_gradients, first_losses, require_dependence
from .gradients import agrees, forward_products, vmap_gradients
from .linear import find_head
from .objective import Objective, Paths

logger = logging.getLogger(__name__)
MOST_PROBED = 8
"""Samples of the batch that a model is tried on: one batch, as the loader makes it, up to so many. Two would not tell a
model that branches on the size of its batch from one that does not; more cost more than a short run."""
LOOKED_AT = 32
"""Samples whose shapes are looked at, so that short and long sequences stand in the batch that a model is tried on."""


def probe(objective: Objective, samples: Samples, most: int = MOST_PROBED) -> None:
    """Find which ways of computing give the model's true values, and set `objective.paths` and `samples.apart`.

    Tried on at most `most` samples.

    Raises:
        NonFiniteError: a loss or gradient of these samples is NaN or infinite.
        TypeError, ValueError: the loss cannot take the batch.
    """
    objective.paths, samples.apart, samples.shapes = Paths(), False, None
    indices, uniform = _different(samples, max(2, min(samples.batch_size, most)))
    alone = [samples.sample(i) for i in indices]
    _look_for_mutation(objective, alone[0], samples)
    alone = [samples.sample(i) for i in indices] if objective.mutates else alone
    _choose_precision(objective, alone[0])
    losses = first_losses(objective, alone, samples.name)
    require_dependence(objective, samples)
    truth = first_gradients(objective, alone, samples.name)
    find_head(objective, alone[:2], truth[:2])
    batch = _rows(objective, samples, indices, losses)
    if batch is None:
        samples.apart = True
        logger.info(
            "%s: a sample collated with others is not what it is alone (padding, time first), so that samples go "
            "through the model one at a time, which is slow; a collate_fn that pads to a fixed length, or a mask in "
            "the loss, lets them go together", samples.name,
        )  # fmt: skip
        return
    samples.shapes = shapes_of(alone[0]) if uniform else None
    _try_fast_paths(objective, batch, losses, truth)
    slow = [name for name, allowed in objective.paths._asdict().items() if allowed is False]
    if slow:
        logger.info("the model does not allow %s; a slower way gives the same numbers", ", ".join(slow))


def _spread(n: int, count: int) -> list[int]:
    """Indices over the whole set, `count` of them (the first one again where there are fewer samples)."""
    chosen = sorted({i * n // count for i in range(count)})
    return chosen if len(chosen) > 1 else [0, 0]


def _different(samples: Samples, count: int) -> tuple[list[int], bool]:
    """Indices of `count` samples, of as many shapes as there are; and whether those looked at have one shape."""
    shapes = {i: shapes_of(samples.sample(i)) for i in _spread(samples.n, min(samples.n, LOOKED_AT))}
    first_of_each = list({shape: i for i, shape in reversed(shapes.items())}.values())
    if len(first_of_each) == 1:
        return _spread(samples.n, count), True
    others = [i for i in shapes if i not in first_of_each]
    return sorted([*first_of_each, *others][:count]), False


def _look_for_mutation(objective: Objective, one: Batch, samples: Samples) -> None:
    """Give the model copies of its inputs where it changes them in place (`x.div_(255)`, `x.requires_grad_()`)."""
    before = [(t._version, t.requires_grad) for t in one.leaves]
    first_losses(objective, [one], samples.name)
    objective.mutates = before != [(t._version, t.requires_grad) for t in one.leaves]
    if objective.mutates:
        logger.info("%s: the model changes its inputs in place; it gets copies", samples.name)


def _choose_precision(objective: Objective, one: Batch) -> None:
    """Compute a model of half precision in single precision, where it runs in it."""
    lowest = min(objective.dtypes, key=lambda dtype: torch.finfo(dtype).bits)
    if torch.finfo(lowest).bits > 16:
        return
    twin = objective.in_precision(torch.float32)
    own = objective.losses(objective.theta, one).detach()
    try:
        found = twin.losses(twin.theta, one).detach()
    except RuntimeError as error:
        logger.info("the model is computed in %s, single precision is refused: %s", lowest, str(error).splitlines()[0])
        return
    # the loss itself was rounded to half precision after some layers of it: this only tells another function apart
    if bool((found - own).abs().max() <= 64 * torch.finfo(lowest).eps * (1 + own.abs().max())):
        vars(objective).update(vars(twin))
        logger.info("the model has parameters in %s; it is computed in single precision", lowest)


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

    def outputs() -> Tensor:
        return _flat(objective.batch_outputs(theta, batch), batch.size)

    def losses_of_outputs() -> Tensor:
        return objective.output_losses(objective.outputs(theta, batch), batch)

    attempt("vmap", lambda: vmap_gradients(objective, batch), truth)
    if objective.model_loss is not None or objective.head is not None:
        _try(lambda: attempt("outputs", outputs, _outputs_alone(objective, batch)))
        if objective.paths.outputs:
            attempt("loss", losses_of_outputs, losses)
            attempt("batched", lambda: objective.losses(theta, batch), losses)
    else:
        objective.paths = objective.paths._replace(outputs=True, loss=True)
        attempt("batched", lambda: objective.losses(theta, batch), losses)
        if not objective.paths.batched:
            objective.paths = objective.paths._replace(loss=False)
            attempt("batched", lambda: objective.losses(theta, batch), losses)
        if not objective.paths.batched:
            objective.paths = objective.paths._replace(outputs=False, loss=False)
            attempt("loss", losses_of_outputs, losses)
    attempt("forward", lambda: jvp(lambda t: objective.losses(t, batch), (theta,), (v,))[1], truth @ v)
    attempt("stacked", lambda: forward_products(objective, batch, two), two @ truth.T)


def _outputs_alone(objective: Objective, batch: Batch) -> Tensor:
    rows = [_flat(objective.batch_outputs(objective.theta, one), 1) for one in batch.singles()]
    return torch.cat(rows).detach()


def _flat(outputs: object, size: int) -> Tensor:
    """Outputs laid end to end, a row for each sample."""
    return torch.cat([leaf.reshape(size, -1) for leaf in flatten_tree(outputs)[0]], 1)


def _try(attempt: Callable[[], None]) -> None:
    """A model whose outputs cannot be had (called twice, not tensors) has no such path."""
    try:
        attempt()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        logger.debug("no outputs: %s", error)
