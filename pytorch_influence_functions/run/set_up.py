"""The set-up of a solver in a run: shared by its processes, and kept in its files for another start."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..solve.set_up import Kept
from ..utils import written_atomically
from .distributed import Team
from .files import RunFiles

logger = logging.getLogger(__name__)
FACTS = "facts"
SPARE = 2
"""A part of the set-up is kept where the disk has so many times its size: the results come first."""


class RunSetUp:
    """A `solve.set_up.Helper`.

    Args:
        team: the processes of the run.
        files: where its first process keeps what it set up; None in the others.
    """

    def __init__(self, team: Team, files: RunFiles | None) -> None:
        self.team, self._files = team, files

    def kept(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What the first process finds in its files, on all of them; else what they make, which it writes there."""
        path = None if self._files is None else self._files.kept(name)
        found = None if path is None else read(path)
        if self.team.told(found is not None):
            return self._handed(found)
        made = make()
        if path is not None:
            write(path, made)
        return made

    def _handed(self, found: Kept | None) -> Kept:
        if self.team.size == 1 and found is not None:
            return found
        tensors = {} if found is None else found.tensors
        outline = {
            name: (tuple(t.shape), t.dtype) for name, t in tensors.items()
        }
        facts, known = self.team.told((found.facts if found else None, outline))
        empty = {
            name: torch.empty((0, *shape[1:]), dtype=dtype)
            for name, (shape, dtype) in known.items()
        }
        whole = {
            name: self.team.joined(tensors.get(name, part), 0)
            for name, part in empty.items()
        }
        return Kept(whole, facts)


def write(path: Path, made: Kept) -> None:
    """Keep a part of the set-up; where there is no room for it the run goes on without."""
    size = sum(t.nbytes for t in made.tensors.values())
    try:
        if shutil.disk_usage(path.parent).free < SPARE * size:
            raise OSError(f"its {size / 2**20:.0f} MiB would fill the disk")
        arrays: dict[str, Any] = {
            name: _bits(t) for name, t in made.tensors.items()
        }
        types = {name: str(t.dtype) for name, t in made.tensors.items()}
        arrays[FACTS] = np.array(
            json.dumps({"types": types, "facts": made.facts})
        )
        with written_atomically(path) as file:
            np.savez(file, **arrays)
    except OSError as error:
        logger.info("%s is not kept for another start (%s)", path.stem, error)


def read(path: Path) -> Kept | None:
    """What `write` kept; None where it did not, or cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as found:
            said = json.loads(str(found[FACTS]))
            tensors = {
                name: torch.from_numpy(found[name]).view(
                    getattr(torch, kind.removeprefix("torch."))
                )
                for name, kind in said["types"].items()
            }
    except FileNotFoundError:
        return None
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        zipfile.BadZipFile,
    ) as error:
        logger.info("%s is set up again (%s)", path.stem, error)
        return None
    logger.info("%s: as an earlier start of the run found it", path.stem)
    return Kept(tensors, said["facts"])


def _bits(tensor: Tensor) -> Any:
    """As NumPy holds it: it has no bfloat16."""
    here = tensor.detach().cpu().contiguous()
    if here.dtype == torch.bfloat16:
        here = here.view(torch.int16)
    return here.numpy()
