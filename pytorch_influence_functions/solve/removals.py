r"""The leverage of a training set at the \lambda that fits it: what the options name, or that of the evidence."""

from __future__ import annotations

import dataclasses
from typing import Any

from .evidence import damping_by_evidence, names_damping
from .held_back import calibrated
from .leverage import Leverage, outputs_of
from .problem import Problem
from .solution import Damping, Prepared
from .solvers import Solver


class Removals:
    """One model's leverage, found when it is first asked for.

    Args:
        problem: the model and its training set.
        solver: of it, taken where the options name a damping.
    """

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
    ) -> None:
        self._problem, self._solver = problem, solver
        self._found: Leverage | None = None
        self.report: dict[str, Any] = {}

    def leverage(self) -> Leverage:
        """Inside the problem's guard."""
        if self._found is None:
            outputs = outputs_of(self._problem)
            if not names_damping(self._problem.config):
                self._choose(damping_by_evidence(self._problem, outputs))
            self._found = Leverage(self._problem, self._solver, outputs)
        return self._found

    def calibrate(self) -> None:
        """Choose the damping by a training afresh, too; inside the problem's guard.

        Raises:
            ValueError: the options name a damping.
        """
        if names_damping(self._problem.config):
            raise ValueError(
                "calibrate: the options name a damping; leave config['damping'], 'damp' and 'scale' out"
            )
        outputs = outputs_of(self._problem)
        evidence = damping_by_evidence(self._problem, outputs)

        def at(damping: Damping) -> Leverage:
            self._choose(damping)
            return Leverage(self._problem, self._solver, outputs)

        self._found = at(calibrated(self._problem, evidence, at))

    def prepared(self) -> Prepared:
        """The solver of the leverage."""
        return self.leverage().solver.prepared()

    def _choose(self, damping: Damping) -> None:
        config = dataclasses.replace(
            self._problem.config, damping=damping.value
        )
        problem = dataclasses.replace(self._problem, config=config)
        self._solver, self.report = Solver(problem), damping.report
