"""What a run returns: one entry per test sample, and the order of the training samples."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import stored
from .entries import harmful_and_helpful
from .groups import Groups, groups_of, labels_of
from .images import Look
from .lazy import row_of
from .report import write_page
from .table import notebook_table, to_dataframe


class Ranked(NamedTuple):
    """A training sample and its influence (units of the loss; positive is helpful)."""

    train_index: int
    influence: float


class _Triple(NamedTuple):
    influences: dict[str, dict[str, Any]]
    harmful: list[int]
    helpful: list[int]


class InfluenceResult(_Triple):
    """What a run returns; three values to unpack, and questions to ask.

    Attributes:
        influences: one entry per test sample, `"0"`, `"1"`, ...: `label`, `num_in_dataset` (its index in the test set),
            `time_calc_influence_s`, `influence` (n numbers: the predicted rise of this test sample's loss if the
            training sample is left out), `harmful`, `helpful` (the first `top_k` training indices),
            `relative_residual`; with r > 1 also `stderr` [n] of `influence`, and `resolved`: how many of the first k of
            each list would be there again in a repeated run.
        harmful: training indices, smallest (most negative) mean influence over the test samples first.
        helpful: training indices, largest mean influence first.
        meta: what the run's meta file holds (`config`, `solver`: what it did); empty where it is not known.
        train_set, test_set: the data sets of the run, for pictures; None where they are not known. They are not saved.
    """

    meta: Mapping[str, Any] = MappingProxyType({})
    train_set: Any = None
    test_set: Any = None

    def about(
        self,
        meta: Mapping[str, Any],
        train_set: Any = None,
        test_set: Any = None,
    ) -> InfluenceResult:
        """Itself, with what is known of the run."""
        self.meta = meta
        self.train_set, self.test_set = train_set, test_set
        return self

    # ---- the numbers

    @property
    def tests(self) -> list[str]:
        """Keys of the entries, in order."""
        return list(self.influences)

    @property
    def scores(self) -> NDArray[np.float64]:
        """Influence of each training sample on each test sample [tests, n]."""
        rows = [self.row(key) for key in self.influences]
        return np.stack(rows) if rows else np.zeros((0, len(self.harmful)))

    def row(
        self,
        test: int | str | None = None,
    ) -> NDArray[np.float64]:
        """Influences on one test sample [n], by its key or its place in the run; None is their mean over all.

        Raises:
            KeyError: the run has no such test sample.
        """
        if test is None:
            return self._mean()
        return row_of(self._entry(test), "influence")

    def _mean(self) -> NDArray[np.float64]:
        """Over all test samples [n], a row of them at a time."""
        total = np.zeros(len(self.harmful))
        for one in self.influences.values():
            total += row_of(one, "influence")
        return total / len(self.influences)

    def _entry(
        self,
        test: int | str,
    ) -> dict[str, Any]:
        key = str(test)
        if key not in self.influences:
            raise KeyError(
                f"test: the run has {len(self.influences)} test samples, named from 0 on, and none is {test}; "
                "its index in the test set is the entry's num_in_dataset"
            )
        return self.influences[key]

    def top(
        self,
        test: int | str | None = None,
        k: int = 10,
    ) -> list[Ranked]:
        """The k most helpful training samples of a test sample (None: of the mean over all), largest first."""
        return self._ranked(test, k, 1)

    def bottom(
        self,
        test: int | str | None = None,
        k: int = 10,
    ) -> list[Ranked]:
        """The k most harmful training samples of a test sample (None: of the mean over all), most negative first."""
        return self._ranked(test, k, 0)

    def _ranked(
        self,
        test: int | str | None,
        k: int,
        end: int,
    ) -> list[Ranked]:
        if isinstance(k, bool) or not isinstance(k, int) or k < 0:
            raise ValueError(
                f"k: expected a whole number of at least 0, got {k!r}"
            )
        row = self.row(test)
        order = harmful_and_helpful(row, k)[end]
        return [Ranked(index, float(row[index])) for index in order]

    def to_dataframe(
        self,
        k: int | None = None,
    ) -> Any:
        """A pandas DataFrame, one row per test and training sample, the most helpful first.

        Columns: `test`, `test_index`, `test_label`, `rank` (0 is the most helpful), `train_index`, `influence`, and
        `stderr` with r > 1.

        Args:
            k: only the k most helpful and the k most harmful of each test sample; None is all of them.

        Raises:
            ImportError: pandas is not installed.
        """
        return to_dataframe(self.influences, k)

    def harmful_groups(
        self,
        groups: Sequence[Any] | None = None,
    ) -> Groups:
        """Which groups of training samples do the harm: influences summed by group, the most harmful group first.

        Args:
            groups: name of the group of each training sample [n]: a class, where it comes from, a cluster; None is its
                label.

        Raises:
            ValueError: `groups` has another length, or is None where the training set is not known.
        """
        if groups is None and self.train_set is None:
            raise ValueError(
                "groups: expected a name for each training sample, as the result knows no training set: it was loaded "
                "or copied"
            )
        named = labels_of(self.train_set) if groups is None else groups
        tests = [entry["label"] for entry in self.influences.values()]
        return groups_of(self.scores, tests, named)

    # ---- files

    def save(
        self,
        path: str | os.PathLike[str],
    ) -> None:
        """Write the result to one file (`.npz`: arrays and JSON, no pickle); the data sets are not part of it."""
        stored.save(path, self.influences, self.meta)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
    ) -> InfluenceResult:
        """What `save` wrote, or an `influence_results_*.json` of a run with its meta file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is none of the two.
        """
        influences, meta = stored.load(path)
        rows = (row_of(one, "influence") for one in influences.values())
        mean = sum(rows, start=np.zeros(1)) / max(len(influences), 1)
        result = cls(influences, *harmful_and_helpful(np.atleast_1d(mean)))
        return result.about(meta)

    def to_html(
        self,
        path: str | os.PathLike[str],
        train_set: Any = None,
        test_set: Any = None,
        *,
        title: str = "Influence of training samples",
        predictions: Any = None,
        suspects: Any = None,
        groups: Sequence[Any] | None = None,
        k: int = 10,
        near: bool = True,
        megabytes: float = 5.0,
        **look: Any,
    ) -> Path:
        """Write the result as a page: one HTML file that needs no network and no server.

        It says what was computed and how good it is, and has tables that sort and filter: test samples with their most
        helpful and harmful training samples, suspicious labels, classes that harm each other, and duplicates across
        training and test set.

        Args:
            path: of the file.
            train_set, test_set: the data sets, for pictures and labels; None is those of the run, where known.
            title: of the page.
            predictions: what the model predicts, by index in the test set (a tensor, a list or a dict).
            suspects: what `find_mislabelled` returned; without it training samples go by their mean influence.
            groups: name of the group of each training sample [n]; None is its label.
            k: how many helpful and how many harmful training samples each test sample shows at most.
            near: whether duplicates are looked for; all samples of both sets are read for that.
            megabytes: of all pictures together; they get smaller and then fewer where they would be more.
            **look: `classes`, `view`, `mean`, `std`, `layout`, `invert`, as for `plot_influences`.

        Returns:
            The path of the file.
        """
        return write_page(
            path,
            self.influences,
            self.meta,
            self.train_set if train_set is None else train_set,
            self.test_set if test_set is None else test_set,
            title=title,
            predictions=predictions,
            suspects=suspects,
            groups=groups,
            k=k,
            near=near,
            megabytes=megabytes,
            look=Look(**look),
        )

    # ---- what it looks like

    def _repr_html_(self) -> str:
        """A table for notebooks, with thumbnails where the data are images."""
        return notebook_table(
            self.influences, self.train_set, self.test_set, Look()
        )

    def __repr__(self) -> str:
        """How large it is, and the ends of the mean."""
        return (
            f"InfluenceResult({len(self.influences)} test samples, {len(self.harmful)} training samples, "
            f"most harmful {_few(self.harmful)}, most helpful {_few(self.helpful)})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copies and processes get the numbers, not the data sets."""
        return {"meta": dict(self.meta)}


def _few(indices: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, indices[:3])) + ", ...]"
