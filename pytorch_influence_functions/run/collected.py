"""What a run has computed: entries of the finished test samples, their scores on disk, and the sum of these."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..influence import InfluenceFunction
from ..show.entries import entry, harmful_and_helpful
from ..show.lazy import Entry, attached
from ..show.results import InfluenceResult
from ..utils import as_json
from .files import RunFiles
from .modes import Group
from .scores import ScoreRows, pieces


class Collected:
    """Entries of the finished test samples, and the sum of their influences.

    Args:
        files: of the run.
        influence: of the model.
        rows: where the scores go.
    """

    def __init__(
        self, files: RunFiles, influence: InfluenceFunction, rows: ScoreRows
    ) -> None:
        self.files, self.influence, self.rows = files, influence, rows
        self.influences: dict[str, Entry] = {}
        self.total = np.zeros(influence.samples.n)

    def add(
        self,
        group: Group,
        labels: Sequence[Any],
    ) -> None:
        """Keep and write a finished group: scores, then what says that they are there."""
        entries = self._entries(group, labels)
        self.rows.flush()
        self.files.write_part(entries, self.influence.report)
        self._keep(entries, group[1])

    def _entries(
        self,
        group: Group,
        labels: Sequence[Any],
    ) -> dict[str, Any]:
        part, scores, chains, residual, seconds = group
        first = len(self.influences)
        return {
            str(first + k): entry(
                scores[k].numpy(),
                label=labels[k],
                index=index,
                seconds=seconds,
                residual=float(residual[k]),
                top_k=self.influence.config.top_k,
                chains=None if chains is None else chains[:, k].numpy(),
                keep=functools.partial(self.rows.put, first + k),
            )
            for k, index in enumerate(part)
        }

    def take(
        self,
        entries: dict[str, dict[str, Any]],
    ) -> None:
        """Keep test samples that an earlier start did."""
        size = self.influence.group_size
        keys = list(entries)
        for start in range(0, len(keys), size):
            part = {key: entries[key] for key in keys[start : start + size]}
            first = len(self.influences)
            scores = self.rows.read(first, first + len(part))
            named = (self.rows.named(int(key)) for key in part)
            both = zip(part.items(), named, strict=True)
            self._keep(
                {key: {**one, **rows} for (key, one), rows in both},
                torch.from_numpy(scores),
            )

    def _keep(
        self,
        entries: dict[str, Any],
        scores: Tensor,
    ) -> None:
        self.influences |= {key: Entry(one) for key, one in entries.items()}
        # one at a time: the sum does not depend on which of them came together
        for row in scores.numpy():
            self.total += row

    def finish(
        self,
        in_json: bool | str,
    ) -> InfluenceResult:
        """Write the result file; the entries, and the two orders by mean influence."""
        arrays = self.rows.finish()
        for one in self.influences.values():
            one.attach(arrays)
        whole = self.rows.fits_json(in_json)
        self.files.finish(pieces(self.influences) if whole else None)
        mean = self.total / max(len(self.influences), 1)
        return InfluenceResult(
            dict(self.influences), *harmful_and_helpful(mean)
        )


class Plain(NamedTuple):
    """A result whose scores are named, not held: what one process tells another."""

    entries: dict[str, dict[str, Any]]
    harmful: list[int]
    helpful: list[int]
    meta: str
    """As JSON."""


def plain(
    result: InfluenceResult,
) -> Plain:
    """A result of a run, as another process can be told it."""
    entries = {key: one.named() for key, one in _entries(result).items()}
    meta = {**result.meta, "config": None}
    return Plain(entries, result.harmful, result.helpful, as_json(meta))


def rebuilt(
    told: Plain,
    options: Config,
) -> InfluenceResult:
    """The result that another process has told of; it reads the same files."""
    entries = attached(told.entries, options.out_folder)
    result = InfluenceResult(dict(entries), told.harmful, told.helpful)
    return result.about({**json.loads(told.meta), "config": options.asdict()})


def _entries(
    result: InfluenceResult,
) -> dict[str, Entry]:
    return result.influences  # type: ignore[return-value]
