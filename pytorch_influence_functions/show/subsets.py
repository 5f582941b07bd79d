"""A training set without its worst samples, or of its best ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)

from ..data.reader import loader_options
from .results import InfluenceResult

Some = int | float | Sequence[int]


def influential_subset(
    train_loader: DataLoader[Any],
    result: InfluenceResult | None = None,
    *,
    keep: Some | None = None,
    drop: Some | None = None,
) -> DataLoader[Any]:
    """A DataLoader over a part of the training set, with the settings of `train_loader`.

    `keep=100` are the 100 samples with the most helpful mean influence over the test samples of `result`, `keep=0.5`
    the better half, `drop=100` all but the 100 most harmful ones, `drop=0.1` all but the worst tenth. Indices are taken
    as they are, e.g. `drop=ptif.find_mislabelled(model, train_loader).flagged`; then no result is needed. The order of
    the training set stays.

    Args:
        train_loader: the loader of the run.
        result: of the run.
        keep: how many (int), what share (float below 1), or which (indices) to keep.
        drop: the same for what to leave out.

    Raises:
        ValueError: not exactly one of `keep` and `drop` is given, nothing would be left, the result is of another
            training set, or the loader draws its samples in a way that has no counterpart on a part of them.
    """
    if (keep is None) == (drop is None):
        raise ValueError(
            "keep, drop: expected exactly one of them: how many of the most helpful samples to keep, or how many of "
            "the most harmful ones to leave out"
        )
    n = len(train_loader.dataset)  # type: ignore[arg-type]
    if drop is not None:
        left_out = _chosen("drop", drop, n, result, helpful=False)
        kept = np.setdiff1d(np.arange(n), left_out)
    else:
        kept = np.unique(_chosen("keep", keep, n, result, helpful=True))
    if not len(kept):
        raise ValueError("keep, drop: no training sample would be left")
    return _like(train_loader, kept)


def _chosen(
    name: str,
    some: Any,
    n: int,
    result: InfluenceResult | None,
    helpful: bool,
) -> NDArray[np.int64]:
    """Indices that a number, a share or a list of them means."""
    if not isinstance(some, int | float | np.number):
        return _indices(name, some, n)
    count = _count(name, some, n)
    if result is None:
        raise ValueError(
            f"result: {name}={some!r} needs the result of a run; without one give the indices"
        )
    order = result.helpful if helpful else result.harmful
    if len(order) != n:
        raise ValueError(
            f"result: it is of {len(order)} training samples, and the loader has {n}"
        )
    return np.asarray(order[:count], dtype=np.int64)


def _count(
    name: str,
    some: Any,
    n: int,
) -> int:
    whole = isinstance(some, int | np.integer) and not isinstance(some, bool)
    if whole and 0 <= some <= n:
        return int(some)
    if isinstance(some, float) and 0 <= some < 1:
        return round(some * n)
    raise ValueError(
        f"{name}: expected a number of samples up to {n}, a share from 0 to 1, or indices, got {some!r}"
    )


def _indices(
    name: str,
    some: Any,
    n: int,
) -> NDArray[np.int64]:
    found = np.asarray(some)
    if not found.size:
        return np.zeros(0, dtype=np.int64)
    wrong = found.ndim != 1 or found.dtype.kind not in "iu"
    if wrong or found.min() < 0 or found.max() >= n:
        raise ValueError(
            f"{name}: expected a number, a share, or indices from 0 to {n - 1}, got {some!r:.60}"
        )
    return found.astype(np.int64)


def _like(
    loader: DataLoader[Any],
    kept: NDArray[np.int64],
) -> DataLoader[Any]:
    """A loader of these samples with the other's settings."""
    subset = Subset(loader.dataset, kept.tolist())
    return DataLoader(
        subset,
        batch_size=_batch_size(loader),
        sampler=_sampler(loader, subset, kept),
        drop_last=_drop_last(loader),
        collate_fn=loader.collate_fn,
        generator=loader.generator,
        persistent_workers=loader.persistent_workers,
        **loader_options(loader),
    )


def _batch_size(loader: DataLoader[Any]) -> int:
    size = getattr(loader.batch_sampler, "batch_size", None)
    if size is None:
        raise ValueError(
            "train_loader: its batch_sampler does not say how large its batches are, so that none can be made for a "
            "part of the samples; give a loader with a batch_size"
        )
    return int(size)


def _drop_last(loader: DataLoader[Any]) -> bool:
    return bool(getattr(loader.batch_sampler, "drop_last", loader.drop_last))


def _sampler(
    loader: DataLoader[Any],
    subset: Subset[Any],
    kept: NDArray[np.int64],
) -> Sampler[int]:
    """What draws the samples of a part as the loader's draws those of the whole."""
    own: Any = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if isinstance(own, SequentialSampler):
        return SequentialSampler(subset)
    if isinstance(own, WeightedRandomSampler):
        weights = own.weights[kept].tolist()
        count = _fewer(own.num_samples, kept, len(own.weights))
        return WeightedRandomSampler(
            weights, count, own.replacement, own.generator
        )
    if isinstance(own, RandomSampler):
        count = _fewer(own.num_samples, kept, len(own.data_source))
        return RandomSampler(subset, own.replacement, count, own.generator)
    raise ValueError(
        f"train_loader: its sampler is a {type(own).__name__}, which has no counterpart for a part of the samples; "
        "give a loader with shuffle=True or False"
    )


def _fewer(
    drawn: int,
    kept: NDArray[np.int64],
    n: int,
) -> int:
    """Samples that are drawn of a part, where so many were drawn of n."""
    return max(round(drawn * len(kept) / n), 1)
