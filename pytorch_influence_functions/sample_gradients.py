"""Loss gradients of training and test samples, as one model's solver and scores take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .config import Config
from .data.batch import UNCUT, Batch, as_batch
from .data.labels import batch_labels, plain
from .data.samples import Samples
from .model.company import keeps_company, meet_all
from .model.door import check_losses, checked_losses
from .model.gradients import require_finite
from .model.objective import Objective
from .solve.groups import parts_of, split
from .solve.problem import Problem
from .solve.smoothing import Points


class SampleGradients:
    """Gradients of the loss, averaged over the points of smoothing where there is some.

    Attributes:
        config: the options.
        problem: the model's objective, the training set and the curvature.
        objective, samples: the problem's.
        points: over which gradients are averaged.
    """

    config: Config
    problem: Problem
    objective: Objective
    samples: Samples
    points: Points
    _met = False

    def meet_all(self) -> None:
        """See once, before the first computation, that every training batch is its samples; see `model.company`."""
        if self._met:
            return
        with self.problem.guard():
            meet_all(
                self.objective, self.samples, lambda: self.problem.scoring_batch
            )
        self._met = True

    @property
    def group_size(self) -> int:
        """How many test samples are solved together."""
        raise NotImplementedError

    def test_gradients(self, tests: Any) -> tuple[int, Iterator[Tensor]]:
        """How many test samples a batch or loader has, and their loss gradients, a group at a time."""
        if hasattr(tests, "dataset"):
            samples = self.checked(tests)
            groups = split(range(samples.n), self.group_size)
            return samples.n, (
                self.gradients_of(samples, indices) for indices in groups
            )
        batch = as_batch(tests, name="test batch").to(self.objective.device)
        if batch.size > 1 and not self.objective.paths.rows:
            raise ValueError(UNCUT)
        check_losses(self.objective, [batch], "test batch")
        return batch.size, (
            self.gradients(part, "test batch")
            for part in parts_of(batch, self.group_size)
        )

    def checked(self, loader: DataLoader[Any]) -> Samples:
        """The samples of a test loader, all of them looked at; errors as of `check`."""
        samples = Samples(
            loader,
            device=self.objective.device,
            name="test_loader",
            progress=self.config.progress,
        )
        self.check(samples, range(samples.n))
        return samples

    def check(self, tests: Samples, indices: Sequence[int]) -> list[Any]:
        """The labels of these samples, as they are read in one pass of their losses, before any long work.

        Raises:
            TypeError, ValueError: a sample cannot be read, or the model or the loss cannot take it.
            NonFiniteError: its loss is NaN or infinite.
        """
        labels: list[Any] = []
        with self.problem.guard(tests):
            for batch in tests.ordered(self.problem.scoring_batch, indices):
                losses = checked_losses(self.objective, batch, tests.name)
                keeps_company(self.objective, tests, batch, losses)
                labels += batch_labels(batch)
        return [plain(label) for label in labels]

    def gradients_of(self, tests: Samples, indices: Sequence[int]) -> Tensor:
        """Loss gradients of these samples -> [K, P]."""
        with self.problem.guard(tests):
            batches = tests.ordered(self.problem.gradient_batch, indices)
            return torch.cat(
                [self.gradients(batch, tests.name) for batch in batches]
            )

    def gradient_rows(
        self, indices: Sequence[int], text: str | None = None
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Loss gradients of training samples, a block at a time: indices, [B, P]."""
        self.meet_all()
        with self.problem.guard():
            for batch in self.samples.ordered(
                self.problem.gradient_batch, indices, text=text
            ):
                yield batch.indices, self.gradients(batch, self.samples.name)

    def gradients(self, batch: Batch, name: str) -> Tensor:
        """Loss gradients of a batch -> [B, P]; `name` is what a message calls it."""
        rows = self.points.gradients(batch)
        require_finite(rows, batch.indices, name, "gradient")
        return rows
