"""Labels of a data set, wherever it keeps them, as plain Python values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

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


def plain(label: Any) -> Any:
    """A label as a Python number or (nested) list, whether it came as tensor, numpy scalar or number."""
    return label.tolist() if hasattr(label, "tolist") else label
