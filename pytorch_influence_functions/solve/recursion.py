r"""One chain of LiSSA over a stack of right-hand sides; every row has its own scale, state and end.

The solution of a row is `base` + h / scale, where h solves for the right-hand side `rest`: 0 and v until the first
exact residual. What happens to one row does not touch another, so that a row's numbers are the same in any group.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from ..data.batch import Batch
from ..utils import progress_bar, warn
from .errors import CurvatureWarning, DivergenceError, NegativeCurvatureError
from .rows import Rows
from .scale import Step, rayleigh
from .system import Residual, System, row_norms

logger = logging.getLogger(__name__)

FIRST_CHECK, CHECK_GROWTH = 60, 1.5
"""The step of the first residual check; each later one comes after this factor."""
NORM_EVERY = 4
"""Steps between two looks at the norm."""
FAR = 100
"""A solution has at most the norm of v / lambda; the noise of the minibatches is allowed this much more."""
FAR_UNDAMPED = 1e8
"""Without damping there is no such bound, only that of single precision."""
RESTARTS = 12
"""Times that a row's scale may be raised: by 4096 at least."""
LONGEST = 20_000
"""Bound for recursion_depth="auto"."""
EXACT_COST, CHECK_COST = 0.6, 0.01
"""What a check may read, as a fraction of the training samples read so far: the whole set where that is so cheap that
refinement pays, else a sample of it."""
LEAST_CHECKED, LEAST_WITHOUT_TOLERANCE = 8, 2
"""Minibatches that a check reads at least; without a tolerance it only chooses between iterate and average."""
SEED_STRIDE = 1_000_003
"""Between the seeds of two chains: a prime far above the seeds that people use."""


