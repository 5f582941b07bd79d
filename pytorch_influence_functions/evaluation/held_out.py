"""Losses of test samples under models that were trained again."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..config import Config
from ..data.batch import Batch, as_batch
from ..data.samples import Samples
from ..model.gradients import agrees
from ..model.objective import Objective, Paths
from ..utils import random_state
from .statistics import Floats

logger = logging.getLogger(__name__)


class HeldOutLoss:
    """Loss of each test sample under models of one kind; in float64 where they can, so that small changes show.

    Args:
        tests: DataLoader, or a collated batch with one row per sample.
        config: `loss_func` and `model_loss` count.
    """

    def __init__(self, tests: Any, config: Config) -> None:
        self._config = config
        self._double, self._paths = True, cast("Paths | None", None)
        if hasattr(tests, "dataset"):
            samples = Samples(tests, name="test_loader", progress=False)
            self.alone: Callable[[int], Batch] = samples.sample
            self._batches = list(samples.ordered())
        else:
            batch = as_batch(tests)
            if not batch.sliceable:
                raise TypeError(
                    "tests: this batch cannot be cut into samples; give a DataLoader over the test samples"
                )
            self.alone = lambda i: batch.rows(i, i + 1)
            self._batches = [batch]
        self.K = sum(batch.size for batch in self._batches)
        loss = config.model_loss or config.loss_func
        self.name = (
            "cross-entropy"
            if loss is None
            else getattr(loss, "__qualname__", type(loss).__qualname__)
        )
        self.digest = digest_of(
            leaf for batch in self._batches for leaf in batch.leaves
        )

    def __call__(self, model: nn.Module) -> Floats:
        """Loss of each test sample -> [K]."""
        with random_state(self._config.seed):
            if self._paths is None:
                self._settle(model)
            objective = self._objective(model)
            objective.paths = cast(Paths, self._paths)
            return np.concatenate(
                [
                    self._losses(objective, batch).numpy()
                    for batch in self._batches
                ]
            )

    def _objective(self, model: nn.Module) -> Objective:
        own = copy.deepcopy(model).requires_grad_(True)
        own = own.double() if self._double else own
        return Objective(
            own,
            loss_func=self._config.loss_func,
            model_loss=self._config.model_loss,
        )

    def _losses(self, objective: Objective, batch: Batch) -> Tensor:
        leaves = [
            t.double() if self._double and t.is_floating_point() else t
            for t in batch.leaves
        ]
        with objective.active(), torch.no_grad():
            losses = objective.losses(
                objective.theta,
                batch._replace(leaves=leaves).to(objective.device),
            )
        return losses.cpu().double()

    def _settle(self, model: nn.Module) -> None:
        """Find once what the model allows: float64, and whole batches whose rows have the loss of the sample alone."""
        try:
            alone = self._first_two(model)
        except RuntimeError as error:
            logger.info(
                "test losses are not computed in float64, which the model or its loss refuses: %s",
                error,
            )
            self._double = False
            alone = self._first_two(model)
        objective, first = self._objective(model), self._batches[0]
        for paths in (
            Paths(rows=True, batched=True, vmap=True),
            Paths(rows=True, vmap=True),
            Paths(rows=True),
        ):
            objective.paths = self._paths = paths
            if first.sliceable and agrees(
                lambda: self._losses(objective, first.rows(0, 2)), alone
            ):
                return
        self._batches = [self.alone(i) for i in range(self.K)]
        self._paths = Paths()

    def _first_two(self, model: nn.Module) -> Tensor:
        objective = self._objective(model)
        return torch.cat(
            [
                self._losses(objective, self.alone(i))
                for i in self._batches[0].indices[:2]
            ]
        )


def digest_of(tensors: Iterable[Tensor]) -> str:
    """A short hash of the values of tensors."""
    digest = hashlib.sha256()
    for t in tensors:
        array = t.detach().cpu().contiguous()
        digest.update(f"{tuple(array.shape)} {array.dtype}".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def digest_of_model(model: nn.Module | None) -> str | None:
    """A short hash of a model's parameters and buffers; None without one."""
    return (
        None
        if model is None
        else digest_of(
            t for t in model.state_dict().values() if isinstance(t, Tensor)
        )
    )
