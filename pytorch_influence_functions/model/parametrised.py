"""The parameters of a model as one vector, and the model at another such vector."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from .parameters import (
    Chosen,
    as_looked_up,
    select_parameters,
    unwrapped,
    widest,
)
from .state import attributes, forgotten
from .swap import LOCK, differentiable, find_slots, swapped

Theta = Tensor | Sequence[Tensor]
"""The parameters as one vector [P], or as tensors of their shapes."""


Own = TypeVar("Own", bound="Parametrised")


class Parametrised:
    """A model whose chosen parameters are a vector theta [P]; the user's model stays as it is.

    Inside `active` the parameters are swapped in place of the model's own for the time of a call.

    Args:
        model: the trained model.
        parameters: names or patterns of the parameters to differentiate, or a predicate; None is all with
            `requires_grad`.
        device: where to compute; None is where the model is.

    Attributes:
        theta: the parameters as one vector [P], a copy, in single precision at least.
        leaves: theta cut into its parameters, each the leaf of a graph.
        names, shapes: of each parameter, in the order of theta; tied parameters once. A complex one counts as pairs of
            numbers, its real and imaginary parts [..., 2]: its gradient is that of the loss in them.
        cast: the precision that the model and its inputs are computed in; None is their own.

    Raises:
        TypeError: it is no module, or one whose parameters cannot be replaced.
        ValueError: no parameter is left to differentiate.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Chosen,
        device: torch.device | None,
    ) -> None:
        self.model = unwrapped(model)
        self.cast: torch.dtype | None = None
        # another thread may have its own parameters in the model's places
        with LOCK:
            self._take_parameters(parameters, device)

    def _take_parameters(
        self,
        parameters: Chosen,
        device: torch.device | None,
    ) -> None:
        """Copy the chosen parameters into theta, and keep the others and the buffers."""
        chosen = select_parameters(self.model, parameters)
        first = next(iter(chosen.values()))
        self.device = first.device if device is None else device
        self.names = list(chosen)
        self.complex = [p.is_complex() for p in chosen.values()]
        self.shapes = [_real(p).shape for p in chosen.values()]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.dtypes = [p.dtype.to_real() for p in chosen.values()]
        # sums of many gradients drown in half precision, so that vectors are in single precision at least
        self.dtype = torch.promote_types(widest(self.dtypes), torch.float32)
        with torch.inference_mode(False):
            read = as_looked_up(self.model)
            parts = [
                _real(read.get(p, p).detach())
                .reshape(-1)
                .to(self.device, self.dtype)
                for p in chosen.values()
            ]
            self.theta = torch.cat(parts).clone()
            self._fixed = {
                n: read.get(p, p).detach().to(self.device)
                for n, p in self.model.named_parameters()
                if n not in chosen
            }
            self._fixed |= {
                n: b.detach().clone().to(self.device)
                for n, b in self.model.named_buffers()
            }
            self.leaves = [
                part.requires_grad_()
                for part in self.unflatten(self.theta.detach())
            ]
        self._find_places()

    def _find_places(self) -> None:
        self._slots = find_slots(self.model)
        self._kept = attributes(self.model)

    @property
    def P(self) -> int:
        """Number of parameters."""
        return len(self.theta)

    def in_precision(self: Own, dtype: torch.dtype) -> Own:
        """The same objective with the model, its inputs and the vectors in another precision."""
        twin = copy.copy(self)
        twin.cast = dtype
        twin.dtype = dtype
        twin.dtypes = [dtype] * len(self.dtypes)
        twin.theta = self.theta.to(dtype)
        twin.leaves = [
            part.requires_grad_()
            for part in twin.unflatten(twin.theta.detach())
        ]
        twin._fixed = {
            name: t.to(dtype) if t.is_floating_point() else t
            for name, t in self._fixed.items()
        }
        return twin

    def at(self: Own, theta: Tensor) -> Own:
        """The same objective at other parameters [P]."""
        twin = copy.copy(self)
        twin.theta = theta.detach()
        twin.leaves = [
            part.requires_grad_() for part in twin.unflatten(twin.theta)
        ]
        return twin

    def double(self: Own) -> Own:
        """The same objective in double precision."""
        return self.in_precision(torch.float64)

    def fixed(self) -> list[Tensor]:
        """Frozen parameters and buffers, which no sample adds to."""
        return list(self._fixed.values())

    # ---- flat and structured

    def flatten(
        self, tensors: Sequence[Tensor], name: str = "tensors"
    ) -> Tensor:
        """Tensors shaped like the parameters -> [P].

        Raises:
            ValueError: they are not; the message calls them `name`.
        """
        tensors = [_real(t) for t in tensors]
        shapes = [tuple(shape) for shape in self.shapes]
        found = [tuple(t.shape) for t in tensors]
        if shapes != found:
            raise ValueError(
                f"{name}: expected tensors shaped like the parameters, {shapes}, got {found}"
            )
        return torch.cat(
            [
                t.detach().reshape(-1).to(self.device, self.dtype)
                for t in tensors
            ]
        )

    def structured(self, vector: Tensor) -> list[Tensor]:
        """[P] -> tensors shaped like the parameters, complex ones complex."""
        parts = zip(self.unflatten(vector), self.complex, strict=True)
        return [
            torch.complex(*part.unbind(-1)) if pairs else part
            for part, pairs in parts
        ]

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """[P] -> tensors of `shapes`."""
        return [
            part.view(shape) if len(shape) != 1 else part
            for part, shape in zip(
                vector.split(self.sizes), self.shapes, strict=True
            )
        ]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside: the model in evaluation mode, and every operation one that can be differentiated twice."""
        with differentiable(self.model, self.device):
            self._find_places()
            yield

    @contextlib.contextmanager
    def _at(self, theta: Theta) -> Iterator[nn.Module]:
        """The model at theta, with buffers of its own inside; its own tensors are back afterwards."""
        parts = self.unflatten(theta) if isinstance(theta, Tensor) else theta
        state = dict(self._fixed)
        of_each = zip(self.names, parts, self.dtypes, self.complex, strict=True)
        for name, t, dtype, pairs in of_each:
            own = t if t.dtype == dtype else t.to(dtype)
            state[name] = torch.complex(*own.unbind(-1)) if pairs else own
        with forgotten(self._kept), swapped(self._slots, state):
            yield self.model


def _real(t: Tensor) -> Tensor:
    """Complex numbers [...] as pairs of real ones [..., 2]."""
    return torch.view_as_real(t) if t.is_complex() else t
