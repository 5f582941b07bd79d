"""The ways of computing that a model allows."""

from __future__ import annotations

from typing import NamedTuple


class Paths(NamedTuple):
    """What a model allows; found by `probe` on a few samples, the slow way round until then."""

    rows: bool = False
    """A row of a collated batch is that sample: batches can be cut apart."""
    outputs: bool = False
    """One call of the model gives one row of outputs for each sample."""
    loss: bool = False
    """`torch.func.vmap` over samples of the loss alone."""
    batched: bool = False
    """One call of the model gives each sample's loss."""
    vmap: bool = False
    """`torch.func.vmap` over samples."""
    jacobian: bool | None = None
    """`vmap` over samples and their outputs; None is not tried yet."""
    forward: bool = False
    """Forward-mode derivatives of the losses."""
    stacked: bool = False
    """`vmap` over forward-mode derivatives."""
    tangent: str | None = None
    """The way to derivatives of the outputs along a vector; None is not tried yet."""
    curved: bool = True
    """Second derivatives of the loss in the outputs by autograd; else from differences of the first ones."""
    twice: bool | None = None
    """Second derivatives of the loss in the parameters by autograd; None is not tried yet."""
    hessian: bool | None = None
    """`vmap` over Hessian-vector products; None is not tried yet."""
    ggn: bool | None = None
    """`vmap` over Gauss-Newton products; None is not tried yet."""
