"""Rows of gradients on disk: one array file and a small manifest, whole or not there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from ..data.samples import Samples
from ..influence import InfluenceFunction
from ..solve.problem import MOST_CHAINS
from ..utils import save_json

SAMPLED_PLACES, SAMPLED_BYTES = 64, 4096
"""What a fingerprint reads: 256 KiB whatever the file's size, so that opening an array stays a matter of milliseconds.
Gradients of another model differ everywhere, so few places tell two runs apart; they do not find a changed bit."""


class RowWriter:
    """Writes an array [rows, ..., P] block by block; it takes its name only when the last row is there.

    Until then the rows are in a file of the writer's own, which goes away where an exception ends the writing.

    Args:
        folder: where `{name}.npy` and `{name}.json` go.
        name: `"grad_z"` or `"s_test"`.
        shape: of the array.
        dtype: of the tensors that will come.
        manifest: what else to note beside it (names and shapes of the parameters).
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        manifest: dict[str, Any],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.npy"
        self.partial = _own_file(folder, name)
        self.manifest = manifest
        self.array: Any = open_memmap(
            self.partial,
            mode="w+",
            dtype=_numpy_dtype(dtype),
            shape=tuple(shape),
        )
        try:
            _reserve(self.partial)
        except OSError:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.array = None
        self.partial.unlink(missing_ok=True)

    def write(self, rows: Sequence[int], block: Tensor) -> None:
        """Put a block [len(rows), ...] at these rows; of an array [rows, r, P] a block may have fewer than r.

        Half precision is stored in single, as NumPy has no bfloat16.
        """
        values = block.detach().cpu()
        if values.dtype != torch.float64:
            values = values.float()
        if values.ndim == 2:
            self.array[list(rows)] = values.numpy()
        else:
            self.array[list(rows), : values.shape[1]] = values.numpy()

    def close(self, **more: Any) -> Path:
        """Give the finished file its name, with `more` in the manifest.

        The manifest of an older file goes first and the new one comes last, so that a kill in between leaves an array
        without a manifest. Where two writers give the same name at once, the fingerprint tells whose array it is.
        """
        self.array.flush()
        self.array = None
        manifest = self.path.with_suffix(".json")
        found = {**self.manifest, **_identity(self.partial), **more}
        manifest.unlink(missing_ok=True)
        os.replace(self.partial, self.path)
        save_json(found, manifest, overwrite_if_exists=True)
        return self.path


def _own_file(folder: Path, name: str) -> Path:
    """An empty file that no other writer has, readable as any other file is."""
    handle, path = tempfile.mkstemp(
        dir=folder, prefix=f"{name}.npy.", suffix=".partial"
    )
    os.close(handle)
    Path(
        path
    ).unlink()  # what NumPy creates in its place has the permissions that the user's umask gives
    return Path(path)


def _reserve(path: Path) -> None:
    """Take a file's space on the disk before anything is computed.

    Writing to the map of a file with holes ends the interpreter with a bus error where the disk is full.

    Raises:
        OSError: the disk has less.
    """
    size = path.stat().st_size
    try:
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        elif shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return  # a file system that cannot reserve
        raise OSError(
            error.errno,
            f"{path.parent}: the array takes {size / 2**20:.0f} MiB, and the disk has "
            f"{shutil.disk_usage(path.parent).free / 2**20:.0f} MiB ({error.strerror}); give a folder on a larger one, "
            "fewer config['parameters'], or calc_img_wise, which stores no gradients",
        ) from error


def _identity(path: Path) -> dict[str, Any]:
    """What says that an array file is the one a manifest is of."""
    array = np.load(path, mmap_mode="r")
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "bytes": path.stat().st_size,
        "fingerprint": _fingerprint(path),
    }


def _fingerprint(path: Path) -> str:
    """CRC-32 of blocks that lie evenly over a file, the first and the last among them."""
    last = max(path.stat().st_size - SAMPLED_BYTES, 0)
    places = np.linspace(0, last, SAMPLED_PLACES, dtype=np.int64)
    found = 0
    with path.open("rb") as file:
        for place in places.tolist():
            file.seek(place)
            found = zlib.crc32(file.read(SAMPLED_BYTES), found)
    return f"{found:08x}"


@contextlib.contextmanager
def own_folder(parent: Path, name: str) -> Iterator[Path]:
    """`unused_folder` that goes away again where an exception leaves it empty."""
    folder = unused_folder(parent, name)
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
        found = _identity(path)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{path}: expected a whole NumPy array, but it cannot be read ({error}); {again}"
        ) from error
    for key, value in found.items():
        if (
            manifest.get(key, value) != value
        ):  # version 1.0.0 noted the shape alone
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


def _numpy_dtype(dtype: torch.dtype) -> Any:
    return np.float64 if dtype == torch.float64 else np.float32


def save_gradients(
    influence: InfluenceFunction, folder: Path, start: int = 0
) -> Path:
    """Write the loss gradient of every training sample from `start` on to `folder` [n - start, P]."""
    indices = range(start, influence.samples.n)
    shape = (len(indices), influence.objective.P)
    with RowWriter(
        folder, "grad_z", shape, influence.objective.dtype, _shapes(influence)
    ) as writer:
        for rows, block in influence.gradient_rows(indices, text="grad_z"):
            writer.write([i - start for i in rows], block)
        return writer.close()


def save_solutions(
    influence: InfluenceFunction,
    folder: Path,
    tests: Samples,
    indices: Sequence[int],
) -> Tensor:
    """Write s_test of these test samples to `folder` [K, r, P] -> relative residuals [K].

    With r = "auto" their number is found in the first group; `chains` in the manifest has it for each test sample, and
    rows behind it are zero.
    """
    objective = influence.objective
    most = (
        MOST_CHAINS if influence.config.r == "auto" else int(influence.config.r)
    )
    shape = (len(indices), most, objective.P)
    manifest = {**_shapes(influence), "indices": list(indices)}
    chains: list[int] = []
    residuals = []
    with RowWriter(
        folder, "s_test", shape, objective.dtype, manifest
    ) as writer:
        for group in influence.solutions(tests, indices):
            own = (
                group.vectors.unsqueeze(1)
                if group.chains is None
                else group.chains.transpose(0, 1)
            )
            writer.write(range(len(chains), len(chains) + len(own)), own)
            chains += [own.shape[1]] * len(own)
            residuals.append(group.residual)
        writer.close(chains=chains)
    return torch.cat(residuals)


def _shapes(influence: InfluenceFunction) -> dict[str, Any]:
    objective = influence.objective
    return {
        "names": objective.names,
        "shapes": [list(s) for s in objective.shapes],
        "train_dataset_size": influence.samples.n,
    }
