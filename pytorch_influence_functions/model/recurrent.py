r"""Recurrent layers step by step, by operations that have every derivative.

PyTorch's LSTM, GRU and RNN are one operation each, which knows neither forward mode nor a batch of parameters, and
whose weights no layer is called with. Step by step the gates of a sample are

    a_t = W_{ih} x_t + b_{ih},     b_t = W_{hh} h_{t-1} + b_{hh},

two linear maps over its positions, like any other layer. The numbers are the same to rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence


class State(NamedTuple):
    """Of a layer in one direction [B, ...]; c of an LSTM alone."""

    h: Tensor
    c: Tensor


def _lstm(a: Tensor, b: Tensor, state: State) -> State:
    i, f, g, o = (a + b).chunk(4, -1)
    kept = f.sigmoid() * state.c
    new = i.sigmoid() * g.tanh()
    c = kept + new
    h = o.sigmoid() * c.tanh()
    return State(h, c)


def _gru(a: Tensor, b: Tensor, state: State) -> State:
    ar, az, an = a.chunk(3, -1)
    br, bz, bn = b.chunk(3, -1)
    r = (ar + br).sigmoid()
    z = (az + bz).sigmoid()
    n = (an + r * bn).tanh()
    h = n + z * (state.h - n)
    return State(h, state.c)


def _tanh(a: Tensor, b: Tensor, state: State) -> State:
    gates = a + b
    h = gates.tanh()
    return State(h, state.c)


def _relu(a: Tensor, b: Tensor, state: State) -> State:
    gates = a + b
    h = gates.relu()
    return State(h, state.c)


STEPS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": _tanh,
    "RNN_RELU": _relu,
}
"""By the `mode` of a module: a_t, b_t and the last state -> the next one."""


class Map(NamedTuple):
    """A linear map inside a module: its name and those of its parameters there, and how many outputs it has."""

    name: str
    weight: str
    bias: str
    outputs: int


def maps(module: nn.RNNBase) -> list[Map]:
    """All linear maps of a recurrent module."""
    found = []
    for _, end in _ends(module):
        gates = len(getattr(module, f"weight_ih_{end}"))
        for kind in ("ih", "hh"):
            own = f"{kind}_{end}"
            found.append(Map(own, f"weight_{own}", f"bias_{own}", gates))
        if module.proj_size:
            own = f"hr_{end}"
            found.append(Map(own, f"weight_{own}", "", module.proj_size))
    return found


def _ends(module: nn.RNNBase) -> list[tuple[bool, str]]:
    """Of each layer and direction: whether it runs backwards, and how the names of its parameters end."""
    ways = (False, True) if module.bidirectional else (False,)
    return [
        (backwards, f"l{layer}{'_reverse' if backwards else ''}")
        for layer in range(module.num_layers)
        for backwards in ways
    ]


@contextlib.contextmanager
def step_by_step(model: nn.Module) -> Iterator[None]:
    """Inside: the recurrent modules of a model compute step by step; packed sequences and single ones as ever."""
    changed = []
    try:
        for module in model.modules():
            if isinstance(module, nn.RNNBase) and _is_plain(module):
                vars(module)["forward"] = functools.partial(_forward, module)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def _is_plain(module: nn.RNNBase) -> bool:
    """Whether it computes what PyTorch's own classes do."""
    own = (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward)
    return type(module).forward in own and "forward" not in vars(module)


def _forward(
    module: nn.RNNBase, input: Tensor | PackedSequence, hx: Any = None
) -> Any:
    """In place of the module's own `forward`."""
    if isinstance(input, PackedSequence) or input.dim() != 3:
        return type(module).forward(module, input, hx)
    ends = _ends(module)
    states = _states(module, input, hx)
    ways = 2 if module.bidirectional else 1
    y, last = input, []
    for first in range(0, len(ends), ways):
        outputs = []
        for i in range(first, first + ways):
            output, state = _direction(module, y, *ends[i], states[i])
            outputs.append(output)
            last.append(state)
        y = torch.cat(outputs, -1) if ways > 1 else outputs[0]
    h = torch.stack([state.h for state in last])
    if module.mode != "LSTM":
        return y, h
    c = torch.stack([state.c for state in last])
    return y, (h, c)


def _states(module: nn.RNNBase, x: Tensor, hx: Any) -> list[State]:
    """The first state of each layer and direction."""
    size = x.shape[0 if module.batch_first else 1]
    count = len(_ends(module))
    if hx is None:
        h = x.new_zeros(count, size, module.proj_size or module.hidden_size)
        c = x.new_zeros(count, size, module.hidden_size)
    else:
        h, c = hx if module.mode == "LSTM" else (hx, hx)
    each = zip(h.unbind(), c.unbind(), strict=True)
    return [State(*both) for both in each]


def _direction(
    module: nn.RNNBase, x: Tensor, backwards: bool, end: str, state: State
) -> tuple[Tensor, State]:
    """One layer over a sequence in one direction -> its outputs, in the layout of x, and the last state."""
    step = STEPS[module.mode]
    W, b = _of(module, "ih", end)
    U, d = _of(module, "hh", end)
    time = 1 if module.batch_first else 0
    gates = F.linear(x, W, b).unbind(time)
    outputs = []
    for a in reversed(gates) if backwards else gates:
        state = step(a, F.linear(state.h, U, d), state)
        if module.proj_size:
            projected = F.linear(state.h, getattr(module, f"weight_hr_{end}"))
            state = State(projected, state.c)
        outputs.append(state.h)
    if backwards:
        outputs.reverse()
    return torch.stack(outputs, time), state


def _of(module: nn.RNNBase, kind: str, end: str) -> tuple[Tensor, Any]:
    own = f"{kind}_{end}"
    weight: Tensor = getattr(module, f"weight_{own}")
    bias = getattr(module, f"bias_{own}", None)
    return weight, bias
