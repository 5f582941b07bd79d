r"""The shift of the parameters where some training samples are removed, relabelled or reweighted.

For a set S whose losses \ell_i become w_i \ell'_i (w = 0: removed; other labels; other weights), with A, J, r, R and K
as in `leverage` and the outputs' change z, the optimum of the changed training loss has

    \Delta = -A^{-1} J_S^T e / n,   e = w r'(y + z) - r - R z,   z = J_S \Delta = -K_SS e,

where the others are taken to second order and S's own losses as they are. Three orders of it:

- first: e = w r'(y) - r, z = 0: minus the sum of the influences where S is removed;
- corrected: each sample's own equation, with the block K_ii, and their sum;
- joint: one equation for the set, with its K_SS [|S| C, |S| C]: copies and neighbours hold each other.

With M = (I - R K)^{-1} and the outputs' covariance without S, K M, it is z = -K M (w r'(y + z) - r), solved by
Newton's method; of a removal that is one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.labels import with_labels
from ..model.local import Local
from .descent import descend
from .leverage import Leverage, times, without
from .weighted import summed_loss, weighted_loss

STEPS = 20
"""Newton steps at most; labels that are far from the outputs take about five."""
DONE = 1e-10
"""Change of the outputs, beside their size, at which they end."""


class Change(NamedTuple):
    """Training samples and what becomes of them."""

    indices: Sequence[int]
    labels: Sequence[Any] | None
    """New ones; None: as they are."""
    weights: Sequence[float] | None
    """New ones beside 1; None is 1 where there are new labels and 0, removed, else."""

    @property
    def w(self) -> Tensor:
        """New weights [m]."""
        if self.weights is not None:
            return torch.as_tensor(self.weights, dtype=torch.float64)
        fill = 0.0 if self.labels is None else 1.0
        return torch.full((len(self.indices),), fill, dtype=torch.float64)


class Set:
    """The samples of a change: the losses around their outputs, what they become, and K.

    Args:
        leverage: of the training set.
        change: what becomes of them.

    Attributes:
        local: the losses as they are.
        w: new weights [m].
        K: the block of the set [m, C, m, C].
    """

    def __init__(
        self,
        leverage: Leverage,
        change: Change,
    ) -> None:
        self.leverage, self.outputs = leverage, leverage.outputs
        samples = leverage.problem.samples
        self.parts = list(samples.ordered(leverage.at_once, change.indices))
        self.altered = self.parts
        if change.labels is not None:
            held = zip(self.parts, self._cut(change.labels), strict=True)
            self.altered = [with_labels(batch, own) for batch, own in held]
        found = [self.outputs.local(batch) for batch in self.parts]
        self.local = Local(*map(torch.cat, zip(*found, strict=True)))
        self.w = change.w.to(self.local.y)
        self.K = _products(leverage, change.indices)

    def slopes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs' change z [m, C] -> w r'(y + z) [m, C] and w R'(y + z) [m, C, C]."""
        if not bool(self.w.any()):
            return torch.zeros_like(self.local.r), torch.zeros_like(
                self.local.R
            )
        there = self._cut(self.local.y + z)
        pairs = zip(self.altered, there, strict=True)
        seen = [self.outputs.local(batch, y) for batch, y in pairs]
        r = torch.cat([one.r for one in seen])
        R = torch.cat([one.R for one in seen])
        return self.w[:, None] * r, self.w[:, None, None] * R

    def pulled(self, e: Tensor) -> Tensor:
        """J^T e of the set, e [m, C] -> [P]."""
        total = torch.zeros_like(self.leverage.problem.objective.theta)
        for batch, own in zip(self.parts, self._cut(e), strict=True):
            total += self.outputs.pulled_back(batch, own).sum(0)
        return total

    def pushed(self, s: Tensor) -> Tensor:
        """J s of the set, s [P] -> [m, C]."""
        parts = [self.outputs.jacobians(batch) @ s for batch in self.parts]
        return torch.cat(parts).to(self.local.y)

    def _cut(self, rows: Any) -> list[Any]:
        """Rows of all samples of the set, a part for each batch."""
        sizes = [batch.size for batch in self.parts]
        starts = [sum(sizes[:k]) for k in range(len(sizes))]
        pairs = zip(starts, sizes, strict=True)
        return [rows[start : start + size] for start, size in pairs]


def shifts(
    leverage: Leverage,
    change: Change,
    steps: int = 1,
) -> Tensor:
    r"""The \Delta of first order, corrected and joint, the last after so many Newton steps -> [3, P]."""
    here = Set(leverage, change)
    e = [_first(here), _each(here), _jointly(here)]
    rows = torch.stack([here.pulled(one) for one in e])
    found = -leverage.solved(rows, 3) / leverage.problem.samples.n
    if steps > 1:
        found[2] = _further(here, change, found[2], steps - 1)
    return found


def _further(
    here: Set,
    change: Change,
    shift: Tensor,
    steps: int,
) -> Tensor:
    r"""\Delta after more steps down the changed training loss itself,

    L_S(\theta + \Delta) - \nabla L(\theta) \Delta + \lambda |\Delta|^2 / 2: what has its minimum at \Delta = 0 where
    nothing is changed. Its curvature is taken for that of the others at \theta and of S where it has come to.
    """
    damping = here.leverage.damping
    problem = here.leverage.problem
    weights = torch.ones(problem.samples.n, dtype=torch.float64)
    _, g = weighted_loss(problem, torch.zeros_like(shift), weights)
    chosen = torch.as_tensor(change.indices)
    kept = here.w if change.labels is None else torch.zeros_like(here.w)
    weights[chosen] = kept.cpu().double()

    def loss(x: Tensor) -> tuple[float, Tensor]:
        value, slope = weighted_loss(problem, x, weights)
        if change.labels is not None:
            own, own_slope = _relabelled(here, x)
            value, slope = value + own, slope + own_slope
        value += float(damping * (x @ x) / 2 - g @ x)
        return value, slope - g + damping * x

    def inverse(x: Tensor, v: Tensor) -> Tensor:
        return _inverse(here, here.pushed(x), v)

    return descend(loss, inverse, shift, steps)


