"""The files of a run: names that no other run has, each whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..utils import save_json, write_atomically


class RunFiles:
    """The files of one run in its folder; a run takes names that no other run has, also one that starts just now.

    The names are taken by creating the folder of parts and the meta file, each exclusively. Each finished group of
    test samples is written once, to a part of its own; the parts become the result file when the last is there. A run
    that stops early leaves its parts.
    """

    def __init__(self, folder: Path, start: int, num: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.meta, self.result, self.parts = _take_names(folder, start, num)
        except OSError as error:
            raise _unwritable("config['outdir']", folder, error) from error
        self._first: list[Path] = []

    def write_meta(self, meta: dict[str, Any]) -> None:
        """Write (again) what the run was asked and what it did."""
        save_json(meta, self.meta, overwrite_if_exists=True)

    def write_part(self, entries: dict[str, dict[str, Any]]) -> None:
        """Write one finished group."""
        first, last = next(iter(entries)), list(entries)[-1]
        path = self.parts / f"{first}-{last}.json"
        save_json(entries, path, overwrite_if_exists=True)
        self._first.append(path)

    def finish(self) -> None:
        """Put the parts together into the result file and remove them."""
        joined = b", ".join(
            path.read_bytes().strip()[1:-1] for path in self._first
        )
        write_atomically(self.result, b"{" + joined + b"}")
        shutil.rmtree(self.parts, ignore_errors=True)

    def release(self) -> None:
        """Give the names back, where the run came to nothing before its first group."""
        if self._first or self.result.exists():
            return
        with contextlib.suppress(OSError):
            self.parts.rmdir()
            self.meta.unlink()


def writable_folder(given: str | os.PathLike[str], key: str) -> Path:
    """A folder that can be written to, made where it is not there; before any work.

    Raises:
        OSError: it cannot be; the message names the option `key`.
    """
    folder = Path(given).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise _unwritable(key, folder, error) from error


def _unwritable(key: str, folder: Path, error: OSError) -> OSError:
    return OSError(
        f"{key}: cannot write to {folder} ({error.strerror}); give a folder you can write to"
    )


def _take_names(folder: Path, start: int, num: int) -> tuple[Path, Path, Path]:
    """Meta file, result file and folder of parts of the first number that nobody has."""
    count = -1
    while True:
        count += 1
        ending = f"_{count}" if count else ""
        meta = folder / f"influences_results_meta_{start}-{num}{ending}.json"
        result = folder / f"influence_results_{start}_{num}{ending}.json"
        parts = folder / f"influence_results_{start}_{num}{ending}_parts"
        if meta.exists() or result.exists():
            continue
        try:
            parts.mkdir()
        except FileExistsError:
            continue
        created = _created(meta)
        if created and not result.exists():
            return meta, result, parts
        parts.rmdir()
        if created:
            meta.unlink()


def _created(path: Path) -> bool:
    """Create an empty file; False where it is there already."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    return True
