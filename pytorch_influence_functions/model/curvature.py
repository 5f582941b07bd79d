r"""The curvature as a map of stacks of vectors, at any batches.

H = \nabla^2 L(\theta) (`"hessian"`) and its Gauss-Newton part G = (1/B) \sum_i J_i^T (\nabla^2_y \ell_i) J_i
(`"ggn"`, Schraudolph 2002), which is positive semi-definite where the loss is convex in the model's output.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch
from ..utils import warn
from .budget import product_stack
from .gradients import activation_bytes, agrees
from .objective import Objective
from .products import gauss_newton_products, hessian_products
from .twice import try_second_derivative

logger = logging.getLogger(__name__)
Product = Callable[..., Tensor]
PRODUCTS: dict[str, Product] = {
    "hessian": hessian_products,
    "ggn": gauss_newton_products,
}


class Curvature:
    """The curvature of an objective as a map of stacks of vectors [K, P], at any batches.

    Args:
        objective: what is differentiated.
        kind: `"hessian"` or `"ggn"`.
        max_bytes: for the working tensors of one product; decides how many vectors go through the model together.
    """

    def __init__(
        self, objective: Objective, kind: str, max_bytes: float = math.inf
    ) -> None:
        if kind == "ggn" and objective.refused is not None:
            raise ValueError(objective.refused)
        if kind == "ggn" and objective.linear is not None:
            warn(objective.linear)
        self.objective, self.kind, self.max_bytes = objective, kind, max_bytes
        self._product = PRODUCTS[kind]

    def __call__(self, batch: Batch, vectors: Tensor) -> Tensor:
        """Curvature over one batch times each row of `vectors` [K, P] -> [K, P]."""
        if batch.parts:
            return self.over(batch.parts, vectors)
        if self.kind == "hessian" and self.objective.paths.twice is None:
            try_second_derivative(
                self.objective, self._few(batch), vectors[0], self._product
            )
        if (
            len(vectors) > 1
            and getattr(self.objective.paths, self.kind) is None
        ):
            self._try_stack(batch, vectors[:2])
        product = self._product(
            self.objective, batch, vectors, self.stack(batch)
        )
        # a criterion that is trained beside the model has a graph of its own
        return product.detach()

    def _try_stack(self, batch: Batch, two: Tensor) -> None:
        """Find whether products of a stack are those of its vectors [2, P], on a few samples."""
        objective = self.objective
        few = self._few(batch)
        expected = torch.cat(
            [self._product(objective, few, v.unsqueeze(0)) for v in two]
        )
        allowed: dict[str, Any] = {self.kind: True}
        objective.paths = objective.paths._replace(**allowed)
        if not agrees(lambda: self._product(objective, few, two), expected):
            allowed[self.kind] = False
            objective.paths = objective.paths._replace(**allowed)
            logger.info(
                "the model does not allow stacks of %s products; one at a time gives the same",
                self.kind,
            )

    def _few(self, batch: Batch) -> Batch:
        """Two samples of a batch that can be cut."""
        return batch.rows(0, 2) if self.objective.paths.rows else batch

    def over(self, batches: Iterable[Batch], vectors: Tensor) -> Tensor:
        """Curvature over all samples of `batches`, each batch by its size, times `vectors` [K, P] -> [K, P]."""
        total, count = None, 0
        for batch in batches:
            part = self(batch, vectors)
            total = (
                part.mul(batch.size)
                if total is None
                else total.add_(part, alpha=batch.size)
            )
            count += batch.size
        return torch.zeros_like(vectors) if total is None else total.div_(count)

    def stack(self, batch: Batch) -> int:
        """How many vectors go through the model together on this batch."""
        kept = batch.size * activation_bytes(self.objective, batch)
        return product_stack(kept, self.objective.theta.nbytes, self.max_bytes)