def _relabelled(
    here: Set,
    shift: Tensor,
) -> tuple[float, Tensor]:
    """The part of the samples with other labels in the changed training loss, and its gradient."""
    problem = here.leverage.problem
    parts = zip(here.altered, here._cut(here.w), strict=True)
    return summed_loss(problem, shift, parts)


def _inverse(
    here: Set,
    z: Tensor,
    v: Tensor,
) -> Tensor:
    """(A + J^T D J / n)^-1 v with D = w R'(y + z) - R, z [m, C], v [P]; Woodbury."""
    leverage, n = here.leverage, here.leverage.problem.samples.n
    s = leverage.solved(v.unsqueeze(0), 1)[0]
    m, C = here.local.y.shape
    wR = here.slopes(z)[1]
    D = torch.block_diag(*(wR - here.local.R))
    eye = torch.eye(m * C, dtype=D.dtype, device=D.device)
    K = here.K.reshape(m * C, -1)
    inside = D @ here.pushed(s).flatten()
    e = torch.linalg.solve(eye + D @ K, inside)
    pulled = here.pulled(e.view(m, C)).unsqueeze(0)
    return s - leverage.solved(pulled, 1)[0] / n


def _products(
    leverage: Leverage,
    indices: Sequence[int],
) -> Tensor:
    """K_SS of these samples [m, C, m, C], in parts that fit."""
    problem, C = leverage.problem, leverage.outputs.C
    rows = 4 * C * problem.row
    size = max(1, int(problem.budget.vectors / rows))
    m, like = len(indices), problem.objective.theta
    K = like.new_zeros(m, C, m, C, dtype=leverage.outputs.dtype)
    places = torch.arange(m)
    for left in places.split(size):
        J = _rows(leverage, indices, left)
        solved = leverage.solved(J, m * C)
        for right in places.split(size):
            same = int(right[0]) == int(left[0])
            other = J if same else _rows(leverage, indices, right)
            block = solved @ other.T
            shaped = block.view(len(left), C, len(right), C).to(K)
            first, second = int(left[0]), int(right[0])
            into = K.narrow(0, first, len(left))
            into.narrow(2, second, len(right)).copy_(shaped)
    K = K / problem.samples.n
    return (K + K.permute(2, 3, 0, 1)) / 2


def _rows(
    leverage: Leverage,
    indices: Sequence[int],
    places: Tensor,
) -> Tensor:
    """J of these of the samples [m C, P]."""
    chosen = [indices[i] for i in places.tolist()]
    batches = leverage.problem.samples.ordered(leverage.at_once, chosen)
    parts = [leverage.outputs.jacobians(batch) for batch in batches]
    return torch.cat(parts).flatten(0, 1)


# ---- the three orders of e [m, C]


def _first(here: Set) -> Tensor:
    nowhere = torch.zeros_like(here.local.y)
    wr, _ = here.slopes(nowhere)
    return wr - here.local.r


def _each(here: Set) -> Tensor:
    """By each sample's own block."""
    own = here.K.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def slopes(z: Tensor) -> tuple[Tensor, Tensor]:
        wr, wR = here.slopes(z)
        return wr - here.local.r, wR

    M = without(*here.local.roots, own, here.leverage.largest)
    return solved(own, M, slopes)


def _jointly(here: Set) -> Tensor:
    """By the block of the whole set."""
    m, C = here.local.y.shape

    def slopes(z: Tensor) -> tuple[Tensor, Tensor]:
        wr, wR = here.slopes(z.view(m, C))
        f = wr - here.local.r
        R = torch.block_diag(*wR)
        return f.view(1, -1), R.unsqueeze(0)

    W, signs = here.local.roots
    whole = here.K.reshape(1, m * C, m * C)
    roots = torch.block_diag(*W).unsqueeze(0), signs.reshape(1, -1)
    M = without(*roots, whole, here.leverage.largest)
    return solved(whole, M, slopes).view(m, C)


def solved(
    K: Tensor,
    M: Tensor,
    slopes: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """e = M f(z) with z = -K M f(z) and f, its Hessian = slopes(z): Newton's method; K, M [B, c, c] -> [B, c]."""
    KM = K @ M
    eye = torch.eye(K.shape[1], dtype=K.dtype, device=K.device)

    def around(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f, R = slopes(z)
        return z + times(KM, f), f, R

    z = torch.zeros_like(K[:, 0])
    rest, f, R = around(z)
    for _ in range(STEPS):
        step = torch.linalg.solve(eye + KM @ R, rest)
        new = around(z - step)
        # labels far from the outputs: a whole step may overshoot
        worse = _worse(new[0], rest)
        while bool(worse.any()):
            step = torch.where(worse, step / 2, step)
            new = around(z - step)
            worse = _worse(new[0], rest)
        z = z - step
        rest, f, R = new
        size = 1 + float(z.abs().max())
        if float(step.abs().max()) <= DONE * size:
            break
    return times(M, f)


def _worse(
    new: Tensor,
    old: Tensor,
) -> Tensor:
    """Which rows have grown [B, c] -> [B, 1]."""
    found: Tensor = new.norm(dim=1) > old.norm(dim=1) + DONE
    return found.unsqueeze(1)
