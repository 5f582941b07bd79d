"""Which tensors of a model are its parameters here, and in which precision they are held."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter


def require_module(model: Any, called: bool) -> None:
    """Raise where a model is none, or cannot be computed with sample by sample; `called` where it is called itself."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}"
        )
    if any(
        isinstance(module, torch.jit.ScriptModule) for module in model.modules()
    ):
        raise TypeError(
            "model: a torch.jit module's parameters cannot be replaced; pass the module it was made from"
        )
    forward: Any = getattr(unwrapped(model), "forward", None)
    if called and getattr(forward, "__func__", forward) in (
        None,
        nn.Module.forward,
    ):
        raise TypeError(
            f"model: a {type(model).__name__} has no forward; {NO_FORWARD}"
        )
    _require_values(model)


NO_FORWARD = "pass a module that can be called, e.g. nn.Sequential, or a config['model_loss'] that calls its parts"


def _require_values(model: nn.Module) -> None:
    """Raise where a parameter or buffer has no values."""
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(t, UninitializedParameter | UninitializedBuffer):
            raise ValueError(
                f"model: {name!r} of a lazy module has no values yet; call the model once, and train it"
            )
        if t.is_meta:
            raise ValueError(
                f"model: {name!r} is on the meta device and has no values; load the trained ones"
            )


Chosen = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None
"""Names or patterns of parameters, or a predicate (name, parameter) -> bool; None is all."""


def select_parameters(
    model: nn.Module, chosen: Chosen = None
) -> dict[str, nn.Parameter]:
    """The trainable parameters that are chosen, tied ones once; a name is also that of a module above parameters."""
    trainable = {
        name: p for name, p in model.named_parameters() if p.requires_grad
    }
    if not trainable:
        raise ValueError(
            "model: no parameter has requires_grad=True; influence is about trained parameters, so set "
            "requires_grad_(True) on those that were trained"
        )
    if chosen is None:
        return trainable
    if callable(chosen):
        return _where(chosen, trainable)
    patterns = [chosen] if isinstance(chosen, str) else list(chosen)
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in trainable):
            raise ValueError(
                f"config['parameters']: {pattern!r} matches no trainable parameter; there are {', '.join(trainable)}"
            )
    return {
        name: p
        for name, p in trainable.items()
        if any(_matches(name, pattern) for pattern in patterns)
    }


def _where(
    predicate: Callable[[str, nn.Parameter], bool],
    trainable: dict[str, nn.Parameter],
) -> dict[str, nn.Parameter]:
    found = {name: p for name, p in trainable.items() if predicate(name, p)}
    if not found:
        raise ValueError(
            "config['parameters']: the predicate (name, parameter) is true of no trainable parameter; there are "
            + ", ".join(trainable)
        )
    return found


def coverage(model: nn.Module, names: Collection[str]) -> str:
    """How much of a model is chosen, e.g. "98,304 of 11.2 M parameters (2 of 62 tensors)"."""
    every = {name: p.numel() for name, p in model.named_parameters()}
    used, whole = sum(every[name] for name in names), sum(every.values())
    total = f"{whole:,}" if whole < 1e6 else f"{whole / 1e6:.1f} M"
    return (
        f"{used:,} of {total} parameters ({len(names)} of {len(every)} tensors)"
    )


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".")


def embeddings(model: nn.Module) -> list[nn.Embedding | nn.EmbeddingBag]:
    """The model's tables of vectors."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    ]


def as_looked_up(model: nn.Module) -> dict[Tensor, Tensor]:
    """Tables with a `max_norm` as a lookup leaves the rows that it reads: those above the norm shortened to it."""
    return {
        table.weight: torch.renorm(
            table.weight.detach(), table.norm_type, 0, table.max_norm
        )
        for table in embeddings(model)
        if table.max_norm is not None
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel or torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, nn.DataParallel | nn.parallel.DistributedDataParallel
        ):
            inner = model.module
        if inner is None:
            return model
        model = inner


def widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The precision that holds all of these."""
    return functools.reduce(torch.promote_types, dtypes)
