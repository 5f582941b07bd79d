"""A run on few training samples, measured: what a run on all of them takes is read off two sizes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from ..data.reader import loader_options
from ..data.samples import Samples
from ..member import Member
from ..solve.auto import WAYS, foreseen
from ..solve.solution import Damping

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Measured(NamedTuple):
    """What some work took."""

    seconds: float
    passed: int
    """Training samples that were read."""
    drawn: int = 0
    """Those of them in random minibatches, as many on any set."""

    def plus(self, other: Measured) -> Measured:
        """Of both."""
        return Measured(
            self.seconds + other.seconds,
            self.passed + other.passed,
            self.drawn + other.drawn,
        )

    def least(self, other: Measured) -> Measured:
        """The same work, done twice."""
        return self if self.seconds < other.seconds else other

    def times(self, factor: float) -> Measured:
        """So many times as much."""
        return Measured(
            self.seconds * factor,
            round(self.passed * factor),
            round(self.drawn * factor),
        )


NOTHING = Measured(0.0, 0)


class Pilot:
    """The solver of a run, on the first `size` of its training samples.

    It goes the way that the whole run goes, with the sizes that this one has: where a way is chosen by its work, that
    is the work on all of them.

    Args:
        whole: the model and all training samples.
        model: the model.
        loader: over the training set.
        size: how many of its samples.
    """

    def __init__(
        self,
        whole: Member,
        model: nn.Module,
        loader: DataLoader[Any],
        size: int,
    ) -> None:
        self.size = size
        part = first_samples(loader, size, whole.samples.batch_size)
        self.member = Member(model, part, whole.config)
        self.member.go_on(
            whole.problem.budget.total, "", pilot_of=whole.samples.n
        )
        self._way = WAYS[foreseen(whole.problem)]

    def set_up(self) -> Measured:
        """Prepare the solver."""
        member = self.member
        with self._measured() as result, member.problem.guard():
            member.begin()
            if member.config.solver_in_use[0] == "auto":
                fixed = member.config.fixed_damping
                damping = None if fixed is None else Damping(fixed, {})
                member.solver.take(self._way(member.problem, damping))
            member.solver.prepared()
            member.points.prepare()
        return result()

    def group(
        self, tests: Samples, part: Sequence[int], total: int
    ) -> list[Measured]:
        """Solve for these test samples, of so many in all; measure the residual; score."""
        member = self.member
        with member.problem.guard():
            with self._measured() as solving:
                v, solution = member.solved(tests, part, total)
            with self._measured() as measuring:
                member.measured(v, solution)
        with self._measured() as scoring:
            self._score(solution.vectors, solution.chains)
        return [solving(), measuring(), scoring()]

    def _score(
        self,
        vectors: Tensor,
        chains: Tensor | None,
    ) -> None:
        rows = vectors if chains is None else chains.flatten(0, 1)
        if self.member.config.calc_method == "img_wise":
            self.member.scores_of(rows)
            return
        stored = rows.new_zeros(self.size, rows.shape[1]).cpu()
        rows.cpu() @ stored.T

    def gradients(self) -> Measured:
        """The gradients that `calc_all_grad_then_test` stores."""
        with self._measured() as result:
            for _, block in self.member.gradient_rows(range(self.size)):
                block.cpu().numpy().tobytes()
        return result()

    @contextlib.contextmanager
    def _measured(self) -> Iterator[Callable[[], Measured]]:
        samples, begin = self.member.samples, time.perf_counter()
        passed, drawn = samples.passed, samples.drawn
        found: list[Measured] = []
        yield lambda: found[0]
        taken = time.perf_counter() - begin
        found.append(
            Measured(taken, samples.passed - passed, samples.drawn - drawn)
        )


def first_samples(
    loader: DataLoader[Any], size: int, batch_size: int
) -> DataLoader[Any]:
    """The loader over its first `size` samples."""
    dataset: Any = loader.dataset
    few: Any = Subset(dataset, range(size))
    if type(dataset) is TensorDataset:
        few = TensorDataset(*(t[:size] for t in dataset.tensors))
    return DataLoader(
        few,
        batch_size=min(batch_size, size),
        collate_fn=loader.collate_fn,
        **loader_options(loader),
    )


def extrapolated(
    small: float,
    large: float,
    sizes: Sequence[float],
    size: float,
    fixed: float = 1.0,
) -> float:
    """What was measured at two sizes, at another: along a line of which that much at most, at the larger, is fixed.

    It neither falls nor starts below 0: a difference of two times is mostly noise where they are short.
    """
    whole = large / sizes[1]
    slope = whole
    if sizes[1] > sizes[0]:
        slope = (large - small) / (sizes[1] - sizes[0])
    slope = min(max(slope, (1 - fixed) * whole), whole)
    return max(large + slope * (size - sizes[1]), 0.0)


class Peak:
    """The most memory that is held from its making on, above what was held then, in bytes; 0 where no one counts it."""

    def __init__(
        self,
        device: torch.device,
    ) -> None:
        self._cuda = device if device.type == "cuda" else None
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        with contextlib.suppress(OSError):
            CLEAR.write_text("5", encoding="ascii")
        self._before = self._held("VmRSS", now=True)

    def bytes(self) -> float:
        """Until now."""
        return max(self._held("VmHWM", now=False) - self._before, 0.0)

    def _held(
        self,
        key: str,
        now: bool,
    ) -> float:
        if self._cuda is not None:
            held = (
                torch.cuda.memory_allocated
                if now
                else torch.cuda.max_memory_allocated
            )
            return float(held(self._cuda))
        try:
            lines = STATUS.read_text(encoding="ascii").splitlines()
        except OSError:
            return 0.0
        found = [line for line in lines if line.startswith(f"{key}:")]
        return 1024.0 * int(found[0].split()[1]) if found else 0.0
