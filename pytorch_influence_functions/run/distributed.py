"""Several processes that do one run: who they are, and the only places where they talk to each other.

Every process calls the same functions in the same order. What each of them computes is joined in the order of their
ranks, without padding, so that all hold the same numbers, whatever their number.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..solve.set_up import ProcessError

PATIENCE = datetime.timedelta(days=30)
"""A process waits so long for another that still computes; one that ends closes its connections, which is seen."""
FAILED = "pytorch_influence_functions/failed"
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher (torchrun) sets."""
T = TypeVar("T")


class Team:
    """The processes of a run; alone by default.

    Args:
        group: of the processes; None where there is one.

    Attributes:
        rank: of this process, from 0 on; 0 writes.
        size: how many there are.
    """

    def __init__(
        self,
        group: Any = None,
    ) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(
        self,
        items: Sequence[T],
    ) -> Sequence[T]:
        """This process's part of what is to be done, in the order of the ranks; the first have one more."""
        first, last = (
            -(-len(items) * rank // self.size)
            for rank in (self.rank, self.rank + 1)
        )
        return items[first:last]

    def told(self, value: T) -> T:
        """The value that the first process has."""
        return self.every(value if self.leads else None)[0]  # type: ignore[return-value]

    def every(self, value: T) -> list[T]:
        """The values of all processes."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * self.size
        self._talk(
            lambda: dist.all_gather_object(found, value, group=self._group)
        )
        return found

    def joined(
        self,
        part: Tensor,
        dim: int,
    ) -> Tensor:
        """The parts of all processes along a dimension."""
        if self._group is None:
            return part
        shapes = self.every((tuple(part.shape), part.dtype))
        parts = [
            part.detach().cpu().contiguous()
            if rank == self.rank
            else torch.empty(shape, dtype=dtype)
            for rank, (shape, dtype) in enumerate(shapes)
        ]
        for rank, one in enumerate(parts):
            if one.numel():
                self._send(one, rank)
        return torch.cat(parts, dim).to(part.device)

    def total(
        self,
        part: Tensor,
    ) -> Tensor:
        """The sum over all processes, in the place of the part; bit-equal on all of them."""
        if self._group is None:
            return part
        here = part.detach().cpu().contiguous()
        self._talk(lambda: dist.all_reduce(here, group=self._group))
        return part.copy_(here)

    def _send(
        self,
        tensor: Tensor,
        rank: int,
    ) -> None:
        source = dist.get_global_rank(self._group, rank)
        self._talk(lambda: dist.broadcast(tensor, source, group=self._group))

    def _talk(
        self,
        exchange: Callable[[], object],
    ) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise ProcessError(_reason(error)) from error


ALONE = Team()


def _reason(
    error: RuntimeError,
) -> str:
    """What the process said that failed first; that a connection broke, where it cannot be asked."""
    with contextlib.suppress(Exception):
        store = _store()
        if store.check([FAILED]):
            return str(store.get(FAILED).decode())
    return (
        f"another process of the run has ended ({str(error).splitlines()[0]})"
    )


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def several(
    num_processes: int | None,
) -> bool:
    """Whether this process is one of several that do a run: the launcher's, or the script's own group."""
    if num_processes == 1 or not dist.is_available():
        return False
    return dist.is_initialized() or (
        all(name in os.environ for name in LAUNCHED)
        and int(os.environ["WORLD_SIZE"]) > 1
    )


@contextlib.contextmanager
def team(
    num_processes: int | None = None,
) -> Iterator[Team]:
    """The processes that do this run, by `config["num_processes"]`.

    Where this one fails, the others are told why: they end at their next word to it.
    """
    if not several(num_processes):
        yield ALONE
        return
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo")
    try:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Team(group)
    except ProcessError:
        raise
    except BaseException as error:
        said = f"process {dist.get_rank()} of the run failed: {type(error).__name__}: {error}"
        with contextlib.suppress(Exception):
            _store().set(FAILED, said)
        raise
    finally:
        if own:
            dist.destroy_process_group()
