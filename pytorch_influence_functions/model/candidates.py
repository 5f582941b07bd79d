"""The layers that a model may have: of its modules those with a rule, and linear maps that no module is called for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from .layer_kinds import plain_linear
from .layer_passes import watched
from .layer_rules import parts_of
from .layers import Layer
from .objective import Objective
from .recurrent import Map, maps

logger = logging.getLogger(__name__)


def candidates(objective: Objective, batch: Batch) -> list[Layer]:
    """Layers that the model calls with the samples of a batch and whose output has a gradient."""
    places = parameter_places(objective)
    layers: list[Layer] = []
    for name, module in objective.model.named_modules():
        layers += _layers(name, module, places)
        layers += _inside(name, module, places)
    return _seen(objective, layers, batch)


def _layers(
    name: str, module: nn.Module, places: dict[str, slice]
) -> list[Layer]:
    """A module's parameters that are trained: one layer, or its weight and its bias apart."""
    prefix = f"{name}." if name else ""
    weight, bias = places.get(f"{prefix}weight"), places.get(f"{prefix}bias")
    try:
        parts = parts_of(module, weight is not None, bias is not None)
    except NotImplementedError as error:
        left_out(name, str(error))
        return []
    layers = []
    for part in parts:
        own = (
            name
            if len(parts) == 1
            else f"{prefix}{'weight' if part.weight else 'bias'}"
        )
        layers.append(
            Layer(
                own,
                module,
                weight if part.weight else None,
                bias if part.bias else None,
                part.rule,
            )
        )
    return layers


def _inside(
    name: str, module: nn.Module, places: dict[str, slice]
) -> list[Layer]:
    """Linear maps that attention and recurrent layers take the parameters of, without calling a module."""
    prefix = f"{name}." if name else ""
    layers = []
    for one in _maps(module):
        weight = places.get(f"{prefix}{one.weight}")
        bias = places.get(f"{prefix}{one.bias}")
        if weight is not None:
            rule = plain_linear(one.outputs)
            own = f"{prefix}{one.name}"
            layers.append(Layer(own, module, weight, bias, rule, inside=True))
    return layers


def _maps(module: nn.Module) -> list[Map]:
    if isinstance(module, nn.RNNBase):
        return maps(module)
    if not isinstance(module, nn.MultiheadAttention):
        return []
    width = module.embed_dim
    return [
        Map("in_proj", "in_proj_weight", "in_proj_bias", 3 * width),
        Map("out_proj", "out_proj.weight", "out_proj.bias", width),
    ]


def _seen(
    objective: Objective, layers: Sequence[Layer], batch: Batch
) -> list[Layer]:
    """The layers that the model calls, and whether it changes what they return in place."""
    outputs: list[list[tuple[Any, int]]] = [[] for _ in layers]

    def keep(i: int, _: Tensor, output: Any) -> Any:
        outputs[i].append((output, getattr(output, "_version", 0)))
        return output

    theta = objective.theta.detach().requires_grad_()
    with watched(layers, theta, keep):
        for one in batch.singles():  # each may take a way of its own
            objective.batch_outputs(theta, one)
    result = []
    for layer, calls in zip(layers, outputs, strict=True):
        if not all(
            isinstance(output, Tensor) and output.requires_grad
            for output, _ in calls
        ):
            left_out(layer.name, "what it returns is no tensor with a gradient")
        elif calls:
            changed = any(
                output._version != version for output, version in calls
            )
            result.append(layer._replace(copied=changed))
    return result


def left_out(name: str, why: str) -> None:
    """Say in the log that a layer is none that EKFAC sees, and why."""
    logger.info("EKFAC: %s is left out, %s", name, why)


def parameter_places(objective: Objective) -> dict[str, slice]:
    """Where each parameter lies in theta."""
    ends = torch.tensor(objective.sizes).cumsum(0).tolist()
    return {
        name: slice(end - size, end)
        for name, size, end in zip(
            objective.names, objective.sizes, ends, strict=True
        )
    }
