"""What a forward pass leaves on the modules (attention maps, a hidden state made anew): nothing of it stays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

STANDARD = frozenset(vars(nn.Module()))
"""Attributes that every module has; parameters, buffers, hooks and the mode are put back elsewhere."""


@contextlib.contextmanager
def forgotten(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside: modules may keep what they like on themselves; afterwards their attributes are what they were.

    A tensor that is kept in one call may carry a tracer, the graph or the precision of that call, in which the next
    call, ours or the user's, cannot use it.
    """
    before = [_own(module) for module in modules]
    contents = [_contents(own) for own in before]
    try:
        yield
    finally:
        for module, own, held in zip(modules, before, contents, strict=True):
            _put_back(module, own, held)


def _own(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if name not in STANDARD
    }


def _contents(own: dict[str, Any]) -> dict[str, Any]:
    """Copies of the lists and dicts among the attributes, which may be added to in place."""
    return {
        name: value.copy()
        for name, value in own.items()
        if type(value) in (list, dict, set)
    }


def _put_back(
    module: nn.Module, own: dict[str, Any], contents: dict[str, Any]
) -> None:
    now = vars(module)
    for name in [
        name for name in now if name not in STANDARD and name not in own
    ]:
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
