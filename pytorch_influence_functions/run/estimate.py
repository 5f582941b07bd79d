"""What a run will take, before it is begun: its way, memory, disk, passes and time."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader

from ..config import Config
from ..data.samples import Samples
from ..influence import InfluenceFunction
from ..member import Member
from ..model.budget import MIB
from ..show.entries import entry
from ..solve.auto import foreseen
from ..solve.device import choose_device
from ..solve.exact import dense_form
from ..utils import as_json
from .pilot import Measured, Peak, Pilot, extrapolated
from .scores import fits_json
from .select import select_test_samples
from .space import chains_of, free_disk, row_bytes, score_bytes

logger = logging.getLogger(__name__)
LEAST, MOST, SHARE = 1024, 4096, 16
"""Training samples of the larger pilot: one in `SHARE`, between these. Layers see up to 1,024 in a pass, so that with
fewer the pilot would be more costly a sample, and take less memory, than the run."""
WARM_UP = 64
MOST_TESTS = 32
"""Test samples in a pilot's group: as many as go through the model together."""
OF_RESULT = 90
"""Bytes of each training sample for what a run returns: the sum of the scores, and two lists of indices."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        solver: and the way that `"auto"` takes.
        why: it is that one.
        parameters: how many numbers the parameters in use are, and names of these.
        n, tests: training and test samples.
        together: test samples that are solved together.
        max_memory: MiB for working tensors that sizes are chosen by.
        disk: MiB that the run writes.
        free: MiB that are free where it writes.
        memory: MiB of the most that is held, beside the model and the data; None where it was not measured.
        set_up, solving, writing: seconds; None where they were not measured.
        passes: how often the training set is read; None where it was not measured.
    """

    solver: str
    why: str
    parameters: int
    names: tuple[str, ...]
    n: int
    tests: int
    together: int
    max_memory: float
    disk: float
    free: float
    memory: float | None = None
    set_up: float | None = None
    solving: float | None = None
    writing: float | None = None
    passes: float | None = None

    @property
    def seconds(self) -> float | None:
        """Of one process."""
        return self.seconds_of(1)

    def seconds_of(self, processes: int) -> float | None:
        """Of so many processes with a core each: they share the test samples, each sets up its own solver."""
        if self.set_up is None or self.solving is None or self.writing is None:
            return None
        rounds = math.ceil(self.tests / processes) / max(self.tests, 1)
        return self.set_up + self.solving * rounds + self.writing

    def __str__(self) -> str:
        lines = [
            f"{self.tests} test samples, {self.n} training samples, {self.parameters:,} parameters of "
            f"{len(self.names)} tensors",
            f"solver: {self.solver} ({self.why}), {self.together} test samples together",
            f"disk: {self.disk:.0f} MiB ({self.free:.0f} MiB are free)",
        ]
        if self.memory is None or self.seconds is None:
            working = f"memory: {self.max_memory:.0f} MiB for working tensors"
            return "\n".join([*lines, working])
        times = ", ".join(
            f"{_time(self.seconds_of(k) or 0.0)} with {k}" for k in (2, 4)
        )
        return "\n".join(
            [
                *lines,
                f"memory: {self.memory:.0f} MiB beside the model and the data",
                f"passes over the training set: {self.passes:.0f}",
                f"time: {_time(self.seconds)} ({_time(self.set_up or 0.0)} of it set-up); {times} processes",
            ]
        )


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.3g} min" if minutes < 100 else f"{minutes / 60:.3g} h"


def estimate(
    config: Config | Mapping[str, Any] | None,
    model: nn.Module,
    train_loader: DataLoader[Any],
    test_loader: DataLoader[Any],
) -> Estimate:
    """What a run with these arguments takes: solver, memory, disk, passes over the data and time; nothing is written.

    The solver is set up and a group of test samples is solved on two parts of the training set; time and passes
    are read off these. `print` it for a few lines.

    Args:
        config: options as a dict (keys may be missing), a `Config`, or None.
        model: the trained model; comes back as it was.
        train_loader: DataLoader over the training set.
        test_loader: DataLoader over the test set.

    Raises:
        TypeError, ValueError: something given cannot be used, as the run would say.
    """
    options = Config.of(config).replace(progress=False)
    begin = time.perf_counter()
    peak = Peak(choose_device(options.gpu, model))
    tests = Samples(test_loader, name="test_loader", progress=False)
    indices = select_test_samples(options, tests.labels())
    influence = InfluenceFunction(model, train_loader, options)
    tests.device = influence.objective.device
    made = time.perf_counter() - begin
    known = outline(influence, len(indices))
    found = _measured(influence, model, train_loader, tests, indices)
    found["set_up"] += made
    found["memory"] += peak.bytes() / MIB
    result = dataclasses.replace(known, **found)  # type: ignore[arg-type]
    logger.info("%s", result)
    return result


