"""The picture of a result: test samples beside the training samples that helped and harmed them."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..data.labels import plain
from ..data.reading import label_of
from .axes import HARMFUL, HELPFUL, NEUTRAL, SMALL, SMALLEST, pyplot, saved
from .images import Look, Pixels
from .results import InfluenceResult

FIRST = 5
COLUMNS = ("sample", "label", "influence", "what it is")
WIDTHS = (0.1, 0.28, 0.1, 0.52)
LETTERS = (14, 36, 12, 62)
"""That fit into each column, the bold ones of the test sample too."""


def plot_influences(
    result: InfluenceResult,
    test: int | str | Sequence[int | str] | None = None,
    train_set: Any = None,
    test_set: Any = None,
    *,
    classes: Sequence[str] | None = None,
    predictions: Any = None,
    show: int = 4,
    notes: Mapping[int, str] | None = None,
    view: Any = None,
    mean: Any = None,
    std: Any = None,
    layout: str | None = None,
    invert: bool = False,
    axes: Any = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Test samples with their most helpful and most harmful training samples, each with its label and influence.

    Images of any layout are drawn; rows of numbers and texts are listed in a table for each test sample.

    Args:
        result: of a run.
        test: key or place of a test sample, or several; None is the first five.
        train_set: its samples are (input, label), dicts or objects; None is that of the run.
        test_set: the same for the test set.
        classes: names of the labels.
        predictions: what the model predicts, by index in the test set (a tensor, a list or a dict).
        show: how many helpful and how many harmful ones, less where there are fewer.
        notes: text for some training samples, by index, e.g. the true label of a wrong one.
        view, mean, std, layout, invert: how samples become pictures; see `Look`.
        axes: draw on these: [tests, 1 + 2 show] for images, [tests] or [tests, 1] for tables.
        path: also save the figure there.

    Returns:
        The axes, an array of that shape.

    Raises:
        ValueError: the data sets are not known, or `axes` has another shape.
        KeyError: there is no such test sample.
        ImportError: matplotlib is not installed.
    """
    pyplot()
    look = Look(view, mean, std, layout, invert, classes)
    data = _data_sets(result, train_set, test_set)
    drawing = _Drawing(result, data, look, predictions, notes or {}, show)
    keys = _keys(result, test)
    rows = [drawing.samples(key) for key in keys]
    images = not any(isinstance(one.shown, str) for row in rows for one in row)
    draw = _images if images else _tables
    drawn = draw(rows, axes)
    saved(drawn.flat[0], path)
    return drawn


def _keys(
    result: InfluenceResult,
    test: Any,
) -> list[str]:
    """Keys of the entries that are asked for."""
    if test is None:
        return list(result.influences)[:FIRST]
    one = isinstance(test, int | str)
    keys = [str(key) for key in ([test] if one else test)]
    if not keys:
        raise ValueError("test: expected at least one test sample, got none")
    for key in keys:
        result.top(key, 0)
    return keys


def _data_sets(
    result: InfluenceResult,
    train_set: Any,
    test_set: Any,
) -> tuple[Any, Any]:
    """The data sets given, or those of the run."""
    train = result.train_set if train_set is None else train_set
    test = result.test_set if test_set is None else test_set
    for name, given in (("train_set", train), ("test_set", test)):
        if given is None:
            raise ValueError(
                f"{name}: expected the data set of the run, got None; a result that was loaded or copied knows none, "
                "so give it"
            )
    return train, test


class _Sample:
    """What is drawn of one sample: a picture or text, a caption and a colour; `label`, `influence` for a table."""

    def __init__(
        self,
        shown: Pixels | str,
        name: str,
        label: str,
        influence: float | None,
    ) -> None:
        self.shown = shown
        self.name = name
        self.label = label
        self.influence = influence

    @property
    def number(self) -> str:
        return "" if self.influence is None else f"{self.influence:+.2g}"

    @property
    def colour(self) -> str:
        if self.influence is None:
            return NEUTRAL
        return HELPFUL if self.influence > 0 else HARMFUL


