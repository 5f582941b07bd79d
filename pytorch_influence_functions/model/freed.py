"""What the C library keeps of freed memory, given back to the system.

PyTorch asks it for aligned blocks, and glibc does not use one again that was freed in the midst of its heap (seen with
2.36). `malloc_trim` gives the whole pages of such holes back; elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch


def give_back(device: torch.device) -> None:
    """Give back what is free, where the CPU computes: on a GPU little is."""
    trim = _trim()
    if trim is not None and device.type == "cpu":
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """`malloc_trim`, where the C library has it."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return trim
