"""Finished retrainings on disk, so that a later call does only what is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils import write_atomically
from .statistics import Floats


class Journal:
    """Finished retrainings on disk, one JSON line each after a line of settings; a line that a kill cut off is dropped.

    Args:
        path: of the file; None keeps them in memory only.
        settings: what a retraining depends on beside its indices and seed.

    Raises:
        ValueError: the file has other settings, or is no such file.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]
    ) -> None:
        self.path = None if path is None else Path(path)
        self.rows: dict[str, list[float]] = {}
        if self.path is not None:
            lines = self._read(self.path)
            self._check(self.path, lines, settings)
            self.rows = {line["key"]: line["losses"] for line in lines[1:]}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [{"settings": settings}, *lines[1:]]
            write_atomically(
                self.path, b"".join(_json_line(line) for line in kept)
            )

    def add(self, key: str, losses: Floats) -> None:
        """Keep the test losses [K] of one retraining."""
        self.rows[key] = losses.tolist()
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(_json_line({"key": key, "losses": self.rows[key]}))
                file.flush()
                os.fsync(file.fileno())

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        content = path.read_bytes() if path.exists() else b""
        try:
            lines = [json.loads(line) for line in content.split(b"\n")[:-1]]
            if content and not lines[0]["settings"]:
                raise ValueError("no settings")
        except (ValueError, LookupError, TypeError):
            raise ValueError(
                f"resume_path: {path} is there, but it is not a file of retrainings; give another path"
            ) from None
        return lines

    @staticmethod
    def _check(
        path: Path, lines: list[dict[str, Any]], settings: Mapping[str, Any]
    ) -> None:
        old = lines[0]["settings"] if lines else settings
        changed = [
            name for name in SETTINGS if old.get(name) != settings.get(name)
        ]
        if changed:
            name = changed[0]
            raise ValueError(
                f"resume_path: {path} holds retrainings with {name} = {old.get(name)!r}, now {name} = "
                f"{settings.get(name)!r} ({SETTINGS[name]}); give another path, or delete the file to begin again"
            )


SETTINGS = {
    "n": "the number of training samples",
    "start": "a digest of the model that the retraining starts from, None from scratch",
    "tests": "a digest of the test samples",
    "loss": "the loss of the test samples",
}


def _json_line(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"
