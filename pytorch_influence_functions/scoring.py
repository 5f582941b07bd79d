"""Scores of solutions: their products with the gradients of the training samples, read once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .data.batch import Batch
from .model.gradients import require_finite
from .sample_gradients import SampleGradients
from .solve.groups import Group

Products = Callable[[Batch, Tensor], Tensor]
"""A batch of training samples and solutions [K, P] -> their products [K, B]."""


class Scoring(SampleGradients):
    """What a member does once its solutions are known."""

    def scores_of_group(
        self, group: Group, indices: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Scores of a group [k, m] for these training samples, and those of each chain [r, k, m] or None."""
        with self.problem.guard():
            return self._products(group.vectors, group.chains, indices)

    def scores_of(self, vectors: Tensor) -> Tensor:
        """Scores of solutions that are already known, [K, P] -> [K, n]."""
        with self.problem.guard():
            return self._score(vectors)

    # ---- inside

    def _products(
        self,
        vectors: Tensor,
        chains: Tensor | None,
        indices: Sequence[int] | None = None,
        block: Products | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Scores [K, m] of the solutions, and of each of their chains [r, K, m], for these training samples or all."""
        if chains is None:
            return self._score(vectors, indices, block), None
        r, k = chains.shape[:2]
        flat = self._score(chains.flatten(0, 1), indices, block)
        scores = flat.view(r, k, -1)
        return scores.mean(0), scores

    def _score(
        self,
        vectors: Tensor,
        indices: Sequence[int] | None = None,
        block: Products | None = None,
    ) -> Tensor:
        n = self.samples.n
        indices = range(n) if indices is None else indices
        # what a pass left out would show
        scores = torch.full(
            (len(vectors), len(indices)), torch.nan, dtype=self.objective.dtype
        )
        done = 0
        for batch in self.samples.ordered(
            self.problem.scoring_batch,
            indices,
            text="Scoring the training set",
        ):
            part = (block or self._block)(batch, vectors) / n
            require_finite(part.T, batch.indices, self.samples.name, "gradient")
            scores[:, done : done + batch.size] = part.detach().cpu()
            done += batch.size
        return scores

    def _block(self, batch: Batch, vectors: Tensor) -> Tensor:
        """Products of the solutions [K, P] with the gradients of a batch -> [K, B]."""
        return self.points.products(batch, vectors)
