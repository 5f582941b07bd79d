"""One test sample's entry of a result: plain numbers, and the order of the training samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..solve.repeats import Row, resolved_ends

POWERS = np.array([float(f"1e{k}") for k in range(-31, 55)])
"""10^k for every k that nine digits of a float32 need, each the nearest double; `np.power` may miss it by a bit."""
SORTED = 4
"""A row is sorted whole where more than one in so many is asked for: parting it first is no faster then (measured on
10^5 and 10^6 numbers)."""


def as_numbers(row: Row) -> list[float]:
    """A row [n] as plain numbers; nine digits in single precision, which tell all its values apart.

    `float(np.float32(0.1))` is 0.10000000149011612: without the digits that it does not hold a file is half as long.
    """
    wide = row.astype(np.float64)
    if row.dtype != np.float32:
        exact: list[float] = wide.tolist()
        return exact
    exponent = np.floor(
        np.log10(np.abs(wide), where=wide != 0, out=np.zeros_like(wide))
    )
    power = POWERS[8 - exponent.astype(int) + 31]
    numbers: list[float] = (np.rint(wide * power) / power).tolist()
    return numbers


def harmful_and_helpful(
    influence: Row,
    top_k: int | None = None,
) -> tuple[list[int], list[int]]:
    """Training indices by influence [n], smallest first and largest first; ties in the order of the index."""
    return smallest(influence, top_k), smallest(-influence, top_k)


def smallest(row: Row, k: int | None = None) -> list[int]:
    """Indices of the k smallest of a row [n] (None: of all) in order, ties in the order of the index.

    A few of many are parted from the rest before they are sorted.
    """
    if k is None or not 0 < SORTED * k < len(row):
        ordered: list[int] = np.argsort(row, kind="stable")[:k].tolist()
        return ordered
    bound = np.partition(row, k - 1)[k - 1]
    among = np.flatnonzero(row <= bound)
    order = np.argsort(row[among], kind="stable")[:k]
    found: list[int] = among[order].tolist()
    return found


def as_lists(rows: Mapping[str, Row]) -> dict[str, Any]:
    """Rows of an entry as plain numbers."""
    return {name: as_numbers(row) for name, row in rows.items()}


def entry(
    influence: Row,
    *,
    label: Any,
    index: int,
    seconds: float,
    residual: float,
    top_k: int,
    chains: Row | None = None,
    keep: Callable[[Mapping[str, Row]], dict[str, Any]] = as_lists,
) -> dict[str, Any]:
    """One test sample's result; from the scores of its chains [r, n] also standard errors and what they resolve.

    `keep` gives what stands for the rows in the entry.
    """
    harmful, helpful = harmful_and_helpful(influence, top_k)
    rows, resolved = {"influence": influence}, {}
    if chains is not None:
        rows["stderr"] = chains.std(0, ddof=1) / len(chains) ** 0.5
        resolved = {"resolved": resolved_ends(chains, top_k)}
    return {
        "label": label,
        "num_in_dataset": index,
        "time_calc_influence_s": seconds,
        **keep(rows),
        **resolved,
        "harmful": harmful,
        "helpful": helpful,
        "relative_residual": residual,
    }
