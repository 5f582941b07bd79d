"""A batch of any structure as its list of tensors and a function that builds it again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module


class Batch(NamedTuple):
    """Samples that were collated together: the tensors of a batch of any structure, and the way back to it.

    Samples that cannot be collated together without changing each other (padding, time first) come as `parts`, each a
    batch of one; then `leaves` is empty.
    """

    leaves: list[Tensor]
    rebuild: Callable[[Sequence[Tensor]], Any]
    size: int
    indices: Sequence[int]
    parts: tuple[Batch, ...] = ()

    @property
    def tree(self) -> Any:
        """The batch as the loader's `collate_fn` made it."""
        return self.rebuild(self.leaves)

    @property
    def sliceable(self) -> bool:
        """Whether every tensor has one row per sample."""
        return bool(self.leaves) and all(
            t.dim() > 0 and t.shape[0] == self.size for t in self.leaves
        )

    def rows(self, start: int, stop: int) -> Batch:
        """Samples `start` to `stop` of a sliceable batch, or of one in parts."""
        indices = self.indices[start:stop]
        if self.parts:
            return apart(self.parts[start:stop])
        if self.size == 1:
            return self
        if not self.sliceable:
            raise ValueError(UNCUT)
        return Batch(
            [t[start:stop] for t in self.leaves],
            self.rebuild,
            len(indices),
            indices,
        )

    def singles(self) -> Iterator[Batch]:
        """Each sample as a batch of one."""
        for i in range(self.size):
            yield self.rows(i, i + 1)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        if self.parts:
            return self._replace(
                parts=tuple(part.to(device) for part in self.parts)
            )
        with torch.inference_mode(False):
            leaves = [t.clone() if t.is_inference() else t for t in self.leaves]
            return self._replace(
                leaves=[
                    t.to(device, non_blocking=t.is_pinned()) for t in leaves
                ]
            )


UNCUT = (
    "the samples of this batch cannot be told apart: its tensors do not have one row per sample, or a sample's loss in "
    "it is another than alone (padding, time first); pass a DataLoader over the test samples instead of a batch"
)
"""What is said of a batch of several samples that has to be cut and cannot be."""


def apart(parts: Sequence[Batch]) -> Batch:
    """Batches of one as a single batch of all of them."""
    if len(parts) == 1:
        return parts[0]
    indices = [part.indices[0] for part in parts]
    return Batch(
        [],
        lambda _: [part.tree for part in parts],
        len(parts),
        indices,
        tuple(parts),
    )


def as_batch(
    tree: Any, indices: Sequence[int] | None = None, name: str = "batch"
) -> Batch:
    """Wrap a collated batch; without `indices` its size is the first dimension that its tensors share.

    Tensors of different first dimensions are those of one sample where one of them has a single row. `name` is what
    messages call it.

    Raises:
        TypeError: there is no tensor that could have one row per sample.
        ValueError: the number of samples cannot be seen, or is zero.
    """
    leaves, rebuild = flatten_tree(tree)
    if indices is None:
        indices = range(_size(leaves, tree, name))
    return Batch(leaves, rebuild, len(indices), indices)


def _size(leaves: Sequence[Tensor], tree: Any, name: str) -> int:
    """Number of samples, as the tensors of a batch show it."""
    sizes = {t.shape[0] for t in leaves if t.dim() > 0}
    if 1 in sizes:
        return 1
    if any(t.dim() == 0 for t in leaves):
        raise ValueError(
            f"{name}: one of its tensors has no dimension; {UNBATCHED}"
        )
    if not sizes:
        raise TypeError(
            f"{name}: expected a batch that holds tensors with one row per sample, got {type(tree).__name__}"
        )
    if len(sizes) > 1:
        found = ", ".join(map(str, sorted(sizes)))
        raise ValueError(
            f"{name}: its tensors have {found} rows; {UNBATCHED}. If it is a batch, {UNCUT}"
        )
    if sizes == {0}:
        raise ValueError(f"{name}: it is empty; expected at least one sample")
    return sizes.pop()


UNBATCHED = (
    "expected one row per sample in each; a single sample needs a batch dimension: "
    "x.unsqueeze(0), t.unsqueeze(0)"
)
"""What is said of a sample that came without its batch dimension."""


def flatten_tree(
    tree: Any,
) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Tensors of a nested mapping, sequence, named tuple or dataclass in a fixed order, and the inverse.

    A sparse tensor is dense among them, so that it can be cut, and sparse again in the inverse. One of another layout
    (nested), or too large for that, is none of them and stays where it is.
    """
    leaves: list[Tensor] = []

    def keep(t: Tensor) -> Any:
        sparse = SPARSE.get(t.layout) if t.numel() <= MOST_DENSE else None
        if t.is_nested or (t.layout != torch.strided and sparse is None):
            return t
        leaves.append(t if sparse is None else t.to_dense())
        return _Slot(len(leaves) - 1, sparse)

    def put(slot: Any, new: Sequence[Tensor]) -> Any:
        if not isinstance(slot, _Slot):
            return slot
        t = new[slot.place]
        return t if slot.sparse is None else slot.sparse(t)

    template = _visit(tree, keep)
    return leaves, lambda new: _visit(template, lambda slot: put(slot, new))


SPARSE: dict[torch.layout, Callable[[Tensor], Tensor]] = {
    torch.sparse_coo: Tensor.to_sparse,
    torch.sparse_csr: Tensor.to_sparse_csr,
}
"""The way back of layouts that a batch may have."""
MOST_DENSE = 2**24
"""Numbers of a sparse tensor that is held dense: 64 MiB, as many as a batch of 128 bags of 130,000 words."""


class _Slot(NamedTuple):
    """Where a tensor stood in a batch, and how it gets back the layout that it had there."""

    place: int
    sparse: Callable[[Tensor], Tensor] | None = None


def _visit(tree: Any, fn: Callable[[Any], Any]) -> Any:
    """Copy of `tree` with `fn` put in place of each tensor (or slot); what is neither stays as it is."""
    if isinstance(tree, Tensor | _Slot):
        return fn(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        new = copy.copy(tree)
        # one that is a dict too (ModelOutput) keeps both in step itself; a frozen one has no way of its own
        put = setattr if isinstance(tree, Mapping) else object.__setattr__
        for field in dataclasses.fields(tree):
            put(new, field.name, _visit(getattr(tree, field.name), fn))
        return new
    if isinstance(tree, Mapping):
        items = {key: _visit(value, fn) for key, value in tree.items()}
        if type(tree) is dict:
            return items
        mapping: Any = copy.copy(tree)
        mapping.update(items)
        return mapping
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_visit(value, fn) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_visit(value, fn) for value in tree)
    if _is_record(tree):
        new = copy.copy(tree)
        vars(new).update(
            {name: _visit(value, fn) for name, value in vars(tree).items()}
        )
        return new
    return tree


def _is_record(tree: Any) -> bool:
    """Whether an object of a class of the user's holds tensors as plain attributes (a batch of graphs, say)."""
    if (
        isinstance(tree, type | Module)
        or callable(tree)
        or not hasattr(tree, "__dict__")
    ):
        return False
    return any(
        isinstance(value, Tensor | _Slot) for value in vars(tree).values()
    )
