"""Pictures of results; needs the extra `plot` (matplotlib).

Each function draws on the axes given, or on new ones, and returns them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .axes import (
    HARMFUL,
    HELPFUL,
    NEUTRAL,
    PALE,
    SERIES,
    SMALL,
    SMALLEST,
    STYLES,
    axis_of,
    bare,
    few_ticks,
    legend,
    saved,
)
from .images import short_number
from .pictures import plot_influences

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .results import InfluenceResult

Path = str | os.PathLike[str]
__all__ = [
    "plot_convergence",
    "plot_damping",
    "plot_distribution",
    "plot_influences",
    "plot_leave_one_out",
    "plot_mislabel_curve",
]


def plot_distribution(
    result: InfluenceResult,
    test: int | str | None = None,
    *,
    bins: int = 50,
    axis: Axes | None = None,
    path: Path | None = None,
) -> Axes:
    """How many training samples have which influence on a test sample (None: their mean over all).

    The count is logarithmic, so that the few that matter show beside the many that do not; the text says which share
    of the absolute influence the largest hundredth of the samples has.
    """
    axis = bare(axis_of(axis, (5.6, 3.6)))
    row = result.row(test)
    edges = np.histogram_bin_edges(row, bins)
    edges = np.union1d(edges, 0.0) if row.min() < 0 < row.max() else edges
    for part, name, colour in (
        (row[row < 0], "harmful", HARMFUL),
        (row[row > 0], "helpful", HELPFUL),
    ):
        text = f"{len(part)} {name}"
        axis.hist(part, edges.tolist(), color=colour, label=text)
    axis.axvline(0, color=NEUTRAL, linewidth=0.8)
    axis.set_yscale("log")
    axis.set_ylim(bottom=0.7)
    axis.set_xlabel("influence: predicted rise of the loss without the sample")
    axis.set_ylabel("training samples")
    what = "mean over the test samples" if test is None else f"test {test}"
    axis.set_title(f"{what}; {_concentration(row)}", fontsize=SMALL)
    axis.locator_params(axis="x", nbins=6)
    legend(axis)
    saved(axis, path)
    return axis


def _concentration(row: Any) -> str:
    size = np.sort(np.abs(row))[::-1]
    few = max(len(size) // 100, 1)
    share = size[:few].sum() / max(size.sum(), 1e-300)
    return f"the largest {few} of {len(size)} have {share:.0%} of it"


def plot_convergence(
    result: InfluenceResult,
    *,
    axis: Axes | None = None,
    path: Path | None = None,
) -> Axes:
    """Relative residual of each test sample against the steps its solve took, and what was decided.

    A solver without steps has the test samples in their order along the axis. The text has the solver, the damping and,
    for LiSSA, the scale asked for and the one used with the largest eigenvalue it comes from.
    """
    axis = bare(axis_of(axis, (5.6, 3.8)))
    residuals = [
        np.nan if one["relative_residual"] is None else one["relative_residual"]
        for one in result.influences.values()
    ]
    report = result.meta.get("solver", {})
    steps = _steps(report, len(residuals))
    x = range(len(residuals)) if steps is None else steps
    axis.plot(x, residuals, "o", color=HELPFUL, markersize=4, alpha=0.6)
    axis.set_xlabel("test sample" if steps is None else "steps of the solver")
    axis.set_ylabel("relative residual")
    _log_scale(axis, residuals)
    tolerance = result.meta.get("config", {}).get("tolerance")
    if tolerance is not None:
        text = f"tolerance {tolerance:g}"
        axis.axhline(tolerance, color=HARMFUL, linestyle="--", label=text)
        legend(axis)
    axis.set_title("\n".join(decided(report)), fontsize=SMALLEST, loc="left")
    axis.locator_params(axis="x", nbins=6, integer=True)
    saved(axis, path)
    return axis


def _log_scale(
    axis: Any,
    values: Sequence[float],
) -> None:
    """A logarithmic axis where there are numbers above zero to show."""
    if any(value > 0 for value in values):
        axis.set_yscale("log")


def _steps(
    report: Mapping[str, Any],
    tests: int,
) -> list[float] | None:
    """Steps of each test sample, the most of its recursions; None where the solver has none or does not say."""
    groups = report.get("groups") or [report]
    found: list[float] = []
    for group in groups:
        steps = np.atleast_1d(np.asarray(group.get("steps", [])))
        found += (steps if steps.ndim == 1 else steps.max(0)).tolist()
    return found if len(found) == tests else None


def decided(
    report: Mapping[str, Any],
) -> list[str]:
    """What a run's solver took, and why, a line each."""
    if not report:
        return ["what the solver did is not known"]
    chosen = f" ({report['chosen']})" if report.get("chosen") else ""
    damping = short_number(report.get("damping"), ".3g")
    curvature = report.get("curvature", "unknown")
    lines = [
        f"solver {report.get('solver')}{chosen}",
        f"curvature {curvature}, damping λ = {damping}",
    ]
    if "scale_asked" in report:
        largest = short_number(report.get("eigenvalue_minibatch"), ".3g")
        lines.append(
            f"scale asked {report['scale_asked']}, used {report['scale']:.3g}; largest eigenvalue {largest}"
        )
    return lines


