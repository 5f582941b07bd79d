"""What the user gives a batch and a loss as, and what is said where they are something else."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def input_and_target(tree: Any) -> tuple[Any, Any]:
    """The two parts of a batch.

    Raises:
        TypeError: it is of another structure.
    """
    if isinstance(tree, list | tuple) and len(tree) == 2:
        return tree[0], tree[1]
    what = (
        f"{type(tree).__name__} of length {len(tree)}"
        if hasattr(tree, "__len__")
        else type(tree).__name__
    )
    raise TypeError(
        f"expected an (input, target) batch, got a {what}; "
        "pass config['model_loss'] = (model, batch) -> mean loss for batches of another structure"
    )


def one_number(loss: Any, key: str) -> Tensor:
    """A loss, which the option `key` gave, as it is.

    Raises:
        TypeError: it is no tensor of one floating-point number.
    """
    if (
        isinstance(loss, Tensor)
        and loss.numel() == 1
        and loss.is_floating_point()
    ):
        return loss
    found = (
        f"{tuple(loss.shape)} {loss.dtype}"
        if isinstance(loss, Tensor)
        else type(loss).__name__
    )
    raise TypeError(
        f"config[{key!r}]: expected the mean loss of the batch, one number as a floating-point tensor, got {found}"
    )
