"""What a loader must be, found before any long work."""

from __future__ import annotations

import logging
from typing import Any

from torch.utils.data import BatchSampler, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

logger = logging.getLogger(__name__)


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
