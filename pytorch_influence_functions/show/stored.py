"""A result as one file: arrays as NumPy has them, the rest as JSON; nothing is ever unpickled."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..utils import as_json, write_atomically
from .entries import as_numbers
from .lazy import Entry, attached, row_of

Entries = dict[str, dict[str, Any]]
ARRAYS = ("influence", "stderr")
FORMAT = "pytorch_influence_functions result 1"


def save(
    path: str | os.PathLike[str],
    influences: Entries,
    meta: Mapping[str, Any],
) -> None:
    """Write entries and meta to `path`, beside it first and then in its place."""
    arrays = {
        name: _array(list(influences.values()), name)
        for name in ARRAYS
        if influences and all(name in one for one in influences.values())
    }
    rest = {
        key: {name: one[name] for name in one if name not in arrays}
        for key, one in influences.items()
    }
    order = [list(one) for one in influences.values()][:1]
    text = as_json(
        {"format": FORMAT, "entries": rest, "meta": dict(meta), "keys": order}
    )
    content = io.BytesIO()
    encoded = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    np.savez_compressed(content, **{"json": encoded, **arrays})  # type: ignore[arg-type]
    write_atomically(Path(path).expanduser(), content.getvalue())


def _array(entries: list[dict[str, Any]], name: str) -> NDArray[Any]:
    """Rows as float32 where that gives back the same numbers, else as float64."""
    on_disk = [
        one.array(name)
        for one in entries
        if isinstance(one, Entry) and one.is_stored(name)
    ]
    if len(on_disk) == len(entries):
        return np.stack(on_disk)
    wide = np.stack([row_of(one, name) for one in entries])
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    if not np.isfinite(narrow).all():
        return wide
    same = all(
        as_numbers(short) == row.tolist()
        for short, row in zip(narrow, wide, strict=True)
    )
    return narrow if same else wide


def load(path: str | os.PathLike[str]) -> tuple[Entries, dict[str, Any]]:
    """Entries and meta of a file that `save` or a run wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file, or damaged.
    """
    file = Path(path).expanduser()
    content = file.read_bytes()
    if content[:1] == b"{":
        return _of_run(file, content)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return _joined({name: arrays[name] for name in arrays.files})
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise ValueError(
            f"{file}: expected a file of InfluenceResult.save, or an influence_results_*.json of a run, but it cannot "
            f"be read ({e})"
        ) from e


def _joined(
    arrays: dict[str, Any],
) -> tuple[Entries, dict[str, Any]]:
    known = json.loads(arrays["json"].tobytes().decode("utf-8"))
    if known.get("format") != FORMAT:
        raise ValueError(f"its format is {known.get('format')!r}")
    names = [name for name in ARRAYS if name in arrays]
    entries: Entries = {}
    for place, (key, rest) in enumerate(known["entries"].items()):
        rows = {name: as_numbers(arrays[name][place]) for name in names}
        whole = {**rest, **rows}
        order = (known["keys"] or [list(whole)])[0]
        entries[key] = {name: whole[name] for name in order if name in whole}
    return entries, known["meta"]


def _of_run(
    file: Path,
    content: bytes,
) -> tuple[Entries, dict[str, Any]]:
    """A result file of a run, with the meta file that stands beside it."""
    try:
        entries = attached(json.loads(content), file.parent)
        sizes = [one.count("influence") for one in entries.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: expected an influence_results_*.json, whose entries hold `influence`; {error!r}"
        ) from error
    if len(set(sizes)) != 1:
        raise ValueError(
            f"{file}: expected at least one entry, each with one influence per training sample"
        )
    return dict(entries), _meta_beside(file)


def _meta_beside(file: Path) -> dict[str, Any]:
    found = re.fullmatch(r"influence_results_(\d+)_(\d+)(_\d+)?", file.stem)
    if not found:
        return {}
    start, num, count = found.groups(default="")
    meta = file.with_name(f"influences_results_meta_{start}-{num}{count}.json")
    if not meta.exists():
        return {}
    known: dict[str, Any] = json.loads(meta.read_text(encoding="utf-8"))
    return known
