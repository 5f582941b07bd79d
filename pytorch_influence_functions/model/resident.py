"""What the C library keeps of freed memory: given back while the process holds more than `max_memory`.

PyTorch asks it for aligned blocks, and glibc does not use one again that was freed in the midst of its heap (seen with
2.36): within one backward pass of an LSTM, which held 171 MiB at most, 944 MiB became resident. `malloc_trim` gives the
whole pages of such holes back to the system. Elsewhere nothing is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .budget import MIB

STATM = Path("/proc/self/statm")
THREAD = "memory of the influence functions"
"""As it is called among the threads of a process."""
PERIOD = 0.005
"""Seconds between two looks, of ten microseconds each; an LSTM takes some 30 MiB meanwhile."""
SHARE = 0.8
"""Of `max_memory`, above what was held before, from which on it is looked for what can be given back."""
AGAIN = 0.1
"""Of `max_memory`: where more than the share is in use, it is looked for again when so much more is held. Pages that
are given back and then come anew made the LSTM's scores 1.1 to 1.6 times as slow under `max_memory=512`."""


class Resident:
    """The memory of this process beside what it holds now.

    Args:
        max_memory: MiB that may be held.
        device: where the model computes; only the memory of a CPU is looked at.
    """

    def __init__(
        self,
        max_memory: float,
        device: torch.device,
    ) -> None:
        self._trim = trim_of_library() if device.type == "cpu" else None
        self._lock, self._inside = threading.Lock(), 0
        self._done = threading.Event()
        self._thread = threading.Thread()
        self._most = self._step = 0.0
        if self._trim is not None:
            self._most = resident() + SHARE * max_memory * MIB
            self._step = AGAIN * max_memory * MIB

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside: looked at by a thread, one for all that are inside; a single call of the model may take all of it."""
        if self._trim is None:
            yield
            return
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._done = threading.Event()
                self._thread = threading.Thread(
                    target=self._watch,
                    args=(self._done,),
                    name=THREAD,
                    daemon=True,
                )
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._done.set()
                    self._thread.join()

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(PERIOD):
            self.relieve()

    def relieve(self) -> None:
        """Give back what is free, where more is held than there may be."""
        if self._trim is None or resident() <= self._most:
            return
        self._trim(0)
        self._most = max(self._most, resident() + self._step)


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(STATM.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def trim_of_library() -> Callable[[int], int] | None:
    """`malloc_trim`, where the C library has it and the system says what is resident."""
    if not STATM.exists():
        return None
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    return trim
