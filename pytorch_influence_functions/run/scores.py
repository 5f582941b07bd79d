"""The scores of a run on disk: an array [K, n] of each kind, whose rows are written as they come."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..show.lazy import ROWS, Entry, Rows
from ..solve.repeats import Row
from ..utils import as_json
from .files import RunFiles
from .row_writer import require_array, reserve

MOST_JSON = 200e6
"""Bytes of a result file up to which `config["json"]` = "auto" writes the scores into it."""
DIGITS = {4: 17, 8: 25}
"""Bytes of a number of so many bytes in JSON, with its sign, exponent and comma."""


class ScoreArray:
    """An array file whose rows are written one at a time, through the file: a map would count as resident memory, and
    a disk that fills under it ends the process.

    Args:
        path: of the file; one that is there is gone on with.
        shape: [K, n].
        dtype: of the numbers.

    Raises:
        OSError: the disk has not the space.
        ValueError: the file that is there is damaged, or of another shape.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int],
        dtype: Any,
    ) -> None:
        self.path, self.shape = path, shape
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        if path.exists():
            known = require_array(path, shape, self.dtype)
            self._offset = int(known.offset)
        else:
            self._offset = self._begin()
        self._file = path.open("r+b")

    def _begin(self) -> int:
        """Write the header and take the space; a kill before its end leaves no file of this name."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": self.shape,
            },
        )
        new = self.path.with_suffix(".new")
        with new.open("wb") as file:
            file.write(header.getvalue())
            file.truncate(header.tell() + self._place(self.shape[0]))
        reserve(
            new, "give a folder on a larger one, or take fewer test samples"
        )
        os.replace(new, self.path)
        return header.tell()

    def _place(self, k: int) -> int:
        return k * self.shape[1] * self.dtype.itemsize

    def write(
        self,
        k: int,
        row: Row,
    ) -> None:
        """Put row k."""
        self._file.seek(self._offset + self._place(k))
        self._file.write(np.ascontiguousarray(row, self.dtype).data)

    def read(
        self,
        start: int,
        stop: int,
    ) -> Row:
        """Rows [stop - start, n]."""
        self._file.seek(self._offset + self._place(start))
        rows = np.fromfile(
            self._file, self.dtype, (stop - start) * self.shape[1]
        )
        return rows.reshape(stop - start, self.shape[1])

    def flush(self) -> None:
        """All that was written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class ScoreRows:
    """The arrays of a run: `influence`, and `stderr` where there are chains.

    Args:
        files: of the run.
        shape: [K, n].
        dtype: of the scores.
        known: names of those that an earlier start wrote rows of; others are begun anew.
    """

    def __init__(
        self,
        files: RunFiles,
        shape: tuple[int, int],
        dtype: Any,
        known: Sequence[str],
    ) -> None:
        self._files, self._shape, self._dtype = files, shape, np.dtype(dtype)
        for name in ROWS:
            if name in known:
                require_array(files.array(name), shape, self._dtype)
            else:
                files.array(name).unlink(missing_ok=True)
        names = known or ["influence"]
        self._arrays = {name: self._opened(name) for name in names}

    def _opened(self, name: str) -> ScoreArray:
        return ScoreArray(self._files.array(name), self._shape, self._dtype)

    def put(
        self,
        k: int,
        rows: Mapping[str, Row],
    ) -> dict[str, Any]:
        """Write the rows of test sample k -> what names them in its entry."""
        for name, row in rows.items():
            if name not in self._arrays:
                self._arrays[name] = self._opened(name)
            self._arrays[name].write(k, row)
        return self.named(k)

    def named(self, k: int) -> dict[str, Any]:
        """What names the rows of test sample k in its entry."""
        return {
            name: {"array": self._files.final_array(name).name, "row": k}
            for name in self._arrays
        }

    def read(
        self,
        start: int,
        stop: int,
    ) -> Row:
        """Scores of these test samples [stop - start, n]."""
        return self._arrays["influence"].read(start, stop)

    def flush(self) -> None:
        """All that was written is on the disk."""
        for array in self._arrays.values():
            array.flush()

    def close(self) -> None:
        for array in self._arrays.values():
            array.close()

    def finish(self) -> dict[str, Rows]:
        """Give the arrays their names -> each of them, to be read."""
        self.close()
        finals = [self._files.name_array(name) for name in self._arrays]
        return {path.name: Rows(path) for path in finals}

    def fits_json(
        self,
        choice: bool | str,
    ) -> bool:
        """Whether the result file holds the scores, by `config["json"]`."""
        numbers = len(self._arrays) * self._shape[0] * self._shape[1]
        return fits_json(choice, numbers, self._dtype.itemsize)


def fits_json(
    choice: bool | str,
    numbers: int,
    itemsize: int,
) -> bool:
    """Whether a result file holds so many scores, of so many bytes each, by `config["json"]`."""
    if choice != "auto":
        return bool(choice)
    return numbers * DIGITS[itemsize] <= MOST_JSON


def pieces(
    entries: Mapping[str, Entry],
) -> Iterator[bytes]:
    """Entries as JSON with their scores, one after the other: what stands between the braces of the file."""
    for key, one in entries.items():
        yield as_json({key: one})[1:-1].encode()
