"""What reads samples and collates them, in this process or in a worker: each index once, or an error that names it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""What is no fault of a sample."""


class Fetched(NamedTuple):
    """Samples that were read and collated."""

    indices: list[int]
    trees: list[Any]
    """One batch of all samples, or a batch of one for each."""
    apart: bool
    """Whether there is a batch for each sample."""


class Fetch:
    """Reads samples of a data set and collates them with the user's `collate_fn`.

    Args:
        dataset: the user's data set.
        collate: the user's `collate_fn`.
        name: what messages call the loader.
        apart: whether each sample is collated alone.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        name: str,
        apart: bool,
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.name = name
        self.apart = apart

    def __call__(self, indices: Sequence[int]) -> Fetched | Exception:
        """The samples, or the error that says which of them fails: raised in a worker it would lose its sentence."""
        try:
            return self.read(indices)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            return error

    def read(self, indices: Sequence[int]) -> Fetched:
        """The samples, together where they can be.

        Raises:
            TypeError, ValueError: a sample cannot be read or collated; the message names it.
        """
        samples = self._samples(indices)
        if not self.apart and len(samples) > 1:
            try:
                return Fetched(
                    list(indices), [self.collate(list(samples))], apart=False
                )
            except Exception:  # samples of different shapes, a broken one: each alone says which
                pass
        trees = [
            self._alone(index, sample)
            for index, sample in zip(indices, samples, strict=True)
        ]
        return Fetched(list(indices), trees, apart=self.apart or len(trees) > 1)

    def both(self, indices: Sequence[int]) -> tuple[Fetched, Fetched]:
        """The samples together where they can be, and each alone, read once: augmentation would make others of them."""
        samples = self._samples(indices)
        alone = [
            self._alone(index, sample)
            for index, sample in zip(indices, samples, strict=True)
        ]
        each = Fetched(list(indices), alone, apart=True)
        try:
            whole = self.collate(list(samples))
        except Exception:  # of different shapes
            return each, each
        return Fetched(list(indices), [whole], apart=False), each

    def _samples(self, indices: Sequence[int]) -> list[Any]:
        many = getattr(self.dataset, "__getitems__", None)
        if not callable(many) or len(indices) == 1:
            return [self._one(index) for index in indices]
        try:
            samples = list(many(list(indices)))
        except Exception:  # one of them fails: each alone says which
            return [self._one(index) for index in indices]
        if len(samples) != len(indices):
            raise ValueError(
                f"{self.name}: __getitems__ of its dataset gave {len(samples)} samples for {len(indices)} indices; "
                "expected one for each, in their order"
            )
        return samples

    def _one(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            raise _told(
                f"{self.name}: sample {index} of its dataset cannot be read",
                error,
            ) from error

    def _alone(self, index: int, sample: Any) -> Any:
        try:
            return self.collate([sample])
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            filtered = sample is None and self.collate is not default_collate
            if filtered:  # nothing is left of it
                reason = LEFT_OUT.format(name=self.name, index=index)
                raise _UnreadableValueError(reason) from error
            raise _told(
                f"{self.name}: its collate_fn fails on sample {index} alone (a {type(sample).__name__})",
                error,
            ) from error


LEFT_OUT = (
    "{name}: its collate_fn leaves out sample {index} (it gives no row for it alone), but influence is given for each "
    "sample; leave it out of the data set: torch.utils.data.Subset"
)


class UnreadableError(Exception):
    """A sample cannot be read: no way of computing is to blame, so that none is left for another one."""


class _UnreadableValueError(UnreadableError, ValueError): ...


class _UnreadableTypeError(UnreadableError, TypeError): ...


class WorkerError(UnreadableError, RuntimeError):
    """A worker of a loader has failed."""


def _told(what: str, error: Exception) -> UnreadableError:
    """The error of the user's code in one sentence; a StopIteration, which would end a pass in silence, too."""
    wrong_type = isinstance(error, TypeError)
    kind = _UnreadableTypeError if wrong_type else _UnreadableValueError
    lines = str(error).splitlines()
    return kind(
        f"{what}: {type(error).__name__}" + (f": {lines[0]}" if lines else "")
    )


