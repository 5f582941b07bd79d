"""Training and test sets as their loaders read them: the only place that iterates a loader.

Batches come in index order or at random from a seeded generator, on the right device, with the user's `collate_fn`,
workers and pinning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate

from ..utils import progress_bar, random_state
from .batch import Batch, apart, as_batch
from .checks import check_loader
from .labels import batch_labels, plain, stored_labels


class Samples:
    """A data set with the collating, workers and pinning of the user's loader.

    Args:
        loader: the user's DataLoader; its dataset must have a length and an index.
        device: where batches are put.
        name: what error messages call it (`"train_loader"`, `"test_loader"`).
        progress: show progress bars.

    Attributes:
        apart: whether each sample is collated alone, since in a batch it would be another.
        shapes: the only shape in which samples may be collated together (that of each tensor behind its first
            dimension); batches of another are taken apart. None is any.
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
        self.apart = False
        self.shapes: Shapes | None = None

    def __len__(self) -> int:
        return self.n

    def sample(self, index: int) -> Batch:
        """One sample, collated alone."""
        return as_batch(self.collate([self.dataset[index]]), [index]).to(self.device)

    def take(self, indices: Sequence[int]) -> Batch:
        """These samples, collated together (or `apart`), read in this process."""
        if self.apart:
            return self._alone(indices)
        return self._trusted(as_batch(self._collated(indices), indices)).to(self.device)

    def _alone(self, indices: Sequence[int]) -> Batch:
        return apart([self.sample(i) for i in indices])

    def _trusted(self, batch: Batch) -> Batch:
        """The batch, or its samples read again one by one where they may have been changed to fit each other."""
        if self.shapes is None or batch.size == 1 or shapes_of(batch) == self.shapes:
            return batch
        return self._alone(batch.indices)

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
        collate = _IndexedCollate(self.collate, self.apart)
        reader = DataLoader(
            cast(Any, _Indexed(self.dataset)), batch_sampler=chunks, collate_fn=collate,
            generator=torch.Generator().manual_seed(seed), **_loader_options(self.loader),
        )  # fmt: skip
        for indices, trees in reader:
            if self.apart:
                parts = [as_batch(tree, [i]) for i, tree in zip(indices, trees, strict=True)]
                yield apart(parts).to(self.device)
            else:
                yield self._trusted(as_batch(trees, indices)).to(self.device)

    @property
    def _in_memory(self) -> bool:
        return type(self.dataset) is TensorDataset and self.collate is default_collate

    def _collated(self, indices: Sequence[int]) -> Any:
        if self._in_memory:
            rows = torch.as_tensor(indices)
            return [t[rows] for t in cast(TensorDataset, self.dataset).tensors]
        return self.collate([self.dataset[i] for i in indices])


Shapes = tuple[tuple[int, ...], ...]


def shapes_of(batch: Batch) -> Shapes:
    """Shape of each tensor of a batch behind its first dimension."""
    return tuple(tuple(t.shape[1:]) for t in batch.leaves)


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
    """The user's `collate_fn` on the samples, all together or each `apart`, the indices beside it."""

    def __init__(self, collate: Callable[[list[Any]], Any], apart: bool) -> None:
        self.collate, self.apart = collate, apart

    def __call__(self, pairs: list[tuple[int, Any]]) -> tuple[list[int], Any]:
        samples = [sample for _, sample in pairs]
        tree = [self.collate([one]) for one in samples] if self.apart else self.collate(samples)
        return [i for i, _ in pairs], tree


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