def plot_leave_one_out(
    check: Any,
    actual: Sequence[float] | None = None,
    *,
    title: str = "",
    dot: str = "one left-out training sample",
    axis: Axes | None = None,
    path: Path | None = None,
) -> Axes:
    """Actual against predicted change of the test loss, and the line on which both are equal (the paper's figure 2).

    Args:
        check: what `leave_one_out` returned, or the predicted changes [m].
        actual: the actual changes [m], where `check` is the predicted ones.
        title: above the picture; correlation, slope and number follow it.
        dot: what a dot is.
        axis: draw on these axes.
        path: also save the figure there.

    Raises:
        ValueError: there are not as many actual as predicted changes, or fewer than two.
    """
    predicted = check.predicted if actual is None else check
    actual = check.actual if actual is None else actual
    x = np.asarray(predicted, float)
    y = np.asarray(actual, float)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ValueError(
            f"actual: expected at least two changes, as many as predicted ones, got {x.shape} and {y.shape}"
        )
    axis = bare(axis_of(axis, (4.2, 4.4)))
    low = min(x.min(), y.min())
    high = max(x.max(), y.max())
    room = 0.06 * max(high - low, 1e-12)
    ends = [low - room, high + room]
    axis.plot(ends, ends, color=PALE, linewidth=1, label="equal")
    axis.plot(x, y, "o", color=HELPFUL, markersize=4, alpha=0.7, label=dot)
    axis.set(xlim=ends, ylim=ends, aspect="equal")
    axis.set_xlabel("predicted change of the test loss")
    axis.set_ylabel("actual change after retraining")
    axis.set_title("\n".join(filter(None, [title, _fit(x, y)])), fontsize=SMALL)
    few_ticks(axis)
    legend(axis)
    saved(axis, path)
    return axis


def _fit(
    x: Any,
    y: Any,
) -> str:
    """Correlation, slope and number of points."""
    spread = x - x.mean()
    if not spread.any() or not (y - y.mean()).any():
        return f"n = {len(x)}"
    slope = spread @ y / (spread @ spread)
    r = np.corrcoef(x, y)[0, 1]
    return f"Pearson {r:.3f}, slope {slope:.2f}, n = {len(x)}"


def plot_mislabel_curve(
    curves: Any,
    *,
    share: float | None = None,
    axis: Axes | None = None,
    path: Path | None = None,
) -> Axes:
    """Share of the wrong labels found against share of the training set inspected (the paper's figure 6).

    Args:
        curves: what `mislabel_curve` returned, or {name: that, or (inspected, found)}.
        share: of the labels that are wrong; draws the best curve that is possible.
        axis: draw on these axes.
        path: also save the figure there.
    """
    axis = bare(axis_of(axis))
    named = curves if isinstance(curves, Mapping) else {"found": curves}
    for place, (name, curve) in enumerate(named.items()):
        whole = hasattr(curve, "inspected")
        x, y = (curve.inspected, curve.found) if whole else curve
        axis.plot(x, y, label=name, **_line(place))
    axis.plot([0, 1], [0, 1], color=PALE, linewidth=1, label="random order")
    if share is not None:
        best = ([0, share, 1], [0, 1, 1])
        axis.plot(*best, ":", color=NEUTRAL, linewidth=1, label="best possible")
    axis.set(xlim=(0, 1), ylim=(0, 1.02))
    axis.set_xlabel("share of the training set inspected")
    axis.set_ylabel("share of the wrong labels found")
    axis.legend(frameon=False, fontsize=SMALLEST, loc="lower right")
    saved(axis, path)
    return axis


def _line(place: int) -> dict[str, Any]:
    """Colour and style of a line, by its place: told apart without colour, too."""
    colour = SERIES[place % len(SERIES)]
    style = STYLES[place % len(STYLES)]
    return {"color": colour, "linestyle": style, "linewidth": 1.8}


def plot_damping(
    dampings: Sequence[float],
    values: Mapping[str, Sequence[float]] | Sequence[float],
    *,
    chosen: float | None = None,
    target: float | None = None,
    label: str = "error of first-order predictions",
    axis: Axes | None = None,
    path: Path | None = None,
) -> Axes:
    """Numbers over a grid of dampings, with a line at the chosen one.

    Args:
        dampings: above 0.
        values: what `InfluenceFunction.damping_curve` returned, or {name: numbers}; infinite ones are left out.
        chosen: the damping in use.
        target: the value by which it was chosen.
        label: of the vertical axis.
        axis: draw on these axes.
        path: also save the figure there.
    """
    axis = bare(axis_of(axis))
    named = values if isinstance(values, Mapping) else {label: values}
    for place, (name, row) in enumerate(named.items()):
        finite = np.where(np.isfinite(row), row, np.nan)
        line = _line(place)
        axis.plot(
            dampings, finite, marker="o", markersize=4, label=name, **line
        )
    axis.set_xscale("log")
    if chosen is not None:
        text = f"chosen: λ = {chosen:.3g}"
        axis.axvline(chosen, color=NEUTRAL, linewidth=1, label=text)
    if target is not None:
        text = f"target: {target:g}"
        axis.axhline(target, color=PALE, linestyle="--", label=text)
    axis.set_xlabel("damping λ")
    axis.set_ylabel(label)
    axis.set_ylim(bottom=0)
    legend(axis)
    saved(axis, path)
    return axis
