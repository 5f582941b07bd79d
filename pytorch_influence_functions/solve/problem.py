"""What is to be solved: a model's objective, its training set, its curvature and the options; fixed once it is made."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from ..config import Config
from ..data.batch import Batch
from ..data.samples import Samples
from ..model.budget import MOST_BATCH, Budget
from ..model.curvature import Curvature
from ..model.door import explain
from ..model.gradients import activation_bytes, per_sample_gradients, reuse
from ..model.lanczos import extreme_eigenvalues
from ..model.layers import Layer
from ..model.objective import Objective
from ..model.usable import TRIED, trusted_layers
from ..utils import random_state, warn
from .errors import (
    CurvatureWarning,
    NegativeCurvatureError,
)
from .set_up import SetUp

logger = logging.getLogger(__name__)
MOST_TOGETHER = 64
"""Test samples in one group at most, so that finished ones are on disk early."""
FASTER_ON_CUDA = 50
"""So many times the work is done in the same time there."""
SHIFTS, FEWEST_SHIFTS = 32, 6
"""Shifts that gradients are averaged over where these may be as many as pay, and how many at least tell if they do.
Datamodeling score at one lambda with 16, 32, 64 shifts: digits (MLP 64-64-10, three models) 0.803, 0.806, 0.807; a
two-class table 0.705, 0.710, 0.716; twelve classes of clusters 0.687, 0.690, 0.691."""
HELD_OF_A_PAIR = 2
"""Vectors that are held for each pair at the worst moment: as a part, and joined with the others."""
HALVED = 100
"""Training samples at least: the sum over half of fewer is far from Gaussian, and retraining itself costs little."""
SMOOTHING_WORK = 6e10
"""Floating-point operations that their passes over the training set may take in all: some seconds on one core, as the
products with G may."""
LEAST_STEPS, ABOVE_LEAST = 30, 1.5
"""Lanczos steps for the least eigenvalue, as many as a solution takes, and the damping over it that is advised: the
eigenvalue is found from above, and LiSSA's minibatches have lower ones."""
MOST_CHAINS = 8
"""Bound for r="auto": the standard error falls with the root of their number."""


