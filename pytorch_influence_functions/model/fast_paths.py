"""Fast ways of computing, each tried on a batch whose true losses and gradients are known."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from ..data.batch import Batch, flatten_tree
from .gradients import (
    by_layers,
    forward_products,
    gradient,
    vmap_gradients,
)
from .trial import Trial, Way
from .usable import TRIED, covering_layers

logger = logging.getLogger(__name__)


class FastPaths:
    """What is tried, one path after the other; each that gives the true numbers is set in `objective.paths`.

    Args:
        trial: the samples and their true numbers.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial, self.objective = trial, trial.objective

    def try_all(self) -> None:
        """Try every path, the ones that others stand on first."""
        self._attempt("vmap", gradients_by_vmap)
        self._try_outputs()
        self._require_gradient()
        self._try_layers()
        if not self.objective.paths.layers:
            self._attempt("forward", products_in_forward_mode)
            self._attempt("stacked", stacked_products)

    def _try_outputs(self) -> None:
        """One call of the model for all samples, and the loss of each from its row of the outputs."""
        objective = self.objective
        if objective.refused is not None:
            return  # what the outputs say of the loss is not its gradient, or nothing
        if objective.model_loss is not None or objective.head is not None:
            # where a row is what the model returns for that sample as a batch of one
            self._attempt("outputs", outputs_of_batch)
            if objective.paths.outputs:
                self._attempt("loss", losses_of_outputs)
                self._attempt("batched", losses_of_batch)
            return
        for outputs, loss in ((True, True), (True, False)):
            self._set(outputs=outputs, loss=loss)
            self._attempt("batched", losses_of_batch)
            if objective.paths.batched:
                return
        self._set(outputs=False, loss=False)
        self._attempt("loss", losses_of_outputs)

    def _try_layers(self) -> None:
        """Per-sample gradients by the rules of layers, which pays for a convolution."""
        before = self.objective.paths
        batch = self.trial.batch
        few = batch.rows(0, min(batch.size, TRIED))
        layers = covering_layers(self.objective, few)
        self._set(layers=tuple(layers))
        if layers and not self.trial.holds(products_by_layers):
            self.objective.paths = before

    def _require_gradient(self) -> None:
        """Give up what has the true losses and not their gradient."""
        if not self.objective.paths.batched:
            return
        if not self.trial.holds(mean_gradient):
            self._set(outputs=False, loss=False, batched=False)

    def _attempt(self, path: str, way: Way) -> None:
        """Set a path, and take it back where it does not give the true numbers."""
        before = self.objective.paths
        self._set(**{path: True})
        if not self.trial.holds(way):
            self.objective.paths = before

    def _set(self, **paths: Any) -> None:
        self.objective.paths = self.objective.paths._replace(**paths)


# ---- the ways: how, and what is right


def losses_of_rows(trial: Trial) -> tuple[Callable[[], Tensor], Tensor]:
    """Each row of the batch by itself, against the sample collated alone [B]."""
    objective = trial.objective

    def found() -> Tensor:
        rows = [
            objective.losses(objective.theta, one)
            for one in trial.batch.singles()
        ]
        return torch.cat(rows)

    return found, trial.losses


def gradients_by_vmap(trial: Trial) -> tuple[Callable[[], Tensor], Tensor]:
    """Per-sample gradients of the batch [B, P]."""
    return lambda: vmap_gradients(trial.objective, trial.batch), trial.truth


def mean_gradient(trial: Trial) -> tuple[Callable[[], Tensor], Tensor]:
    """Of the batch, on the scale of the whole [1, P]."""
    mean = trial.truth.mean(0, keepdim=True)
    return lambda: gradient(trial.objective, trial.batch).unsqueeze(0), mean


def outputs_of_batch(trial: Trial) -> tuple[Callable[[], Tensor], Tensor]:
    """What the model returns for all samples at once [B, C]."""

    def rows(batch: Batch) -> Tensor:
        return _outputs(trial, batch)

    try:
        alone = [rows(one) for one in trial.batch.singles()]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # called twice, no tensors
        logger.debug("no outputs: %s", error)
        return _not_open, trial.losses
    return lambda: _both(trial, rows), _twice(trial, torch.cat(alone).detach())


def losses_of_batch(trial: Trial) -> tuple[Callable[[], Tensor], Tensor]:
    """From one call of the model for all samples [B]."""
    objective = trial.objective

    def losses(batch: Batch) -> Tensor:
        return objective.losses(objective.theta, batch)

    return lambda: _both(trial, losses), _twice(trial, trial.losses)


def losses_of_outputs(trial: Trial) -> tuple[Callable[[], Tensor], Tensor]:
    """From the outputs of each sample [B]."""
    objective, batch = trial.objective, trial.batch

    def found() -> Tensor:
        outputs = objective.outputs(objective.theta, batch)
        return objective.output_losses(outputs, batch)

    return found, trial.losses


def products_in_forward_mode(
    trial: Trial,
) -> tuple[Callable[[], Tensor], Tensor]:
    """Of each sample's gradient with the sum of all [B]."""
    objective, v = trial.objective, trial.truth.sum(0)

    def losses(theta: Tensor) -> Tensor:
        return objective.losses(theta, trial.batch)

    def found() -> Tensor:
        along: Tensor = jvp(losses, (objective.theta,), (v,))[1]
        return along

    return found, _products(trial)


def stacked_products(trial: Trial) -> tuple[Callable[[], Tensor], Tensor]:
    """The same for two vectors at once [2, B]."""
    v, expected = trial.truth.sum(0), _products(trial)
    two = torch.stack([v, 2 * v])

    def found() -> Tensor:
        return forward_products(trial.objective, trial.batch, two)

    return found, torch.stack([expected, 2 * expected])


def products_by_layers(
    trial: Trial,
) -> tuple[Callable[[], Tensor], Tensor]:
    """The same by the rules of the layers [B]."""
    v = trial.truth.sum(0, keepdim=True)

    def found() -> Tensor:
        return by_layers(trial.objective, trial.batch, v)[0]

    return found, _products(trial)


def _products(trial: Trial) -> Tensor:
    # in single precision a product of long vectors is further off than what
    # is tried here
    precise = trial.truth.sum(0).double()
    products = [float(g.double() @ precise) for g in trial.truth]
    return trial.truth.new_tensor(products)


def _outputs(trial: Trial, batch: Batch) -> Tensor:
    """Outputs of a batch laid end to end, a row for each sample."""
    objective = trial.objective
    leaves, _ = flatten_tree(objective.batch_outputs(objective.theta, batch))
    return torch.cat([leaf.reshape(batch.size, -1) for leaf in leaves], 1)


def _both(trial: Trial, value: Callable[[Batch], Tensor]) -> Tensor:
    """The rows of the batch, and those of the same samples in the large one below them."""
    if trial.large is None:
        return value(trial.batch)
    large, places = trial.large
    rows = value(large)
    return torch.cat([value(trial.batch), rows[places.to(rows.device)]])


def _twice(trial: Trial, rows: Tensor) -> Tensor:
    """What `_both` is to be."""
    return rows if trial.large is None else torch.cat([rows, rows])


def _not_open() -> Tensor:
    raise NotImplementedError("the samples alone have no outputs")