class Recursion:
    """One chain for v [K, P]; a row that is done leaves the stack.

    Args:
        system: the problem and lambda.
        step: the scale that was measured, and the preconditioner.
        v: right-hand sides [K, P].
        scale: of each row [K].
        chain: which of the r chains.

    Attributes:
        steps, stopped: of each row, how many steps it took and why it ended.
        scale: of each row at its end [K].
        restarts: the most of any row.
    """

    def __init__(
        self, system: System, step: Step, v: Tensor, scale: Tensor, chain: int
    ) -> None:
        self.system = system
        self.config = system.config
        self.step = step
        self.chain = chain
        self.auto = self.config.recursion_depth == "auto"
        self.limit = LONGEST if self.auto else int(self.config.recursion_depth)
        self.seed = self.config.seed + chain * SEED_STRIDE
        self.first = math.inf if self.config.tolerance is None else 1.0
        self.rows = Rows.start(v, scale, self.first)
        self.solved = torch.zeros_like(v)
        self.scale = scale.clone()
        self.steps = [0] * len(v)
        self.stopped = ["depth"] * len(v)
        self.restarts = 0

    def run(self) -> Tensor:
        """Recurse until every row is done -> s [K, P]."""
        text = f"LiSSA, chain {self.chain + 1}" if self.chain else "LiSSA"
        next_check = (
            FIRST_CHECK
            if self.config.tolerance is not None
            else self.limit // 2
        )
        with progress_bar(
            text, total=self.limit, unit="step", enabled=self.config.progress
        ) as bar:
            for j, batch in enumerate(
                self.system.samples.random(seed=self.seed), 1
            ):
                self._advance(batch)
                bar.update()
                if j % NORM_EVERY == 0 or j == self.limit:
                    self._watch(j)
                if j == self.limit or j >= next_check:
                    self._look(j)
                    next_check = int(j * CHECK_GROWTH)
                if len(self.rows) == 0:
                    break
        return self.solved

    # ---- a step

    def _advance(self, batch: Batch) -> None:
        """h <- v + (1 - damp) h - H_B h / scale, or with a preconditioner h + M^-1 (v - (H_B + lambda) h / scale)."""
        rows, damping = self.rows, self.system.damping
        scale = rows.scale[:, None]
        product = self.system.curvature(batch, rows.h)
        if self.step.factors is None:
            rows.h.mul_(1 - damping / scale).add_(rows.rest)
            rows.h.addcdiv_(product, scale, value=-1)
        else:
            product.add_(rows.h, alpha=damping)
            along = rows.rest - product / scale
            rows.h.add_(self.step.factors.power(along, damping, -1))
        rows.total.add_(rows.h)
        rows.count = rows.count + 1

    # ---- is it going well?

    def _watch(self, j: int) -> None:
        """Raise the scale, or give up, where the norm has left the range in which a solution can lie."""
        rows, damping = self.rows, self.system.damping
        norm = rows.h.norm(dim=1)
        far = (
            FAR * rows.scale / damping
            if damping > 0
            else torch.full_like(norm, FAR_UNDAMPED)
        )
        away = ~(norm <= rows.rest.norm(dim=1) * far)
        if not bool(away.any()):
            return
        along = self._require_positive(j, rows.h, away)
        if bool((rows.restarts[away] >= RESTARTS).any()):
            size = float(
                (norm / rows.scale)[away].nan_to_num(math.inf, math.inf).max()
            )
            raise DivergenceError(
                f"LiSSA diverged at step {j} (norm of s {size:.3g}, {self._state(away)}): "
                "set a larger config['scale'] or config['damping'], or a larger batch_size in the train_loader"
            )
        self._restart(away, (1.2 * along / rows.scale).clamp_min(2.0))

    def _require_positive(self, j: int, u: Tensor, mask: Tensor) -> Tensor:
        """The curvature along each row of u [k, P] -> [k]; an error where one of the mask is below -lambda.

        No scale helps then.
        """
        instead = self.system.problem.random_vector(j)
        finite = u.norm(dim=1).isfinite()
        found = rayleigh(
            self.system, torch.where(finite[:, None], u, instead)[mask]
        )
        along = torch.zeros_like(u[:, 0]).masked_scatter(mask, found)
        lowest = float(found.min())
        if lowest < -self.system.damping:
            size = float((self.rows.h.norm(dim=1) / self.rows.scale).max())
            raise NegativeCurvatureError(
                f"LiSSA diverged at step {j} (norm of s {size:.3g}, {self._state(mask)}), where the curvature is "
                f"{lowest:.3g}, below -lambda"
            )
        return along

    def _state(self, mask: Tensor) -> str:
        """The recursion's numbers, for its messages."""
        scale = float(self.rows.scale[mask].max())
        restarts = int(self.rows.restarts[mask].max())
        return f"scale {scale:.3g}, lambda {self.system.damping:.3g}, {restarts} restarts"

    def _restart(self, mask: Tensor, factor: Tensor) -> None:
        """Those rows go on from their last good state with `factor` [k] times the scale and the same lambda."""
        rows = self.rows
        before = rows.scale
        factor = torch.where(mask, factor, torch.ones_like(factor))
        rows.scale = before * factor
        rows.restarts = rows.restarts + mask
        rows.go_on_from(rows.good * factor[:, None], mask)
        self._tell_restart(
            float(before[mask].max()), float(rows.scale[mask].max())
        )
        self.restarts = max(self.restarts, int(rows.restarts.max()))

    def _tell_restart(self, before: float, after: float) -> None:
        message = (
            f"LiSSA grew at scale {before:.3g}; it goes on from its last good state with scale {after:.3g}, "
            f"lambda = {self.system.damping:g} is kept"
        )
        if self.restarts == 0:
            warn(message, CurvatureWarning)
        logger.info(message)

    # ---- is it done?

    def _look(self, j: int) -> None:
        """Let the rows leave that are done; the others go on from here."""
        if j == self.limit or self.config.tolerance is not None:
            self._check(j)
        else:
            self.rows.go_on_from(
                self.rows.h, torch.ones_like(self.rows.places, dtype=torch.bool)
            )

    def _check(self, j: int) -> None:
        """Measure the residual of each row; rows that reached the tolerance, no longer gain, or ran all steps leave.

        A row whose residual rose falls back to its best solution, and its scale is raised.
        """
        rows = self.rows
        s, residual = self._estimate(j)
        better, grown = self._compare(residual)
        if bool(grown.any()):
            self._require_positive(
                j, rows.h if residual.rows is None else residual.rows, grown
            )
        gained = residual.relative < 0.95 * rows.best
        rows.best = torch.where(better, residual.relative, rows.best)
        rows.kept = torch.where(better[:, None], s, rows.kept)
        done = self._ended(j, residual, gained, grown)
        if residual.rows is None:
            fallback = torch.where(grown[:, None], rows.good, rows.h)
        else:
            rows.base = torch.where(better[:, None], s, rows.base)
            rows.rest = torch.where(better[:, None], residual.rows, rows.rest)
            fallback = rows.rest
        rows.go_on_from(fallback, torch.ones_like(grown))
        self._leave(done, j)
        again = grown[~done] & (self.rows.restarts < RESTARTS)
        if bool(again.any()):
            self._restart(again, torch.full_like(self.rows.scale, 2.0))

    def _estimate(self, j: int) -> tuple[Tensor, Residual]:
        """The last iterate or the average of the later ones, whichever has the smaller residual, row by row."""
        rows, k = self.rows, len(self.rows)
        both = torch.cat([rows.last, rows.average])
        of = self.system.certificate(
            rows.v.repeat(2, 1),
            both,
            self._samples_of_check(j),
            seed=self.seed + 1,
        )
        first, second = of.relative.split(k)
        better = torch.arange(k, device=both.device) + k * (second < first)
        return both[better], of.at(better)

    def _samples_of_check(self, j: int) -> int:
        """How many training samples a check at step j reads."""
        n, batch_size = self.system.samples.n, self.system.samples.batch_size
        read = j * batch_size
        # for the last iterate and for the average
        if 2 * n <= EXACT_COST * read:
            return n
        least = (
            LEAST_CHECKED
            if self.config.tolerance is None
            else LEAST_WITHOUT_TOLERANCE
        )
        return min(n, max(least * batch_size, int(CHECK_COST * read)))

    def _compare(self, residual: Residual) -> tuple[Tensor, Tensor]:
        """Which rows are better than the best so far, and which have grown; 0 has the residual 1."""
        rows = self.rows
        if residual.rows is None or self.config.tolerance is None:
            better = residual.relative <= rows.best
            surely = residual.relative - 2 * residual.stderr
            return better, ~(surely <= (2 * rows.best).clamp_max(self.first))
        bar = rows.rest.norm(dim=1) / row_norms(rows.v)
        better = residual.relative <= bar
        return better, ~better

    def _ended(
        self, j: int, residual: Residual, gained: Tensor, grown: Tensor
    ) -> Tensor:
        """Which rows are done, and why."""
        rows = self.rows
        reached = residual.relative + residual.stderr <= (
            self.config.tolerance or -math.inf
        )
        known = residual.stderr < 0.2 * residual.relative
        # the start has fallen by e^-2
        forgotten = j * self.system.damping > 2 * rows.scale
        settled = known & forgotten & ~grown
        rows.stalls = torch.where(gained, 0, rows.stalls + settled)
        stalled = (rows.stalls >= 2) & self.auto
        for mask, why in ((stalled, "noise"), (reached, "tolerance")):
            for row in rows.places[mask].tolist():
                self.stopped[row] = why
        return reached | stalled | (j >= self.limit)

    def _leave(self, mask: Tensor, j: int) -> None:
        """Take the rows of `mask` out of the stack with the best solution of each, v / scale where none beat s = 0."""
        left = self.rows.at(mask)
        found = (left.best < self.first)[:, None]
        self.solved[left.places] = torch.where(
            found, left.kept, left.v / left.scale[:, None]
        )
        self.scale[left.places] = left.scale
        for row in left.places.tolist():
            self.steps[row] = j
        self.rows = self.rows.at(~mask)