@dataclasses.dataclass(frozen=True)
class Problem:
    r"""A model and its training set, for which (H + \lambda I) s = v is to be solved.

    Attributes:
        objective: the loss as a function of the parameters.
        samples: the training set.
        curvature: H, the Hessian or the Gauss-Newton matrix.
        config: the options.
        budget: how much memory there is, from which every size comes.
        shifts: of the parameters, in pairs, over which gradients are averaged; 0: no smoothing.
        set_up: who helps to set up a solver of it.
        pilot_of: training samples of a larger run that this one is measured for; None: it is the run.
    """

    objective: Objective
    samples: Samples
    curvature: Curvature
    config: Config
    budget: Budget
    shifts: int = 0
    set_up: SetUp = dataclasses.field(default_factory=SetUp, compare=False)
    pilot_of: int | None = None

    @property
    def row(self) -> int:
        """Bytes of one vector [P]."""
        return self.objective.theta.nbytes

    @contextlib.contextmanager
    def guard(self, *others: Samples) -> Iterator[None]:
        """Inside: seeded random state, model in evaluation mode; both come back as they were.

        Where a computation fails, the workers that read the samples (and `others`) end, and the training sample is
        named that it failed at, if it was one.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(random_state(self.config.seed))
            stack.enter_context(self.objective.active())
            for samples in (self.samples, *others):
                stack.enter_context(samples.kept())
            try:
                yield
            except BaseException as error:
                _close(self.samples, *others)
                if isinstance(error, Exception) and not isinstance(
                    error, NegativeCurvatureError
                ):
                    self._explain(error)
                raise

    def _explain(self, error: Exception) -> None:
        try:
            explain(self.objective, self.samples, error)
        finally:
            _close(self.samples)

    def product(self, vectors: Tensor, text: str | None = None) -> Tensor:
        """H V over the whole training set, V [K, P] -> [K, P]."""
        batches = self.samples.ordered(self.batch, text=text)
        return self.curvature.over(batches, vectors)

    def random_vector(self, seed: int) -> Tensor:
        """A standard normal vector [P], the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(
            self.objective.P, generator=generator, dtype=torch.float32
        )
        return draw.to(self.objective.device, self.objective.dtype)

    def enough_damping(self) -> str:
        """What to change where the curvature is negative beyond the damping.

        An iteration meets a curvature above the least eigenvalue, so that a damping made of it would be refused again.
        """
        least = extreme_eigenvalues(
            self.product,
            self.random_vector(self.config.seed),
            LEAST_STEPS,
            change=0.0,
        ).smallest
        known = self.objective.refused is None and self.objective.linear is None
        other = (
            "config['curvature'] = 'ggn', or "
            if self.curvature.kind == "hessian" and known
            else ""
        )
        return f"set {other}config['damping'] to at least {ABOVE_LEAST * abs(least):.3g}"

    def with_gauss_newton(self) -> Problem:
        """The same problem with the Gauss-Newton matrix as its curvature."""
        if self.curvature.kind == "ggn":
            return self
        curvature = Curvature(self.objective, "ggn", self.budget.product)
        return dataclasses.replace(self, curvature=curvature)

    def with_budget(self, total: float) -> Problem:
        """The same problem with so many bytes for working tensors."""
        budget = dataclasses.replace(self.budget, total=total)
        kind = self.curvature.kind
        curvature = Curvature(self.objective, kind, budget.product)
        return dataclasses.replace(self, budget=budget, curvature=curvature)

    def with_shifts(self, count: int | None) -> Problem:
        """The same problem with gradients averaged over so many shifts, or as many as can be afforded (None)."""
        count = self.affordable_shifts if count is None else count
        if not count:
            return self
        # a pair of shifts is held as one vector
        budget = self.budget.beside(count // 2 * self.row)
        smaller = self.with_budget(budget.total)
        return dataclasses.replace(smaller, shifts=count)

    @property
    def affordable_shifts(self) -> int:
        """How many shifts the work allows, at most `SHIFTS`; 0 where they are too few to pay or do not fit memory."""
        count = 2 * int(min(SHIFTS, SMOOTHING_WORK / self.product_work) // 2)
        # all of them or none, so that free memory decides of the way and never of how many
        fit = count // 2 * HELD_OF_A_PAIR * self.row <= self.budget.held_ways
        enough = self.samples.n >= HALVED and count >= FEWEST_SHIFTS and fit
        return count if enough else 0

    def instead_of_hessian(self, reason: str) -> Problem:
        """`with_gauss_newton`, said in a warning, where the user left the choice open."""
        warn(
            f"{reason}; the Gauss-Newton curvature is used instead of the Hessian. Name config['curvature'] = 'ggn' to "
            "choose it yourself, or a larger config['damping'] to keep the Hessian",
            CurvatureWarning,
        )
        return self.with_gauss_newton()

    def gradients_of_few(self, most: int) -> Tensor:
        """Gradients of at most `most` training samples at equal distances [k, P]: what is decided by them is the same
        for all test samples."""
        few = self.samples.spread(most)
        batches = self.samples.ordered(self.gradient_batch, few)
        rows = [
            per_sample_gradients(self.objective, batch, self.budget.product)
            for batch in batches
        ]
        return torch.cat(rows)

    @functools.cached_property
    def layers(self) -> list[Layer]:
        """Those whose rules give the whole gradient of each sample at any parameters; none where they do not."""
        known = list(self.objective.paths.layers)
        return known or trusted_layers(self.objective, self.tried)

    @property
    def tried(self) -> Batch:
        """Samples from the whole set that the rules of the layers are tried on."""
        count = self.budget.probed(self.row, TRIED)
        return self.samples.take(self.samples.spread(count))

    # ---- how much at a time

    @functools.cached_property
    def first(self) -> Batch:
        """The first training sample, read once: sizes are asked for in every product."""
        return self.samples.take([0])

    @property
    def activations(self) -> int:
        """Bytes that one sample's forward pass keeps."""
        return activation_bytes(self.objective, self.first)

    @functools.cached_property
    def product_work(self) -> float:
        """Floating-point operations of one product G v over the training set, about, in a CPU's time."""
        uses = max(1.0, reuse(self.objective, self.first))
        faster = FASTER_ON_CUDA if self.objective.device.type == "cuda" else 1
        return 6 * uses * self.objective.P * self.run_size / faster

    @property
    def run_size(self) -> int:
        """Training samples of the run that ways are chosen for: those that are here, but in a pilot of a larger run."""
        return self.pilot_of or self.samples.n

    @property
    def batch(self) -> int:
        """Training samples at a time in a product over the whole set."""
        if not self.objective.paths.rows:
            return self.samples.batch_size
        return self.budget.curvature_batch(self.activations)

    @property
    def scoring_batch(self) -> int:
        """Training samples at a time when scoring."""
        if not self.objective.paths.rows:
            return 1
        if self.config.batch_size is not None:
            return self.config.batch_size
        if self.shifts and self.layers:
            # of each point a call of the model: few large batches
            return self.budget.scoring_batch(self.activations, MOST_BATCH)
        return self.budget.scoring_batch(self.activations)

    @property
    def gradient_batch(self) -> int:
        """Samples at a time whose gradients are held."""
        return min(
            self.scoring_batch,
            self.budget.gradient_batch(self.activations, self.row),
        )

    def group_size(self, most: int, held: int) -> int:
        """How many test samples are solved together: what the memory holds, at most `most`, `held` vectors each."""
        r = MOST_CHAINS if self.config.r == "auto" else int(self.config.r)
        scores = (2 + r) * self.samples.n * self.objective.theta.element_size()
        return self.budget.group(held + r, self.row, scores, most)


def _close(*all_samples: Samples) -> None:
    for samples in all_samples:
        samples.close()
