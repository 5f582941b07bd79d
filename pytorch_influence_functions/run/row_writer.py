"""Writing rows to an array on disk: whole or not there, and gone on with where a run is started again."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from ..utils import save_json
from .files import RunFiles

SAMPLED_PLACES, SAMPLED_BYTES = 64, 4096
"""What a fingerprint reads: 256 KiB whatever the file's size, so that opening an array stays a matter of milliseconds.
Gradients of another model differ everywhere, so few places tell two runs apart; they do not find a changed bit."""


class RowWriter:
    """Writes an array [rows, ..., P] block by block; it takes its name only when the last row is there.

    Until then the rows are in a file of the writer's own, which goes away where an exception ends the writing; where
    the folder is a run's own (`progress`), it stays, with a note of how many rows are done, and is gone on with.

    Args:
        folder: where `{name}.npy` and `{name}.json` go.
        name: `"grad_z"` or `"s_test"`.
        shape: of the array.
        dtype: of the tensors that will come.
        manifest: what else to note beside it (names and shapes of the parameters).
        progress: what an earlier start of the run has done.

    Raises:
        OSError: the disk has not the space.
        ValueError: the rows of an earlier start are damaged, or of another shape.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        manifest: dict[str, Any],
        progress: Progress | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.npy"
        self.manifest = manifest
        self.progress = progress
        self.partial = (
            _own_file(folder, name)
            if progress is None
            else folder / f"{name}.npy.partial"
        )
        wanted = tuple(shape), np.dtype(numpy_dtype(dtype))
        if progress is not None and progress.rows:
            if self.path.exists() and not self.partial.exists():
                # stopped before its manifest
                os.replace(self.path, self.partial)
            require_array(self.partial, *wanted)
            self.array: Any = open_memmap(self.partial, mode="r+")
            return
        self.array = open_memmap(
            self.partial, mode="w+", shape=wanted[0], dtype=wanted[1]
        )
        try:
            reserve(self.partial, ADVICE)
        except OSError:
            self.array = None
            self.partial.unlink(missing_ok=True)
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
        if self.progress is None or not self.progress.rows:
            self.partial.unlink(missing_ok=True)

    def note(
        self,
        rows: int,
        fact: dict[str, Any] | None = None,
        report: dict[str, Any] | None = None,
    ) -> None:
        """The first `rows` rows are done: they are on disk before this is said."""
        if self.progress is not None:
            self.array.flush()
            self.progress.note(rows, fact, report)

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
        found = {**self.manifest, **array_identity(self.partial), **more}
        manifest.unlink(missing_ok=True)
        os.replace(self.partial, self.path)
        save_json(found, manifest, overwrite_if_exists=True)
        return self.path


class Progress:
    """How many rows of an array are done, and facts about them, kept where another start of the run finds them.

    Attributes:
        rows: how many.
        facts: of each group of rows.
        report: what was done until then.
    """

    def __init__(self, files: RunFiles, name: str) -> None:
        self._files, self._name = files, f"rows_of_{name}"
        state = files.state(self._name) or {}
        self.rows: int = state.get("rows", 0)
        self.facts: list[dict[str, Any]] = state.get("facts", [])
        self.report: dict[str, Any] = state.get("report", {})

    def note(
        self,
        rows: int,
        fact: dict[str, Any] | None = None,
        report: dict[str, Any] | None = None,
    ) -> None:
        """So many are done now; a fact about those that came last."""
        self.rows = rows
        self.facts += [fact] if fact else []
        self.report = report or {}
        state = {"rows": rows, "facts": self.facts, "report": self.report}
        self._files.write_state(self._name, state)


def require_array(path: Path, shape: tuple[int, ...], dtype: Any) -> Any:
    """The array of an earlier start, mapped to be read.

    Raises:
        ValueError: it is not there, damaged or another one.
    """
    wanted = f"an array of shape {list(shape)} and type {dtype}"
    advice = (
        "remove it, or set config['resume'] = False to start anew beside it"
    )
    try:
        # a map that can be written to would fill up a short file
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path}: expected {wanted}, which the run had begun, but it cannot be read ({error}); {advice}"
        ) from error
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"{path}: expected {wanted}, which the run had begun, found shape {list(array.shape)} and type "
            f"{array.dtype}; {advice}"
        )
    return array


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


ADVICE = "give a folder on a larger one, fewer config['parameters'], or calc_img_wise, which stores no gradients"


def reserve(path: Path, advice: str) -> None:
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
            f"{shutil.disk_usage(path.parent).free / 2**20:.0f} MiB ({error.strerror}); {advice}",
        ) from error


def array_identity(path: Path) -> dict[str, Any]:
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


def numpy_dtype(dtype: torch.dtype) -> Any:
    """In which numbers of this type are stored; NumPy has no bfloat16."""
    return np.float64 if dtype == torch.float64 else np.float32
