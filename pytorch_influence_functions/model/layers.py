r"""The layers of a model whose gradient is a sum of outer products over their positions, trusted where that is true.

Of a layer with inputs a_t and output gradients g_t the weight gradient of one sample is \sum_t g_t a_t^T, t over
sequence or image positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from .gradients import agrees
from .layer_rules import Products, Sums, parts_of
from .objective import Objective
from .outer_products import outer_products
from .outputs import attached, numbers_of

logger = logging.getLogger(__name__)
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
    weight: slice | None
    """Place in theta; None where there is no weight, or a frozen one."""
    bias: slice | None
    rule: Products | Sums
    layout: Layout = _samples_first
    copied: bool = False
    """Whether the model gets a copy of its output, which it changes in place."""
    shared: bool = False
    """Whether all samples share its input, as they do their positions; the model gets its output once for each."""

    @property
    def places(self) -> list[slice]:
        """Where its parameters lie in theta."""
        return [place for place in (self.weight, self.bias) if place is not None]

    @property
    def classes(self) -> int | None:
        """Of one-hot inputs."""
        return None if isinstance(self.rule, Sums) else self.rule.classes

    def inputs(self, x: Tensor, size: int) -> Tensor:
        """Input as the module gets it, batch size -> [B, T, groups, in (+ 1)]; one-hot ones as their places."""
        if isinstance(self.rule, Sums):
            return x.new_ones(size, 1, 1, 1)
        rows = self.rule.inputs(x)
        if self.bias is not None:
            rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
        return self.layout(rows, size)

    def outputs(self, g: Tensor, x: Tensor, size: int) -> Tensor:
        """Gradient of its output, its input, batch size -> [B, T, groups, out]."""
        if isinstance(self.rule, Products):
            return self.layout(self.rule.outputs(g), size)
        sums = [self.layout(rows, size).sum(1, keepdim=True) for rows in self.rule.gradients(g, x)]
        return joined(sums, -1)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat` that does not copy a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


# ---- which layers


def usable_layers(objective: Objective, batch: Batch) -> list[Layer]:
    """Layers whose outer products give the true gradient of each sample of a batch of a few, in the layout that does.

    A layer for which none does (weights used elsewhere too, samples that cannot be found in it) is left out, alone.
    """
    places = parameter_places(objective)
    named = objective.model.named_modules()
    layers = [layer for name, module in named for layer in _layers(name, module, places)]
    layers = _seen(objective, layers, batch)
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
        if right is None and len(together) == 1:
            right = _shared(objective, layer, batch)
        if right is None:
            _left_out(layer.name, "its gradient is no sum of outer products by sample")
        else:
            usable.append(right)
    return usable


def _shared(objective: Objective, layer: Layer, batch: Batch) -> Layer | None:
    """The layer with its output repeated for each sample, where that gives the right gradients."""
    option = layer._replace(shared=True)
    try:
        seen = [_gradients_of(objective, [option], batch)]
    except (RuntimeError, IndexError, ValueError, AssertionError) as error:
        logger.debug("%s is not shared by the samples: %s", layer.name, str(error).splitlines()[0])
        return None
    return option if _is_right(option, 0, seen) else None


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
        # in the model's own precision, which the truth is rounded to as well
        a = torch.cat([layer.inputs(x, size) for x in one.inputs[i]], 1)
        pairs = zip(one.gradients[i], one.inputs[i], strict=True)
        g = torch.cat([layer.outputs(g, x, size) for g, x in pairs], 1)
        return outer_products(g.transpose(1, 2), a.transpose(1, 2), layer.classes).flatten(1)

    return all(agrees(lambda one=one: found(one), gather(layer, one.truth).flatten(1)) for one in tried)  # type: ignore[misc]


def _layers(name: str, module: nn.Module, places: dict[str, slice]) -> list[Layer]:
    """A module's parameters that are trained: one layer, or its weight and its bias apart."""
    prefix = f"{name}." if name else ""
    weight, bias = places.get(f"{prefix}weight"), places.get(f"{prefix}bias")
    try:
        parts = parts_of(module, weight is not None, bias is not None)
    except NotImplementedError as error:
        _left_out(name, str(error))
        return []
    layers = []
    for part in parts:
        own = name if len(parts) == 1 else f"{prefix}{'weight' if part.weight else 'bias'}"
        layers.append(Layer(own, module, weight if part.weight else None, bias if part.bias else None, part.rule))
    return layers


