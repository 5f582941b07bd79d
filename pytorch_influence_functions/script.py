"""What a user's script gives the command line: a model and its loaders."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class UsageError(Exception):
    """What the person at the command line can put right; said without a traceback."""


class Entry(NamedTuple):
    """What a user's script gives."""

    model: Any = None
    train_loader: Any = None
    test_loader: Any = None
    config: Any = None
    classes: Any = None


def entry_of(name: str) -> Entry:
    """What `module:function` or `folder/script.py:function` returns.

    Raises:
        UsageError: there is no such module or function, or it returns something else.
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise UsageError(
            f"--entry: expected my_script:make, a module and a function in it, got {name!r}"
        )
    make = getattr(_module(place), function, None)
    if not callable(make):
        raise UsageError(f"--entry: {place} has no function {function!r}")
    given = make()
    if isinstance(given, Mapping):
        return _entry(given)
    if isinstance(given, tuple) and 2 <= len(given) <= len(Entry._fields):
        return Entry(*given)
    raise UsageError(
        f"--entry: {name} returned a {type(given).__name__}; expected a dict with the keys {', '.join(Entry._fields)}"
    )


def _entry(given: Mapping[str, Any]) -> Entry:
    unknown = [key for key in given if key not in Entry._fields]
    if unknown:
        raise UsageError(
            f"--entry: it returned the key {unknown[0]!r}; the keys are {', '.join(Entry._fields)}"
        )
    return Entry(**given)


def _module(place: str) -> Any:
    """A module by its name, seen from the folder one is in, or a script by its path."""
    if place.endswith(".py"):
        return _script(Path(place))
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name != place.split(".")[0] and error.name != place:
            raise
        raise UsageError(
            f"--entry: no module {place!r} in {Path.cwd()} or on the path"
        ) from error


def _script(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"--entry: no file {path}")
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--entry: {path} is no Python script")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
