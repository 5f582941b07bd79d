"""The files of a run: names that no other run has, each whole or not there; a run that was killed is found again."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ..utils import save_json, written_atomically
from .identity import differences
from .lock import Lock

logger = logging.getLogger(__name__)
UNWRITABLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
)  # fmt: skip
"""Of a disk that is full, may no longer be written to, or fails."""


class Names(NamedTuple):
    """Where one run writes."""

    meta: Path
    result: Path
    parts: Path

    @classmethod
    def of(cls, folder: Path, start: int, num: int, count: int) -> Names:
        """Those of the run of this number."""
        ending = f"_{count}" if count else ""
        return cls(
            folder / f"influences_results_meta_{start}-{num}{ending}.json",
            folder / f"influence_results_{start}_{num}{ending}.json",
            folder / f"influence_results_{start}_{num}{ending}_parts",
        )


class RunFiles:
    """The files of one run in its folder; a run takes names that no other run has, also one that starts just now.

    A run holds a lock in its folder of parts, which ends with its process. Each finished group of test samples is
    written once, to a part of its own; the parts become the result file when the last is there. A run that stops early
    leaves its parts, and the next start of the same run takes its names and goes on.

    Args:
        folder: `config["outdir"]`.
        start, num: of the names.
        identity: what makes another start the same run; None: none is.
        resume: whether to go on with an unfinished start of the same run.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        num: int,
        identity: dict[str, Any] | None = None,
        resume: bool = True,
    ) -> None:
        self.identity, self._resume = identity, resume
        try:
            folder.mkdir(parents=True, exist_ok=True)
            names, self._lock = self._take(folder, start, num)
        except OSError as error:
            raise _unwritable("config['outdir']", folder, error) from error
        self.meta, self.result, self.parts = names

    def __enter__(self) -> RunFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise OSError(
                error.errno,
                f"the run in config['outdir'] = {self.parts.parent} cannot be written further ({error.strerror}): what "
                "it has done stays there, and the same call goes on from it when there is space to write to",
            ) from error

    # ---- while it runs

    def write_meta(self, meta: dict[str, Any]) -> None:
        """Write (again) what the run was asked and what it did."""
        whole = {**meta, "run": self.identity} if self.identity else meta
        save_json(whole, self.meta, overwrite_if_exists=True)

    def write_part(
        self, entries: dict[str, dict[str, Any]], report: dict[str, Any]
    ) -> None:
        """Write one finished group, and what was done until then."""
        first, last = next(iter(entries)), list(entries)[-1]
        self.write_state(f"report_{last}", report)
        path = self.parts / f"{first}-{last}.json"
        save_json(entries, path, overwrite_if_exists=True)

    def finished(self) -> Iterator[tuple[dict[str, dict[str, Any]], Any]]:
        """The groups that an earlier start finished, in order, each with what was done until then."""
        if self.result.exists():  # only the parts were still to be removed
            meta = json.loads(self.meta.read_text(encoding="utf-8"))
            whole = json.loads(self.result.read_text(encoding="utf-8"))
            yield whole, meta["solver"]
            return
        for path in self._parts():
            last = path.stem.partition("-")[2]
            entries = json.loads(path.read_text(encoding="utf-8"))
            yield entries, self.state(f"report_{last}")

    def state(self, name: str) -> Any:
        """What `write_state` wrote under this name; None where it did not."""
        path = self.parts / f"state_{name}.json"
        if not path.exists():
            return None
        return json.loads(path.read_text(encoding="utf-8"))

    def write_state(self, name: str, state: Any) -> None:
        """Keep what another start needs to go on."""
        path = self.parts / f"state_{name}.json"
        save_json(state, path, overwrite_if_exists=True)

    def kept(self, name: str) -> Path:
        """Where a part of the set-up is kept until the run ends."""
        return self.parts / f"set_up_{name}.npz"

    def array(self, name: str) -> Path:
        """Where an array of the run is: beside the parts until all of its rows are there."""
        final = self.final_array(name)
        return final if final.exists() else self.parts / f"{name}.npy"

    def final_array(self, name: str) -> Path:
        """Where an array of the run is at its end."""
        ending = "" if name == "influence" else f"_{name}"
        return self.result.with_name(f"{self.result.stem}{ending}.npy")

    def name_array(self, name: str) -> Path:
        """Give an array the name that it has at the end of the run."""
        final = self.final_array(name)
        if not final.exists():
            os.replace(self.array(name), final)
        return final

    def finish(self, pieces: Iterable[bytes] | None = None) -> None:
        """Write the result file of these pieces (None: the parts as they are), one at a time; remove the parts."""
        if not self.result.exists():
            with written_atomically(self.result) as file:
                between = b"{"
                for piece in self._pieces() if pieces is None else pieces:
                    file.write(between + piece)
                    between = b", "
                file.write(b"}" if between == b", " else b"{}")
        self._lock.release()
        shutil.rmtree(self.parts, ignore_errors=True)

    def _pieces(self) -> Iterator[bytes]:
        for path in self._parts():
            yield path.read_bytes().strip()[1:-1]

    def _parts(self) -> list[Path]:
        """Those of test sample 0 on, without a gap."""
        found: list[Path] = []
        numbered = {
            int(path.stem.partition("-")[0]): path
            for path in self.parts.glob("[0-9]*-*.json")
        }
        next_one = 0
        while next_one in numbered:
            path = numbered[next_one]
            found.append(path)
            next_one = int(path.stem.partition("-")[2]) + 1
        return found

    # ---- taking names

    def _take(self, folder: Path, start: int, num: int) -> tuple[Names, Lock]:
        """Those of an unfinished start of the same run, else the first that nobody has."""
        count = -1
        while True:
            count += 1
            names = Names.of(folder, start, num, count)
            taken = names.meta.exists() or names.result.exists()
            if taken and not names.parts.exists():
                continue  # a finished run
            known = names.parts.exists()
            lock = self._locked(names.parts)
            if lock is None:
                continue  # one that runs now, or has just ended
            if self._may_have(names):
                return names, lock
            lock.release()
            if not known:  # they were taken since the look at them
                shutil.rmtree(names.parts, ignore_errors=True)

    def _locked(self, parts: Path) -> Lock | None:
        parts.mkdir(exist_ok=True)
        try:
            return Lock.take(parts / "lock")
        except FileNotFoundError:
            return None  # its run has ended and removed it

    def _may_have(self, names: Names) -> bool:
        """Whether the names are free, or of an unfinished start of the same run."""
        if not names.meta.exists() and not names.result.exists():
            return True
        if self.identity is None or not names.meta.exists():
            return False
        content = names.meta.read_bytes()
        if not content.strip():
            # killed before it had done anything
            return not names.result.exists()
        try:
            found = json.loads(content).get("run")
        except (ValueError, AttributeError):
            return False
        if found == self.identity and self._resume:
            logger.info("%s: goes on where it stopped", names.result.name)
            return True
        if found not in (None, self.identity) and not names.result.exists():
            other = ", ".join(differences(found, self.identity))
            logger.info(
                "%s: an unfinished run of other %s is there; this one starts beside it",
                names.meta,
                other,
            )
        return False


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
