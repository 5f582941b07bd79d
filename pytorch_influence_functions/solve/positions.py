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
from ..model.layer_passes import Forward, Inputs
from ..model.layers import Layer

ROWS_PER_INPUT, LEAST_POSITIONS = 8, 8
"""How many positions are taken for each input of the layer, over all training samples, and at least of each sample.
Of a ResNet-18 at width 16 (up to 1024 positions, 256 samples, one draw) EKFAC's scores rank the training samples as
with all positions and directions to 0.995, as they do with 32 rows."""
POSITIONS = 2
"""The stream of random positions, apart from those of draws and signs; each layer has its own after it."""


class Positions(NamedTuple):
    """What decides which positions of a sample are taken."""

    n: int
    """Training samples."""
    seed: int

    def some_inputs(
        self, layers: Sequence[Layer], seen: Forward, batch: Batch
    ) -> list[Tensor]:
        """Of each layer, scaled [B, S, groups, in]; one-hot inputs and sums over positions are as they are."""
        return [
            self._of_call(layer, i, seen, batch)
            for i, layer in enumerate(layers)
        ]

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

    def _of_call(
        self, layer: Layer, i: int, seen: Forward, batch: Batch
    ) -> Tensor:
        """Of a layer that finds some of its inputs without the others, those alone are built."""
        xs, outs = seen.raw[i], seen.outs[i]
        wanted = self._wanted(layer)
        if len(xs) == 1 and outs[0].dim() > 2 and wanted is not None:
            count = int(outs[0][0, 0].numel())  # of pixels
            if wanted < count:
                places = self._places(batch, count, wanted, i, outs[0].device)
                rows = layer.some_inputs(xs[0].to(seen.theta), places)
                if rows is not None:
                    scaled: Tensor = rows * (count / wanted) ** 0.5
                    return scaled
        one = Forward([xs], [outs], seen.y, seen.rebuild, seen.theta)
        inputs = Inputs([layer], one, batch.size)[0]
        return self.some_of(layer, i, inputs, batch)

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
