"""Entries whose long rows lie on disk: a row becomes a list when it is asked for."""

from __future__ import annotations

import functools
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..solve.repeats import Row
from .entries import as_numbers

ROWS = ("influence", "stderr")
ORDERS = ("harmful", "helpful")
KEPT = 4
"""Rows of a file that are kept as lists: a loop that asks for an entry's row at each index reads it once."""


class Rows:
    """An array file [K, n], of which a row at a time is read; it may be deleted meanwhile.

    Args:
        path: of the file.

    Raises:
        OSError, ValueError: it cannot be read.
    """

    def __init__(
        self,
        path: Path,
    ) -> None:
        self.name = path.name
        self.array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        self.numbers = functools.lru_cache(KEPT)(self._numbers)

    def _numbers(
        self,
        k: int,
    ) -> list[float]:
        return as_numbers(np.array(self.array[k]))


class StoredRow:
    """Row k of an array file."""

    def __init__(
        self,
        rows: Rows,
        k: int,
    ) -> None:
        self.rows, self.k = rows, k

    def named(self) -> dict[str, Any]:
        return {"array": self.rows.name, "row": self.k}

    def read(self) -> list[float]:
        return self.rows.numbers(self.k)


class Order:
    """Indices of samples, four bytes each; in a list of Python's numbers they take nine times as much."""

    def __init__(
        self,
        indices: list[int],
    ) -> None:
        largest = max(indices, default=0)
        self.indices = np.asarray(indices, np.min_scalar_type(largest))

    def read(self) -> list[int]:
        found: list[int] = self.indices.tolist()
        return found


class Entry(dict[str, Any]):
    """One test sample's entry, a dict like any other; its rows and orders are lists as soon as they are taken out.

    Copies and pickles are plain dicts that hold the numbers.
    """

    def __init__(
        self,
        entry: Mapping[str, Any],
    ) -> None:
        super().__init__(entry)
        for name in ORDERS:
            if isinstance(entry.get(name), list):
                self[name] = Order(entry[name])

    def attach(
        self,
        arrays: Mapping[str, Rows],
    ) -> Entry:
        """Itself, with the rows that it names by file and number found in these files."""
        for name in ROWS:
            named = super().get(name)
            if isinstance(named, dict):
                self[name] = StoredRow(arrays[named["array"]], named["row"])
        return self

    def named(self) -> dict[str, Any]:
        """The entry with the rows named as `attach` finds them."""
        return {
            name: kept.named() if isinstance(kept, StoredRow) else kept
            for name, kept in super().items()
        }

    def array(
        self,
        name: str,
    ) -> Row:
        """A row as NumPy has it."""
        kept = super().__getitem__(name)
        if isinstance(kept, StoredRow):
            return np.array(kept.rows.array[kept.k])
        return np.asarray(kept, dtype=np.float64)

    def count(
        self,
        name: str,
    ) -> int:
        """How many numbers a row has."""
        kept = super().__getitem__(name)
        if isinstance(kept, StoredRow):
            return int(kept.rows.array.shape[1])
        return len(kept)

    def is_stored(
        self,
        name: str,
    ) -> bool:
        """Whether a row lies on disk."""
        return isinstance(super().get(name), StoredRow)

    def __getitem__(
        self,
        key: str,
    ) -> Any:
        return _read(super().__getitem__(key))

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # dict(entry) copies what is kept without it

    def get(
        self,
        key: str,
        default: Any = None,
    ) -> Any:
        return _read(super().get(key, default))

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        return ItemsView(self)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        return ValuesView(self)

    def pop(
        self,
        key: str,
        *default: Any,
    ) -> Any:
        return _read(super().pop(key, *default))

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __or__(
        self,
        other: Any,
    ) -> Any:
        return dict(self) | dict(other)

    def __eq__(
        self,
        other: object,
    ) -> bool:
        return isinstance(other, dict) and dict(self) == dict(other)

    def __ne__(
        self,
        other: object,
    ) -> bool:
        return not self == other

    __hash__ = None

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def _read(
    kept: Any,
) -> Any:
    return kept.read() if isinstance(kept, StoredRow | Order) else kept


def row_of(
    entry: Mapping[str, Any],
    name: str,
) -> NDArray[np.float64]:
    """A row of an entry as an array in double precision [n]."""
    row = entry.array(name) if isinstance(entry, Entry) else entry[name]
    return np.asarray(row, dtype=np.float64)


def attached(
    entries: Mapping[str, Mapping[str, Any]], folder: Path
) -> dict[str, Entry]:
    """Entries that name arrays of this folder, with their rows found in them.

    Raises:
        OSError, ValueError: an array is not there, cannot be read or has not the row.
    """
    last: dict[str, int] = {}
    for one in entries.values():
        for named in map(one.get, ROWS):
            if isinstance(named, dict):
                array, row = Path(named["array"]).name, int(named["row"])
                last[array] = max(last.get(array, 0), row)
    arrays = {name: _opened(folder / name, row) for name, row in last.items()}
    return {key: Entry(one).attach(arrays) for key, one in entries.items()}


def _opened(
    path: Path,
    last: int,
) -> Rows:
    rows = Rows(path)
    if rows.array.ndim != 2 or len(rows.array) <= last:
        raise ValueError(
            f"{path}: expected an array [tests, n] of at least {last + 1} rows, which the result file names, found "
            f"shape {list(rows.array.shape)}; it is of another run"
        )
    return rows
