"""What is warned of where a model or a loss is not what it seems."""

from __future__ import annotations


class ModelWarning(UserWarning):
    """The model or the loss does something that changes what its influence means; the message names it."""
