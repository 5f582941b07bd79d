"""Roots of the loss's Hessian in the outputs of each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils import warn
from .doubts import ModelWarning

NOT_CONVEX = (
    "the loss is not convex in the model's outputs, so that its Gauss-Newton matrix has negative parts, which EKFAC "
    "and low rank leave out; config['solver'] = 'cg' or 'exact' solve the system itself"
)


ABSOLUTE = 1e-14
"""Rounding of numbers near one in double precision, some units in the last place, whatever the curvature is."""


def roots(R: Tensor, convex: bool = False) -> Tensor:
    r"""W with W^T W = R, rows \sqrt{value} times eigenvector, the largest first; [B, C, C] -> [B, C, C].

    Negative eigenvalues, of a loss that is not convex in the outputs, are left out with a warning; where it is known
    to be `convex` they are rounding.
    """
    W, signs = signed_roots(R, convex)
    if bool((signs < 0).any()):
        warn(NOT_CONVEX, ModelWarning)
    return W * (signs > 0).to(W).unsqueeze(-1)


def signed_roots(R: Tensor, convex: bool) -> tuple[Tensor, Tensor]:
    r"""W and signs S with W^T diag(S) W = R, the largest value first; [B, C, C] -> [B, C, C], [B, C] of 1 and -1.

    Of a loss that is known to be `convex` no sign is -1: the Hessian of a sample that is fitted well is all rounding.
    """
    values, vectors = torch.linalg.eigh(R.double())
    signs = torch.ones_like(values)
    if not convex:
        # an entry is rounded on the scale of the largest one
        unit = max(1e-7, 10 * R.shape[-1] * torch.finfo(R.dtype).eps)
        largest = values.abs().amax(-1, keepdim=True)
        # of a sample that is fitted well, on the scale of probabilities: 1 - p
        rounding = unit * largest + 1e-9 * largest.max() + ABSOLUTE
        signs[values < -rounding] = -1
    lengths = (values * signs).clamp_min(0).sqrt()
    rows = lengths.unsqueeze(-1) * vectors.mT
    return rows.flip(1).to(R), signs.flip(1).to(R)
