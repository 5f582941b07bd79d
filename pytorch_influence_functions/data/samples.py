"""Training and test sets as their loaders read them: the only place that iterates a loader.

Batches come in index order or at random from a seeded generator, on the right device, with the user's `collate_fn`,
workers and pinning.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from ..utils import progress_bar, random_state
from .batch import Batch, apart, as_batch
from .checks import check_loader
from .labels import agree, batch_labels, plain, stored_labels
from .reader import (
    LEFT_OUT,
    Fetch,
    Fetched,
    RandomBatches,
    Reader,
    WorkerError,
    batch_size_of,
    loader_options,
)

logger = logging.getLogger(__name__)
COMPARED = 32
"""Samples whose labels are compared with those that the data set holds: a tenth of them wrong escapes once in 30."""


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
        passed: samples that passes have given so far.
        drawn: those of them in random minibatches, whose number is not that of the set.
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
        self.batch_size = min(batch_size_of(loader, self.n, name), self.n)
        self.apart = False
        self.passed = 0
        self.drawn = 0
        self.shapes: Shapes | None = None
        self._readers: dict[object, Reader] = {}
        self._idle: list[Reader] = []
        self._keeping = 0

    def __len__(self) -> int:
        return self.n

    def sample(self, index: int) -> Batch:
        """One sample, collated alone."""
        return self._batch(self._fetch(apart=True).read([index])).to(
            self.device
        )

    def take(self, indices: Sequence[int]) -> Batch:
        """These samples, collated together (or `apart`), read in this process."""
        if self._in_memory and not self.apart:
            rows = torch.as_tensor(indices)
            tree = [t[rows] for t in cast(TensorDataset, self.dataset).tensors]
            return self._trusted(as_batch(tree, indices)).to(self.device)
        return self._batch(self._fetch(self.apart).read(indices)).to(
            self.device
        )

    def spread(self, most: int) -> list[int]:
        """Indices of at most so many samples at equal distances."""
        return sorted({i * self.n // most for i in range(most)})

    def both(self, indices: Sequence[int]) -> tuple[Batch, list[Batch]]:
        """Two samples or more, read once: collated together, and each collated alone."""
        whole, each = self._fetch(apart=False).both(indices)
        alone = self._batch(each).parts
        return self._batch(whole).to(self.device), [
            one.to(self.device) for one in alone
        ]

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside: the workers of a pass live on for the next one; at the end of the outermost they are gone."""
        self._keeping += 1
        try:
            yield
        finally:
            self._keeping -= 1
            if not self._keeping:
                self.close()

    def close(self) -> None:
        """End all workers, also those of passes that were not read to their end."""
        idle, self._idle = self._idle, []
        while self._readers:
            idle.append(self._readers.popitem()[1])
        for reader in idle:
            reader.close()

    def _started(self, chunks: Any, seed: int) -> Reader:
        """A reader of these chunks, with the workers of an earlier pass where there are some."""
        fetch = self._fetch(self.apart)
        for reader in self._idle:
            if reader.fetch.apart == self.apart:
                self._idle.remove(reader)
                break
        else:
            reader = Reader(self.dataset, fetch, loader_options(self.loader))
        reader.start(chunks, seed)
        return reader

    def _end(self, key: object) -> None:
        reader = self._readers.pop(key, None)
        if reader is None:
            return
        if self._keeping and reader.lives_on:
            self._idle.append(reader)
        else:
            reader.close()

    def _fetch(self, apart: bool) -> Fetch:
        return Fetch(self.dataset, self.loader.collate_fn, self.name, apart)

    def _batch(self, fetched: Fetched) -> Batch:
        """What was read, as a batch of these samples and no others."""
        if not fetched.apart and len(fetched.indices) > 1:
            return self._trusted(as_batch(fetched.trees[0], fetched.indices))
        parts = [
            as_batch(tree, [i])
            for i, tree in zip(fetched.indices, fetched.trees, strict=True)
        ]
        for part in parts:
            self._require_rows(part)
        return apart(parts)

    def _trusted(self, batch: Batch) -> Batch:
        """The batch, or its samples read again one by one.

        They are where they may have been changed to fit each other, and where there is not one row for each: a
        `collate_fn` that drops or repeats some.
        """
        right = batch.sliceable and (
            self.shapes is None or shapes_of(batch) == self.shapes
        )
        if right or batch.size == 1:
            return batch
        return self._batch(self._fetch(apart=True).read(batch.indices))

    def _require_rows(self, one: Batch) -> None:
        """Raise where nothing is left of a sample."""
        if one.leaves and all(t.dim() > 0 and len(t) == 0 for t in one.leaves):
            raise ValueError(
                LEFT_OUT.format(name=self.name, index=one.indices[0])
            )

    def ordered(
        self,
        batch_size: int | None = None,
        indices: Sequence[int] | None = None,
        text: str | None = None,
    ) -> Iterator[Batch]:
        """Every sample (or those of `indices`) once, in order, with a progress bar where `text` says what is done."""
        indices = range(self.n) if indices is None else indices
        size = min(
            self.batch_size if batch_size is None else batch_size,
            max(len(indices), 1),
        )
        chunks = [indices[i : i + size] for i in range(0, len(indices), size)]
        with progress_bar(
            text, total=len(indices), unit="sample", enabled=self.progress
        ) as bar:
            for batch in self._read(chunks, seed=0):
                yield batch
                bar.update(batch.size)

    def random(
        self, batch_size: int | None = None, *, seed: int
    ) -> Iterator[Batch]:
        """Random minibatches without end, all of the same size, through one iterator.

        They are independent of each other: taken in epochs, a minibatch would depend on the steps before it, and a
        recursion over them would be biased. One of size n is the whole set.
        """
        size = min(
            self.batch_size if batch_size is None else batch_size, self.n
        )
        for batch in self._read(RandomBatches(self.n, size, seed), seed):
            self.drawn += batch.size
            yield batch

    def labels(self, stored: bool = True) -> list[Any]:
        """Label of each sample: as `dataset.targets` (or tensors) has it, or by reading the samples.

        A few samples are read to see whether what the data set holds is true; with `stored=False` all of them are.
        """
        with random_state(0):
            known = stored_labels(self.dataset) if stored else None
            if known is None or not self._have(known):
                batches = self.ordered(
                    text=f"Reading the labels of {self.name}"
                )
                known = [
                    label for batch in batches for label in batch_labels(batch)
                ]
        return [plain(label) for label in known]

    def _have(self, labels: Sequence[Any]) -> bool:
        """Whether the samples have these labels, as far as a few of them tell."""
        if self._in_memory:
            return True
        for index in range(0, self.n, -(-self.n // COMPARED)):
            read = self._label_read(index)
            if not agree(labels[index], read):
                logger.info(
                    "%s: the labels that its dataset holds are not those of its samples (sample %d: %r, read: %r); "
                    "all are read",
                    self.name,
                    index,
                    plain(labels[index]),
                    plain(read),
                )
                return False
        return True

    def _label_read(self, index: int) -> Any:
        """Label of a sample as it is read; None where there is none, or the sample cannot be read, as its use says."""
        try:
            return batch_labels(self.sample(index))[0]
        except (TypeError, ValueError):
            return None

    def _read(self, chunks: Any, seed: int) -> Iterator[Batch]:
        if self._in_memory:
            for chunk in chunks:
                self.passed += len(chunk)
                yield self.take(chunk)
            return
        # by a key alone, since a frame that named the reader would keep its pipes as long as an exception is kept
        key = object()
        self._readers[key] = self._started(chunks, seed)
        try:
            for chunk in chunks:
                self.passed += len(chunk)
                yield self._batch(self._next(key, chunk)).to(self.device)
        finally:
            self._end(key)

    def _next(self, key: object, chunk: Sequence[int]) -> Fetched:
        """The samples of one chunk."""
        try:
            fetched = self._readers[key].read()
        except RuntimeError as error:
            where = f"{self.name}: a worker of its loader failed at samples {chunk[0]} to {chunk[-1]}"
            raise WorkerError(f"{where}: {error}") from error
        if isinstance(fetched, Fetched) and fetched.indices == list(chunk):
            return fetched
        try:
            raise fetched or RuntimeError(
                f"{self.name}: its loader ended before sample {chunk[0]} was read"
            )
        finally:
            del fetched  # an exception that its own frame holds is not freed

    @property
    def _in_memory(self) -> bool:
        return (
            type(self.dataset) is TensorDataset
            and self.loader.collate_fn is default_collate
        )


Shapes = tuple[tuple[int, ...], ...]


def shapes_of(batch: Batch) -> Shapes:
    """Shape of each tensor of a batch behind its first dimension."""
    return tuple(tuple(t.shape[1:]) for t in batch.leaves)


def varying_sample(samples: Samples, tries: int = 8) -> int | None:
    """Index of a sample that is not the same when read twice (random augmentation), or None."""
    step = max(samples.n // tries, 1)
    for index in range(0, samples.n, step)[:tries]:
        if varies(samples, index):
            return index
    return None


def varies(samples: Samples, index: int) -> bool:
    """Whether a sample is not the same when it is read twice."""
    first = samples.sample(index).leaves
    second = samples.sample(index).leaves
    return any(
        not same_numbers(a, b) for a, b in zip(first, second, strict=True)
    )


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN at the same places."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
