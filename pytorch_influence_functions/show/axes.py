"""Matplotlib, where it is installed: axes to draw on, colours, and the end of a figure."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..utils import optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HELPFUL, HARMFUL, NEUTRAL, PALE = "#0072B2", "#D55E00", "#444444", "#B0B0B0"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, which people with any kind of colour vision tell apart."""
STYLES = ("-", "--", "-.", ":")
SMALL, SMALLEST = 9, 8


def pyplot() -> Any:
    """`matplotlib.pyplot`.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    return optional("matplotlib.pyplot", "plot", "pictures need matplotlib")


def axis_of(axis: Axes | None, size: tuple[float, float] = (4.8, 4.0)) -> Any:
    """The axes given, or those of a new figure of this size in inches."""
    if axis is not None:
        return axis
    return pyplot().subplots(figsize=size, layout="constrained")[1]


def bare(axis: Any) -> Any:
    """Without the lines that say nothing."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=SMALLEST)
    return axis


def few_ticks(axis: Any) -> None:
    """Few enough numbers on both axes that they never touch."""
    axis.locator_params(axis="both", nbins=5)


def legend(axis: Any) -> None:
    """What each line is."""
    axis.legend(frameon=False, fontsize=SMALLEST)


def saved(
    axis: Any,
    path: str | os.PathLike[str] | None,
) -> None:
    """Write the figure of these axes, where a path is given."""
    if path is None:
        return
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    axis.figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.12)
