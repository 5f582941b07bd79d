"""Samples as something to look at: pixels of images of any layout, text of everything else."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.labels import plain
from ..data.reading import input_of, plain_array

Pixels = NDArray[np.uint8]
CHANNELS = (1, 3, 4)
SMALLEST_IMAGE = 4
"""A matrix with fewer rows or columns is a table, not a picture."""
LONGEST_TEXT = 140


@dataclass(frozen=True)
class Look:
    """How samples are shown.

    Args:
        view: input of a sample -> what to show (an image, a text, a row); e.g. `lambda x: x.view(8, 8)`, or the words
            of token numbers. None shows the input as it is.
        mean, std: of the normalisation that the images went through, a number or one for each channel; the picture is
            `x * std + mean`.
        layout: `"CHW"`, `"HWC"` or `"HW"`; None takes the dimension of 1, 3 or 4 as that of the channels, the first
            one where there are two.
        invert: dark on light, for grey images whose background is 0.
        classes: names of the labels, in their order.

    Raises:
        ValueError: `layout` is none of these.
    """

    view: Callable[[Any], Any] | None = None
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    layout: str | None = None
    invert: bool = False
    classes: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.layout not in (None, "CHW", "HWC", "HW"):
            raise ValueError(
                f"layout: expected 'CHW', 'HWC', 'HW' or None to find it, got {self.layout!r}"
            )

    def label(
        self,
        label: Any,
    ) -> str:
        """A label by its name, where there is one."""
        value = plain(label)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        known = (
            self.classes is not None
            and isinstance(value, int)
            and 0 <= value < len(self.classes)
        )
        if known:
            return str(self.classes[value])  # type: ignore[index]
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    def shown(
        self,
        sample: Any,
    ) -> Pixels | str:
        """A sample of a data set as pixels [H, W, 3] of uint8, or as text."""
        value = input_of(sample)
        value = self.view(value) if self.view else value
        if isinstance(value, str):
            return value
        image = self._channels_last(value)
        return as_text(value) if image is None else self._pixels(image)

    def _channels_last(
        self,
        value: Any,
    ) -> NDArray[Any] | None:
        """An image as [H, W, C]; None where it is none."""
        try:
            array = np.asarray(plain_array(value))
        except (TypeError, ValueError):
            return None
        if array.dtype.kind not in "fuib" or array.ndim not in (2, 3):
            return None
        if array.ndim == 2:
            whole = array[..., None]
        elif self._channels_first(array.shape):
            whole = np.moveaxis(array, 0, -1)
        else:
            whole = array
        fits = whole.shape[-1] in CHANNELS and min(whole.shape[:2]) >= (
            SMALLEST_IMAGE
        )
        return whole if fits else None

    def _channels_first(
        self,
        shape: Sequence[int],
    ) -> bool:
        if self.layout is not None:
            return self.layout == "CHW"
        return shape[0] in CHANNELS

    def _pixels(
        self,
        image: NDArray[Any],
    ) -> Pixels:
        """[H, W, C] of any range as [H, W, 3] of 0 to 255."""
        whole = image.dtype.kind in "uib"
        x = image.astype(np.float64)
        if self.mean is not None or self.std is not None:
            x = x * np.asarray(1.0 if self.std is None else self.std)
            x = x + np.asarray(0.0 if self.mean is None else self.mean)
        x = np.nan_to_num(x)
        x = _to_unit(x, whole)
        x = x[..., :3] if x.shape[-1] > 1 else np.repeat(x, 3, axis=-1)
        x = 1 - x if self.invert else x
        return np.rint(x * 255).astype(np.uint8)


def _to_unit(
    x: NDArray[Any],
    whole: bool,
) -> NDArray[Any]:
    """Values as 0 to 1: they are already, or go to 255, or lie between others that become the ends."""
    low = float(x.min())
    high = float(x.max())
    if low >= 0 and high <= 1:
        return x
    if low >= 0 and high <= 255 and whole:
        return x / 255
    return (x - low) / max(high - low, 1e-12)


def as_text(value: Any) -> str:
    """A row of numbers, or anything else, as a short text."""
    array = plain_array(value)
    if (
        isinstance(array, np.ndarray | np.generic)
        and array.dtype.kind in "fiub"
    ):
        numbers = np.asarray(array).reshape(-1)
        text = ", ".join(f"{float(number):.3g}" for number in numbers[:40])
    else:
        text = str(array)
    return shortened(text)


def short_number(
    value: Any,
    form: str = ".2g",
) -> str:
    """A number as text; what is none, or not finite, as a word."""
    return "unknown" if value is None else f"{float(value):{form}}"


def shortened(
    text: str,
    most: int = LONGEST_TEXT,
) -> str:
    """The beginning of a text, with an ellipsis where it goes on."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def png(pixels: Pixels) -> bytes:
    """A PNG file of pixels [H, W, 3] (ISO/IEC 15948: signature, IHDR, IDAT, IEND)."""
    height, width, _ = pixels.shape
    grey = bool((pixels == pixels[..., :1]).all())
    values = pixels[..., :1] if grey else pixels
    rows = np.zeros((height, 1 + width * values.shape[-1]), np.uint8)
    rows[:, 1:] = values.reshape(height, -1)  # before each row: no filter
    header = struct.pack(
        ">IIBBBBB", width, height, 8, 0 if grey else 2, 0, 0, 0
    )
    parts = [
        (b"IHDR", header),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


def _chunk(
    name: bytes,
    content: bytes,
) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def data_uri(
    pixels: Pixels,
    largest: int = 64,
) -> str:
    """Pixels as the address of an image that needs no file; every so many pixels left out above `largest`."""
    step = -(-max(pixels.shape[:2]) // largest)
    encoded = base64.b64encode(png(pixels[::step, ::step])).decode("ascii")
    return f"data:image/png;base64,{encoded}"
