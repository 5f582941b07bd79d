"""Fast ways of computing, each tried on a batch whose true losses and gradients are known."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from ..data.batch import Batch, flatten_tree
from .gradients import forward_products, gradient, vmap_gradients
from .objective import Objective
from .rounding import Rounding

logger = logging.getLogger(__name__)


class FastPaths:
    """What is tried, one path after the other; each that gives the true numbers is set in `objective.paths`.

    Args:
        objective: of the model.
        batch: samples collated together.
        losses: of each alone [B].
        truth: gradient of each alone [B, P].
        large: a larger batch, and where the samples of `batch` stand in it; a model may branch on the size.
        rounding: of these losses and gradients.
    """

    def __init__(
        self,
        objective: Objective,
        batch: Batch,
        losses: Tensor,
        truth: Tensor,
        large: tuple[Batch, Tensor] | None,
        rounding: Rounding,
    ) -> None:
        self.objective, self.batch = objective, batch
        self.losses, self.truth, self.large = losses, truth, large
        self.theta = objective.theta
        self.rounding = rounding

    def try_all(self) -> None:
        """Try every path, the ones that others stand on first."""
        self._attempt(
            "vmap",
            self._vmap_gradients,
            self.truth,
            self.rounding.of_gradients,
        )
        self._try_outputs()
        self._require_gradient()
        self._try_forward_mode()

    # ---- outputs and losses

    def _try_outputs(self) -> None:
        """One call of the model for all samples, and the loss of each from its row of the outputs."""
        objective = self.objective
        if objective.refused is not None:
            return  # what the outputs say of the loss is not its gradient, or nothing
        if objective.model_loss is not None or objective.head is not None:
            self._try_rows_of_outputs()
            return
        for outputs, loss in ((True, True), (True, False)):
            self._set(outputs=outputs, loss=loss)
            self._attempt_losses("batched")
            if objective.paths.batched:
                return
        self._set(outputs=False, loss=False)
        self._attempt_losses("loss")

    def _try_rows_of_outputs(self) -> None:
        """The same where a row is what the model returns for that sample as a batch of one."""
        try:
            alone = self._outputs_alone()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # called twice, no tensors
            logger.debug("no outputs: %s", error)
            return
        self._attempt("outputs", self._outputs, self._twice(alone), lambda: 0.0)
        if self.objective.paths.outputs:
            self._attempt_losses("loss")
            self._attempt_losses("batched")

    def _require_gradient(self) -> None:
        """Give up what has the true losses and not their gradient."""
        if not self.objective.paths.batched:
            return
        mean = self.truth.mean(0, keepdim=True)  # on the scale of the whole
        off = self.rounding.of_gradients
        if not self.rounding.holds(self._mean_gradient, mean, off):
            self._set(outputs=False, loss=False, batched=False)

    # ---- derivatives

    def _try_forward_mode(self) -> None:
        v = self.truth.sum(0)
        two = torch.stack([v, 2 * v])

        def along() -> Tensor:
            def losses(theta: Tensor) -> Tensor:
                return self.objective.losses(theta, self.batch)

            found: Tensor = jvp(losses, (self.theta,), (v,))[1]
            return found

        def stacked() -> Tensor:
            return forward_products(self.objective, self.batch, two)

        # a product of long vectors in single precision is further off than
        # what is tried here
        precise = v.double()
        products = [float(g.double() @ precise) for g in self.truth]
        expected = self.truth.new_tensor(products)
        off = self.rounding.of_products
        self._attempt("forward", along, expected, off)
        both = torch.stack([expected, 2 * expected])
        self._attempt("stacked", stacked, both, off)

    # ---- what is compared

    def _attempt_losses(self, path: str) -> None:
        ways = {
            "batched": (self._batched, self._twice(self.losses)),
            "loss": (self._losses_of_outputs, self.losses),
        }
        value, expected = ways[path]
        self._attempt(path, value, expected, self.rounding.of_losses)

    def _attempt(
        self,
        path: str,
        value: Callable[[], Tensor],
        expected: Tensor,
        rounding: Callable[[], float],
    ) -> None:
        """Set a path, and take it back where it does not give the expected numbers."""
        before = self.objective.paths
        self._set(**{path: True})
        if not self.rounding.holds(value, expected, rounding):
            self.objective.paths = before

    def _set(self, **paths: Any) -> None:
        self.objective.paths = self.objective.paths._replace(**paths)

    def _vmap_gradients(self) -> Tensor:
        return vmap_gradients(self.objective, self.batch)

    def _mean_gradient(self) -> Tensor:
        return gradient(self.objective, self.batch).unsqueeze(0)

    def _outputs(self) -> Tensor:
        return self._both(self._rows)

    def _batched(self) -> Tensor:
        return self._both(lambda one: self.objective.losses(self.theta, one))

    def _losses_of_outputs(self) -> Tensor:
        outputs = self.objective.outputs(self.theta, self.batch)
        return self.objective.output_losses(outputs, self.batch)

    def _outputs_alone(self) -> Tensor:
        rows = [self._rows(one) for one in self.batch.singles()]
        return torch.cat(rows).detach()

    def _rows(self, batch: Batch) -> Tensor:
        """Outputs of a batch laid end to end, a row for each sample."""
        leaves, _ = flatten_tree(
            self.objective.batch_outputs(self.theta, batch)
        )
        return torch.cat([leaf.reshape(batch.size, -1) for leaf in leaves], 1)

    def _both(self, value: Callable[[Batch], Tensor]) -> Tensor:
        """The rows of the batch, and those of the same samples in the large one below them."""
        if self.large is None:
            return value(self.batch)
        large, places = self.large
        rows = value(large)
        return torch.cat([value(self.batch), rows[places.to(rows.device)]])

    def _twice(self, rows: Tensor) -> Tensor:
        """What `_both` is to be."""
        return rows if self.large is None else torch.cat([rows, rows])
