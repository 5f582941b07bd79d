"""The two modes: what is computed and stored, a group of test samples after the other."""

from __future__ import annotations

import dataclasses
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
from .estimate import require_disk, row_bytes
from .files import RunFiles
from .row_writer import Progress
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
        files: where it writes.
        done: how many of the test samples are done.
    """

    influence: InfluenceFunction
    tests: Samples
    indices: list[int]
    files: RunFiles
    done: int = 0

    @property
    def left(self) -> list[int]:
        """Test samples that are not done."""
        return self.indices[self.done :]


Group = tuple[list[int], Tensor, Tensor | None, Tensor, float]
"""Test indices, scores [k, n], those of each chain [r, k, n] or None, relative residuals [k], seconds per sample."""


def _img_wise(task: Task, earlier: Earlier) -> Iterator[Group]:
    begin = time.perf_counter()
    for group, scores, chains in task.influence.groups(
        task.tests, task.left, earlier
    ):
        seconds = (time.perf_counter() - begin) / len(group.indices)
        yield group.indices, scores, chains, group.residual, seconds
        begin = time.perf_counter()


def _all_grad_then_test(task: Task, earlier: Earlier) -> Iterator[Group]:
    begin = time.perf_counter()
    influence, indices = task.influence, task.indices
    grads_folder, solutions_folder, residuals = _store(task)
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


def _store(task: Task) -> tuple[Path, Path, Tensor]:
    """Compute and store what is not yet -> the folders of grad_z and s_test, relative residuals [K]."""
    influence, files = task.influence, task.files
    parent = influence.config.save_folder
    require_disk(_not_begun(task, parent), parent)
    with own_folder(files, parent, "grad_z") as grads:
        if not (grads / "grad_z.json").exists():
            save_gradients(influence, grads, progress=Progress(files, "grad_z"))
    with own_folder(files, parent, "s_test") as solutions:
        progress = Progress(files, "s_test")
        if not (solutions / "s_test.json").exists():
            residuals = save_solutions(
                influence, solutions, task.tests, task.indices, progress
            )
        else:
            residuals = residuals_of(progress.facts, influence.objective.dtype)
            influence.take_report(progress.report)
    influence.notes["stored"] = {
        "grad_z": str(grads),
        "s_test": str(solutions),
    }
    return grads, solutions, residuals


def _not_begun(task: Task, parent: Path) -> dict[str, float]:
    """Bytes of the arrays whose space is not yet taken."""
    need = row_bytes(task.influence, len(task.indices))
    for name in list(need):
        known = task.files.state(f"folder_of_{name}")
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