class Indices(Dataset[int]):
    """Stands for the data set in a DataLoader, whose `collate_fn` reads: gives the indices as they come.

    A `worker_init_fn` finds the attributes of the data set on it, and may set them.
    """

    def __init__(self, dataset: Any) -> None:
        vars(self)["dataset"] = dataset

    def __getitems__(self, indices: list[int]) -> list[int]:
        return indices

    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return len(vars(self)["dataset"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["dataset"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["dataset"], name, value)


class RandomBatches(Sampler[list[int]]):
    """Endless minibatches, each a random sample without repeats and independent of the others."""

    def __init__(self, n: int, size: int, seed: int) -> None:
        self.n, self.size, self.seed = n, size, seed

    def __iter__(self) -> Iterator[list[int]]:
        generator = random.Random(self.seed)
        while True:
            yield generator.sample(range(self.n), self.size)


def loader_options(loader: DataLoader[Any]) -> dict[str, Any]:
    """The user's options of reading."""
    names = [
        "num_workers",
        "pin_memory",
        "timeout",
        "worker_init_fn",
        "multiprocessing_context",
    ]
    names += ["prefetch_factor"] if loader.num_workers > 0 else []
    return {name: getattr(loader, name) for name in names}


class _Chunks:
    """A batch sampler whose batches of indices are given anew for each pass."""

    now: Iterable[Sequence[int]] = ()

    def __iter__(self) -> Iterator[Sequence[int]]:
        return iter(self.now)


class Reader:
    """A DataLoader of a data set whose workers live on from one pass to the next.

    Args:
        dataset: the user's.
        fetch: reads and collates the samples of some indices.
        options: of reading, as `loader_options` gives them.
    """

    def __init__(
        self, dataset: Any, fetch: Fetch, options: dict[str, Any]
    ) -> None:
        self.fetch = fetch
        self.lives_on = options["num_workers"] > 0
        self._chunks, self._generator = _Chunks(), torch.Generator()
        self._loader = DataLoader(
            Indices(dataset),
            batch_sampler=self._chunks,  # type: ignore[arg-type]
            collate_fn=fetch,
            generator=self._generator,
            persistent_workers=self.lives_on,
            **options,
        )
        self._iterator: Iterator[Any] = iter(())

    def start(self, chunks: Iterable[Sequence[int]], seed: int) -> None:
        """Begin a pass over these chunks of indices; what an earlier one left unread is thrown away."""
        self._chunks.now = chunks
        self._generator.manual_seed(seed)
        self._iterator = iter(self._loader)

    def read(self) -> Any:
        """What was read of the next chunk; None at the end."""
        return next(self._iterator, None)

    def close(self) -> None:
        """End the workers now: an exception's traceback would keep them alive."""
        shutdown = getattr(self._iterator, "_shutdown_workers", None)
        if callable(shutdown):
            shutdown()


UNKNOWN_SIZE = 32
"""Of a batch sampler that does not say how large its batches are: what the documentation's examples use."""


def batch_size_of(loader: DataLoader[Any], n: int, name: str) -> int:
    """Samples in one of the loader's batches; its batch sampler is not read, since that may change it.

    Raises:
        ValueError: it has no batches.
    """
    batches: Any = loader.batch_sampler
    size = loader.batch_size or getattr(batches, "batch_size", None)
    if size:
        return int(size)
    if not hasattr(batches, "__len__"):
        return UNKNOWN_SIZE
    if len(batches) == 0:
        raise ValueError(
            f"{name}: its batch_sampler has no batch; give one, or a batch_size"
        )
    if isinstance(batches, Sequence):
        return max(len(batches[0]), 1)
    return -(-n // len(batches))
