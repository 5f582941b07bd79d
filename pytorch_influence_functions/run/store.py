"""Rows of gradients on disk: one array file and a small manifest, whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.nn import functional

from ..data.samples import Samples
from ..influence import InfluenceFunction
from ..solve.lissa import MOST_CHAINS
from ..utils import save_json


class RowWriter:
    """Writes an array [rows, ..., P] block by block; it takes its name only when the last row is there.

    Args:
        folder: where `{name}.npy` and `{name}.json` go.
        name: `"grad_z"` or `"s_test"`.
        shape: of the array.
        dtype: of the tensors that will come.
        manifest: what else to note beside it (names and shapes of the parameters).
    """

    def __init__(
        self, folder: Path, name: str, shape: Sequence[int], dtype: torch.dtype, manifest: dict[str, Any]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.partial = folder / f"{name}.npy", folder / f"{name}.npy.partial"
        self.manifest = {"shape": list(shape), **manifest}
        self.array = open_memmap(self.partial, mode="w+", dtype=_numpy_dtype(dtype), shape=tuple(shape))

    def write(self, rows: Sequence[int], block: Tensor) -> None:
        """Put a block [len(rows), ...] at these rows."""
        self.array[list(rows)] = (
            block.detach().cpu().to(torch.float64 if block.dtype == torch.float64 else torch.float32).numpy()
        )

    def close(self, **more: Any) -> Path:
        """Give the finished file its name, with `more` in the manifest.

        The manifest of an older file goes first and the new one comes last: what is there at any moment fits together.
        """
        self.array.flush()
        del self.array
        manifest = self.path.with_suffix(".json")
        manifest.unlink(missing_ok=True)
        os.replace(self.partial, self.path)
        save_json({**self.manifest, **more}, manifest, overwrite_if_exists=True)
        return self.path


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
    """
    path = Path(folder) / f"{name}.npy"
    if not path.exists() or not path.with_suffix(".json").exists():
        partial = path.with_name(path.name + ".partial").exists()
        why = "only an unfinished one is there" if partial else "nothing is there"
        raise FileNotFoundError(
            f"expected {path} and its manifest, but {why}; write them with calc_{name} or calc_all_grad_then_test"
        )
    manifest = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    array = np.load(path, mmap_mode="c")
    if list(array.shape) != manifest["shape"]:
        raise ValueError(
            f"{path}: its manifest says {manifest['shape']}, the array is {list(array.shape)}; they are of two runs: "
            f"write them again with calc_{name} or calc_all_grad_then_test"
        )
    return array, manifest


def read_chains(folder: Path) -> tuple[list[Tensor], dict[str, Any]]:
    """The stored s_test of each test sample [r, P], mapped from disk, and the manifest."""
    rows, manifest = read_rows(folder, "s_test")
    counts = manifest.get("chains") or [rows.shape[1]] * len(rows)
    return [torch.from_numpy(np.asarray(row))[:count] for row, count in zip(rows, counts, strict=True)], manifest


def as_parameters(row: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """A row [P] as tensors of the parameters' shapes, without a copy."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    return [part.view(*shape) for part, shape in zip(row.split(sizes), shapes, strict=True)]


def _numpy_dtype(dtype: torch.dtype) -> Any:
    return np.float64 if dtype == torch.float64 else np.float32


def save_gradients(influence: InfluenceFunction, folder: Path, start: int = 0) -> Path:
    """Write the loss gradient of every training sample from `start` on to `folder` [n - start, P]."""
    indices = range(start, influence.samples.n)
    writer = RowWriter(
        folder, "grad_z", (len(indices), influence.objective.P), influence.objective.dtype, _shapes(influence)
    )
    for rows, block in influence.gradient_rows(indices, text="grad_z"):
        writer.write([i - start for i in rows], block)
    return writer.close()


def save_solutions(influence: InfluenceFunction, folder: Path, tests: Samples, indices: Sequence[int]) -> Tensor:
    """Write s_test of these test samples to `folder` [K, r, P] -> relative residuals [K].

    With r = "auto" each group has its own number of recursions; `chains` in the manifest has it for each test sample,
    and rows behind it are zero.
    """
    objective = influence.objective
    most = MOST_CHAINS if influence.config.r == "auto" else int(influence.config.r)
    shape = (len(indices), most, objective.P)
    writer = RowWriter(folder, "s_test", shape, objective.dtype, {**_shapes(influence), "indices": list(indices)})
    chains: list[int] = []
    residuals = []
    for part, solution in influence.solutions(tests, indices):
        own = solution.vectors.unsqueeze(1) if solution.chains is None else solution.chains.transpose(0, 1)
        places = range(len(chains), len(chains) + len(part))
        writer.write(places, functional.pad(own, (0, 0, 0, most - own.shape[1])))
        chains += [own.shape[1]] * len(part)
        residuals.append(solution.relative_residual.cpu())
    writer.close(chains=chains)
    return torch.cat(residuals)


def _shapes(influence: InfluenceFunction) -> dict[str, Any]:
    objective = influence.objective
    return {
        "names": objective.names,
        "shapes": [list(s) for s in objective.shapes],
        "train_dataset_size": influence.samples.n,
    }
