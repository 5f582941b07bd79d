"""Test samples that are solved together, a group at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from .solution import Solution


@dataclasses.dataclass
class Unmeasured:
    """Solutions of an approximation for v [K, P], whose residual costs as much as they do."""

    v: Tensor
    solution: Solution


@dataclasses.dataclass(frozen=True)
class Group:
    """Test samples that were solved together.

    Attributes:
        indices: of the test samples.
        vectors: their solutions s [k, P].
        chains: those of each recursion [r, k, P], or None.
        residual: relative residual of each [k].
    """

    indices: list[int]
    vectors: Tensor
    chains: Tensor | None
    residual: Tensor


def split(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """Parts of at most `size`, in order."""
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])


def shared_facts(groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was the same for all groups of a run, beside how many test samples each had."""
    first = groups[0] if groups else {}
    return {
        key: value
        for key, value in first.items()
        if key != "tests" and all(other.get(key) == value for other in groups)
    }
