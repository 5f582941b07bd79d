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


def roots(R: Tensor) -> Tensor:
    r"""W with W^T W = R, rows \sqrt{value} times eigenvector, the largest first; [B, C, C] -> [B, C, C].

    Negative eigenvalues, of a loss that is not convex in the outputs, are left out with a warning.
    """
    W, signs = signed_roots(R)
    if bool((signs < 0).any()):
        warn(NOT_CONVEX, ModelWarning)
    return W * (signs > 0).to(W).unsqueeze(-1)


def signed_roots(R: Tensor) -> tuple[Tensor, Tensor]:
    r"""W and signs S with W^T diag(S) W = R, the largest value first; [B, C, C] -> [B, C, C], [B, C] of 1 and -1."""
    values, vectors = torch.linalg.eigh(R.double())
    rounding = 1e-7 * values.abs().amax(-1, keepdim=True)
    signs = torch.where(values < -rounding, -1.0, 1.0)
    lengths = (values * signs).clamp_min(0).sqrt()
    rows = lengths.unsqueeze(-1) * vectors.mT
    return rows.flip(1).to(R), signs.flip(1).to(R)
