r"""Layers whose gradient is a sum of outer products over their positions: one rule a layer, trusted where it is true.

Of a layer with inputs a_t and output gradients g_t the weight gradient of one sample is \sum_t g_t a_t^T, t over
sequence or image positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batch import Batch
from .gradients import agrees
from .objective import Objective
from .outputs import attached, numbers_of

logger = logging.getLogger(__name__)
Rows = Callable[[Tensor], Tensor]
"""A layer's input or output gradient [..., d] -> [positions with samples among them..., groups, d]."""
Layout = Callable[[Tensor, int], Tensor]
"""[..., groups, d], number of samples B -> [B, T, groups, d]."""


def _samples_first(rows: Tensor, size: int) -> Tensor:
    """Samples in the first dimension, or [B T, ...]."""
    return rows.reshape(size, -1, *rows.shape[-2:])


def _samples_second(rows: Tensor, size: int) -> Tensor:
    """Samples in the second dimension (`batch_first=False`)."""
    if rows.dim() < 4 or rows.shape[1] != size:
        raise ValueError("no second dimension of that size")
    return rows.transpose(0, 1).reshape(size, -1, *rows.shape[-2:])


def _samples_last(rows: Tensor, size: int) -> Tensor:
    """[T B, ...], the samples running faster than the positions."""
    return rows.reshape(-1, size, *rows.shape[-2:]).transpose(0, 1)


LAYOUTS: tuple[Layout, ...] = (_samples_first, _samples_second, _samples_last)
"""Where a layer's samples may lie, in the order in which they are tried."""


class Layer(NamedTuple):
    """A layer whose gradient is a sum of outer products: where its parameters are, and how to see its inputs."""

    name: str
    module: nn.Module
    weight: slice
    bias: slice | None
    groups: int
    input_rows: Rows
    output_rows: Rows
    layout: Layout = _samples_first

    def inputs(self, x: Tensor, size: int) -> Tensor:
        """Input as the module gets it, batch size -> [B, T, groups, in (+ 1)]."""
        return self.layout(self.input_rows(x), size)

    def outputs(self, g: Tensor, size: int) -> Tensor:
        """Gradient of its output, batch size -> [B, T, groups, out]."""
        return self.layout(self.output_rows(g), size)


# ---- which layers


def usable_layers(objective: Objective, batch: Batch) -> list[Layer]:
    """Layers whose outer products give the true gradient of each sample of a batch of a few, in the layout that does.

    A layer for which none does (weights used elsewhere too, samples that cannot be found in it) is left out, alone.
    """
    places = parameter_places(objective)
    named = objective.model.named_modules()
    layers = [layer for name, module in named if (layer := _layer(name, module, places))]
    layers = _called(objective, layers, batch)
    if not layers:
        return []
    try:
        return _true(objective, layers, batch)
    except (RuntimeError, IndexError, NotImplementedError) as error:
        logger.info("EKFAC sees no layer of this model on its own: %s", str(error).splitlines()[0])
        return []


def _true(objective: Objective, layers: list[Layer], batch: Batch) -> list[Layer]:
    """Each layer in the layout in which its gradients are right; without those for which none is."""
    singles = list(batch.singles())
    together = singles if batch.parts or not objective.paths.outputs else [batch]
    seen = [_gradients_of(objective, layers, one) for one in together]
    usable = []
    for i, layer in enumerate(layers):
        tried = (layer._replace(layout=layout) for layout in LAYOUTS)
        right = next((option for option in tried if _is_right(option, i, seen)), None)
        if right is None:
            logger.info("EKFAC: %s is left out, its gradient is no sum of outer products by sample", layer.name)
        else:
            usable.append(right)
    return usable


class _Tried(NamedTuple):
    """What the layers saw of a batch, and the true gradient of each of its samples for the same output gradients."""

    inputs: list[list[Tensor]]
    gradients: list[list[Tensor]]
    truth: Tensor
    """[B, P]"""


