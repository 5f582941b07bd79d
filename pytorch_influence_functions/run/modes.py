"""The two modes: what is computed and stored, a group of test samples after the other."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.samples import Samples
from ..influence import InfluenceFunction
from ..solve.groups import Earlier
from . import shares
from .distributed import ALONE, Team
from .files import RunFiles
from .row_writer import Progress
from .set_up import RunSetUp
from .space import require_disk, row_bytes
from .store import (
    own_folder,
    read_chains,
    read_rows,
    residuals_of,
    save_gradients,
    save_solutions,
)


@dataclasses.dataclass(frozen=True)
class Task:
    """What a run is about.

    Attributes:
        influence: of the model.
        tests: the test set.
        indices: the test samples of the run.
        files: where it writes; None in a process that does not.
        done: how many of the test samples are done.
        team: the processes that do it.
    """

    influence: InfluenceFunction
    tests: Samples
    indices: list[int]
    files: RunFiles | None
    done: int = 0
    team: Team = ALONE

    @property
    def set_up(self) -> RunSetUp:
        """Who helps to set up the solver."""
        return RunSetUp(self.team, self.files)

    @property
    def left(self) -> list[int]:
        """Test samples that are not done."""
        return self.indices[self.done :]


Group = tuple[list[int], Tensor, Tensor | None, Tensor, float]
"""Test indices, scores [k, n], those of each chain [r, k, n] or None, relative residuals [k], seconds per sample."""


def _img_wise(task: Task, earlier: Earlier) -> Iterator[Group]:
    begin = time.perf_counter()
    influence, team = task.influence, task.team
    for group in shares.solutions(
        influence, task.tests, task.left, earlier, task.set_up
    ):
        scores, chains = shares.scores(influence, group, team)
        seconds = (time.perf_counter() - begin) / len(group.indices)
        yield group.indices, scores, chains, group.residual, seconds
        begin = time.perf_counter()


def _all_grad_then_test(task: Task, earlier: Earlier) -> Iterator[Group]:
    begin = time.perf_counter()
    influence, indices = task.influence, task.indices
    if task.files is None:
        _help_to_store(task)
        return
    grads_folder, solutions_folder, residuals = _store(task, task.files)
    (grads, _) = read_rows(grads_folder, "grad_z")
    (solutions, _) = read_chains(solutions_folder)
    for start in range(task.done, len(indices), influence.group_size):
        part = list(indices[start : start + influence.group_size])
        stored = torch.stack(solutions[start : start + len(part)]).transpose(
            0, 1
        )
        chains = _scores_of_rows(stored.flatten(0, 1), grads).view(
            len(stored), len(part), -1
        )
        seconds = (time.perf_counter() - begin) / len(part)
        yield (
            part,
            chains.mean(0),
            chains if len(chains) > 1 else None,
            residuals[start : start + len(part)],
            seconds,
        )
        begin = time.perf_counter()


def _store(task: Task, files: RunFiles) -> tuple[Path, Path, Tensor]:
    """Compute and store what is not yet -> the folders of grad_z and s_test, relative residuals [K]."""
    influence, parent = task.influence, task.influence.config.save_folder
    require_disk(_not_begun(task, files), parent)
    with own_folder(files, parent, "grad_z") as grads:
        _store_gradients(task, grads, Progress(files, "grad_z"))
    with own_folder(files, parent, "s_test") as solutions:
        progress = Progress(files, "s_test")
        residuals = _store_solutions(task, solutions, progress)
    influence.notes["stored"] = {
        "grad_z": str(grads),
        "s_test": str(solutions),
    }
    return grads, solutions, residuals


def _store_gradients(task: Task, folder: Path, progress: Progress) -> None:
    finished = (folder / "grad_z.json").exists()
    task.team.told(task.influence.samples.n if finished else progress.rows)
    rows_of = functools.partial(
        shares.gradient_rows, task.influence, team=task.team
    )
    if not finished:
        save_gradients(
            task.influence, folder, progress=progress, rows_of=rows_of
        )


def _store_solutions(task: Task, folder: Path, progress: Progress) -> Tensor:
    influence, tests = task.influence, task.tests
    finished = (folder / "s_test.json").exists()
    rows = len(task.indices) if finished else progress.rows
    task.team.told((rows, progress.report))
    if finished:
        influence.take_report(progress.report)
        return residuals_of(progress.facts, influence.objective.dtype)
    groups_of = functools.partial(
        shares.solutions,
        influence,
        tests,
        set_up=task.set_up,
    )
    return save_solutions(
        influence, folder, tests, task.indices, progress, groups_of
    )


def _help_to_store(task: Task) -> None:
    """The part of a process that writes nothing."""
    influence, team = task.influence, task.team
    done: int = team.told(0)
    left = range(done, influence.samples.n)
    for _ in shares.gradient_rows(influence, left, team):
        pass
    nothing: dict[str, Any] = {}
    rows, report = team.told((0, nothing))
    earlier = Earlier(len(task.indices), report)
    for _ in shares.solutions(
        influence, task.tests, task.indices[rows:], earlier, task.set_up
    ):
        pass


def _not_begun(task: Task, files: RunFiles) -> dict[str, float]:
    """Bytes of the arrays whose space is not yet taken."""
    need = row_bytes(task.influence, len(task.indices))
    for name in list(need):
        known = files.state(f"folder_of_{name}")
        if known and list(Path(known).glob(f"{name}.npy*")):
            del need[name]
    return need


METHODS = {"img_wise": _img_wise, "all_grad_then_test": _all_grad_then_test}


def _scores_of_rows(solutions: Tensor, grads: Any, block: int = 4096) -> Tensor:
    """Stored solutions [K, P] times stored gradients [n, P], over n -> [K, n]."""
    n = len(grads)
    parts = [
        solutions @ torch.from_numpy(np.asarray(grads[i : i + block])).T
        for i in range(0, n, block)
    ]
    return torch.cat(parts, dim=1) / n
