"""A lock on a file that ends with the process that holds it, however that ends."""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt


class Lock:
    """Held until `release`, or until the process ends.

    Args:
        handle: of the open file.
    """

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle

    @classmethod
    def take(cls, path: Path) -> Lock | None:
        """The lock on this file, which is made where it is not there; None where another one holds it.

        Raises:
            FileNotFoundError: its folder is not there.
        """
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        if _locked(handle) and _is_there(path, handle):
            return cls(handle)
        os.close(handle)
        return None

    def release(self) -> None:
        """Let another one have it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.release()


def _locked(handle: int) -> bool:
    try:
        if fcntl is None:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_there(path: Path, handle: int) -> bool:
    """Whether the file still has this name: a run that ends removes it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
