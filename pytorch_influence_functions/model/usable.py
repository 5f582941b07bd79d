"""Which layers of a model are used: those whose outer products are the true gradient of each sample."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..data.batch import Batch
from .candidates import candidates, left_out
from .gradients import SMALL_BYTES, agrees, per_sample_gradients
from .layer_passes import forward
from .layer_products import summed_gradients
from .layers import LAYOUTS, Layer, gather
from .objective import Objective
from .outer_products import outer_products
from .outputs import attached, numbers_of
from .trial import IN_DOUBLE

logger = logging.getLogger(__name__)
TRIED = 4
"""Samples whose gradients tell how a layer sees them: two may come in the order they are sorted in, or to the same
expert, by chance."""


def usable_layers(objective: Objective, batch: Batch) -> list[Layer]:
    """Layers whose outer products give the true gradient of each sample of a batch of a few, in the layout that does.

    A layer for which none does (weights used elsewhere too, samples that cannot be found in it) is left out, alone.
    """
    layers = candidates(objective, batch)
    if not layers:
        return []
    try:
        return _true(objective, layers, batch)
    except (RuntimeError, IndexError, NotImplementedError) as error:
        logger.info(
            "EKFAC sees no layer of this model on its own: %s",
            str(error).splitlines()[0],
        )
        return []


def covering_layers(objective: Objective, batch: Batch) -> list[Layer]:
    """Layers whose rules give the whole gradient of each sample of a batch; none where they do not, or not faster.

    Without a convolution or a recurrent layer per-sample gradients by `vmap` are outer products as well, and cost no
    more, nor do small ones.
    """
    modules = objective.model.modules()
    faster = any(isinstance(one, (_ConvNd, nn.RNNBase)) for one in modules)
    large = objective.theta.nbytes > SMALL_BYTES
    return whole_layers(objective, batch) if faster and large else []


def whole_layers(objective: Objective, batch: Batch) -> list[Layer]:
    """Layers whose rules give the whole gradient of each sample of a batch; none where they do not."""
    if not (objective.paths.batched and objective.paths.outputs):
        return []
    layers = usable_layers(objective, batch)
    if any(layer.alone for layer in layers):
        return []
    places = [place for layer in layers for place in layer.places]
    covered = sum(place.stop - place.start for place in places)
    return layers if covered == objective.P else []


def trusted_layers(objective: Objective, batch: Batch) -> list[Layer]:
    """`whole_layers` whose gradients of these samples are the true ones; none where they are not."""
    layers = whole_layers(objective, batch)
    rows = [per_sample_gradients(objective, one) for one in batch.singles()]

    def found() -> Tensor:
        return summed_gradients([objective], layers, batch)

    return layers if layers and agrees(found, torch.cat(rows)) else []


def _true(
    objective: Objective, layers: list[Layer], batch: Batch
) -> list[Layer]:
    """Each layer in the layout in which its gradients are right; without those for which none is."""
    singles = list(batch.singles())
    together = (
        singles if batch.parts or not objective.paths.outputs else [batch]
    )
    seen = [_gradients_of(objective, layers, one) for one in together]
    in_double = functools.cache(lambda: _in_double(objective, layers, together))
    usable = []
    for i, layer in enumerate(layers):
        right = _in_a_layout(layer, i, seen)
        if right is None and in_double():
            within = IN_DOUBLE[objective.dtype]
            right = _in_a_layout(layer, i, in_double(), within)
        if right is None and len(together) == 1:
            right = _shared(objective, layer, batch)
            right = right or _alone(objective, layer, singles)
        if right is None:
            left_out(
                layer.name, "its gradient is no sum of outer products by sample"
            )
        else:
            usable.append(right)
    return usable


def _in_a_layout(
    layer: Layer,
    i: int,
    seen: Sequence[_Tried],
    within: float | None = None,
) -> Layer | None:
    """The layer in the layout in which its gradients are right, or None."""
    for layout in LAYOUTS:
        option = layer._replace(layout=layout)
        if _is_right(option, i, seen, within):
            return option
    return None


def _in_double(
    objective: Objective,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
) -> list[_Tried]:
    """What the layers saw in double precision; nothing where the model runs in its own only.

    In single precision a ReLU's input near zero may have one sign in a batch and the other alone, and the gradients of
    all layers below it differ: a ResNet-18 of 11 million parameters lost all layers so, with some of its samples.
    """
    if objective.dtype not in IN_DOUBLE:
        return []
    if objective.rounded not in (None, objective.dtype):
        return []
    twin = objective.double()
    try:
        return [_gradients_of(twin, layers, one) for one in batches]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        logger.debug("no layers in double precision: %s", error)
        return []


def _shared(objective: Objective, layer: Layer, batch: Batch) -> Layer | None:
    """The layer with its output repeated for each sample, where that gives the right gradients."""
    option = layer._replace(shared=True)
    try:
        seen = [_gradients_of(objective, [option], batch)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model may raise anything where a shape is another than it knows
        logger.debug("%s is not shared by the samples: %s", layer.name, error)
        return None
    return option if _is_right(option, 0, seen) else None


def _alone(
    objective: Objective, layer: Layer, singles: Sequence[Batch]
) -> Layer | None:
    """The layer as one to be seen one sample at a time, where that gives the right gradients."""
    seen = [_gradients_of(objective, [layer], one) for one in singles]
    return layer._replace(alone=True) if _is_right(layer, 0, seen) else None


class _Tried(NamedTuple):
    """What the layers saw of a batch, and the true gradient of each of its samples for the same output gradients."""

    inputs: list[list[Tensor]]
    gradients: list[list[Tensor]]
    truth: Tensor
    """[B, P]"""


def _gradients_of(
    objective: Objective, layers: Sequence[Layer], batch: Batch
) -> _Tried:
    seen = forward(objective, layers, batch)
    generator = torch.Generator().manual_seed(0)
    e = [
        torch.randn(part.shape, generator=generator).to(part) for part in seen.y
    ]
    flat = [out for parts in seen.outs for out in parts]
    each = iter(
        torch.autograd.grad(
            seen.y,
            flat,
            e,
            retain_graph=True,
            materialize_grads=True,
            allow_unused=True,
        )
    )
    gradients = [[next(each) for _ in parts] for parts in seen.outs]
    truth = seen.theta.new_empty(batch.size, objective.P)
    for i, one in enumerate(batch.singles()):
        theta = objective.theta.detach().requires_grad_()
        y = attached(numbers_of(objective.batch_outputs(theta, one))[0], theta)
        cotangents = [part[i : i + 1] for part in e]
        (truth[i],) = torch.autograd.grad(
            y, theta, cotangents, materialize_grads=True, allow_unused=True
        )
    return _Tried(seen.raw, gradients, truth)


def _is_right(
    layer: Layer,
    i: int,
    tried: Sequence[_Tried],
    within: float | None = None,
) -> bool:
    """Whether the outer products of layer i are the true gradient of every sample."""

    def found(one: _Tried) -> Tensor:
        size = len(one.truth)
        if not one.inputs[i]:  # it was not called
            return torch.zeros_like(gather(layer, one.truth).flatten(1))
        # in the model's own precision, which the truth is rounded to as well
        a = torch.cat([layer.inputs(x, size) for x in one.inputs[i]], 1)
        pairs = zip(one.gradients[i], one.inputs[i], strict=True)
        g = torch.cat([layer.outputs(g, x, size) for g, x in pairs], 1)
        return outer_products(
            g.transpose(1, 2), a.transpose(1, 2), layer.classes
        ).flatten(1)

    for one in tried:
        expected = gather(layer, one.truth).flatten(1)
        if not agrees(functools.partial(found, one), expected, within):
            return False
    return True
