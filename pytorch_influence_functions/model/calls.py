"""What a loss calls of a model: seen while it is called, and other outputs put in their place.

The outputs are those of every outermost call: of the model, of a part of it (`model.encode` calls its encoder), and of
`torch.autograd.grad` in the loss itself (physics-informed losses, forces). All of them together are what the loss is a
function of.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Of a module; they have run on an output that is put in place of a call."""


class Recorder:
    """What the outermost calls return, in order.

    Attributes:
        modules: of each call; None is `torch.autograd.grad`.
        outputs: of each call.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module | None] = []
        self.outputs: list[Any] = []
        self._depth = 0

    def enter(self, *_: Any) -> None:
        """A module is called."""
        self._depth += 1

    def leave(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        """A module has returned."""
        self._depth -= 1
        self._keep(module, output)

    def gradient(self, grad: Callable[..., Any]) -> Callable[..., Any]:
        """`torch.autograd.grad` that is recorded where no module calls it."""

        def recorded_grad(*args: Any, **kwargs: Any) -> Any:
            slopes = grad(*args, **kwargs)
            self._keep(None, slopes)
            return slopes

        return recorded_grad

    def _keep(self, module: nn.Module | None, output: Any) -> None:
        if self._depth == 0:
            self.modules.append(module)
            self.outputs.append(output)


@contextlib.contextmanager
def recorded(model: nn.Module, parts: bool) -> Iterator[Recorder]:
    """Inside: the outermost calls of the model, and where `parts` of any module of it, are recorded."""
    recorder = Recorder()
    with contextlib.ExitStack() as stack:
        for module in model.modules() if parts else (model,):
            stack.callback(
                module.register_forward_pre_hook(recorder.enter).remove
            )
            stack.callback(module.register_forward_hook(recorder.leave).remove)
        if parts:
            stack.enter_context(
                _in_place_of_grad(recorder.gradient(torch.autograd.grad))
            )
        yield recorder


@contextlib.contextmanager
def replayed(
    model: nn.Module, outputs: Sequence[Any], parts: bool
) -> Iterator[None]:
    """Inside: the calls that `recorded` sees return these `outputs`, in order."""
    coming = iter(outputs)

    def answer(*_args: Any, **_kwargs: Any) -> Any:
        try:
            return next(coming)
        except StopIteration:
            raise RuntimeError(
                "the loss calls the model more often than it did before"
            ) from None

    with contextlib.ExitStack() as stack:
        for module in model.modules() if parts else (model,):
            stack.enter_context(_in_place_of_forward(module, answer))
        if parts:
            stack.enter_context(_in_place_of_grad(answer))
        yield


@contextlib.contextmanager
def _in_place_of_forward(
    module: nn.Module, answer: Callable[..., Any]
) -> Iterator[None]:
    """Inside: a call of the module is `answer`, without its hooks."""
    own = vars(module)
    replaced = {"forward": answer, **{name: OrderedDict() for name in HOOKS}}
    before = {name: own[name] for name in replaced if name in own}
    own.update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del own[name]
        own.update(before)


@contextlib.contextmanager
def _in_place_of_grad(function: Callable[..., Any]) -> Iterator[None]:
    before = torch.autograd.grad
    torch.autograd.grad = function
    try:
        yield
    finally:
        torch.autograd.grad = before
