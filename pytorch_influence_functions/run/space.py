"""What a run takes of a disk, told before anything is computed."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..config import Config
from ..influence import InfluenceFunction
from ..model.budget import MIB
from ..solve.problem import MOST_CHAINS, Problem
from .scores import DIGITS, fits_json

OF_INDEX = 6
"""Bytes of an index in JSON, about."""


def chains_of(config: Config) -> int:
    """Recursions of a solver that averages some, at most."""
    if config.solver_in_use[0] != "lissa":
        return 1
    return MOST_CHAINS if config.r == "auto" else int(config.r)


def score_bytes(problem: Problem, tests: int) -> float:
    """Of the arrays of scores, and of the result file where it holds them."""
    config, n = problem.config, problem.samples.n
    item = max(problem.objective.theta.element_size(), 4)
    numbers = (2 if chains_of(config) > 1 else 1) * tests * n
    in_json = DIGITS[item] if fits_json(config.json, numbers, item) else 0
    orders = 2.0 * min(config.top_k, n) * tests * OF_INDEX
    return numbers * (item + in_json) + orders


def row_bytes(influence: InfluenceFunction, tests: int) -> dict[str, float]:
    """Of the arrays that `calc_all_grad_then_test` stores."""
    objective = influence.objective
    row = objective.P * max(objective.theta.element_size(), 4)
    r = influence.config.r
    chains = MOST_CHAINS if r == "auto" else int(r)
    return {
        "grad_z": float(influence.samples.n * row),
        "s_test": float(tests * chains * row),
    }


def free_disk(folder: Path) -> float:
    """Bytes that are free where a folder is, or will be."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return float(shutil.disk_usage(there).free)


def require_disk(need: Mapping[str, float], folder: Path) -> None:
    """Raise `OSError` where a disk has not the space for these arrays, before anything of them is computed."""
    free = free_disk(folder)
    if sum(need.values()) <= free:
        return
    each = ", ".join(
        f"{size / MIB:.0f} MiB for {k}" for k, size in need.items()
    )
    raise OSError(
        errno.ENOSPC,
        f"calc_all_grad_then_test stores {sum(need.values()) / MIB:.0f} MiB ({each}), but the disk of {folder} has "
        f"{free / MIB:.0f} MiB; give config['save_pth'] on a larger one, fewer config['parameters'], or take "
        "calc_img_wise, which stores no gradients",
    )