def outline(influence: InfluenceFunction, tests: int) -> Estimate:
    """What is known of a run without any measurement."""
    with influence.problem.guard():  # sizes ask the model for its outputs
        return _outline(influence, tests)


def _outline(influence: InfluenceFunction, tests: int) -> Estimate:
    problem, config = influence.problem, influence.config
    solver, why = config.solver_in_use
    if solver == "auto":
        solver = f"auto, {foreseen(problem)}"
    folder = config.out_folder
    rows = config.calc_method == "all_grad_then_test"
    disk = score_bytes(problem, tests)
    disk += sum(row_bytes(influence, tests).values()) if rows else 0
    return Estimate(
        solver,
        why,
        problem.objective.P,
        tuple(problem.objective.names),
        problem.samples.n,
        tests,
        max(1, min(influence.group_size, tests)),
        problem.budget.total / MIB,
        disk / MIB,
        free_disk(folder) / MIB,
    )


# ---- measurement


def _measured(
    influence: InfluenceFunction,
    model: nn.Module,
    loader: DataLoader[Any],
    tests: Samples,
    indices: Sequence[int],
) -> dict[str, float]:
    """Memory, seconds and passes of a run on all samples, from those of two parts."""
    (whole,) = influence._members
    n, K = whole.samples.n, len(indices)
    G = max(1, min(whole.group_size, K))
    sizes = _pilot_sizes(n)
    few = (max(1, min(G, MOST_TESTS) // 4), min(G, MOST_TESTS))
    late = _warm_up(whole, model, loader, tests, indices[:1])
    found = []
    for size in sizes:
        pilot = Pilot(whole, model, loader, size)
        found.append(_run(pilot, tests, indices, few))
    set_ups, groups, stored = zip(*found, strict=True)
    writing = _writing(whole, K)
    grown = _grown(whole, pilot, few[1], G, K)
    power = 2 if _is_quadratic(whole) else 1
    ready = _at(set_ups, sizes, n, power)
    reads = _at(stored, sizes, n)
    group = [_at(pair, sizes, n) for pair in zip(*groups, strict=True)]
    full = _at(group, few, G)
    rest = _at(group, few, K % G) if K % G else Measured(0.0, 0)
    return {
        "memory": grown / MIB,
        "set_up": late + ready.seconds + reads.seconds,
        "solving": (K // G) * full.seconds + rest.seconds,
        "writing": writing,
        "passes": (
            ready.passed + reads.passed + (K // G) * full.passed + rest.passed
        )
        / n,
    }


def _run(
    pilot: Pilot, tests: Samples, indices: Sequence[int], few: Sequence[int]
) -> tuple[Measured, list[Measured], Measured]:
    """The set-up, groups of each of these sizes, and the gradients that the second mode stores."""
    K, config = len(indices), pilot.member.config
    set_up = pilot.set_up()
    first = pilot.group(tests, indices[: few[0]], K)
    groups = [pilot.group(tests, indices[:k], K) for k in few]
    # what the first group does for all of them belongs to the set-up
    ready = set_up.plus(first.beyond(groups[0]))
    stores = config.calc_method == "all_grad_then_test"
    return ready, groups, pilot.gradients() if stores else Measured(0.0, 0)


def _pilot_sizes(n: int) -> tuple[int, int]:
    large = min(n, max(LEAST, min(MOST, n // SHARE)))
    return max(1, large // 2), large


def _at(
    found: Sequence[Measured], sizes: tuple[int, int], size: int, power: int = 1
) -> Measured:
    """What was measured at two sizes, at another."""
    small, large = found
    powers = float(sizes[0]) ** power, float(sizes[1]) ** power
    at = float(size) ** power
    return Measured(
        extrapolated(small.seconds, large.seconds, powers, at),
        round(extrapolated(small.passed, large.passed, powers, at)),
    )


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
    return scores + vectors + max(dense, 0.0) + OF_RESULT * n + read


def _is_exact(whole: Member) -> bool:
    solver = whole.config.solver_in_use[0]
    if solver == "auto":
        solver = foreseen(whole.problem)
    return solver == "exact"


def _is_quadratic(whole: Member) -> bool:
    """Whether the set-up builds a matrix of all pairs of training samples."""
    return _is_exact(whole) and dense_form(whole.problem)[0] < whole.objective.P
