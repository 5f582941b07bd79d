"""What a run did and how good its numbers are, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .images import short_number
from .lazy import row_of

Entries = dict[str, dict[str, Any]]
Fact = tuple[str, str]


def facts(
    influences: Entries,
    meta: Mapping[str, Any],
) -> list[Fact]:
    """Names and values, in the order in which one asks."""
    report: Mapping[str, Any] = meta.get("solver") or {}
    number = len(next(iter(influences.values()), {}).get("influence", []))
    rows: list[Fact | None] = [
        ("Test samples", str(len(influences))),
        ("Training samples", str(number)),
        ("Solver", _solver(report)),
        ("Curvature", _curvature(report)),
        ("Damping λ", _damping(report)),
        ("Smoothing", _smoothing(report)),
        ("Relative residual", _residual(influences, meta)),
        _errors(influences),
        _versions(meta),
    ]
    return [row for row in rows if row is not None]


def warnings_of(
    influences: Entries,
    meta: Mapping[str, Any],
) -> list[str]:
    """What stands against the numbers, a sentence each."""
    if not meta:
        return [
            "How these numbers were computed is not known: the result has no meta data."
        ]
    found = [
        _unfinished(meta),
        _inexact(influences, meta),
        _unsolved(influences),
        _scaled(meta.get("solver") or {}),
    ]
    return [sentence for sentence in found if sentence]


def _solver(report: Mapping[str, Any]) -> str:
    if not report:
        return "unknown"
    chosen = report.get("chosen")
    name = str(report.get("solver"))
    whole = f"{name}: {chosen}" if chosen else name
    why = report.get("why") or report.get("solver_why")
    return f"{whole} ({why})" if why else whole


CURVATURES = {"ggn": "Gauss-Newton matrix", "hessian": "Hessian"}


def _curvature(report: Mapping[str, Any]) -> str:
    name = report.get("curvature", "unknown")
    return CURVATURES.get(name, str(name))


def _damping(report: Mapping[str, Any]) -> str:
    value = short_number(report.get("damping"), ".3g")
    chosen = report.get("damping_chosen")
    if not chosen:
        return value
    error = short_number(chosen.get("error"), ".0%")
    return f"{value}, chosen from the model: there, predicted and actual changes of the training loss differ by {error}"


def _smoothing(report: Mapping[str, Any]) -> str:
    smoothing = report.get("smoothing")
    if not smoothing:
        return "none: gradients at the trained parameters"
    return f"gradients averaged over {smoothing.get('shifts')} shifts of the parameters"


def residuals(influences: Entries) -> Any:
    """Of each test sample [K], NaN where it is not known."""
    values = [one.get("relative_residual") for one in influences.values()]
    return np.array(values, dtype=float)


def _residual(
    influences: Entries,
    meta: Mapping[str, Any],
) -> str:
    known = residuals(influences)
    known = known[np.isfinite(known)]
    if not len(known):
        return "unknown"
    text = f"{np.median(known):.2g} in the median, {known.max():.2g} at most"
    tolerance = (meta.get("config") or {}).get("tolerance")
    return text + ("" if tolerance is None else f" (tolerance {tolerance:g})")


def _errors(influences: Entries) -> Fact | None:
    """Standard errors of the scores, beside their spread."""
    entries = influences.values()
    errors = [row_of(one, "stderr") for one in entries if "stderr" in one]
    if not errors:
        return None
    error = np.median(np.array(errors))
    spread = np.std(np.array([row_of(one, "influence") for one in entries]))
    return (
        "Standard error",
        f"{error:.2g} in the median; the scores themselves spread by {spread:.2g}",
    )


def _versions(meta: Mapping[str, Any]) -> Fact | None:
    versions = meta.get("versions")
    if not versions:
        return None
    names = (f"{name} {value}" for name, value in versions.items())
    return "Versions", ", ".join(names)


def _unfinished(meta: Mapping[str, Any]) -> str:
    if meta.get("finished", True):
        return ""
    return "The run is not finished: start it again with the same arguments and it goes on."


def _inexact(
    influences: Entries,
    meta: Mapping[str, Any],
) -> str:
    tolerance = (meta.get("config") or {}).get("tolerance")
    known = residuals(influences)
    above = 0 if tolerance is None else int((known > tolerance).sum())
    if not above:
        return ""
    return (
        f"For {above} of {len(known)} test samples the linear system is solved less well than the tolerance of "
        f"{tolerance:g}: the largest relative residual is {np.nanmax(known):.2g}. Orders are more robust to that than "
        "sizes. Another solver, or more steps, gives a smaller one."
    )


def _unsolved(influences: Entries) -> str:
    missing = int((~np.isfinite(residuals(influences))).sum())
    if not missing:
        return ""
    return f"The residual of {missing} test samples is not known."


def _scaled(report: Mapping[str, Any]) -> str:
    asked = report.get("scale_asked")
    used = report.get("scale")
    if not isinstance(asked, int | float) or used is None or used <= asked:
        return ""
    return f"The scale of {asked:g} that was asked for is below the largest eigenvalue; {used:.3g} was used."
