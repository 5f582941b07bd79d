"""Labels of a data set, wherever it keeps them, as plain Python values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from .batch import Batch

LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def stored_labels(dataset: Any) -> Sequence[Any] | None:
    """Labels that a data set holds in memory (`targets`, `labels`, or the second tensor), or None."""
    if isinstance(dataset, Subset):
        whole = stored_labels(dataset.dataset)
        return None if whole is None else [whole[i] for i in dataset.indices]
    if type(dataset) is TensorDataset:
        return dataset.tensors[1] if len(dataset.tensors) > 1 else None  # type: ignore[return-value]
    for name in ("targets", "labels"):
        known = _column(getattr(dataset, name, None))
        if known is not None and len(known) == len(dataset):
            transform = getattr(dataset, "target_transform", None)
            return (
                [transform(label) for label in known]
                if callable(transform)
                else known
            )
    return None


def _column(held: Any) -> Sequence[Any] | None:
    """What a data set holds, as values in the order of its samples; None where it has no such order (a dict, a set)."""
    if isinstance(held, str | bytes):
        return None
    if isinstance(held, Sequence):
        return held
    if isinstance(held, Tensor | np.ndarray):
        return cast(Sequence[Any], held) if held.ndim > 0 else None
    # a column of pandas, whose [] is not by place
    values = held.tolist() if hasattr(held, "tolist") else None
    return values if isinstance(values, list) else None


def agree(held: Any, read: Any) -> bool:
    """Whether a label that a data set holds is the one that was read, as it is or as one-hot; None was not found."""
    one, other = plain(held), plain(read)
    if other is None or one == other:
        return True
    try:
        a = np.asarray(one, dtype=np.float64)
        b = np.asarray(other, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    if a.ndim == 0 and b.ndim == 1 and b.size > 1:
        return bool(b.argmax() == a)
    return a.size == b.size and bool(
        np.isclose(
            a.ravel(), b.ravel(), rtol=1e-6, atol=0, equal_nan=True
        ).all()
    )


def batch_labels(batch: Batch) -> list[Any]:
    """Labels of a batch: the rows of its second part, or of its `labels`, `label`, `targets`, `target` or `y`."""
    labels = labels_of(batch.tree)
    return (
        list(labels)
        if hasattr(labels, "__len__") and len(labels) == batch.size
        else [None] * batch.size
    )


def labels_of(tree: Any) -> Any:
    """The part of a batch that holds its labels, or None."""
    if isinstance(tree, list | tuple):
        return tree[1] if len(tree) > 1 else None
    if isinstance(tree, Mapping):
        held = (tree[key] for key in LABEL_KEYS if key in tree)
    else:
        held = (getattr(tree, key) for key in LABEL_KEYS if hasattr(tree, key))
    return next(held, None)


def with_labels(batch: Batch, labels: Sequence[Any]) -> Batch:
    """The same samples with other labels, one for each.

    Raises:
        TypeError: the batch holds no tensor of labels.
        ValueError: a label does not have the shape of those in the batch.
    """
    if batch.parts:
        pairs = zip(batch.parts, labels, strict=True)
        return batch._replace(
            parts=tuple(with_labels(one, [label]) for one, label in pairs)
        )
    held = labels_of(batch.tree)
    place = next((i for i, t in enumerate(batch.leaves) if t is held), None)
    if place is None:
        keys = ", ".join(LABEL_KEYS)
        raise TypeError(
            "labels: the batches hold no tensor of labels, which is their second part or one of "
            + keys
        )
    rows = [torch.as_tensor(label).to(held) for label in labels]
    wrong = next((row for row in rows if row.numel() != held[0].numel()), None)
    if wrong is not None:
        raise ValueError(
            f"labels: expected labels of shape {tuple(held[0].shape)}, as the batches hold, got {tuple(wrong.shape)}"
        )
    leaves = list(batch.leaves)
    leaves[place] = torch.stack(rows).view(held.shape)
    return batch._replace(leaves=leaves)


def plain(label: Any) -> Any:
    """A label as a Python number or (nested) list, whether it came as tensor, numpy scalar or number."""
    return label.tolist() if hasattr(label, "tolist") else label
