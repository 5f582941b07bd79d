"""Pictures of results; needs the extra `plot` (matplotlib)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.labels import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELPFUL, HARMFUL, NEUTRAL = "#1b7837", "#b2182b", "#444444"


def plot_influences(
    result: Any,
    train_dataset: Any,
    test_dataset: Any,
    *,
    tests: Sequence[str] | None = None,
    show: int = 4,
    notes: Mapping[int, str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Each test image with its most helpful and its most harmful training images, label and influence below each.

    Args:
        result: what `calc_img_wise` returned, or its `influences`.
        train_dataset: (image, label) samples; images [H, W], [1, H, W] or [3, H, W].
        test_dataset: the same for the test set.
        tests: keys of the entries to show; None is the first five.
        show: how many helpful and how many harmful ones.
        notes: text for some training samples, by index, e.g. the true label of a wrong one.
        path: also save the figure there.
    """
    plt = _pyplot()
    entries = getattr(result, "influences", result)
    keys = list(entries)[:5] if tests is None else list(tests)
    figure, axes = plt.subplots(
        len(keys),
        2 * show + 1,
        figsize=(1.25 * (2 * show + 1) + 0.6, 1.75 * len(keys) + 0.5),
        squeeze=False,
    )
    for row, key in zip(axes, keys, strict=True):
        entry = entries[key]
        _image(
            row[0],
            test_dataset[entry["num_in_dataset"]][0],
            f"test, label {entry['label']}",
            NEUTRAL,
        )
        for axis, index in zip(
            row[1:],
            [*entry["helpful"][:show], *entry["harmful"][:show]],
            strict=True,
        ):
            image, label = train_dataset[index]
            influence = float(entry["influence"][index])
            note = f"\n{notes[index]}" if notes and index in notes else ""
            colour = HELPFUL if influence > 0 else HARMFUL
            _image(
                axis,
                image,
                f"label {plain(label)}{note}\n{influence:+.2g}",
                colour,
            )
    axes[0, 0].set_title("test image", fontsize=9)
    axes[0, 1].set_title("most helpful", fontsize=9, color=HELPFUL, loc="left")
    axes[0, show + 1].set_title(
        "most harmful", fontsize=9, color=HARMFUL, loc="left"
    )
    return _finished(figure, path)


def plot_leave_one_out(
    predicted: Sequence[float],
    actual: Sequence[float],
    *,
    title: str = "",
    axis: Axes | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Actual against predicted change of the test loss, and the line on which both are equal (the paper's figure 2)."""
    figure, axis = _axis(axis)
    x, y = np.asarray(predicted, dtype=float), np.asarray(actual, dtype=float)
    ends = [float(min(x.min(), y.min())), float(max(x.max(), y.max()))]
    axis.plot(ends, ends, color="0.7", linewidth=1, zorder=1)
    axis.scatter(x, y, s=14, color="#2166ac", zorder=2)
    axis.set_xlabel("predicted change of the test loss")
    axis.set_ylabel("actual change after retraining")
    axis.set_title(
        f"{title}\nPearson {np.corrcoef(x, y)[0, 1]:.3f}".strip(), fontsize=10
    )
    return _finished(figure, path)


def plot_mislabel_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    axis: Axes | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Fraction of the wrong labels found against fraction of the training set inspected, {name: (inspected, found)}."""
    figure, axis = _axis(axis)
    for name, (inspected, found) in curves.items():
        axis.plot(inspected, found, label=name, linewidth=1.5)
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="at random")
    axis.set_xlabel("fraction of the training set inspected")
    axis.set_ylabel("fraction of the wrong labels found")
    axis.legend(frameon=False, fontsize=8)
    return _finished(figure, path)


def plot_damping_curve(
    dampings: Sequence[float],
    values: Mapping[str, Sequence[float]],
    *,
    chosen: float | None = None,
    axis: Axes | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Scores over a grid of dampings, {name: values}, with a line at the chosen one."""
    figure, axis = _axis(axis)
    for name, row in values.items():
        axis.semilogx(dampings, row, marker="o", markersize=3, label=name)
    if chosen is not None:
        axis.axvline(
            chosen, color=HARMFUL, linewidth=1, label=f"chosen: {chosen:.3g}"
        )
    axis.set_xlabel("damping")
    axis.legend(frameon=False, fontsize=8)
    return _finished(figure, path)


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'pytorch_influence_functions[plot]'"
        ) from error
    return plt


def _axis(axis: Axes | None) -> tuple[Any, Any]:
    figure, axes = (
        _pyplot().subplots(figsize=(4.6, 4.0))
        if axis is None
        else (axis.figure, axis)
    )
    return figure, axes


def _image(axis: Any, image: Any, text: str, colour: str) -> None:
    pixels = torch.as_tensor(np.asarray(image), dtype=torch.float32)
    pixels = (
        pixels.movedim(0, -1)
        if pixels.dim() == 3 and pixels.shape[0] in (1, 3)
        else pixels
    )
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp_min(
        1e-12
    )
    axis.imshow(
        pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray_r"
    )
    axis.set_xlabel(text, fontsize=7.5, color=colour)
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_edgecolor(colour)


def _finished(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    figure.tight_layout()
    if path is not None:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure
