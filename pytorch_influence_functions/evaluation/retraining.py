"""Retraining by the user's function.

`retrain(indices, model, seed) -> model`: `indices` are the training samples to train on, `model` is a copy of the
trained model to start from (a warm start) or None (from scratch), and `seed` is for everything random in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from ..config import Config
from ..model.gradients import NonFiniteError
from ..utils import progress_bar, random_state
from .held_out import HeldOutLoss, digest_of
from .journal import Journal
from .statistics import Floats, array_of

Retrain: TypeAlias = Callable[[list[int], Any, int], nn.Module]
"""(indices, copy of the trained model or None, seed) -> the retrained model."""
RetrainMany: TypeAlias = Callable[[list[list[int]], list[int]], Any]
"""(m lists of indices, a seed for each) -> test losses [m, K]."""
Options: TypeAlias = Config | Mapping[str, Any] | None


class Retrainings:
    """Does the retrainings that are not in the journal yet.

    Args:
        train: (lists of indices, seeds) -> test losses [b, K].
        journal: the finished ones.
        progress: show a progress bar.
        together: how many to give `train` at a time.
    """

    def __init__(
        self,
        train: RetrainMany,
        journal: Journal,
        progress: bool,
        together: int = 1,
    ) -> None:
        self.train = train
        self.journal = journal
        self.progress = progress
        self.together = together

    def __call__(
        self, jobs: Sequence[tuple[Sequence[int], int]], text: str
    ) -> Floats:
        """Test losses after training on these indices with these seeds -> [jobs, K]."""
        keys = [
            f"{digest_of([torch.as_tensor(indices)])} {seed}"
            for indices, seed in jobs
        ]
        todo = [
            (key, job)
            for key, job in zip(keys, jobs, strict=True)
            if key not in self.journal.rows
        ]
        with progress_bar(
            text, total=len(jobs), unit="retraining", enabled=self.progress
        ) as bar:
            bar.update(len(jobs) - len(todo))
            for start in range(0, len(todo), self.together):
                part = todo[start : start + self.together]
                for (key, _), row in zip(
                    part, self._rows([job for _, job in part]), strict=True
                ):
                    self.journal.add(key, row)
                bar.update(len(part))
        rows = [self.journal.rows[key] for key in keys]
        if len(set(map(len, rows))) > 1:
            raise ValueError(
                f"expected as many test losses from each retraining, got {sorted(set(map(len, rows)))}"
            )
        return np.array(rows)

    def _rows(self, jobs: list[tuple[Sequence[int], int]]) -> Floats:
        rows = array_of(
            self.train(
                [list(indices) for indices, _ in jobs],
                [seed for _, seed in jobs],
            )
        )
        if rows.ndim != 2 or len(rows) != len(jobs):
            raise ValueError(
                f"retrain_many: expected test losses [{len(jobs)}, K], got shape {list(rows.shape)}"
            )
        bad = np.argwhere(~np.isfinite(rows))
        if len(bad):
            (indices, seed), k = jobs[bad[0][0]], bad[0][1]
            raise NonFiniteError(
                f"the loss of test sample {k} is NaN or infinite after retraining on {len(indices)} samples with seed "
                f"{seed}; look at whether that training diverged"
            )
        return rows


def one_by_one(
    retrain: Retrain, model: nn.Module | None, test_loss: HeldOutLoss
) -> RetrainMany:
    """`retrain` for one list of indices after the other, from a copy of `model`."""
    if not callable(retrain):
        raise TypeError(
            f"retrain: expected a function (indices, model, seed) -> model, got {type(retrain).__name__}"
        )

    def one(indices: list[int], seed: int) -> Floats:
        with random_state(seed), torch.enable_grad():
            retrained = retrain(indices, copy.deepcopy(model), seed)
        if not isinstance(retrained, nn.Module):
            raise TypeError(
                f"retrain: expected it to return the trained model, got {type(retrained).__name__}"
            )
        return test_loss(retrained)

    return lambda subsets, seeds: np.stack(
        [one(i, s) for i, s in zip(subsets, seeds, strict=True)]
    )


def seeded(retrain_many: RetrainMany) -> RetrainMany:
    """`retrain_many` with the global random state seeded, and back afterwards."""

    def run(subsets: list[list[int]], seeds: list[int]) -> Any:
        with random_state(seeds[0]), torch.enable_grad():
            return retrain_many(subsets, seeds)

    return run
