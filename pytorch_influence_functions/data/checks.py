"""What a loader must be, found before any long work."""

from __future__ import annotations

import logging
import operator
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

logger = logging.getLogger(__name__)
NEEDED = (
    "batch_sampler",
    "sampler",
    "batch_size",
    "collate_fn",
    "num_workers",
    "prefetch_factor",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
)
"""What is read of a loader."""


def check_loader(loader: Any, name: str) -> None:
    """Raise where a loader cannot be read by index; warn where its sampler leaves samples out."""
    if not hasattr(loader, "dataset"):
        raise TypeError(
            f"{name}: expected a torch DataLoader, got {type(loader).__name__}; "
            "wrap the data set: DataLoader(dataset, batch_size=32)"
        )
    lacks = [name for name in NEEDED if not hasattr(loader, name)]
    if lacks:
        raise TypeError(
            f"{name}: expected a torch DataLoader, got {type(loader).__name__}, which has no {', '.join(lacks)}; pass "
            "the DataLoader inside it, or wrap its data set: DataLoader(loader.dataset, batch_size=32)"
        )
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not (
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    ):
        raise TypeError(
            f"{name}: its dataset ({type(dataset).__name__}) has no length or no index, but influence is given per "
            "sample; use a map-style dataset with __len__ and __getitem__, e.g. a list of the samples"
        )
    if len(dataset) == 0:
        raise ValueError(
            f"{name}: its dataset ({type(dataset).__name__}) is empty; expected at least one sample"
        )
    if loader.batch_sampler is None:
        raise ValueError(
            f"{name}: it has batch_size=None, so one item of its dataset is not one sample; "
            "give a DataLoader with a batch_size over single samples"
        )
    unused = _unused(loader)
    if unused is not None:
        logger.warning(
            "%s: its sampler (%s) is not used: all %d samples of its dataset count, each once. "
            "To leave some out, pass a DataLoader over torch.utils.data.Subset.",
            name,
            type(unused).__name__,
            len(dataset),
        )


def _unused(loader: Any) -> Any | None:
    """The sampler that does not give every sample once in each epoch, if there is one."""
    sampler, n = loader.sampler, len(loader.dataset)
    if type(loader.batch_sampler) is not BatchSampler:
        return loader.batch_sampler
    if isinstance(sampler, RandomSampler):
        return (
            sampler if sampler.replacement or sampler.num_samples != n else None
        )
    if isinstance(sampler, DistributedSampler):
        return sampler if sampler.num_replicas > 1 else None
    return None if isinstance(sampler, SequentialSampler) else sampler


def require_whole(
    value: Any, name: str, least: int, most: int | None = None
) -> int:
    """An argument that is a whole number from `least` to `most`.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of range.
    """
    expected = f"{least} to {most}" if most is not None else f"at least {least}"
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(
            f"{name}: expected a whole number ({expected}), got {value!r}"
        ) from error
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number
