"""What a run takes, read off pilots of it on two parts of the training set."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

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
    n, K = whole.samples.n, len(indices)
    G = max(1, min(whole.group_size, K))
    sizes = _pilot_sizes(n)
    few = (max(1, min(G, MOST_TESTS) // 4), min(G, MOST_TESTS))
    late = _warm_up(whole, model, loader, tests, indices[:1])

    def pilot_of(size: int) -> Pilot:
        return Pilot(whole, model, loader, size)

    pilot = pilot_of(sizes[1])
    set_up = pilot.set_up()
    most = pilot.group(tests, indices[: few[1]], K)
    first = 0.0
    if K > G:  # what the first group does for all of them is no other's
        again = pilot.group(tests, indices[: few[1]], K)
        first, most = max(_seconds(most) - _seconds(again), 0.0), again
    memory = peak.bytes() + _grown(whole, pilot, few[1], G, K)
    fewer = pilot.group(tests, indices[: few[0]], K)
    reads = _stored(pilot).times(n / pilot.size)
    del pilot
    once = pilot_of(sizes[0]).set_up()
    pilot = pilot_of(sizes[0])
    pair = pilot.set_up().least(once), set_up
    ready = (
        _at(pair, sizes, n, 2, 1.0)
        if _is_quadratic(whole)
        else _at(pair, sizes, n, 1, FIXED)
    )
    less = pilot.group(tests, indices[: few[0]], K)
    grows = [_growth(*two, sizes, n) for two in zip(less, fewer, strict=True)]
    groups = [
        functools.reduce(
            Measured.plus,
            (stage.times(by) for stage, by in zip(stages, grows, strict=True)),
        )
        for stages in (fewer, most)
    ]
    full = _at(groups, few, G)
    rest = _at(groups, few, K % G) if K % G else NOTHING
    return {
        "memory": memory / MIB,
        "loading": late,
        "set_up": ready.seconds + first + reads.seconds,
        "solving": (K // G) * full.seconds + rest.seconds,
        "writing": _writing(whole, K),
        "passes": (
            ready.passed + reads.passed + (K // G) * full.passed + rest.passed
        )
        / n,
    }


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


def _grown(
    whole: Member, pilot: Pilot, tests: int, together: int, all_tests: int
) -> float:
    """Bytes that the run holds and the pilot did not: scores of all, vectors of a whole group, a dense matrix.

    And the array of scores, where the result file is written from it.
    """
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
    n, K = problem.samples.n, all_tests
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
