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

    def close(self) -> Path:
        """Give the finished file its name."""
        self.array.flush()
        del self.array
        os.replace(self.partial, self.path)
        save_json(self.manifest, self.path.with_suffix(".json"), overwrite_if_exists=True)
        return self.path


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
    return np.load(path, mmap_mode="c"), manifest


def as_parameters(row: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """A row [P] as tensors of the parameters' shapes, without a copy."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    return [part.view(*shape) for part, shape in zip(row.split(sizes), shapes, strict=True)]


def _numpy_dtype(dtype: torch.dtype) -> Any:
    return np.float64 if dtype == torch.float64 else np.float32
