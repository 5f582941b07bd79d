"""Training and test sets as their loaders read them: the only place that iterates a loader.

Batches come in index order or at random from a seeded generator, on the right device, with the user's `collate_fn`,
workers and pinning. A batch of any structure is held as its list of tensors and a function that builds it again.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from ..utils import progress_bar, random_state

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Samples that were collated together: the tensors of a batch of any structure, and the way back to it."""

    leaves: list[Tensor]
    rebuild: Callable[[Sequence[Tensor]], Any]
    size: int
    indices: Sequence[int]

    @property
    def tree(self) -> Any:
        """The batch as the loader's `collate_fn` made it."""
        return self.rebuild(self.leaves)

    @property
    def sliceable(self) -> bool:
        """Whether every tensor has one row per sample."""
        return bool(self.leaves) and all(t.dim() > 0 and t.shape[0] == self.size for t in self.leaves)

    def rows(self, start: int, stop: int) -> Batch:
        """Samples `start` to `stop` of a sliceable batch."""
        leaves = [t[start:stop] for t in self.leaves]
        return Batch(leaves, self.rebuild, len(self.indices[start:stop]), self.indices[start:stop])

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        with torch.inference_mode(False):
            leaves = [t.clone() if t.is_inference() else t for t in self.leaves]
            return self._replace(leaves=[t.to(device, non_blocking=t.is_pinned()) for t in leaves])


def as_batch(tree: Any, indices: Sequence[int] | None = None) -> Batch:
    """Wrap a collated batch; without `indices` its size is the first dimension of its first tensor."""
    leaves, rebuild = flatten_tree(tree)
    if indices is None:
        if not leaves or leaves[0].dim() == 0:
            raise TypeError(f"expected a batch that holds tensors with one row per sample, got {type(tree).__name__}")
        indices = range(leaves[0].shape[0])
    return Batch(leaves, rebuild, len(indices), indices)


def flatten_tree(tree: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Tensors of a nested mapping, sequence, named tuple or dataclass in a fixed order, and the inverse."""
    leaves: list[Tensor] = []
    template = _visit(tree, lambda t: leaves.append(t) or _Slot(len(leaves) - 1))  # type: ignore[func-returns-value]
    return leaves, lambda new: _visit(template, lambda slot: new[slot.place])


class _Slot(NamedTuple):
    """Where a tensor stood in a batch."""

    place: int


def _visit(tree: Any, fn: Callable[[Any], Any]) -> Any:
    """Copy of `tree` with `fn` put in place of each tensor (or slot); what is neither stays as it is."""
    if isinstance(tree, Tensor | _Slot):
        return fn(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        new = copy.copy(tree)
        for field in dataclasses.fields(tree):
            object.__setattr__(new, field.name, _visit(getattr(tree, field.name), fn))
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
    return tree


class Samples:
    """A data set with the collating, workers and pinning of the user's loader.

    Args:
        loader: the user's DataLoader; its dataset must have a length and an index.
        device: where batches are put.
        name: what error messages call it (`"train_loader"`, `"test_loader"`).
        progress: show progress bars.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        device: torch.device | None = None,
        name: str = "loader",
        progress: bool = True,
    ) -> None:
        check_loader(loader, name)
        self.loader, self.name, self.progress = loader, name, progress
        self.dataset: Dataset[Any] = loader.dataset
        self.device = device if device is not None else torch.device("cpu")
        self.n = len(cast(Any, self.dataset))
        self.collate: Callable[[list[Any]], Any] = loader.collate_fn
        self.batch_size = min(_batch_size(loader), self.n)

    def __len__(self) -> int:
        return self.n

    def sample(self, index: int) -> Batch:
        """One sample, collated alone."""
        return as_batch(self.collate([self.dataset[index]]), [index]).to(self.device)

    def take(self, indices: Sequence[int]) -> Batch:
        """These samples, collated together, read in this process."""
        return as_batch(self._collated(indices), indices).to(self.device)

    def ordered(
        self, batch_size: int | None = None, indices: Sequence[int] | None = None, text: str | None = None
    ) -> Iterator[Batch]:
        """Every sample (or those of `indices`) once, in order, with a progress bar where `text` says what is done."""
        indices = range(self.n) if indices is None else indices
        size = min(self.batch_size if batch_size is None else batch_size, max(len(indices), 1))
        chunks = [indices[i : i + size] for i in range(0, len(indices), size)]
        with progress_bar(text, total=len(indices), unit="sample", enabled=self.progress) as bar:
            for batch in self._read(chunks, seed=0):
                yield batch
                bar.update(batch.size)

    def random(self, batch_size: int | None = None, *, seed: int) -> Iterator[Batch]:
        """Random minibatches without end, all of the same size, through one iterator.

        They are independent of each other: taken in epochs, a minibatch would depend on the steps before it, and a
        recursion over them would be biased. One of size n is the whole set.
        """
        size = min(self.batch_size if batch_size is None else batch_size, self.n)
        return self._read(_RandomBatches(self.n, size, seed), seed)

    def labels(self) -> list[Any]:
        """Label of each sample: from `dataset.targets` (or tensors) where there is one, else by reading the samples."""
        with random_state(0):
            known = stored_labels(self.dataset)
            if known is None:
                batches = self.ordered(text=f"Reading the labels of {self.name}")
                known = [label for batch in batches for label in batch_labels(batch)]
        return [plain(label) for label in known]

    def _read(self, chunks: Any, seed: int) -> Iterator[Batch]:
        if self._in_memory:
            for chunk in chunks:
                yield self.take(chunk)
            return
        # each worker batch carries its indices, so that nothing depends on what collate_fn returns
        reader = DataLoader(
            cast(Any, _Indexed(self.dataset)), batch_sampler=chunks, collate_fn=_IndexedCollate(self.collate),
            generator=torch.Generator().manual_seed(seed), **_loader_options(self.loader),
        )  # fmt: skip
        for indices, tree in reader:
            yield as_batch(tree, indices).to(self.device)

    @property
    def _in_memory(self) -> bool:
        return type(self.dataset) is TensorDataset and self.collate is default_collate

    def _collated(self, indices: Sequence[int]) -> Any:
        if self._in_memory:
            rows = torch.as_tensor(indices)
            return [t[rows] for t in cast(TensorDataset, self.dataset).tensors]
        return self.collate([self.dataset[i] for i in indices])


