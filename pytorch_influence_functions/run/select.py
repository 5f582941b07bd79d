"""Which test samples a run takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader

from ..config import Config
from ..data.checks import require_whole
from ..data.samples import Samples
from ..utils import as_json


def select_test_samples(options: Config, labels: Sequence[Any]) -> list[int]:
    """Indices of the test samples that the options ask for: so many of each class from a position on, or all."""
    if not options.test_sample_num and not options.start:
        return list(range(len(labels)))
    by_class = indices_per_class(labels, options.num_classes)
    return [
        i
        for c in by_class
        for i in slice_of_class(
            by_class[c], c, options.start, options.test_sample_num or None
        )
    ]


def require_writable(labels: Sequence[Any], indices: Sequence[int]) -> None:
    """Raise `TypeError` where a test sample's label is nothing that the result file can hold."""
    for index in indices:
        try:
            as_json(labels[index])
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"test_loader: the label of sample {index} is a {type(labels[index]).__name__}, which the result file "
                "cannot hold; expected a number, a string or a list of them"
            ) from error


class ByClass(dict[int, list[int]]):
    """Indices per class, looked up by a number or by its string, as old scripts do."""

    def __missing__(self, key: Any) -> list[int]:
        if isinstance(key, str) and key.lstrip("-").isdigit():
            return self[int(key)]
        raise KeyError(key)


def indices_per_class(
    labels: Sequence[Any], num_classes: int | None = None
) -> dict[int, list[int]]:
    """{class: indices}, for the classes 0 to num_classes - 1 or those that occur.

    Raises:
        ValueError: the labels are not whole numbers.
    """
    rows: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        label = (
            label[0] if isinstance(label, list) and len(label) == 1 else label
        )
        if (
            not isinstance(label, int | float)
            or not math.isfinite(label)
            or int(label) != label
        ):
            raise ValueError(
                f"test_loader: test samples are taken per class, which needs whole numbers as labels, but the label of "
                f"sample {index} is {label!r}; set config['test_sample_num'] and ['test_sample_start_per_class'] to "
                "False for the whole test set"
            )
        rows.setdefault(int(label), []).append(index)
    classes = sorted(rows) if num_classes is None else range(num_classes)
    return {c: rows.get(c, []) for c in classes}


def slice_of_class(
    rows: list[int], class_id: int, start: int, num: int | None
) -> list[int]:
    """`num` indices of one class from position `start` on; all that follow for None."""
    stop = len(rows) if num is None else start + int(num)
    if stop > len(rows) or start >= max(len(rows), 1):
        raise ValueError(
            f"test_loader: class {class_id} has {len(rows)} samples, but {'all' if num is None else num} from position "
            f"{start} on are asked for; lower config['test_sample_num'] or config['test_sample_start_per_class']"
        )
    return rows[start:stop]


def get_dataset_sample_ids_per_class(
    class_id: int,
    num_samples: int,
    test_loader: DataLoader[Any],
    start_index: int = 0,
) -> list[int]:
    """Indices of `num_samples` samples of one class, from its `start_index`-th on, in the order of the data set.

    Raises:
        ValueError: the class has fewer samples.
    """
    rows = _indices_of_loader(test_loader).get(class_id, [])
    return _slice(rows, class_id, num_samples, start_index)


def get_dataset_sample_ids(
    num_samples: int,
    test_loader: DataLoader[Any],
    num_classes: int | None = None,
    start_index: int = 0,
) -> tuple[dict[int, list[int]], list[int]]:
    """`num_samples` indices of each class, from its `start_index`-th sample on.

    Returns:
        `({class: indices}, indices)`, the second a class after the other. The dict takes a class as number or string.

    Raises:
        ValueError: a class has fewer samples.
    """
    by_class = _indices_of_loader(test_loader, num_classes)
    chosen = ByClass()
    for c, rows in by_class.items():
        chosen[c] = _slice(rows, c, num_samples, start_index)
    return chosen, [i for rows in chosen.values() for i in rows]


def _indices_of_loader(
    test_loader: DataLoader[Any], num_classes: int | None = None
) -> dict[int, list[int]]:
    labels = Samples(test_loader, name="test_loader", progress=False).labels()
    return indices_per_class(labels, num_classes)


def _slice(rows: list[int], class_id: int, num: Any, start: Any) -> list[int]:
    """`slice_of_class`, of what a caller gives."""
    num = require_whole(num, "num_samples", 0)
    start = require_whole(start, "start_index", 0)
    return slice_of_class(rows, class_id, start, num)