def _gradients_of(objective: Objective, layers: Sequence[Layer], batch: Batch) -> _Tried:
    seen = forward(objective, layers, batch)
    generator = torch.Generator().manual_seed(0)
    e = [torch.randn(part.shape, generator=generator).to(part) for part in seen.y]
    flat = [out for parts in seen.outs for out in parts]
    each = iter(torch.autograd.grad(seen.y, flat, e, retain_graph=True, materialize_grads=True, allow_unused=True))
    gradients = [[next(each) for _ in parts] for parts in seen.outs]
    rows = []
    for i, one in enumerate(batch.singles()):
        theta = objective.theta.detach().requires_grad_()
        y = attached(numbers_of(objective.batch_outputs(theta, one))[0], theta)
        cotangents = [part[i : i + 1] for part in e]
        rows.append(torch.autograd.grad(y, theta, cotangents, materialize_grads=True, allow_unused=True)[0])
    return _Tried(seen.raw, gradients, torch.stack(rows))


def _is_right(layer: Layer, i: int, tried: Sequence[_Tried]) -> bool:
    """Whether the outer products of layer i are the true gradient of every sample."""

    def found(one: _Tried) -> Tensor:
        size = len(one.truth)
        a = torch.cat([layer.inputs(x, size) for x in one.inputs[i]], 1)
        g = torch.cat([layer.outputs(x, size) for x in one.gradients[i]], 1)
        return torch.einsum("btgo,btgi->bgoi", g, a).flatten(1)

    return all(agrees(lambda one=one: found(one), gather(layer, one.truth).flatten(1)) for one in tried)  # type: ignore[misc]


def _called(objective: Objective, layers: Sequence[Layer], batch: Batch) -> list[Layer]:
    """The layers that the model calls."""
    called: set[str] = set()
    handles = [
        layer.module.register_forward_hook(lambda _m, _i, _o, name=layer.name: called.add(name)) for layer in layers
    ]
    try:
        objective.batch_outputs(objective.theta, next(batch.singles()))
    finally:
        for handle in handles:
            handle.remove()
    return [layer for layer in layers if layer.name in called]


def parameter_places(objective: Objective) -> dict[str, slice]:
    """Where each parameter lies in theta."""
    ends = torch.tensor(objective.sizes).cumsum(0).tolist()
    return {
        name: slice(end - size, end) for name, size, end in zip(objective.names, objective.sizes, ends, strict=True)
    }


# ---- one batch


class Forward(NamedTuple):
    """One pass of the model: what its layers got and gave."""

    raw: list[list[Tensor]]
    """Of each layer its inputs, one for each time it was called."""
    outs: list[list[Tensor]]
    """Of each layer its outputs, with their graph."""
    y: list[Tensor]
    """What the model returned, [B, ...] each."""
    rebuild: Callable[[Sequence[Tensor]], Any]
    theta: Tensor