class _Indexed(Dataset[Any]):
    """A data set that returns each sample with its index, fetched a batch at a time where the data set can."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        many = getattr(self.dataset, "__getitems__", None)
        samples = many(list(indices)) if callable(many) else [self.dataset[i] for i in indices]
        return list(zip(indices, samples, strict=True))

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


class _IndexedCollate:
    """The user's `collate_fn` on the samples, the indices beside it."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, pairs: list[tuple[int, Any]]) -> tuple[list[int], Any]:
        return [i for i, _ in pairs], self.collate([sample for _, sample in pairs])


class _RandomBatches(Sampler[list[int]]):
    """Endless minibatches, each a random sample without repeats and independent of the others."""

    def __init__(self, n: int, size: int, seed: int) -> None:
        self.n, self.size, self.seed = n, size, seed

    def __iter__(self) -> Iterator[list[int]]:
        generator = random.Random(self.seed)
        while True:
            yield generator.sample(range(self.n), self.size)


def _loader_options(loader: DataLoader[Any]) -> dict[str, Any]:
    names = ["num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context"]
    names += ["prefetch_factor"] if loader.num_workers > 0 else []
    return {name: getattr(loader, name) for name in names}


def _batch_size(loader: DataLoader[Any]) -> int:
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return int(size) if size else max(len(next(iter(cast(Any, loader.batch_sampler)))), 1)


def check_loader(loader: Any, name: str) -> None:
    """Raise where a loader cannot be read by index; warn where its sampler leaves samples out."""
    if not hasattr(loader, "dataset"):
        raise TypeError(
            f"{name}: expected a torch DataLoader, got {type(loader).__name__}; "
            "wrap the data set: DataLoader(dataset, batch_size=32)"
        )
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"{name}: its dataset ({type(dataset).__name__}) has no length or no index, but influence is given per "
            "sample; use a map-style dataset with __len__ and __getitem__, e.g. a list of the samples"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name}: its dataset ({type(dataset).__name__}) is empty; expected at least one sample")
    if loader.batch_sampler is None:
        raise ValueError(
            f"{name}: it has batch_size=None, so one item of its dataset is not one sample; "
            "give a DataLoader with a batch_size over single samples"
        )
    sampler = loader.sampler
    plain_batches = type(loader.batch_sampler) is BatchSampler
    if not plain_batches or not isinstance(sampler, SequentialSampler | RandomSampler | DistributedSampler):
        logger.warning(
            "%s: its sampler (%s) is not used: all %d samples of its dataset count, each once. "
            "To leave some out, pass a DataLoader over torch.utils.data.Subset.",
            name, type(sampler if plain_batches else loader.batch_sampler).__name__, len(dataset),
        )  # fmt: skip


def varying_sample(samples: Samples, tries: int = 8) -> int | None:
    """Index of a sample that is not the same when read twice (random augmentation), or None."""
    step = max(samples.n // tries, 1)
    for index in range(0, samples.n, step)[:tries]:
        first, second = samples.sample(index).leaves, samples.sample(index).leaves
        if any(not _same(a, b) for a, b in zip(first, second, strict=True)):
            return index
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def stored_labels(dataset: Any) -> Sequence[Any] | None:
    """Labels that a data set holds in memory (`targets`, `labels`, or the second tensor), or None."""
    if isinstance(dataset, Subset):
        whole = stored_labels(dataset.dataset)
        return None if whole is None else [whole[i] for i in dataset.indices]
    if type(dataset) is TensorDataset:
        return dataset.tensors[1] if len(dataset.tensors) > 1 else None  # type: ignore[return-value]
    for name in ("targets", "labels"):
        known = getattr(dataset, name, None)
        if known is not None and hasattr(known, "__len__") and len(known) == len(dataset):
            transform = getattr(dataset, "target_transform", None)
            return [transform(label) for label in known] if callable(transform) else cast(Sequence[Any], known)
    return None


def batch_labels(batch: Batch) -> list[Any]:
    """Labels of a batch: the rows of its second part, or of its `labels`, `label`, `targets`, `target` or `y`."""
    tree: Any = batch.tree
    if isinstance(tree, Mapping):
        tree = (None, next((tree[key] for key in LABEL_KEYS if key in tree), None))
    elif not isinstance(tree, list | tuple):
        tree = (None, next((getattr(tree, key) for key in LABEL_KEYS if hasattr(tree, key)), None))
    labels: Any = tree[1] if len(tree) > 1 else None
    return list(labels) if hasattr(labels, "__len__") and len(labels) == batch.size else [None] * batch.size


LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def plain(label: Any) -> Any:
    """A label as a Python number or (nested) list, whether it came as tensor, numpy scalar or number."""
    return label.tolist() if hasattr(label, "tolist") else label
