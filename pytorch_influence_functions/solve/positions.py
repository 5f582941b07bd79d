r"""The inputs of a layer at a random part of its positions: what the factor of its inputs is estimated from.

Of T positions of a sample S are taken, one at random in each of S parts of equal length, and scaled by \sqrt{T / S}:
the mean of their second moment is that of all. They are keyed by the sample and the layer, so that the factor does not
depend on how samples are put into batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batch import Batch
from ..model import draws
from ..model.layer_kinds import Sums
from ..model.layer_passes import Inputs
from ..model.layers import Layer

ROWS_PER_INPUT, LEAST_POSITIONS = 8, 8
"""How many positions are taken for each input of the layer, over all training samples, and at least of each sample.
Of a ResNet-18 at width 16 (up to 1024 positions, 256 samples, one draw) EKFAC's scores rank the training samples as
with all positions and directions to 0.995 (two seeds)."""
POSITIONS = 2
"""The stream of random positions, apart from those of draws and signs; each layer has its own after it."""


class Positions(NamedTuple):
    """What decides which positions of a sample are taken."""

    n: int
    """Training samples."""
    seed: int

    def some_inputs(
        self,
        layers: Sequence[Layer],
        inputs: Inputs,
        counts: Sequence[int],
        batch: Batch,
    ) -> list[Tensor]:
        """Of each layer, of so many positions, scaled [B, S, groups, in]; one-hot inputs and sums as they are."""
        result = []
        for i, (layer, count) in enumerate(zip(layers, counts, strict=True)):
            rows = self._found(layer, i, inputs.once(i), count, batch)
            if rows is None:
                rows = self.some_of(layer, i, inputs[i], batch)
            result.append(rows)
        return result

    def some_of(
        self, layer: Layer, i: int, inputs: Tensor, batch: Batch
    ) -> Tensor:
        """The same of all inputs of the i-th layer [B, T, groups, in]."""
        count = inputs.shape[1]
        wanted = self._wanted(layer)
        if wanted is None or wanted >= count:
            return inputs
        places = self._places(batch, count, wanted, i, inputs.device)
        samples = torch.arange(len(inputs), device=inputs.device).unsqueeze(1)
        rows: Tensor = inputs[samples, places] * (count / wanted) ** 0.5
        return rows

    def _found(
        self, layer: Layer, i: int, x: Tensor | None, count: int, batch: Batch
    ) -> Tensor | None:
        """Of a layer that finds some of its inputs without the others, those alone are built."""
        wanted = self._wanted(layer)
        if x is None or wanted is None or wanted >= count:
            return None
        places = self._places(batch, count, wanted, i, x.device)
        rows = layer.some_inputs(x, places)
        if rows is None:
            return None
        scaled: Tensor = rows * (count / wanted) ** 0.5
        return scaled

    def _wanted(self, layer: Layer) -> int | None:
        """How many of a sample; None where there is nothing to choose from."""
        if isinstance(layer.rule, Sums) or layer.classes is not None:
            return None
        rows = ROWS_PER_INPUT * layer.fan_in
        return max(LEAST_POSITIONS, math.ceil(rows / self.n))

    def _places(
        self,
        batch: Batch,
        count: int,
        wanted: int,
        i: int,
        device: torch.device,
    ) -> Tensor:
        """One of each part of the positions [B, S]."""
        stream = POSITIONS + i
        u = draws.uniform(self.seed, batch.indices, wanted, device, stream)
        places = (torch.arange(wanted, device=device) + u) * (count / wanted)
        return places.long().clamp_max_(count - 1)
