"""Labels of a data set, wherever it keeps them, as plain Python values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
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
    values = (
        held.tolist() if hasattr(held, "tolist") else None
    )  # a column of pandas, whose [] is not by place
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
    tree: Any = batch.tree
    if isinstance(tree, Mapping):
        tree = (
            None,
            next((tree[key] for key in LABEL_KEYS if key in tree), None),
        )
    elif not isinstance(tree, list | tuple):
        tree = (
            None,
            next(
                (
                    getattr(tree, key)
                    for key in LABEL_KEYS
                    if hasattr(tree, key)
                ),
                None,
            ),
        )
    labels: Any = tree[1] if len(tree) > 1 else None
    return (
        list(labels)
        if hasattr(labels, "__len__") and len(labels) == batch.size
        else [None] * batch.size
    )


def plain(label: Any) -> Any:
    """A label as a Python number or (nested) list, whether it came as tensor, numpy scalar or number."""
    return label.tolist() if hasattr(label, "tolist") else label
