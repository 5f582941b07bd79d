r"""A model and a loss as functions of a flat parameter vector.

\ell(z_i, \theta) is the loss of sample i as a batch of one, L(\theta) the mean over a batch. Everything above works on
this object alone: nothing else in the package knows what a batch looks like.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap

from ..data.batch import Batch, flatten_tree
from .calls import recorded, replayed
from .cross_entropy import (
    IGNORED_CLASS,
    calc_loss,
    cross_entropies,
    cross_entropy_of,
    with_class_weights,
)
from .outputs import Head, numbers_of
from .parameters import Chosen, require_module
from .parametrised import Parametrised, Theta
from .paths import Paths
from .user_loss import input_and_target, one_number

__all__ = [
    "IGNORED_CLASS",
    "Objective",
    "Paths",
    "Rebuild",
    "Theta",
    "calc_loss",
]
Rebuild = Callable[[Sequence[Tensor]], Any]


class Direct(NamedTuple):
    """Outputs of a model, and the parameters that the loss takes past them."""

    outputs: Any
    theta: Theta


class Objective(Parametrised):
    """The loss of a model on batches, at any parameters.

    Args:
        model: the trained model, from DataParallel or torch.compile too.
        loss_func: (output, target) -> mean loss; None is cross-entropy.
        model_loss: (model, batch) -> mean loss.
        parameters: names or patterns of the parameters to differentiate, or a predicate; None is all with
            `requires_grad`.
        device: where to compute; None is where the model is.

    Attributes:
        mutates: whether the model changes its inputs in place, so that it gets copies.
        head: what stands for a loss that is linear in what the model returns.
        parts: whether `model_loss` calls parts of the model, or differentiates; else only calls of the model count.
        direct: whether the loss takes parameters past the outputs too (a penalty), which then are outputs themselves.
        linear: what is said of a loss that is linear in the outputs, so that its Gauss-Newton matrix is zero.
        refused: why there is no Gauss-Newton matrix.
        rounded: the precision that the values of the loss have, for comparing them.
        once: what is said of a loss that has no second derivative by automatic differentiation.

    Raises:
        ValueError: no parameter is left to differentiate.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_func: Callable[..., Any] | None = None,
        model_loss: Callable[..., Any] | None = None,
        parameters: Chosen = None,
        device: torch.device | None = None,
    ) -> None:
        require_module(model, called=model_loss is None)
        super().__init__(model, parameters, device)
        self.loss_func = with_class_weights(loss_func or calc_loss)
        self.model_loss = model_loss
        self.paths = Paths()
        self.cost: tuple[float, int] | None = None
        self.mutates = False
        self.head: Head | None = None
        self.parts = self.direct = False
        self.linear: str | None = None
        self.refused: str | None = None
        self.once: str | None = None
        self.rounded: torch.dtype | None = None

    # ---- the functions

    def loss(self, theta: Theta, batch: Batch) -> Tensor:
        """Mean loss of a batch at theta, [P] or cut into its parameters -> scalar."""
        if batch.size == 1:
            return self._call(theta, self._tree(batch))
        if not batch.parts and not (self.paths.rows and batch.sliceable):
            return self._call(theta, self._tree(batch))
        if self._is_cross_entropy and self.paths.batched:
            y = self.outputs(theta, batch)
            t = input_and_target(self._tree(batch))[1]
            if y.dim() == 2:
                return cross_entropy_of(y, t, "sum").to(self.dtype) / batch.size
        return self.losses(theta, batch).mean()

    def whole_loss(self, theta: Theta, batch: Batch) -> Tensor:
        """What the user's loss says of a batch as it is -> scalar."""
        return self._call(theta, self._tree(batch))

    def losses(self, theta: Theta, batch: Batch) -> Tensor:
        """Loss of each sample of a batch at theta [P] -> [B]."""
        if batch.size == 1:
            return self._call(theta, self._tree(batch)).reshape(1)
        if batch.parts:
            return torch.cat([self.losses(theta, one) for one in batch.parts])
        if self.paths.batched:
            outputs = self.outputs(theta, batch)
            return self.output_losses(
                Direct(outputs, theta) if self.direct else outputs, batch
            )
        if self.paths.vmap:
            return vmap(
                lambda *leaves: self.sample_loss(theta, leaves, batch.rebuild)
            )(*batch.leaves)
        return torch.cat([self.losses(theta, one) for one in batch.singles()])

    def sample_loss(
        self, theta: Theta, leaves: Sequence[Tensor], rebuild: Rebuild
    ) -> Tensor:
        """Loss of one sample, its tensors given without the batch dimension -> scalar."""
        return self._call(
            theta, rebuild([self._given(t).unsqueeze(0) for t in leaves])
        )

    def outputs(self, theta: Theta, batch: Batch) -> Any:
        """What the model returns for a batch at theta [P]: one row per sample in each of its tensors."""
        if batch.size == 1 or self.paths.outputs:
            return self.batch_outputs(theta, batch)
        if self.paths.vmap:
            return vmap(
                lambda *leaves: self._sample_outputs(
                    theta, leaves, batch.rebuild
                )
            )(*batch.leaves)
        rows = [
            flatten_tree(self.batch_outputs(theta, one))
            for one in batch.singles()
        ]
        joined = [
            torch.cat(parts)
            for parts in zip(*(leaves for leaves, _ in rows), strict=True)
        ]
        return rows[0][1](joined)

    def batch_outputs(self, theta: Theta, batch: Batch) -> Any:
        """`outputs` by one call of the model, as its modules and their hooks see it."""
        output = self._output(theta, self._tree(batch))
        if not self._apart:
            return output
        leaves, rebuild = flatten_tree(output)
        if batch.size == 1:
            return rebuild([leaf.unsqueeze(0) for leaf in leaves])
        if self.model_loss is None or any(
            leaf.shape[:1] != (batch.size,) for leaf in leaves
        ):
            raise NotImplementedError(
                "the model's output for a batch does not have one row per sample, so its samples go through it one at "
                "a time"
            )
        return rebuild([leaf.unsqueeze(1) for leaf in leaves])

    def all_outputs(
        self, theta: Tensor, batch: Batch
    ) -> tuple[list[Tensor], Rebuild]:
        """The numbers that the loss is a function of, and what `output_losses` takes from others in their place.

        They are the model's outputs, and theta [P] itself where the loss takes it `direct`ly.
        """
        leaves, rebuild = numbers_of(self.outputs(theta, batch))
        if not self.direct:
            return leaves, rebuild
        return [*leaves, theta], lambda parts: Direct(
            rebuild(parts[:-1]), parts[-1]
        )

    def double_of_outputs(self) -> Objective:
        """The same losses of outputs in double precision, without a copy of parameters that they do not depend on."""
        if self.model_loss is not None:
            return self.double()
        twin = copy.copy(self)
        twin.cast = torch.float64
        twin.dtype = torch.float64
        return twin

    def output_losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Loss of each sample of a batch from the model's outputs -> [B]."""
        if isinstance(outputs, Direct):
            with self._at(outputs.theta):
                return self.output_losses(outputs.outputs, batch)
        if self._is_cross_entropy and not self._apart:
            return cross_entropies(
                outputs, input_and_target(self._tree(batch))[1]
            ).to(self.dtype)
        rows, rebuild = flatten_tree(outputs)

        def one(data: Sequence[Tensor], leaves: Sequence[Tensor]) -> Tensor:
            return self._loss_of_output(
                [t.unsqueeze(0) for t in data],
                batch.rebuild,
                list(leaves),
                rebuild,
            )

        if batch.size == 1:
            return self._loss_of_output(
                batch.leaves, batch.rebuild, [row[0] for row in rows], rebuild
            ).reshape(1)
        if self.paths.loss:
            return vmap(one)(batch.leaves, rows)
        each = [
            one([t[i] for t in batch.leaves], [row[i] for row in rows])
            for i in range(batch.size)
        ]
        return torch.stack(each)

    # ---- inside

    def _call(self, theta: Theta, tree: Any) -> Tensor:
        """Mean loss of a batch by the user's loss."""
        with self._at(theta) as model:
            return self._user_loss(model, tree)

    def _user_loss(self, model: nn.Module, tree: Any) -> Tensor:
        return self._raw_loss(model, tree).reshape(()).to(self.dtype)

    def _raw_loss(self, model: nn.Module, tree: Any) -> Tensor:
        if self.model_loss is not None:
            return one_number(self.model_loss(model, tree), self.loss_key)
        x, t = input_and_target(tree)
        return one_number(self.loss_func(model(x), t), self.loss_key)

    def _scalar(self, loss: Any) -> Tensor:
        """What the user's loss gave, as a number of this precision."""
        return one_number(loss, self.loss_key).reshape(()).to(self.dtype)

    @property
    def loss_key(self) -> str:
        """The option that the loss came by."""
        return "loss_func" if self.model_loss is None else "model_loss"

    @property
    def _apart(self) -> bool:
        """Whether a row of the outputs is what the model returns for that sample as a batch of one."""
        return (
            self.model_loss is not None
            or self.head is not None
            or not self.paths.batched
        )

    @property
    def _is_cross_entropy(self) -> bool:
        return (
            self.model_loss is None
            and self.loss_func is calc_loss
            and self.head is None
        )

    def _sample_outputs(
        self, theta: Theta, leaves: Sequence[Tensor], rebuild: Rebuild
    ) -> Any:
        """What the model returns for one sample, its tensors given without the batch dimension."""
        return self._output(
            theta, rebuild([self._given(t).unsqueeze(0) for t in leaves])
        )

    def _output(self, theta: Theta, tree: Any) -> Any:
        """What the model returns for a batch, or what of it stands for the loss."""
        output = self.model_output(theta, tree)
        if self.head is None:
            return output
        return flatten_tree(output)[0][self.head.output]

    def model_output(self, theta: Theta, tree: Any) -> Any:
        """All that the model returns for a batch; of a `model_loss` what each of its calls returns."""
        with self._at(theta) as model:
            if self.model_loss is None:
                return model(input_and_target(tree)[0])
            with recorded(model, self.parts) as seen:
                self.model_loss(model, tree)
        return seen.outputs

    def _loss_of_output(
        self,
        leaves: Sequence[Tensor],
        rebuild: Rebuild,
        output: list[Tensor],
        rebuild_output: Rebuild,
    ) -> Tensor:
        """Loss of one sample, a batch of one, from a row of `outputs` -> scalar."""
        given = [self._given(t) for t in leaves]
        if self.head is not None:
            return self.head.loss(output[0], given[self.head.target]).to(
                self.dtype
            )
        tree = rebuild(given)
        if self.model_loss is not None:
            with replayed(self.model, rebuild_output(output), self.parts):
                return self._scalar(self.model_loss(self.model, tree))
        y = rebuild_output(
            output if self._apart else [t.unsqueeze(0) for t in output]
        )
        return self._scalar(self.loss_func(y, input_and_target(tree)[1]))

    def _tree(self, batch: Batch) -> Any:
        return batch.rebuild([self._given(t) for t in batch.leaves])

    def _given(self, t: Tensor) -> Tensor:
        """A tensor of a batch as the model gets it."""
        if self.cast is not None and t.is_floating_point():
            t = t.to(self.cast)
        return t.clone() if self.mutates else t
