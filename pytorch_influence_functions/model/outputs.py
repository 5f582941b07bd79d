"""What a model returns, as numbers, and read as a known loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from ..data.batch import flatten_tree
from .cross_entropy import IGNORED_CLASS, Weighted


def numbers_of(
    outputs: Any,
) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The floating-point tensors among a model's outputs, and how to put others in their place."""
    leaves, rebuild = flatten_tree(outputs)
    places = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point()]

    def again(numbers: Sequence[Tensor]) -> Any:
        whole = list(leaves)
        for i, number in zip(places, numbers, strict=True):
            whole[i] = number
        return rebuild(whole)

    return [leaves[i] for i in places], again


def attached(numbers: Sequence[Tensor], theta: Tensor) -> list[Tensor]:
    """Outputs that all have a graph, those that do not depend on theta [P] with a derivative of zero."""
    return [
        part if part.requires_grad else part + 0 * theta[0].to(part)
        for part in numbers
    ]


class Head(NamedTuple):
    """A known loss of one of the tensors that the model returns and one of the batch's.

    It stands for a loss that is linear in what the model returns (computed inside the model, or from its
    log-probabilities), whose Gauss-Newton matrix there is zero: the curvature lies behind this tensor.
    """

    name: str
    output: int
    """Place of the output among the tensors that the model returns."""
    target: int
    """Place of the target among the tensors of the batch."""
    loss: Callable[[Tensor, Tensor], Tensor]


def _classes_last(y: Tensor, t: Tensor) -> Tensor:
    """Mean cross-entropy with the classes in the last dimension, y [B, ..., C], t [B, ...]."""
    return F.cross_entropy(
        y.reshape(-1, y.shape[-1]), t.reshape(-1), ignore_index=IGNORED_CLASS
    )


def _next_token(y: Tensor, t: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it, y [B, T, C], t [B, T]."""
    return _classes_last(y[:, :-1], t[:, 1:])


def _squares(y: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(y.reshape(t.shape), t)


def _binary(y: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(y.reshape(t.shape), t.to(y))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "cross-entropy over the last dimension": _classes_last,
    "cross-entropy of the next token": _next_token,
    "mean squared error": _squares,
    "binary cross-entropy with logits": _binary,
}
"""What a loss inside a model is compared with, in value and gradient."""


def candidates(
    outputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    given: Callable[..., Any],
) -> Iterator[Head]:
    """Every known loss of every pair of an output and a tensor of the batch; `given` is the user's own loss."""
    losses = dict(LOSSES)
    if isinstance(given, Weighted):
        losses["cross-entropy with class weights"] = given.of_logits
    for i, y in enumerate(outputs):
        for j in range(len(targets)):
            if y.is_floating_point() and y.dim() > 0:
                yield from (
                    Head(name, i, j, loss) for name, loss in losses.items()
                )
