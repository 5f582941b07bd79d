"""One test sample's entry of a result: plain numbers, and the order of the training samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..solve.repeats import Row, resolved_ends

POWERS = np.array([float(f"1e{k}") for k in range(-31, 55)])
"""10^k for every k that nine digits of a float32 need, each the nearest double; `np.power` may miss it by a bit."""


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
    harmful = np.argsort(influence, kind="stable")[:top_k]
    helpful = np.argsort(-influence, kind="stable")[:top_k]
    return harmful.tolist(), helpful.tolist()


def entry(
    influence: Row,
    *,
    label: Any,
    index: int,
    seconds: float,
    residual: float,
    top_k: int,
    chains: Row | None = None,
) -> dict[str, Any]:
    """One test sample's result; from the scores of its chains [r, n] also standard errors and what they resolve."""
    harmful, helpful = harmful_and_helpful(influence, top_k)
    errors: dict[str, Any] = {}
    if chains is not None:
        errors = {
            "stderr": as_numbers(chains.std(0, ddof=1) / len(chains) ** 0.5),
            "resolved": resolved_ends(chains, top_k),
        }
    return {
        "label": label,
        "num_in_dataset": index,
        "time_calc_influence_s": seconds,
        "influence": as_numbers(influence),
        **errors,
        "harmful": harmful,
        "helpful": helpful,
        "relative_residual": residual,
    }