def forward(objective: Objective, layers: Sequence[Layer], batch: Batch) -> Forward:
    """Call the model once and keep what each layer sees."""
    raw: list[list[Tensor]] = [[] for _ in layers]
    outs: list[list[Tensor]] = [[] for _ in layers]

    def hook(i: int) -> Callable[..., None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            raw[i].append(inputs[0].detach())
            outs[i].append(output)

        return keep

    handles = [layer.module.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        theta = objective.theta.detach().requires_grad_()
        y, rebuild = numbers_of(objective.batch_outputs(theta, batch))
    finally:
        for handle in handles:
            handle.remove()
    return Forward(raw, outs, attached(y, theta), rebuild, theta)


def layer_inputs(layers: Sequence[Layer], seen: Forward, size: int) -> list[Tensor]:
    """Inputs of each layer [B, T, groups, in], all of its calls one after the other, in the precision of theta."""
    pairs = zip(layers, seen.raw, strict=True)
    return [torch.cat([layer.inputs(x.to(seen.theta), size) for x in xs], 1) for layer, xs in pairs]


def backward(
    layers: Sequence[Layer], seen: Forward, e: list[Tensor], size: int, whole: bool = False
) -> tuple[list[Tensor], Tensor | None]:
    """Output gradients of each layer [B, T, groups, out] for output gradients e; the parameters' [P] where `whole`."""
    flat = [out for parts in seen.outs for out in parts]
    targets = [*flat, seen.theta] if whole else flat
    grads = torch.autograd.grad(seen.y, targets, e, retain_graph=True, allow_unused=True, materialize_grads=True)
    each = iter(grads)
    g = []
    for layer, parts in zip(layers, seen.outs, strict=True):
        g.append(torch.cat([layer.outputs(next(each).to(seen.theta), size) for _ in parts], 1))
    return g, next(each, None)


# ---- one rule a layer


def _layer(name: str, module: nn.Module, places: dict[str, slice]) -> Layer | None:
    prefix = f"{name}." if name else ""
    weight, bias = places.get(f"{prefix}weight"), places.get(f"{prefix}bias")
    if weight is None or isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return None
    for kind, rule in RULES.items():
        if isinstance(module, kind):
            groups, inputs, outputs = rule(module, bias is not None)
            return Layer(name, module, weight, bias, groups, inputs, outputs)
    return None


def _with_one(a: Tensor, bias: bool) -> Tensor:
    return torch.cat([a, torch.ones_like(a[..., :1])], -1) if bias else a


def _linear(_: nn.Module, bias: bool) -> tuple[int, Rows, Rows]:
    return 1, lambda x: _with_one(x, bias).unsqueeze(-2), lambda g: g.unsqueeze(-2)


def _convolution(module: nn.Module, bias: bool) -> tuple[int, Rows, Rows]:
    conv = cast(nn.Conv2d, module)

    def inputs(x: Tensor) -> Tensor:
        patches = _patches(conv, x)
        per_group = patches.view(len(patches), conv.groups, -1, patches.shape[-1])
        return _with_one(per_group.permute(0, 3, 1, 2), bias)

    def outputs(g: Tensor) -> Tensor:
        return g.reshape(len(g), conv.groups, g.shape[1] // conv.groups, -1).permute(0, 3, 1, 2)

    return conv.groups, inputs, outputs


RULES: dict[type[nn.Module], Callable[[nn.Module, bool], tuple[int, Rows, Rows]]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
}


def _patches(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """What each output position of a convolution sees, [B, in * kernel, T]."""
    two = x if x.dim() == 4 else x.unsqueeze(2)
    flat = isinstance(conv, nn.Conv1d)
    kernel, dilation, stride = ((1, *t) if flat else t for t in (conv.kernel_size, conv.dilation, conv.stride))
    if isinstance(conv.padding, str):
        total = [d * (k - 1) if conv.padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in ((0, *conv.padding) if flat else conv.padding)]
    padding = [p for side in reversed(sides) for p in side]
    if any(padding):
        two = F.pad(two, padding, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    return F.unfold(two, kernel, dilation=dilation, stride=stride)


# ---- how a layer's parameters lie in theta


def gather(layer: Layer, v: Tensor) -> Tensor:
    """The layer's part of v [K, P] -> [K, groups, out, in (+ 1 for the bias)]."""
    weight = cast(Tensor, layer.module.weight)
    out = weight.shape[0] // layer.groups
    W = v[:, layer.weight].reshape(len(v), layer.groups, out, -1)
    if layer.bias is None:
        return W
    return torch.cat([W, v[:, layer.bias].reshape(len(v), layer.groups, out, 1)], -1)


def scatter(layer: Layer, W: Tensor, v: Tensor) -> None:
    """The inverse of `gather`, into v."""
    if layer.bias is not None:
        v[:, layer.bias] = W[..., -1].reshape(len(v), -1)
        W = W[..., :-1]
    v[:, layer.weight] = W.reshape(len(v), -1)
