r"""Output gradients e of a batch whose second moment is the loss's Hessian there: \sum_e e e^T = \nabla^2_y \ell_i.

All of the Hessian's eigenvectors, which is exact, where few backward passes do; else draws.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..data.batch import Batch
from ..model import draws
from ..model.layer_passes import Forward
from ..model.likelihoods import (
    DENSE_OUTPUTS,
    Categorical,
    Form,
    Likelihood,
    likelihood,
)
from ..model.roots import roots
from .problem import Problem

FEW_OUTPUTS = 16
"""Up to this many outputs of a sample the expectation over e is a sum over all of them; beyond it, e is drawn."""
EXACT_WORK = 1e10
"""Floating-point operations of a product for each output, about, up to which that sum is taken: a second on one core.
For a ResNet-18 it costs 20 backward passes, and `DRAWS` draws rank the training samples as it does to 0.985."""
LEAST_DRAWN, DRAWS = 256, 2
"""Draws where that sum is too expensive: one of each sample where there are so many samples, two of fewer. EKFAC's
scores by one of each rank the samples as all directions do to 0.995 (ResNet-18 of width 16, 256 samples, two seeds) and
to 0.969 to 0.993 (a vision transformer, 128 samples, three seeds), by two of each to 0.995 there (one seed). Random
signs of all directions in their place rank the latter to 0.925 to 0.95."""
DRAW_STRIDE = 1_000_003
"""Between the seeds of two draws: a prime far above the seeds that people use."""
Forms = dict[tuple[int, ...], Form]
"""Of the likelihoods of batches, by their indices: the parameters stay the same over the passes."""
SIGNS = 1
"""The stream of random signs, apart from that of the draws."""


def pseudo_gradients(
    problem: Problem,
    seen: Forward,
    batch: Batch,
    top: int | None,
    many: int | None = None,
    forms: Forms | None = None,
) -> list[list[Tensor]]:
    """Output gradients e of a batch, as many tensors each as the model has outputs [B, ...].

    First the `top` largest eigenvectors of the loss's Hessian, then one draw of the rest; None: all eigenvectors where
    they are few and a pass costs little, else `many` draws of the whole (None: as `draws_of` says). Random signs and
    draws are keyed by the sample, so that they do not depend on the batch. `forms` are of batches seen before.
    """
    y = [part.detach() for part in seen.y]
    known = _known(problem, seen, y, batch, {} if forms is None else forms)
    count = sum(part[0].numel() for part in y)
    if top is not None:
        top = directions(count, top)
    elif count <= FEW_OUTPUTS and count * problem.product_work <= EXACT_WORK:
        top = count
    if top:
        return _eigenvectors(problem, known, y, batch, top)
    # where many outputs are drawn in a cheap pass, one draw of each of many samples is enough
    many = 1 if count > FEW_OUTPUTS else many or draws_of(problem)
    seeds = [problem.config.seed + k * DRAW_STRIDE for k in range(many)]
    return [
        _split_like(known.draw(seed, batch.indices) / many**0.5, y)
        for seed in seeds
    ]


def _known(
    problem: Problem,
    seen: Forward,
    y: Sequence[Tensor],
    batch: Batch,
    forms: Forms,
) -> Likelihood:
    """The likelihood of a batch, looked at the first time: that costs two passes of a language model's head."""
    key = tuple(batch.indices)
    if key in forms:
        return forms[key].at(y)
    known = likelihood(problem.objective, y, seen.rebuild, batch)
    if isinstance(known, Categorical):
        forms[key] = known.form
    return known


def draws_of(problem: Problem) -> int:
    """Draws of each sample where not all directions are taken."""
    return 1 if problem.samples.n >= LEAST_DRAWN else DRAWS


def _eigenvectors(
    problem: Problem,
    known: Likelihood,
    y: Sequence[Tensor],
    batch: Batch,
    top: int,
) -> list[list[Tensor]]:
    """The `top` largest eigenvectors, each with a random sign, and one draw of the others."""
    seed, indices = problem.config.seed, batch.indices
    W = roots(known.hessians(), isinstance(known, Categorical))
    count = W.shape[1]
    signs = draws.signs(seed, indices, top, W.device, SIGNS).to(W)
    es = [_split_like(W[:, k] * signs[:, k : k + 1], y) for k in range(top)]
    if top < count:
        numbers = draws.normal(seed, indices, count - top, W.device).to(W)
        rest = (numbers.unsqueeze(1) @ W[:, top:]).squeeze(1)
        es.append(_split_like(rest, y))
    return es


def directions(count: int, top: int) -> int:
    """How many directions of `count` outputs are taken one by one: the last costs no more than a draw of it."""
    if count > DENSE_OUTPUTS:
        return 0
    return count if count <= top + 1 else top


def _split_like(flat: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([leaf[0].numel() for leaf in leaves], 1)
    return [
        part.reshape(leaf.shape).to(leaf)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
