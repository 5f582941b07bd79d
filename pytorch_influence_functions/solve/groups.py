"""Test samples that are solved together, a group at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ..data.batch import Batch
from .solution import Prepared, Solution


@dataclasses.dataclass
class Unmeasured:
    """Solutions of an approximation for v [K, P], whose residual costs as much as they do."""

    v: Tensor
    solution: Solution
    group: dict[str, Any]
    """Their row of the report."""


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


@dataclasses.dataclass(frozen=True)
class Earlier:
    """What stands before the groups that are left, where a run goes on.

    Attributes:
        total: test samples of the whole run.
        report: of the groups that are done.
    """

    total: int
    report: dict[str, Any] = dataclasses.field(default_factory=dict)


def split(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """Parts of at most `size`, in order."""
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])


def parts_of(batch: Batch, size: int) -> Iterator[Batch]:
    """A batch in parts of at most `size` rows."""
    if batch.size <= size:
        yield batch
        return
    for start in range(0, batch.size, size):
        yield batch.rows(start, start + size)


def shared_facts(groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was the same for all groups of a run, beside how many test samples each had."""
    first = groups[0] if groups else {}
    return {
        key: value
        for key, value in first.items()
        if key != "tests" and all(other.get(key) == value for other in groups)
    }


def described(
    facts: dict[str, Any],
    prepared: Prepared,
    groups: list[dict[str, Any]],
    group: dict[str, Any] | None,
) -> dict[str, Any]:
    """The report of a run with one more group: what all groups share stands at the top too."""
    every = groups + ([group] if group else [])
    errors = [one["score_error"] for one in every if "score_error" in one]
    return {
        **facts,
        "curvature": prepared.system.curvature.kind,
        "damping": prepared.system.damping,
        **prepared.report,
        **shared_facts(every),
        **({"score_error": max(errors)} if errors else {}),
        "groups": every,
    }
