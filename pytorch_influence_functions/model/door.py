"""A model at samples it has not met yet: where it fails, one sentence that names the loader and the sample."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.reader import OUT_OF_MEMORY
from ..data.samples import Samples
from .gradients import (
    NonFiniteError,
    gradient,
    per_sample_gradients,
    require_finite,
)
from .objective import Objective

PLACES = ("_loader:", "test batch:", "config[", "model:", "preconditioner")
"""What a message holds that already says where to look."""
MOST_LOOKED_AT = 32
"""Samples that are tried before a loss is said to have no gradient: usually the first has one."""


def first_losses(
    objective: Objective, samples: Sequence[Batch], name: str
) -> Tensor:
    """Losses of batches of one that the model is tried on -> [B].

    Raises:
        TypeError, ValueError: the model or the loss cannot take one.
        NonFiniteError: a parameter or a loss is NaN or infinite.
    """
    # with gradients, which a loss may take of its own
    losses = torch.cat(
        [
            _loss(objective, objective.theta, one, name).detach()
            for one in samples
        ]
    )
    _require_finite_parameters(objective)
    require_finite(losses, [one.indices[0] for one in samples], name, "loss")
    return losses


def require_dependence(objective: Objective, samples: Samples) -> None:
    """Raise where the loss is not one of the parameters: detached, or a number; a sample that is masked may be."""
    theta = objective.theta.detach().requires_grad_()
    looked = range(0, samples.n, -(-samples.n // MOST_LOOKED_AT))
    losses = (
        _loss(objective, theta, samples.sample(i), samples.name) for i in looked
    )
    if not any(loss.requires_grad for loss in losses):
        raise TypeError(
            f"config[{objective.loss_key!r}]: the losses of {len(looked)} training samples do not depend on the "
            "parameters; return the loss itself, not its .detach(), .item() or one computed under torch.no_grad()"
        )


def _require_finite_parameters(objective: Objective) -> None:
    if bool(objective.theta.isfinite().all()):
        return
    parts = zip(
        objective.names, objective.unflatten(objective.theta), strict=True
    )
    wrong = next(key for key, part in parts if not bool(part.isfinite().all()))
    raise NonFiniteError(
        f"model: its parameter {wrong!r} holds NaN or infinite numbers; its training diverged"
    )


def check_losses(
    objective: Objective, batches: Iterable[Batch], name: str
) -> None:
    """One pass of losses.

    Raises:
        TypeError, ValueError: the model or the loss cannot take a sample; the first one is named.
        NonFiniteError: its loss is NaN or infinite.
    """
    for batch in batches:
        checked_losses(objective, batch, name)


def checked_losses(objective: Objective, batch: Batch, name: str) -> Tensor:
    """Losses of a batch [B], finite all of them; errors as of `check_losses`."""
    losses = _losses(objective, batch, name).detach()
    require_finite(losses, batch.indices, name, "loss")
    return losses


def check_mean(objective: Objective, batch: Batch, name: str) -> None:
    """The mean loss of a batch that is taken as a whole; errors as of `check_losses`."""
    try:
        loss = objective.loss(objective.theta, batch).detach()
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        _look_inside(objective, batch, name)
        raise _told(objective, batch, name, error) from error
    if not bool(loss.isfinite()):
        _look_inside(objective, batch, name)
        raise NonFiniteError(
            f"{name}: its mean loss is NaN or infinite; look at its inputs and targets"
        )


def _look_inside(objective: Objective, batch: Batch, name: str) -> None:
    """`check_losses` where the samples can be told apart."""
    if batch.sliceable and batch.size > 1:
        check_losses(objective, batch.singles(), name)


def _losses(objective: Objective, batch: Batch, name: str) -> Tensor:
    """Losses of a batch [B]; where they fail, of each sample by itself, to find the one."""
    try:
        return objective.losses(objective.theta, batch)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        if batch.size > 1 and (batch.parts or batch.sliceable):
            return torch.cat(
                [
                    _loss(objective, objective.theta, one, name)
                    for one in batch.singles()
                ]
            )
        raise _told(objective, batch, name, error) from error


def _loss(objective: Objective, theta: Tensor, one: Batch, name: str) -> Tensor:
    """Loss of a batch of one [1]."""
    return _tried(lambda: objective.losses(theta, one), objective, one, name)


def _tried(
    compute: Callable[[], Tensor], objective: Objective, one: Batch, name: str
) -> Tensor:
    """What is computed of a batch of one, or an error that names the sample."""
    try:
        return compute()
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        raise _told(objective, one, name, error) from error


def first_gradients(
    objective: Objective, samples: Sequence[Batch], name: str
) -> Tensor:
    """Gradients of batches of one that the model is tried on -> [B, P]; errors as of `first_losses`."""
    g = torch.stack(
        [
            _tried(
                functools.partial(gradient, objective, one),
                objective,
                one,
                name,
            )
            for one in samples
        ]
    )
    require_finite(g, [one.indices[0] for one in samples], name, "gradient")
    return g


def _told(
    objective: Objective, batch: Batch, name: str, error: Exception
) -> Exception:
    """What the model or the loss did not take, with the sample and what it is."""
    where = f"{name}: sample {batch.indices[0]}"
    if isinstance(error, TypeError | ValueError) and not isinstance(
        error, UnicodeError
    ):
        kind = TypeError if isinstance(error, TypeError) else ValueError
        return kind(f"{where}: {error}; the batch of it holds {_facts(batch)}")
    own = {t.dtype for t in batch.leaves if t.is_floating_point()}
    mixed = bool(own - set(objective.dtypes))
    hint = ", which the loader has to give" if mixed else ""
    line = (str(error).splitlines() or [""])[0]
    return (TypeError if mixed else ValueError)(
        f"{where}: the model or its loss fails on it, collated alone: {type(error).__name__}: {line}; its batch holds "
        f"{_facts(batch)}, the parameters are {_names(objective.dtypes)}{hint}"
    )


def _facts(batch: Batch) -> str:
    """Precision and shape of each tensor."""
    each = [f"{_names([t.dtype])} {tuple(t.shape)}" for t in batch.leaves]
    return (
        ", ".join(each)
        if each
        else f"no tensor, but a {type(batch.tree).__name__}"
    )


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(
        sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})
    )


def explain(objective: Objective, samples: Samples, error: Exception) -> None:
    """Raise what names the training sample at which a computation failed, if it was one; a pass of losses finds it.

    Raises:
        TypeError, ValueError, NonFiniteError: the sample.
    """
    known = isinstance(error, TypeError | ValueError) and any(
        place in str(error) for place in PLACES
    )
    if known or isinstance(error, OUT_OF_MEMORY):
        return
    check_losses(objective, samples.ordered(), samples.name)
    size = samples.batch_size if objective.paths.rows else 1
    for batch in samples.ordered(size):
        rows = per_sample_gradients(objective, batch)
        require_finite(rows, batch.indices, samples.name, "gradient")
