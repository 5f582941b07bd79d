r"""Each sample's loss as a function of its outputs, \ell_i(y), with its gradient r and its Hessian R there.

In double precision where the loss runs in it: r and R of samples that are fitted well drown in rounding else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batch import Batch
from .jacobians import jacobians, pulled_back
from .likelihoods import (
    DENSE_OUTPUTS,
    PENALTY,
    Categorical,
    Independent,
    Likelihood,
    likelihood,
)
from .objective import Objective, Rebuild
from .outputs import numbers_of
from .roots import signed_roots

logger = logging.getLogger(__name__)
NOT_PER_SAMPLE = (
    "the loss is no function of each sample's own outputs with a curvature there ({}), so that there is no prediction "
    "of a sample by the others"
)
MANY_OUTPUTS = (
    "a sample has {} outputs, and a block of them squared is solved for each "
    f"sample, for up to {DENSE_OUTPUTS}"
)
UNEQUAL = "sample {} has {} outputs and others have {}; there is one prediction a sample only where all have as many"


class Local(NamedTuple):
    """Losses of a batch as functions of its outputs y."""

    y: Tensor
    """[B, C]"""
    losses: Tensor
    """[B]"""
    r: Tensor
    """Gradients of the losses in y [B, C]."""
    R: Tensor
    """Hessians of the losses in y [B, C, C]."""

    @property
    def roots(self) -> tuple[Tensor, Tensor]:
        """W and signs S with R = W^T S W, [B, C, C] and [B, C]."""
        return signed_roots(self.R, convex=False)


class Outputs:
    """The outputs of a model that its loss goes by.

    Args:
        objective: of the model.
        few: some training samples.

    Attributes:
        kind: `"classes"` (cross-entropy), `"labels"` (binary cross-entropy of each output), or `"numbers"`.
        C: how many there are of a sample.

    Raises:
        ValueError: the loss is no function of a sample's own outputs alone, or of too many.
    """

    def __init__(
        self,
        objective: Objective,
        few: Batch,
    ) -> None:
        self.objective = objective
        reason = objective.refused or (PENALTY if objective.direct else None)
        if reason is not None:
            raise ValueError(NOT_PER_SAMPLE.format(reason))
        self.dtype = torch.float64
        self._double: Objective | None = None
        self._kept: list[int] | None = None
        whole = self._tried(few)
        self._kept = self._that_count(few, whole)
        self.C = self.numbers(few).shape[1]
        if self.C > DENSE_OUTPUTS:
            raise ValueError(MANY_OUTPUTS.format(self.C))
        self._places: Tensor | None = None
        self.kind = self._kind(few)

    # ---- of a batch

    def numbers(self, batch: Batch) -> Tensor:
        """Outputs y [B, C]."""
        if batch.parts:
            return self._same([self.numbers(one) for one in batch.parts], batch)
        with torch.no_grad():
            return _joined(self._chosen(self._parts(batch)[0]))

    def local(
        self,
        batch: Batch,
        y: Tensor | None = None,
    ) -> Local:
        """The losses of a batch around its outputs, or around others y [B, C]."""
        if batch.parts:
            rows = [None] * batch.size if y is None else list(y.split(1))
            pairs = zip(batch.parts, rows, strict=True)
            found = [self.local(one, row) for one, row in pairs]
            self._same([one.y for one in found], batch)
            return Local(
                *(torch.cat(part) for part in zip(*found, strict=True))
            )
        parts, rebuild = self._parts(batch)
        if y is not None:
            self._put(parts, y)
        losses, r = self._slopes(parts, rebuild, batch)
        R = likelihood(self._twin, parts, rebuild, batch).hessians()
        places = self._columns(parts)
        R = R[:, places[:, None], places]
        return Local(_joined(self._chosen(parts)), losses, r, R)

    def losses(
        self,
        batch: Batch,
        y: Tensor,
    ) -> Tensor:
        """Losses of a batch at outputs y [B, C] -> [B]."""
        return self.local(batch, y).losses

    def jacobians(self, batch: Batch) -> Tensor:
        """Derivatives of the outputs in the parameters [B, C, P]."""
        return jacobians(self.objective, batch, self._kept).detach()

    def pulled_back(
        self,
        batch: Batch,
        c: Tensor,
    ) -> Tensor:
        """J_i^T c_i of each sample, c [B, C] -> [B, P]."""
        return pulled_back(self.objective, batch, c, self._kept).detach()

    def probabilities(self, y: Tensor) -> Tensor | None:
        """Those that the loss reads from outputs y [B, C]: in the same places; None of numbers."""
        if self.kind == "labels":
            return y.sigmoid()
        if self._places is None:
            return None
        result = torch.zeros_like(y)
        result[:, self._places] = y[:, self._places].softmax(-1)
        return result

    # ---- inside

    @property
    def _twin(self) -> Objective:
        if self.dtype == self.objective.dtype:
            return self.objective
        if self._double is None:
            self._double = self.objective.double()
        return self._double

    def _parts(self, batch: Batch) -> tuple[list[Tensor], Rebuild]:
        """All floating-point tensors that the model returns, and the way back."""
        objective = self.objective
        with torch.no_grad():
            y, rebuild = numbers_of(objective.outputs(objective.theta, batch))
        return [part.detach().to(self.dtype) for part in y], rebuild

    def _chosen(self, parts: Sequence[Tensor]) -> list[Tensor]:
        kept = range(len(parts)) if self._kept is None else self._kept
        return [parts[k] for k in kept]

    def _put(
        self,
        parts: list[Tensor],
        y: Tensor,
    ) -> None:
        """Put y [B, C] in the place of the outputs that count."""
        kept = list(range(len(parts))) if self._kept is None else self._kept
        sizes = [parts[k][0].numel() for k in kept]
        for k, piece in zip(
            kept, y.to(self.dtype).split(sizes, 1), strict=True
        ):
            parts[k] = piece.reshape(parts[k].shape)

    def _columns(self, parts: Sequence[Tensor]) -> Tensor:
        """Where the outputs that count lie among all numbers of a sample [C]."""
        sizes = [part[0].numel() for part in parts]
        columns = torch.arange(sum(sizes), device=parts[0].device).split(sizes)
        return torch.cat(self._chosen(columns))

    def _slopes(
        self,
        parts: Sequence[Tensor],
        rebuild: Rebuild,
        batch: Batch,
    ) -> tuple[Tensor, Tensor]:
        """Losses [B] and their gradients in the outputs that count [B, C]."""
        y = [part.detach().requires_grad_() for part in parts]
        with torch.enable_grad():
            losses = self._twin.output_losses(rebuild(y), batch)
            r = torch.autograd.grad(
                losses.sum(), y, materialize_grads=True, allow_unused=True
            )
        return losses.detach(), _joined(self._chosen(r))

    def _tried(self, few: Batch) -> Local:
        """The losses around all outputs, in the highest precision that they run in."""
        try:
            return self.local(few)
        except (RuntimeError, TypeError) as error:
            if isinstance(error, NotImplementedError):
                raise ValueError(NOT_PER_SAMPLE.format(error)) from error
            # constants of another precision inside the loss
            self.dtype = self.objective.dtype
            return self.local(few)

    def _that_count(
        self,
        few: Batch,
        whole: Local,
    ) -> list[int]:
        """The tensors among the outputs in which the loss has a slope or a curvature."""
        one = next(few.singles())
        sizes = [part[0].numel() for part in self._parts(one)[0]]
        slopes = whole.r.abs().amax(0)
        curvatures = whole.R.abs().amax((0, 1))
        known = slopes + curvatures
        pieces = known.split(sizes)
        return [k for k, piece in enumerate(pieces) if bool(piece.any())]

    def _kind(self, few: Batch) -> str:
        one = next(few.singles())
        y = self.numbers(one)
        generator = torch.Generator().manual_seed(0)
        at = [torch.randn(y.shape, generator=generator).to(y) for _ in range(2)]
        first, second = (self._likelihood(one, there) for there in at)
        if isinstance(first, Categorical):
            self._places = self._among_kept(one, first)
            return "classes"
        if isinstance(first, Independent) and isinstance(second, Independent):
            c = [
                found.hessians().diagonal(dim1=1, dim2=2) / _variance(there)
                for found, there in zip((first, second), at, strict=True)
            ]
            if bool(((c[0] - c[1]).abs() <= 1e-4 * c[0].abs()).all()):
                return "labels"
        return "numbers"

    def _likelihood(
        self,
        one: Batch,
        y: Tensor,
    ) -> Likelihood:
        parts, rebuild = self._parts(one)
        self._put(parts, y)
        return likelihood(self._twin, parts, rebuild, one)

    def _among_kept(
        self,
        one: Batch,
        found: Categorical,
    ) -> Tensor:
        """Places of the classes at each position among the outputs that count [N, C]."""
        columns = self._columns(self._parts(one)[0])
        return torch.searchsorted(columns, found.places.contiguous())

    def _same(
        self,
        rows: Sequence[Tensor],
        batch: Batch,
    ) -> Tensor:
        """Outputs of single samples, joined."""
        expected = getattr(self, "C", rows[0].shape[1])
        for row, index in zip(rows, batch.indices, strict=True):
            if row.shape[1] != expected:
                text = UNEQUAL.format(index, row.shape[1], expected)
                raise ValueError(NOT_PER_SAMPLE.format(text))
        return torch.cat(list(rows))


def _variance(y: Tensor) -> Tensor:
    """p (1 - p) at p = sigmoid(y), the curvature of a binary cross-entropy but for a weight."""
    p = y.sigmoid()
    return p * (1 - p)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one row per sample, side by side [B, C]."""
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1)
