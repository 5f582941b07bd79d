"""One batch as the layers of a model see it: their inputs, their outputs, and the gradients of these."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batch import Batch
from .layer_kinds import Sums
from .layers import Layer, LayoutError, joined
from .objective import Objective
from .outputs import attached, numbers_of

logger = logging.getLogger(__name__)


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


def forward(
    objective: Objective, layers: Sequence[Layer], batch: Batch
) -> Forward:
    """Call the model once and keep what each layer sees."""
    raw: list[list[Tensor]] = [[] for _ in layers]
    outs: list[list[Tensor]] = [[] for _ in layers]

    def keep(i: int, x: Tensor, output: Tensor) -> Tensor:
        if layers[i].shared:
            x = _repeated(x, batch.size)
            output = _repeated(output, batch.size)
        raw[i].append(x.detach())
        outs[i].append(output)
        return output.clone() if layers[i].copied else output

    theta = objective.theta.detach().requires_grad_()
    with watched(layers, theta, keep):
        y, rebuild = numbers_of(objective.batch_outputs(theta, batch))
    return Forward(raw, outs, attached(y, theta), rebuild, theta)


Keep = Callable[[int, Tensor, Any], Any]
"""Place of a layer, its input, its output -> what the model gets for its output."""


@contextlib.contextmanager
def watched(
    layers: Sequence[Layer], theta: Tensor, keep: Keep
) -> Iterator[None]:
    """Inside: `keep` sees each call of the layers of a model at theta [P], and gives what the model goes on with."""

    def hook(i: int) -> Callable[..., Any]:
        def seen(
            _: nn.Module,
            args: tuple[Tensor, ...],
            kwargs: dict[str, Tensor],
            output: Any,
        ) -> Any:
            x = args[0] if args else next(iter(kwargs.values()))
            return keep(i, x, output)

        return seen

    numbered = list(enumerate(layers))
    handles = [
        layer.module.register_forward_hook(hook(i), with_kwargs=True)
        for i, layer in numbered
        if not layer.inside
    ]
    weights = {
        (theta[layer.weight].data_ptr(), theta[layer.weight].numel()): i
        for i, layer in numbered
        if layer.inside and layer.weight is not None
    }
    plain = F.linear
    try:
        if weights:
            vars(F)["linear"] = _watched_linear(plain, weights, keep)
        yield
    finally:
        vars(F)["linear"] = plain
        for handle in handles:
            handle.remove()


def _watched_linear(
    plain: Callable[..., Tensor],
    weights: dict[tuple[int, int], int],
    keep: Keep,
) -> Callable[..., Tensor]:
    """`F.linear` that shows its calls with some weights, by their places in memory and sizes."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = plain(x, weight, bias)
        try:
            i = weights.get((weight.data_ptr(), weight.numel()))
        except RuntimeError:  # inside a transform of the model's own
            return output
        shown: Tensor = output if i is None else keep(i, x, output)
        return shown

    return linear


def _repeated(x: Tensor, size: int) -> Tensor:
    """[T, ...] or [1, T, ...] -> [B, T, ...]."""
    x = x if x.shape[:1] == (1,) else x.unsqueeze(0)
    return x.expand(size, *x.shape[1:])


class Inputs:
    """Inputs of each layer [B, T, groups, in], all of its calls one after the other, in the precision of theta.

    Each is made when it is asked for: those of a convolution take up to nine times as much unfolded as they are.
    """

    def __init__(
        self, layers: Sequence[Layer], seen: Forward, size: int
    ) -> None:
        self._layers, self._theta, self._size = layers, seen.theta, size
        self._raw = [
            [x.new_empty(0) for x in xs] if isinstance(layer.rule, Sums) else xs
            for layer, xs in zip(layers, seen.raw, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, i: int) -> Tensor:
        if i >= len(self):
            raise IndexError(i)
        xs = [_precise(x, self._theta) for x in self._raw[i]]
        return _inputs(self._layers[i], xs, self._theta, self._size)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def once(self, i: int) -> Tensor | None:
        """The input of the i-th layer as it is, if the layer was called once."""
        xs = self._raw[i]
        return _precise(xs[0], self._theta) if len(xs) == 1 else None

    @property
    def nbytes(self) -> int:
        """Bytes that they take as they are."""
        held = {x.data_ptr(): x.nbytes for xs in self._raw for x in xs}
        return sum(held.values())


def _inputs(
    layer: Layer, xs: Sequence[Tensor], theta: Tensor, size: int
) -> Tensor:
    if xs:
        return joined([layer.inputs(x, size) for x in xs], 1)
    kind = theta.dtype if layer.classes is None else torch.long
    width = layer.fan_in if layer.classes is None else 1
    return theta.new_zeros(size, 0, layer.groups, width, dtype=kind)


def _precise(x: Tensor, theta: Tensor) -> Tensor:
    """In the precision of theta; the places of one-hot inputs as they are."""
    return x.to(theta) if x.is_floating_point() else x


def backward(
    layers: Sequence[Layer],
    seen: Forward,
    e: list[Tensor],
    size: int,
    whole: bool = False,
    last: bool = False,
) -> tuple[list[Tensor], Tensor | None]:
    """Output gradients of each layer [B, T, groups, out] for output gradients e; the parameters' [P] where `whole`.

    After the `last` one what the pass forward kept is let go.
    """
    flat = [out for parts in seen.outs for out in parts]
    targets = [*flat, seen.theta] if whole else flat
    if not targets:
        return [], None
    grads = torch.autograd.grad(
        seen.y,
        targets,
        e,
        retain_graph=not last,
        allow_unused=True,
        materialize_grads=True,
    )
    each = iter(grads)
    g = []
    for layer, xs in zip(layers, seen.raw, strict=True):
        calls = [
            layer.outputs(
                next(each).to(seen.theta), _precise(x, seen.theta), size
            )
            for x in xs
        ]
        none = seen.theta.new_zeros(size, 0, layer.groups, layer.fan_out)
        g.append(joined(calls, 1) if calls else none)
    return g, next(each, None)


Found = TypeVar("Found")


def by_parts(batch: Batch, way: Callable[[Batch], Found]) -> Iterator[Found]:
    """What `way` finds in a batch, or in each sample alone where a layer does not see all (experts, branches)."""
    for one in batch.parts or (batch,):
        try:
            found = way(one)
        except LayoutError as error:
            if one.size == 1:
                raise
            logger.debug("%s; they go one at a time", error)
        else:
            yield found
            continue
        yield from map(way, one.singles())