def _seen(objective: Objective, layers: Sequence[Layer], batch: Batch) -> list[Layer]:
    """The layers that the model calls, and whether it changes what they return in place."""
    outputs: dict[str, list[tuple[Any, int]]] = {layer.name: [] for layer in layers}

    def keep(name: str, output: Any) -> None:
        outputs[name].append((output, getattr(output, "_version", 0)))

    handles = [
        layer.module.register_forward_hook(lambda _m, _i, output, name=layer.name: keep(name, output))
        for layer in layers
    ]
    try:
        objective.batch_outputs(objective.theta.detach().requires_grad_(), next(batch.singles()))
    finally:
        for handle in handles:
            handle.remove()
    result = []
    for layer in layers:
        calls = outputs[layer.name]
        if not all(isinstance(output, Tensor) and output.requires_grad for output, _ in calls):
            _left_out(layer.name, "what it returns is no tensor with a gradient")
        elif calls:
            changed = any(output._version != version for output, version in calls)
            result.append(layer._replace(copied=changed))
    return result


def _left_out(name: str, why: str) -> None:
    logger.info("EKFAC: %s is left out, %s", name, why)


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

    def hook(i: int) -> Callable[..., Tensor]:
        def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            if layers[i].shared:
                x, output = _repeated(x, batch.size), _repeated(output, batch.size)
            raw[i].append(x.detach())
            outs[i].append(output)
            return output.clone() if layers[i].copied else output

        return keep

    handles = [layer.module.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        theta = objective.theta.detach().requires_grad_()
        y, rebuild = numbers_of(objective.batch_outputs(theta, batch))
    finally:
        for handle in handles:
            handle.remove()
    return Forward(raw, outs, attached(y, theta), rebuild, theta)


def _repeated(x: Tensor, size: int) -> Tensor:
    """[T, ...] or [1, T, ...] -> [B, T, ...]."""
    x = x if x.shape[:1] == (1,) else x.unsqueeze(0)
    return x.expand(size, *x.shape[1:])


def layer_inputs(layers: Sequence[Layer], seen: Forward, size: int) -> list[Tensor]:
    """Inputs of each layer [B, T, groups, in], all of its calls one after the other, in the precision of theta."""
    pairs = zip(layers, seen.raw, strict=True)
    return [joined([layer.inputs(_precise(x, seen.theta), size) for x in xs], 1) for layer, xs in pairs]


def _precise(x: Tensor, theta: Tensor) -> Tensor:
    """In the precision of theta; the places of one-hot inputs as they are."""
    return x.to(theta) if x.is_floating_point() else x


def backward(
    layers: Sequence[Layer], seen: Forward, e: list[Tensor], size: int, whole: bool = False
) -> tuple[list[Tensor], Tensor | None]:
    """Output gradients of each layer [B, T, groups, out] for output gradients e; the parameters' [P] where `whole`."""
    flat = [out for parts in seen.outs for out in parts]
    targets = [*flat, seen.theta] if whole else flat
    if not targets:
        return [], None
    grads = torch.autograd.grad(seen.y, targets, e, retain_graph=True, allow_unused=True, materialize_grads=True)
    each = iter(grads)
    g = []
    for layer, xs in zip(layers, seen.raw, strict=True):
        calls = [layer.outputs(next(each).to(seen.theta), _precise(x, seen.theta), size) for x in xs]
        g.append(joined(calls, 1))
    return g, next(each, None)


# ---- how a layer's parameters lie in theta


def gather(layer: Layer, v: Tensor) -> Tensor:
    """The layer's part of v [K, P] -> [K, groups, out, in (+ 1 for the bias)]."""
    rule, parts = layer.rule, [v[:, place] for place in layer.places]
    if isinstance(rule, Sums):
        return joined(parts, 1)[:, None, :, None]
    W = parts[0]
    if rule.inputs_first:
        W = W.reshape(len(v), rule.groups, -1, rule.out).mT
    else:
        W = W.reshape(len(v), rule.groups, rule.out, -1)
    biases = [b.reshape(len(v), rule.groups, rule.out, 1) for b in parts[1:]]
    return joined([W, *biases], -1)


def scatter(layer: Layer, W: Tensor, v: Tensor) -> None:
    """The inverse of `gather`, into v."""
    if isinstance(layer.rule, Sums):
        parts = W.flatten(1).split([place.stop - place.start for place in layer.places], 1)
    elif layer.bias is None:
        parts = (W,)
    else:
        parts = (W[..., :-1], W[..., -1])
    if isinstance(layer.rule, Products) and layer.rule.inputs_first:
        parts = (parts[0].mT, *parts[1:])
    for place, part in zip(layer.places, parts, strict=True):
        v[:, place] = part.reshape(len(v), -1)
