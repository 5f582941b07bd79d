"""What setting up a solver may lean on: other processes that take a part of its passes, and what an earlier start kept.

Alone, a process does everything itself and keeps nothing. Inside `SetUp.by` all processes of a run do the same steps
in the same order, each with its part of the samples; what they find is joined in the order of their ranks, so that all
of them hold the same numbers, which depend on how many they are only by rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

Rows = TypeVar("Rows", Tensor, Sequence[int], list[list[int]])


class ProcessError(RuntimeError):
    """Another process of the run failed; the message has its own."""


class Kept(NamedTuple):
    """A part of the set-up, as it can be written down."""

    tensors: dict[str, Tensor]
    facts: Any = None
    """Plain values."""


class Team(Protocol):
    """The processes of a run."""

    @property
    def size(self) -> int:
        """How many there are."""

    def share(self, items: range) -> Sequence[int]:
        """This process's part, in the order of the ranks."""

    def joined(self, part: Tensor, dim: int) -> Tensor:
        """The parts of all processes along a dimension."""

    def total(self, part: Tensor) -> Tensor:
        """The sum over all processes, which replaces the part."""

    def every(self, value: Any) -> list[Any]:
        """The values of all processes."""


class Helper(Protocol):
    """The processes of a run, and its files."""

    @property
    def team(self) -> Team:
        """The processes."""

    def kept(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What an earlier start of the run made, else what is made now, which the next one will find."""


class Share:
    """A process's part of a work.

    Args:
        count: of the things to be done.
        block: so many of them stay together.
        team: who shares them, where there are enough blocks; None: they are all this process's.

    Attributes:
        indices: of this process; None: all.
        count: how many these are.
    """

    def __init__(
        self, count: int, block: int = 1, team: Team | None = None
    ) -> None:
        blocks = -(-count // block)
        self._team = team if team and 1 < team.size <= blocks else None
        self.indices: Sequence[int] | None = None
        self.count = count
        if self._team is not None:
            mine = self._team.share(range(blocks))
            last = min(count, (mine[-1] + 1) * block)
            self.indices = range(mine[0] * block, last)
            self.count = len(self.indices)

    def of(self, rows: Rows) -> Rows:
        """Those of the rows [count, ...], or of the samples, that are this process's."""
        if self.indices is None:
            return rows
        return rows[self.indices[0] : self.indices[-1] + 1]

    def joined(self, part: Tensor, dim: int = 0) -> Tensor:
        """What all processes found, along a dimension."""
        return part if self._team is None else self._team.joined(part, dim)

    def total(self, part: Tensor) -> Tensor:
        """The sum of what all processes found, in the place of the part."""
        return part if self._team is None else self._team.total(part)


class SetUp:
    """Who helps to set up a solver; nobody, outside of `by`."""

    def __init__(self) -> None:
        self._helper: Helper | None = None

    @contextlib.contextmanager
    def by(self, helper: Helper) -> Iterator[None]:
        """Inside: with the help of the other processes of the run, and of its files."""
        self._helper = helper
        try:
            yield
        finally:
            self._helper = None

    def share(self, count: int, block: int = 1) -> Share:
        """This process's part of `count` things, of which a block stays together; all where they are few."""
        team = self._helper.team if self._helper else None
        return Share(count, block, team)

    def any(self, found: bool) -> bool:
        """Whether one of the processes found it."""
        return any(self._helper.team.every(found)) if self._helper else found

    def kept(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What `make` returns, or returned in an earlier start of the run."""
        return self._helper.kept(name, make) if self._helper else make()
