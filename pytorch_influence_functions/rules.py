"""Rules that a value of an option may have to keep, and a row of the table of options."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

CALC_METHODS = ("img_wise", "all_grad_then_test")
SOLVER_NAMES = ("lissa", "cg", "exact", "ekfac", "auto")
CURVATURES = ("hessian", "ggn")
PRECONDITIONERS = ("ekfac",)
NUMBER, TEXT, OTHER = (int, float), (str,), ()
"""The right type of an option: a value of it that breaks the rule is a ValueError, any other a TypeError."""


def is_whole(value: Any, least: int) -> bool:
    """A whole number of at least `least`; True and False are none."""
    return (
        isinstance(value, int)
        and not isinstance(value, bool)
        and value >= least
    )


def is_real(value: Any) -> bool:
    """A finite number."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def is_path(value: Any) -> bool:
    """A file or folder name."""
    return (
        isinstance(value, str | os.PathLike)
        and str(value) != ""
        and "\0" not in str(value)
    )


def are_chosen(value: Any) -> bool:
    """A name, a sequence of some, or a predicate."""
    if isinstance(value, str) or is_function(value):
        return True
    return (
        isinstance(value, Sequence)
        and len(value) > 0
        and all(isinstance(name, str) for name in value)
    )


def at_least(least: int) -> Callable[[Any], bool]:
    """The rule: a whole number of at least `least`."""
    return lambda value: is_whole(value, least)


def is_even(value: Any) -> bool:
    """An even whole number of at least 0."""
    return is_whole(value, 0) and value % 2 == 0


def is_above_zero(value: Any) -> bool:
    """A finite number above 0."""
    return is_real(value) and value > 0


def is_fraction(value: Any) -> bool:
    """A number above 0 and below 1."""
    return is_above_zero(value) and value < 1


def is_function(value: Any) -> bool:
    """A callable that is no class."""
    return callable(value) and not isinstance(value, type)


def either(other: Any, rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The rule, or this very value."""
    return lambda value: (
        (type(value) is type(other) and value == other) or rule(value)
    )


def one_of(names: Sequence[str]) -> Callable[[Any], bool]:
    """The rule: one of these names."""
    return lambda value: value in names


def quoted(names: Sequence[str]) -> str:
    """Names as a message lists them."""
    return " or ".join(f'"{name}"' for name in names)


def row(
    right: tuple[type, ...],
    rule: Callable[[Any], bool],
    expected: str,
    meaning: str,
) -> dict[str, Any]:
    """What the table says of an option beside its default.

    Args:
        right: the right type, `NUMBER`, `TEXT` or `OTHER`.
        rule: whether a value may be.
        expected: what an error says was expected.
        meaning: what the documentation says.
    """
    return {
        "right": right,
        "rule": rule,
        "expected": expected,
        "meaning": meaning,
    }


def plain(value: Any) -> Any:
    """A scalar of NumPy or PyTorch as the Python number it is; anything else as it came."""
    scalar = hasattr(value, "item") and getattr(value, "shape", None) == ()
    return value.item() if scalar else value


def check(option: dataclasses.Field[Any], value: Any) -> None:
    """Raise TypeError or ValueError for a value that breaks the rule of its row."""
    # its comparison with a name has no truth value
    array = hasattr(value, "__array__")
    if not array and option.metadata["rule"](value):
        return
    right = isinstance(value, option.metadata["right"]) and not isinstance(
        value, bool
    )
    kind = ValueError if right else TypeError
    raise kind(
        f"config[{option.name!r}]: expected {option.metadata['expected']}, got {value!r}"
    )


def documented(cls: type) -> str:
    """The docstring of the class, with the meaning of every option."""
    rows = [
        f"{option.name}: {option.metadata['meaning']}"
        for option in dataclasses.fields(cls)
    ]
    wrapped = [
        textwrap.fill(
            row, 120, initial_indent=" " * 8, subsequent_indent=" " * 12
        )
        for row in rows
    ]
    return "\n".join(
        [(cls.__doc__ or "").rstrip(), "", "    Attributes:", *wrapped, "    "]
    )


def unknown_key(
    key: str, known: Sequence[str], aliases: Sequence[str]
) -> ValueError:
    """What is raised for a key that no option has; it names the nearest one."""
    near = difflib.get_close_matches(
        str(key), [*known, *aliases], n=1, cutoff=0.5
    )
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else f"the keys are {', '.join(known)}"
    )
    return ValueError(f"config: unknown key {key!r}; {hint}")


def without_left(
    pairs: Mapping[str, Any],
    aliases: Mapping[str, str],
    defaults: Mapping[str, Any],
) -> dict[str, Any]:
    """Options without those left at their default beside their old name, as in a dict of `get_default_config`."""
    renamed = {aliases[key] for key in pairs if key in aliases}
    return {
        key: value
        for key, value in pairs.items()
        if key not in renamed or value != defaults[key]
    }
