"""Input and label of one sample of a data set, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .labels import LABEL_KEYS

INPUT_KEYS = (
    "image",
    "pixel_values",
    "img",
    "text",
    "x",
    "input",
    "inputs",
    "input_ids",
)


def input_of(sample: Any) -> Any:
    """The input of a sample: its first part, or that of its keys which is named like one, else its first other key."""
    if isinstance(sample, Mapping):
        named = [key for key in INPUT_KEYS if key in sample]
        others = [key for key in sample if key not in LABEL_KEYS]
        keys = named or others
        return sample[keys[0]] if keys else None
    if isinstance(sample, list | tuple) and len(sample) > 0:
        return sample[0]
    for name in INPUT_KEYS:
        if hasattr(sample, name):
            return getattr(sample, name)
    return sample


def label_of(sample: Any) -> Any:
    """The label of a sample: its second part, or that of its keys which is named like one; None where there is none."""
    if isinstance(sample, Mapping):
        return next((sample[k] for k in LABEL_KEYS if k in sample), None)
    if isinstance(sample, list | tuple):
        return sample[1] if len(sample) > 1 else None
    return next(
        (getattr(sample, k) for k in LABEL_KEYS if hasattr(sample, k)), None
    )


def plain_array(value: Any) -> Any:
    """A tensor as NumPy has it, whatever its device and precision; anything else as it is."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
        return value.numpy()
    return value
