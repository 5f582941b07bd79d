"""What is said once of a model's solutions: a residual above the tolerance, and scores that are off."""

from __future__ import annotations

from ..utils import warn
from .errors import ScoreErrorWarning, ToleranceWarning
from .score_error import SMALL
from .solvers import Solver
from .system import Residual

SURE = 2
"""Standard errors by which a residual is above the tolerance before it is warned of."""


class Told:
    """Warns once of each.

    Args:
        tolerance: that of the options; None: nobody asks for the residual.
    """

    def __init__(self, tolerance: float | None) -> None:
        self.tolerance = tolerance
        self._inexact = self._off = False

    def inexact(self, residual: Residual, solver: Solver) -> None:
        """Warn where a residual is above the tolerance; of one that is estimated, by more than its noise."""
        if self.tolerance is None or self._inexact:
            return
        worst = float((residual.relative - SURE * residual.stderr).max())
        if worst <= self.tolerance:
            return
        self._inexact = True
        warn(
            f"the relative residual of the solution is {worst:.3g}, above config['tolerance'] = {self.tolerance:g}: "
            f"{solver.row.advice}",
            ToleranceWarning,
        )

    def off(self, error: float, residual: Residual, solver: Solver) -> None:
        """Warn where the scores are off by more than the residual lets one expect."""
        worst = float(residual.relative.max())
        expected = 10 * max(self.tolerance or 0.0, worst)
        if error <= max(SMALL, expected) or self._off:
            return
        self._off = True
        damping = solver.prepared().system.damping
        warn(
            f"the scores are off by about {error:.0%} of their size, though the relative residual is {worst:.3g}: "
            f"the damping ({damping:.3g}) is far below the largest eigenvalue: a larger config['damping'], "
            "config['solver'] = 'exact' where it fits, or in an iteration a smaller config['tolerance'] lowers it",
            ScoreErrorWarning,
        )
