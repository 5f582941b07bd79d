"""Which groups of training samples (classes, sources, clusters) do the harm."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.frame import frame
from ..data.labels import plain, stored_labels
from ..data.reading import label_of

Floats = NDArray[np.float64]
COLUMNS = ("group", "size", "influence", "harm", "harm_per_sample", "worst")


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """Groups of training samples, the most harmful first.

    Attributes:
        group: names [G].
        size: training samples of each [G].
        influence: predicted rise of the mean test loss if the whole group is left out, to first order [G].
        harm: what of it comes from samples with a negative influence, so at most 0 [G].
        worst: the test label to which the group does most harm [G].
        test_labels: in their order [T].
        matrix: influence of each group on the mean loss of the tests of each label [G, T].
    """

    group: list[Any]
    size: NDArray[np.int64]
    influence: Floats
    harm: Floats
    worst: list[Any]
    test_labels: list[Any]
    matrix: Floats

    @property
    def harm_per_sample(self) -> Floats:
        """Harm over size [G]: which groups are the worst to have more of."""
        return self.harm / self.size

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict a group."""
        columns = [list(plain(getattr(self, name))) for name in COLUMNS]
        return [
            dict(zip(COLUMNS, row, strict=True))
            for row in zip(*columns, strict=True)
        ]

    def to_dataframe(self) -> Any:
        """A pandas DataFrame, one row a group.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame({name: getattr(self, name) for name in COLUMNS})


def labels_of(dataset: Any) -> list[Any]:
    """Label of each sample of a data set, as it holds them, or by reading the samples."""
    known = stored_labels(dataset)
    if known is None:
        known = [label_of(dataset[i]) for i in range(len(dataset))]
    return [name_of(label) for label in known]


def name_of(label: Any) -> Any:
    """A label as something that groups can be named by."""
    value = plain(label)
    if isinstance(value, list):
        return value[0] if len(value) == 1 else str(value)
    return value


def groups_of(
    scores: Floats,
    test_labels: Sequence[Any],
    groups: Sequence[Any],
) -> Groups:
    """Influences [tests, n] summed over the groups of the n training samples.

    Raises:
        ValueError: there is not one group for each training sample.
    """
    if len(groups) != scores.shape[1]:
        raise ValueError(
            f"groups: expected a name for each of the {scores.shape[1]} training samples, got {len(groups)}"
        )
    names, place = _numbered(groups)
    labels, test_place = _numbered(test_labels)
    member = np.eye(len(names))[place]
    sums = scores @ member
    harm = (np.minimum(scores, 0) @ member).mean(0)
    matrix = _mean_by(sums, test_place, len(labels))
    order = np.argsort(harm, kind="stable")
    worst = matrix.argmin(0)
    return Groups(
        [names[i] for i in order],
        member.sum(0).astype(np.int64)[order],
        sums.mean(0)[order],
        harm[order],
        [labels[worst[i]] for i in order],
        labels,
        matrix.T[order],
    )


def _numbered(names: Sequence[Any]) -> tuple[list[Any], NDArray[np.int64]]:
    """The different names in their order, and which of them each is."""
    values = [name_of(name) for name in names]
    different = list(dict.fromkeys(values))
    if all(isinstance(name, int | float) for name in different):
        different.sort()
    number = {name: i for i, name in enumerate(different)}
    return different, np.array([number[name] for name in values], dtype=int)


def _mean_by(
    rows: Floats,
    place: NDArray[np.int64],
    count: int,
) -> Floats:
    """Mean of the rows [K, G] of each of `count` labels -> [count, G]."""
    of_label = np.eye(count)[place]
    means: Floats = (of_label.T @ rows) / of_label.sum(0)[:, None]
    return means