class _Drawing:
    """What is shown of each test sample."""

    def __init__(
        self,
        result: InfluenceResult,
        data: tuple[Any, Any],
        look: Look,
        predictions: Any,
        notes: Mapping[int, str],
        show: int,
    ) -> None:
        self.result = result
        self.look = look
        self.notes = notes
        self.train_set, self.test_set = data
        self.predictions = predictions
        # no sample on both sides
        self.show = min(show, len(result.row(next(iter(result.tests)))) // 2)

    def samples(
        self,
        key: str,
    ) -> list[_Sample]:
        """The test sample, its most helpful and its most harmful training samples."""
        ends = [
            *self.result.top(key, self.show),
            *self.result.bottom(key, self.show),
        ]
        return [self._test(key), *(self._train(*one) for one in ends)]

    def _test(
        self,
        key: str,
    ) -> _Sample:
        entry = self.result.influences[key]
        index = entry["num_in_dataset"]
        label = f"label {self.look.label(entry['label'])}"
        if self.predictions is not None:
            found = self.look.label(self.predictions[index])
            label += f"\npredicted {found}"
        shown = self.look.shown(self.test_set[index])
        return _Sample(shown, f"test {index}", label, None)

    def _train(
        self,
        index: int,
        influence: float,
    ) -> _Sample:
        sample = self.train_set[index]
        label = f"label {self.look.label(plain(label_of(sample)))}"
        if index in self.notes:
            label += f"\n{self.notes[index]}"
        shown = self.look.shown(sample)
        return _Sample(shown, f"train {index}", label, influence)


# ---- images


def _images(
    rows: list[list[_Sample]],
    axes: Any,
) -> Any:
    width = len(rows[0])
    lines = _most_lines(rows)
    grid = _grid(axes, (len(rows), width), (1.3, 1.35 + 0.16 * lines))
    for line, samples in zip(grid, rows, strict=True):
        for axis, sample in zip(line, samples, strict=True):
            _image(axis, sample)
    show = (width - 1) // 2
    _title(grid[0, 0], "test sample", NEUTRAL)
    _title(grid[0, 1], "most helpful →", HELPFUL)
    _title(grid[0, 1 + show], "most harmful →", HARMFUL)
    return grid


def _most_lines(rows: list[list[_Sample]]) -> int:
    return max(_caption(s).count("\n") + 1 for row in rows for s in row)


def _caption(sample: _Sample) -> str:
    lines = [sample.name, sample.label, sample.number]
    whole = "\n".join(line for line in lines if line)
    return "\n".join(textwrap.shorten(x, 20) for x in whole.split("\n"))


def _title(
    axis: Any,
    text: str,
    colour: str,
) -> None:
    axis.set_title(text, fontsize=SMALL, color=colour, loc="left")


def _image(
    axis: Any,
    sample: _Sample,
) -> None:
    axis.imshow(sample.shown, interpolation="nearest")
    axis.set_xlabel(_caption(sample), fontsize=SMALLEST, color=sample.colour)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_edgecolor(sample.colour)


def _grid(
    axes: Any,
    shape: tuple[int, int],
    cell: tuple[float, float],
) -> Any:
    """The axes given as an array of this shape, or new ones with cells of this size in inches."""
    if axes is None:
        size = (shape[1] * cell[0], shape[0] * cell[1] + 0.3)
        return pyplot().subplots(
            *shape, figsize=size, squeeze=False, layout="constrained"
        )[1]
    given = np.asarray(axes, dtype=object)
    if given.size != shape[0] * shape[1]:
        raise ValueError(
            f"axes: expected {shape[0]} x {shape[1]} of them, got an array of shape {list(given.shape)}"
        )
    return given.reshape(shape)


# ---- tables


def _tables(
    rows: list[list[_Sample]],
    axes: Any,
) -> Any:
    height = 0.3 * (len(rows[0]) + 1) + 0.2
    grid = _grid(axes, (len(rows), 1), (9.0, height))
    for axis, samples in zip(grid[:, 0], rows, strict=True):
        _table(axis, samples)
    return grid


def _table(
    axis: Any,
    samples: list[_Sample],
) -> None:
    axis.set_axis_off()
    text = [list(map(_one_line, _cells(one), LETTERS)) for one in samples]
    table = axis.table(
        text,
        colLabels=COLUMNS,
        colWidths=WIDTHS,
        cellLoc="left",
        colLoc="left",
        loc="center",
        bbox=[0, 0, 1, 1],
    )
    table.auto_set_font_size(False)
    table.set_fontsize(SMALLEST)
    for (row, _), cell in table.get_celld().items():
        cell.visible_edges = "B" if row == 0 else ""
        cell.set_edgecolor(NEUTRAL)
        if row > 0:
            cell.set_text_props(color=samples[row - 1].colour)
        if row in (0, 1):
            cell.set_text_props(weight="bold")


def _cells(sample: _Sample) -> tuple[str, str, str, str]:
    what = sample.shown if isinstance(sample.shown, str) else "(an image)"
    label = sample.label.removeprefix("label ").replace("\n", ", ")
    return sample.name, label, sample.number, what


def _one_line(
    text: str,
    most: int,
) -> str:
    # matplotlib would read what lies between two dollars as a formula
    line = textwrap.shorten(text, most, placeholder=" …") or text[:most]
    return line.replace("$", r"\$")
