"""What a run takes, read off pilots of it on two parts of the training set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from torch.utils.data import DataLoader

from ..data.samples import Samples
from ..influence import InfluenceFunction
from ..member import Member
from ..model.budget import MIB
from ..show.entries import entry
from ..solve.auto import foreseen
from ..solve.exact import dense_form
from ..utils import as_json
from .pilot import NOTHING, Measured, Peak, Pilot, extrapolated
from .scores import fits_json
from .space import chains_of

LEAST, MOST, SHARE = 1024, 4096, 16
"""Training samples of the larger pilot: one in `SHARE`, between these. Layers see up to 1,024 in a pass, so that with
fewer the pilot would be more costly a sample, and take less memory, than the run."""
APART = 4
"""The smaller pilot is so many times as small: of two that are near a difference of times is noise."""
FIXED = 0.5
"""At most this share of the larger pilot's set-up is taken not to grow with the training set: eigenvectors, and the
search of the damping, whose samples are 200."""
WARM_UP = 64
MOST_TESTS = 32
"""Test samples in a pilot's group: as many as go through the model together."""
OF_RESULT = 90
"""Bytes of each training sample for what a run returns: the sum of the scores, and two lists of indices."""


def measured(
    influence: InfluenceFunction,
    model: nn.Module,
    loader: DataLoader[Any],
    tests: Samples,
    indices: Sequence[int],
    peak: Peak,
) -> dict[str, float]:
    """Memory, seconds and passes of a run on all samples, from those of two parts."""
    (whole,) = influence._members
    run = _Run.of(whole, tests, indices)
    late = _warm_up(whole, model, loader, tests, indices[:1])

    def pilot_of(size: int) -> Pilot:
        return Pilot(whole, model, loader, size)

    large = _larger(pilot_of(run.sizes[1]), run, peak)
    once = pilot_of(run.sizes[0]).set_up()  # of two: it is short
    small = _smaller(pilot_of(run.sizes[0]), run)
    pair = small.set_up.least(once), large.set_up
    power, fixed = (2, 1.0) if _is_quadratic(whole) else (1, FIXED)
    ready = _at(pair, run.sizes, run.n, power, fixed)
    reads = large.stored.times(run.n / run.sizes[1])
    solving = _solving(run, small, large)
    return {
        "memory": large.memory / MIB,
        "loading": late,
        "set_up": ready.seconds + large.first + reads.seconds,
        "solving": solving.seconds,
        "writing": _writing(whole, run.K),
        "passes": (ready.passed + reads.passed + solving.passed) / run.n,
    }


