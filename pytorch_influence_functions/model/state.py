"""What a forward pass leaves on the modules (attention maps, a hidden state made anew): nothing of it stays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

STANDARD = frozenset(vars(nn.Module()))
"""Attributes that every module has; parameters, buffers, hooks and the mode are put back elsewhere."""


class Attributes(NamedTuple):
    """A module's own attributes, as they are to be."""

    now: dict[str, Any]
    """Its `__dict__`."""
    own: dict[str, Any]
    """What is in it beside what every module has."""
    names: frozenset[str]
    """All that may be in it."""
    contents: dict[str, Any]
    """Copies of the lists, dicts and sets among these, which may be added to in place."""


def attributes(model: nn.Module) -> list[Attributes]:
    """The attributes of every module of a model."""
    found = []
    for module in model.modules():
        now = vars(module)
        own = {
            name: value for name, value in now.items() if name not in STANDARD
        }
        contents = {
            name: value.copy()
            for name, value in own.items()
            if type(value) in (list, dict, set)
        }
        names = STANDARD.union(own)
        found.append(Attributes(now, own, names, contents))
    return found


@contextlib.contextmanager
def forgotten(kept: Sequence[Attributes]) -> Iterator[None]:
    """Inside: modules may keep what they like on themselves; afterwards their attributes are those that are `kept`.

    A tensor that is kept in one call may carry a tracer, the graph or the precision of that call, in which the next
    call, ours or the user's, cannot use it.
    """
    try:
        yield
    finally:
        for each in kept:
            _put_back(each)


def _put_back(kept: Attributes) -> None:
    now, own, names, contents = kept
    for name in now.keys() - names:
        del now[name]
    for name, value in own.items():
        if now.get(name) is not value:
            now[name] = value
    for name, held in contents.items():
        if not _same_items(own[name], held):
            _refill(own[name], held)


def _same_items(value: Any, held: Any) -> bool:
    """Whether two lists, dicts or sets hold the same objects; tensors have no truth value to compare by."""
    if len(value) != len(held):
        return False
    if isinstance(held, dict):
        return all(
            key in value and value[key] is item for key, item in held.items()
        )
    return all(one is other for one, other in zip(value, held, strict=True))


def _refill(value: Any, held: Any) -> None:
    value.clear()
    if isinstance(value, list):
        value.extend(held)
    else:
        value.update(held)
