"""What a run has computed: entries of the finished test samples, their scores on disk, and the sum of these."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..influence import InfluenceFunction
from ..show.entries import entry, harmful_and_helpful
from ..show.lazy import Entry
from ..show.results import InfluenceResult
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

    def add(self, group: Group, labels: Sequence[Any]) -> None:
        """Keep and write a finished group: scores, then what says that they are there."""
        entries = self._entries(group, labels)
        self.rows.flush()
        self.files.write_part(entries, self.influence.report)
        self._keep(entries, group[1])

    def _entries(self, group: Group, labels: Sequence[Any]) -> dict[str, Any]:
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

    def take(self, entries: dict[str, dict[str, Any]]) -> None:
        """Keep test samples that an earlier start did, summed in groups as it did."""
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

    def _keep(self, entries: dict[str, Any], scores: Tensor) -> None:
        self.influences |= {key: Entry(one) for key, one in entries.items()}
        self.total += scores.sum(0, dtype=torch.float64).numpy()

    def finish(self, json: bool | str) -> InfluenceResult:
        """Write the result file; the entries, and the two orders by mean influence."""
        arrays = self.rows.finish()
        for one in self.influences.values():
            one.attach(arrays)
        whole = self.rows.fits_json(json)
        self.files.finish(pieces(self.influences) if whole else None)
        mean = self.total / max(len(self.influences), 1)
        return InfluenceResult(
            dict(self.influences), *harmful_and_helpful(mean)
        )