class _Run(NamedTuple):
    """The run that is measured for, and the sizes of its pilots."""

    whole: Member
    tests: Samples
    indices: Sequence[int]
    sizes: tuple[int, int]
    """Training samples of the two pilots."""
    few: tuple[int, int]
    """Test samples of their groups."""
    G: int
    """Test samples together in the run."""

    @classmethod
    def of(cls, whole: Member, tests: Samples, indices: Sequence[int]) -> _Run:
        """Those of a run over these test samples."""
        G = max(1, min(whole.group_size, len(indices)))
        most = min(G, MOST_TESTS)
        sizes = _pilot_sizes(whole.samples.n)
        return cls(whole, tests, indices, sizes, (max(1, most // 4), most), G)

    @property
    def n(self) -> int:
        """Training samples."""
        return self.whole.samples.n

    @property
    def K(self) -> int:
        """Test samples."""
        return len(self.indices)

    def group(self, pilot: Pilot, count: int) -> list[Measured]:
        """The stages of a group of so many test samples."""
        return pilot.group(self.tests, self.indices[:count], self.K)


class _Small(NamedTuple):
    """What the smaller pilot took."""

    set_up: Measured
    fewer: list[Measured]


class _Large(NamedTuple):
    """What the larger pilot took, and the bytes that the run will hold."""

    set_up: Measured
    fewer: list[Measured]
    most: list[Measured]
    first: float
    """Seconds of what its first group did for all of them."""
    stored: Measured
    memory: float


def _smaller(pilot: Pilot, run: _Run) -> _Small:
    return _Small(pilot.set_up(), run.group(pilot, run.few[0]))


def _larger(pilot: Pilot, run: _Run, peak: Peak) -> _Large:
    set_up = pilot.set_up()
    most, first = run.group(pilot, run.few[1]), 0.0
    if run.K > run.G:
        again = run.group(pilot, run.few[1])
        first, most = max(_seconds(most) - _seconds(again), 0.0), again
    memory = peak.bytes() + _grown(run, pilot)
    fewer = run.group(pilot, run.few[0])
    return _Large(set_up, fewer, most, first, _stored(pilot), memory)


def _solving(run: _Run, small: _Small, large: _Large) -> Measured:
    """All groups of the run."""
    pairs = zip(small.fewer, large.fewer, strict=True)
    grows = [_growth(*pair, run.sizes, run.n) for pair in pairs]
    groups = [_whole(large.fewer, grows), _whole(large.most, grows)]
    count, left = divmod(run.K, run.G)
    rest = _at(groups, run.few, left) if left else NOTHING
    return _at(groups, run.few, run.G).times(count).plus(rest)


def _whole(stages: Sequence[Measured], grows: Sequence[float]) -> Measured:
    """A group on all training samples."""
    total = NOTHING
    for stage, by in zip(stages, grows, strict=True):
        total = total.plus(stage.times(by))
    return total


def _stored(pilot: Pilot) -> Measured:
    """The gradients that the second mode stores."""
    stores = pilot.member.config.calc_method == "all_grad_then_test"
    return pilot.gradients() if stores else NOTHING


def _pilot_sizes(n: int) -> tuple[int, int]:
    large = min(n, max(LEAST, min(MOST, n // SHARE)))
    return max(1, large // APART), large


def _at(
    found: Sequence[Measured],
    sizes: Sequence[int],
    size: int,
    power: int = 1,
    fixed: float = 1.0,
) -> Measured:
    """What was measured at two sizes, at another; a share `fixed` of the larger at most does not grow."""
    small, large = found
    powers = float(sizes[0]) ** power, float(sizes[1]) ** power
    at = float(size) ** power
    return Measured(
        extrapolated(small.seconds, large.seconds, powers, at, fixed),
        round(extrapolated(small.passed, large.passed, powers, at)),
    )


def _growth(
    small: Measured, large: Measured, sizes: Sequence[int], n: int
) -> float:
    """How many times as long a stage takes on n samples as on the larger pilot's.

    By the samples that it passes, which are exact: a stage takes the same time for each of them. Random minibatches
    are as many on any set.
    """
    whole = large.passed - large.drawn
    grown = extrapolated(small.passed - small.drawn, whole, sizes, n)
    passed = large.drawn + grown
    return passed / large.passed if large.passed else 1.0


def _seconds(stages: Sequence[Measured]) -> float:
    return sum(stage.seconds for stage in stages)


def _warm_up(
    whole: Member,
    model: nn.Module,
    loader: DataLoader[Any],
    tests: Samples,
    indices: Sequence[int],
) -> float:
    """Seconds of what is loaded and compiled once, whatever the sizes."""
    pilot = Pilot(whole, model, loader, min(WARM_UP, whole.samples.n))
    taken = []
    for _ in range(2):
        begin = time.perf_counter()
        pilot.set_up()
        pilot.group(tests, indices, 1)
        taken.append(time.perf_counter() - begin)
    return max(taken[0] - taken[1], 0.0)


def _writing(whole: Member, tests: int) -> float:
    """Seconds that the entries of all test samples take."""
    n = whole.samples.n
    row = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    begin = time.perf_counter()
    one = entry(
        row,
        label=0,
        index=0,
        seconds=0.0,
        residual=0.0,
        top_k=whole.config.top_k,
    )
    if fits_json(whole.config.json, tests * n, 4):
        as_json(one)
    return tests * (time.perf_counter() - begin)


def _grown(run: _Run, pilot: Pilot) -> float:
    """Bytes that the run holds and the pilot did not: scores of all, vectors of a whole group, a dense matrix.

    And the array of scores, where the result file is written from it.
    """
    whole, tests, together = run.whole, run.few[1], run.G
    problem, row = whole.problem, whole.problem.row
    item, chains = (
        problem.objective.theta.element_size(),
        chains_of(whole.config),
    )
    copies = (1 + chains if chains > 1 else 1) * item
    scores = copies * (together * problem.samples.n - tests * pilot.size)
    vectors = (together - tests) * (3 + chains) * row
    dense = 0.0
    if _is_exact(whole):
        dense = dense_form(problem)[1] - dense_form(pilot.member.problem)[1]
    n, K = run.n, run.K
    numbers = K * n * (2 if chains > 1 else 1)
    read = fits_json(whole.config.json, numbers, item) * numbers * item
    # the solutions of a group are held until the next ones are there
    before = together * chains * row if together < K else 0
    return scores + vectors + before + max(dense, 0.0) + OF_RESULT * n + read


def _is_exact(whole: Member) -> bool:
    solver = whole.config.solver_in_use[0]
    if solver == "auto":
        solver = foreseen(whole.problem)
    return solver == "exact"


def _is_quadratic(whole: Member) -> bool:
    """Whether the set-up builds a matrix of all pairs of training samples."""
    return _is_exact(whole) and dense_form(whole.problem)[0] < whole.objective.P
