"""Pictures, texts and labels of the samples that a page shows, within a number of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.labels import plain
from ..data.reading import label_of
from .images import Look, data_uri

SIZES = (64, 48, 32, 24, 16)
"""Largest side of a thumbnail in pixels; the first that fits is taken."""
TRIED = 24
"""Samples from which the bytes of the others are estimated."""
HEAD = len("data:image/png;base64,")


class Gallery:
    """What is shown of samples, by the set and the index.

    Args:
        look: how samples are shown.
        megabytes: for all pictures together; smaller ones are taken where they would be more, then fewer.

    Attributes:
        images: PNG files in base64.
        texts: of samples that are no images.
        labels: by name.
    """

    def __init__(
        self,
        look: Look,
        megabytes: float,
    ) -> None:
        self.look = look
        self.left = megabytes * 1e6
        self.images: dict[str, dict[int, str]] = {"train": {}, "test": {}}
        self.texts: dict[str, dict[int, str]] = {"train": {}, "test": {}}
        self.labels: dict[str, dict[int, str]] = {"train": {}, "test": {}}

    def add(
        self,
        kind: str,
        dataset: Any,
        indices: Sequence[int],
    ) -> None:
        """Samples of the training or the test set, the most important first; nothing where the set is not known."""
        if dataset is None or not len(indices):
            return
        size = self._size(dataset, indices)
        for index in indices:
            sample = dataset[index]
            label = plain(label_of(sample))
            self.labels[kind][index] = self.look.label(label)
            shown = self.look.shown(sample)
            if isinstance(shown, str):
                self.texts[kind][index] = shown
            elif self.left > 0:
                image = data_uri(shown, size)[HEAD:]
                self.left -= len(image)
                self.images[kind][index] = image

    def _size(
        self,
        dataset: Any,
        indices: Sequence[int],
    ) -> int:
        """The largest thumbnails of which all fit."""
        some = indices[:: max(len(indices) // TRIED, 1)]
        shown = [self.look.shown(dataset[index]) for index in some]
        pixels = [one for one in shown if not isinstance(one, str)]
        for size in SIZES:
            length = sum(len(data_uri(one, size)) for one in pixels)
            if length * len(indices) <= self.left * len(some):
                return size
        return SIZES[-1]
