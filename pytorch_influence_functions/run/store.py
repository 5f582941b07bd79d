"""Rows of gradients on disk: one array file and a small manifest, whole or not there."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.samples import Samples
from ..influence import InfluenceFunction
from ..solve.groups import Earlier, Group
from ..solve.problem import MOST_CHAINS
from .files import RunFiles
from .row_writer import Progress, RowWriter, array_identity

RowsOf = Callable[[Sequence[int]], Iterator[tuple[Sequence[int], Tensor]]]
GroupsOf = Callable[[Sequence[int], Earlier], Iterator[Group]]


@contextlib.contextmanager
def own_folder(files: RunFiles, parent: Path, name: str) -> Iterator[Path]:
    """The run's folder for an array, the one it has had or an unused one; an exception that leaves it empty ends it."""
    state = f"folder_of_{name}"
    known = files.state(state)
    folder = Path(known) if known else unused_folder(parent, name)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_state(state, str(folder))
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def unused_folder(parent: Path, name: str) -> Path:
    """Create `parent/name`, or the first of `name_1`, `name_2`, ... that nobody has."""
    parent.mkdir(parents=True, exist_ok=True)
    count = -1
    while True:
        count += 1
        folder = parent / (f"{name}_{count}" if count else name)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def read_rows(folder: Path, name: str) -> tuple[Any, dict[str, Any]]:
    """The array of `{name}.npy`, mapped from disk, and its manifest.

    Raises:
        FileNotFoundError: no finished array is there.
        ValueError: the array is not the one that the manifest is of.
    """
    path = Path(folder).expanduser() / f"{name}.npy"
    if not path.exists() or not path.with_suffix(".json").exists():
        partial = any(path.parent.glob(f"{path.name}*.partial"))
        why = (
            "only an unfinished one is there" if partial else "nothing is there"
        )
        raise FileNotFoundError(
            f"expected {path} and its manifest, but {why}; write them with calc_{name} or calc_all_grad_then_test"
        )
    manifest = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    _require_same(path, manifest, name)
    return np.load(path, mmap_mode="c"), manifest


def _require_same(path: Path, manifest: dict[str, Any], name: str) -> None:
    again = f"write them again with calc_{name} or calc_all_grad_then_test"
    try:
        found = array_identity(path)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{path}: expected a whole NumPy array, but it cannot be read ({error}); {again}"
        ) from error
    for key, value in found.items():
        # version 1.0.0 noted the shape alone
        if manifest.get(key, value) != value:
            raise ValueError(
                f"{path}: its manifest says {key} {manifest[key]}, the array has {value}; they are of two runs: {again}"
            )


def read_chains(folder: Path) -> tuple[list[Tensor], dict[str, Any]]:
    """The stored s_test of each test sample [r, P], mapped from disk, and the manifest."""
    rows, manifest = read_rows(folder, "s_test")
    counts = manifest.get("chains") or [rows.shape[1]] * len(rows)
    return [
        torch.from_numpy(np.asarray(row))[:count]
        for row, count in zip(rows, counts, strict=True)
    ], manifest


def as_parameters(row: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """A row [P] as tensors of the parameters' shapes, without a copy."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    return [
        part.view(*shape)
        for part, shape in zip(row.split(sizes), shapes, strict=True)
    ]


def save_gradients(
    influence: InfluenceFunction,
    folder: Path,
    start: int = 0,
    progress: Progress | None = None,
    rows_of: RowsOf | None = None,
) -> Path:
    """Write the loss gradient of every training sample from `start` on to `folder` [n - start, P].

    `rows_of` gives them, a block at a time: `influence.gradient_rows` where it is None.
    """
    rows_of = rows_of or functools.partial(
        influence.gradient_rows, text="grad_z"
    )
    indices = range(start, influence.samples.n)
    shape = (len(indices), influence.objective.P)
    with RowWriter(
        folder,
        "grad_z",
        shape,
        influence.objective.dtype,
        _shapes(influence),
        progress,
    ) as writer:
        left = indices[progress.rows :] if progress else indices
        for rows, block in rows_of(left):
            writer.write([i - start for i in rows], block)
            writer.note(rows[-1] + 1 - start)
        return writer.close()


def save_solutions(
    influence: InfluenceFunction,
    folder: Path,
    tests: Samples,
    indices: Sequence[int],
    progress: Progress | None = None,
    groups_of: GroupsOf | None = None,
) -> Tensor:
    """Write s_test of these test samples to `folder` [K, r, P] -> relative residuals [K].

    `groups_of` solves for them, a group at a time: `influence.solutions` where it is None.

    With r = "auto" their number is found in the first group; `chains` in the manifest has it for each test sample, and
    rows behind it are zero.
    """
    groups_of = groups_of or functools.partial(influence.solutions, tests)
    objective = influence.objective
    most = (
        MOST_CHAINS if influence.config.r == "auto" else int(influence.config.r)
    )
    shape = (len(indices), most, objective.P)
    manifest = {**_shapes(influence), "indices": list(indices)}
    facts = list(progress.facts) if progress else []
    done = progress.rows if progress else 0
    with RowWriter(
        folder, "s_test", shape, objective.dtype, manifest, progress
    ) as writer:
        earlier = Earlier(len(indices), progress.report if progress else {})
        for group in groups_of(indices[done:], earlier):
            own = (
                group.vectors.unsqueeze(1)
                if group.chains is None
                else group.chains.transpose(0, 1)
            )
            writer.write(range(done, done + len(own)), own)
            done += len(own)
            facts.append(
                {"chains": own.shape[1], "residuals": group.residual.tolist()}
            )
            writer.note(done, facts[-1], influence.report)
        counts = [f["chains"] for f in facts for _ in f["residuals"]]
        writer.close(chains=counts)
    return residuals_of(facts, objective.dtype)


def residuals_of(facts: Sequence[dict[str, Any]], dtype: torch.dtype) -> Tensor:
    """Relative residuals [K] of the groups."""
    every = [residual for fact in facts for residual in fact["residuals"]]
    return torch.tensor(every, dtype=dtype)


def _shapes(influence: InfluenceFunction) -> dict[str, Any]:
    objective = influence.objective
    return {
        "names": objective.names,
        "shapes": [list(s) for s in objective.shapes],
        "train_dataset_size": influence.samples.n,
    }
