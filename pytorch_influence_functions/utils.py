"""Logging, progress, JSON files, optional packages, and the global random state left as it was."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)
_PACKAGE = __name__.split(".")[0]
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def init_logging(filename: str | os.PathLike[str] | None = None) -> None:
    """Show the package's log lines on stderr and, with `filename`, append them to that file too.

    Only the logger of this package is set up; the root logger stays as it is. May be called again.
    """
    log = logging.getLogger(_PACKAGE)
    if filename is not None:
        path = os.path.abspath(os.path.expanduser(filename))
        if not any(
            isinstance(h, logging.FileHandler) and h.baseFilename == path
            for h in log.handlers
        ):
            _add_handler(log, _file_handler(Path(path), "filename"))
    log.setLevel(logging.INFO)
    if not any(type(h) is logging.StreamHandler for h in log.handlers):
        _add_handler(log, logging.StreamHandler())


@contextlib.contextmanager
def log_to(filename: str | os.PathLike[str] | None) -> Iterator[None]:
    """Append the package's log lines to a file while inside; no file for None."""
    if filename is None:
        yield
        return
    log, level = logging.getLogger(_PACKAGE), logging.getLogger(_PACKAGE).level
    handler = _add_handler(
        log,
        _file_handler(Path(filename).expanduser(), "config['log_filename']"),
    )
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        _close(handler, filename)


def _close(handler: logging.Handler, filename: str | os.PathLike[str]) -> None:
    """Close a log; what cannot be written of it ends no run."""
    try:
        handler.close()
    except OSError as error:
        logger.warning(
            "config['log_filename']: cannot write to %s (%s); its last lines are lost",
            filename,
            error.strerror,
        )


def _file_handler(path: Path, key: str) -> logging.Handler:
    """A handler that appends to a file, whose folder is made where it is not there."""
    file_path(path, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return logging.FileHandler(path)
    except OSError as error:
        raise OSError(
            f"{key}: cannot write to {path} ({error.strerror}); give a file you can write to"
        ) from error


def file_path(path: Path, key: str) -> Path:
    """`path`, where it can be that of a file.

    Raises:
        ValueError: there is a NUL in it.
        OSError: it is a folder.
    """
    if "\0" in str(path):
        raise ValueError(
            f"{key}: expected a file name without NUL, got {str(path)!r}"
        )
    if path.is_dir():
        raise IsADirectoryError(
            f"{key}: {path} is a folder; give the name of a file in it"
        )
    return path


def _add_handler(
    log: logging.Logger, handler: logging.Handler
) -> logging.Handler:
    handler.setFormatter(logging.Formatter(_FORMAT))
    log.addHandler(handler)
    return handler


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user's code that called the package, whatever lies between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_ours(filename: str) -> bool:
    """Whether a file is of this package, or of the standard library's context managers and generators between."""
    return (
        Path(filename).parent.is_relative_to(Path(__file__).parent)
        or filename == contextlib.__file__
    )


def display_progress(
    text: str,
    current_step: int,
    last_step: int,
    enabled: bool = True,
    fix_zero_start: bool = True,
) -> None:
    """Draw a progress bar on one line of stderr, for a loop that calls it once per step.

    Args:
        text: what is being done.
        current_step: the step that was done; counted from 0 with `fix_zero_start`, else from 1.
        last_step: how many steps there are.
        enabled: draw nothing where False.
        fix_zero_start: count `current_step` from 0.
    """
    if not enabled:
        return
    done = min(current_step + int(fix_zero_start), last_step)
    line = tqdm.format_meter(
        done,
        last_step,
        elapsed=0,
        prefix=text.rstrip(": "),
        bar_format="{l_bar}{bar:40}| {n_fmt}/{total_fmt}",
    )
    sys.stderr.write("\r" + line + ("\n" if done >= last_step else ""))
    sys.stderr.flush()


def progress_bar(
    text: str | None,
    *,
    total: int | None,
    unit: str,
    enabled: bool,
    done: int = 0,
) -> tqdm[Any]:
    """A tqdm bar (a widget in notebooks); silent without `text` or where not `enabled`."""
    return tqdm(
        total=total,
        initial=done,
        desc=text,
        unit=unit,
        disable=not enabled or text is None,
        leave=False,
        dynamic_ncols=True,
    )


@contextlib.contextmanager
def random_state(seed: int) -> Iterator[None]:
    """Seed torch, numpy and `random` inside, and put their global states back afterwards."""
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    cuda_states = torch.cuda.get_rng_state_all() if cuda else []
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    if cuda:
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda_states)


