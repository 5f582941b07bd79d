"""What a run will take, before it is begun: its way, memory, disk, passes and time."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from ..config import Config
from ..data.samples import Samples
from ..influence import InfluenceFunction
from ..model.budget import MIB
from ..solve.auto import foreseen
from ..solve.make import choose_device
from .measuring import measured
from .pilot import Peak
from .select import select_test_samples
from .space import free_disk, row_bytes, score_bytes

logger = logging.getLogger(__name__)


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
        loading: seconds until the solver is set up, which each process takes; None where they were not measured.
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
    loading: float | None = None
    set_up: float | None = None
    solving: float | None = None
    writing: float | None = None
    passes: float | None = None

    @property
    def seconds(self) -> float | None:
        """Of one process."""
        return self.seconds_of(1)

    def seconds_of(self, processes: int) -> float | None:
        """Of so many processes with a core each: they share the set-up and the test samples."""
        stages = self.loading, self.set_up, self.solving, self.writing
        if None in stages:
            return None
        loading, set_up, solving, writing = map(float, stages)  # type: ignore[arg-type]
        rounds = math.ceil(self.tests / processes) / max(self.tests, 1)
        return loading + set_up / processes + solving * rounds + writing

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
        set_up = (self.loading or 0.0) + (self.set_up or 0.0)
        times = ", ".join(
            f"{_time(self.seconds_of(k) or 0.0)} with {k}" for k in (2, 4)
        )
        return "\n".join(
            [
                *lines,
                f"memory: {self.memory:.0f} MiB beside the model and the data",
                f"passes over the training set: {self.passes:.0f}",
                f"time: {_time(self.seconds)} ({_time(set_up)} of it set-up); {times} processes",
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
    found = measured(influence, model, train_loader, tests, indices, peak)
    found["loading"] += made
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
