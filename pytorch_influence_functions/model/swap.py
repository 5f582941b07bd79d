"""The user's model at other parameters: swapped in for the time of a call, and everything back afterwards."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint

from .parameters import embeddings
from .recurrent import step_by_step

LOCK = threading.RLock()
"""Held while a model is computed with. One for the process, not one a model: the random state, the level of forward
mode and the switches of PyTorch's kernels are the process's."""


class Slot(NamedTuple):
    """Where a parameter or buffer is kept."""

    registry: dict[str, Any]
    """`_parameters` or `_buffers` of its module."""
    key: str
    name: str
    """The first of its names in the model, the same for tied ones."""


def find_slots(model: nn.Module) -> list[Slot]:
    """Every place of the model that holds a parameter or a buffer."""
    slots: list[Slot] = []
    first: dict[Tensor, str] = {}
    for kind in ("_parameters", "_buffers"):
        for path, module in model.named_modules():
            registry = getattr(module, kind)
            for key, t in registry.items():
                if t is not None:
                    own = f"{path}.{key}" if path else key
                    slots.append(Slot(registry, key, first.setdefault(t, own)))
    return slots


@contextlib.contextmanager
def swapped(slots: list[Slot], state: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside: the tensors of `state` in the model's places; its own are back afterwards."""
    held = [slot.registry[slot.key] for slot in slots]
    try:
        for slot in slots:
            slot.registry[slot.key] = state[slot.name]
        yield
    finally:
        for slot, own in zip(slots, held, strict=True):
            slot.registry[slot.key] = own


@contextlib.contextmanager
def differentiable(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside: this thread alone, the model in evaluation mode, and operations that can be differentiated twice."""
    with LOCK, contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_evaluation_mode(model))
        stack.enter_context(_no_fast_attention())
        stack.enter_context(_no_checkpoints())
        stack.enter_context(_plain_embeddings(model))
        stack.enter_context(step_by_step(model))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # cuDNN's recurrent kernels have no second derivative, nor a first one in evaluation mode
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


PLAIN = {"sparse": False, "scale_grad_by_freq": False, "max_norm": None}
"""Options of embeddings, as they are for the time of a call. Sparse gradients cannot be cut out of, or added to, one
vector of all parameters; those that are divided by how often a row is looked up are not the loss's; and rows above a
norm, which a lookup shortens in place, are taken as it leaves them (`as_looked_up`)."""


@contextlib.contextmanager
def _plain_embeddings(model: nn.Module) -> Iterator[None]:
    held = [
        (module, {key: getattr(module, key) for key in PLAIN})
        for module in embeddings(model)
    ]
    try:
        for module, _ in held:
            vars(module).update(PLAIN)
        yield
    finally:
        for module, own in held:
            vars(module).update(own)


@contextlib.contextmanager
def _no_fast_attention() -> Iterator[None]:
    """The fused encoder layer of evaluation mode has no derivative."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _no_checkpoints() -> Iterator[None]:
    """Activation checkpoints keep what they would compute again.

    The second forward pass of a checkpoint runs in the backward pass, when the model's own parameters are back, and
    would differentiate these.
    """
    inner = {
        "_checkpoint_without_reentrant_generator": _kept,
        "CheckpointFunction": _Kept,
    }
    before = {
        name: getattr(checkpoint, name)
        for name in inner
        if hasattr(checkpoint, name)
    }
    for name in before:
        setattr(checkpoint, name, inner[name])
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(checkpoint, name, own)


def _kept(*_: Any, **__: Any) -> Iterator[None]:
    """In place of the hooks around a checkpointed function: none."""
    yield


class _Kept:
    """In place of the reentrant checkpoint: a plain call."""

    @staticmethod
    def apply(function: Any, _preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)