def save_json(
    json_obj: Any,
    json_path: str | os.PathLike[str],
    append_if_exists: bool = False,
    overwrite_if_exists: bool = False,
    unique_fn_if_exists: bool = True,
) -> Path:
    """Write `json_obj` to `json_path`: beside it first, then renamed, so that a kill never leaves half a file.

    NaN and infinite numbers, for which JSON has no value, are written as null.
    Where the file exists: `overwrite_if_exists` replaces it; `append_if_exists` adds to it (lists are extended,
    dicts updated); `unique_fn_if_exists` takes the first free name `name_1.json`, `name_2.json`, ...

    Returns:
        The path that was written.

    Raises:
        TypeError: something that JSON cannot hold.
        FileExistsError: the file exists and all three options are False.
        ValueError, OSError: `json_path` is not the name of a file.
    """
    path = file_path(Path(json_path).expanduser(), "json_path")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not overwrite_if_exists:
        if append_if_exists:
            json_obj = _joined(
                json.loads(path.read_text(encoding="utf-8")), json_obj, path
            )
        elif unique_fn_if_exists:
            path = unused_path(path)
        else:
            raise FileExistsError(
                f"{path} exists; pass overwrite_if_exists, append_if_exists or unique_fn_if_exists as True"
            )
    write_atomically(path, as_json(json_obj).encode())
    return path


def as_json(value: Any) -> str:
    """`value` as JSON, with null for NaN and infinite numbers.

    Raises:
        TypeError: something in it is no value of JSON.
    """
    try:
        return json.dumps(value, default=_plain, allow_nan=False)
    except (
        TypeError,
        ValueError,
    ):
        # a number without a value, or a key that is a number of NumPy
        return json.dumps(_with_null(value), allow_nan=False)


def _with_null(value: Any) -> Any:
    """A copy of plain lists and dicts, None in place of what JSON has no number for."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {_key(key): _with_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_null(item) for item in value]
    return _with_null(_plain(value))


def _key(key: Any) -> Any:
    return key.item() if isinstance(key, np.generic) else key


def unused_path(path: Path) -> Path:
    """`path`, or the first of `stem_1.suffix`, `stem_2.suffix`, ... that does not exist."""
    count, candidate = 0, path
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.stem}_{count}{path.suffix}")
    return candidate


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under another name in the same folder, flush it to disk, and rename it to `path`."""
    with written_atomically(path) as file:
        file.write(content)


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Inside: a file of another name in the same folder, which is flushed to disk and renamed to `path` at the end."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _joined(old: Any, new: Any, path: Path) -> Any:
    if isinstance(old, list):
        return old + (new if isinstance(new, list) else [new])
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **new}
    raise TypeError(
        f"cannot append a {type(new).__name__} to the {type(old).__name__} in {path}"
    )


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike | torch.dtype | torch.device):
        return str(value)
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")


def optional(
    module: str,
    extra: str,
    need: str,
) -> Any:
    """A module of a package that only an extra of this one installs.

    Args:
        module: its full name.
        extra: which brings it.
        need: who needs what, for the message.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        importlib.import_module(module.split(".")[0])
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{need}: pip install '{_PACKAGE}[{extra}]'"
        ) from error
