r"""(H + \lambda I)^{-1} V for a stack of right-hand sides V [K, P]: a table of solvers, a row each.

All answer the same question, with the same curvature and the same \lambda; changing the solver changes the error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..config import Config
from ..model.freed import give_back
from .auto import auto
from .cg import conjugate_gradient
from .damping_ways import damping_by_low_rank, damping_by_steps
from .ekfac import ekfac
from .errors import NegativeCurvatureError
from .exact import exact
from .lissa import lissa
from .problem import MOST_TOGETHER, Problem
from .score_error import ScoreErrors
from .solution import Damping, Prepared, Solution
from .system import Residual

logger = logging.getLogger(__name__)
MANY_TOGETHER = 512
"""Test samples in one group at most, for solvers whose cost hardly grows with them."""
JOINED = 3
"""Vectors [P] that are held for each test sample that another process solved, beside the chains: its solution, as a
part and joined, and a block of what the scores are made from."""
OWN_SYSTEM = "it is an approximation; config['solver'] = 'cg' with its preconditioner solves the system itself"


class Row(NamedTuple):
    """What is true of a solver."""

    prepare: (
        Callable[[Problem, Damping], Prepared]
        | Callable[[Problem, Damping | None], Prepared]
    )
    """Its set-up; it gets no damping where it is to choose that itself."""
    advice: str
    """What lowers a residual that is above the tolerance."""
    curvature: str = "ggn"
    """The curvature where the user names none."""
    together: int = MOST_TOGETHER
    """Test samples in one group at most."""
    held: int = 10
    """Vectors [P] that are held for each test sample at the worst moment, beside the chains."""
    chooses_damping: bool = False
    """Whether it chooses an automatic damping itself, from what it builds anyway."""
    preconditioned: bool = False
    """Whether it takes a preconditioner."""
    or_hessian: bool = False
    """Whether it takes the Hessian of a model that has no Gauss-Newton matrix, where the user names no curvature."""


SOLVERS: dict[str, Row] = {
    "lissa": Row(
        lissa,
        "a larger config['recursion_depth'] or config['r'], or a larger batch_size in the train_loader, lowers it",
        curvature="hessian",
        preconditioned=True,
    ),
    "cg": Row(
        conjugate_gradient,
        "config['preconditioner'] = 'ekfac' or a larger config['damping'] lets it converge sooner",
        preconditioned=True,
    ),
    "exact": Row(
        exact,
        "a larger config['damping'] or a model in double precision lowers it",
        together=MANY_TOGETHER,
    ),
    "ekfac": Row(
        ekfac,
        OWN_SYSTEM,
        together=MANY_TOGETHER,
        # v, s, what the scores make of s, and the parts that are turned
        held=4,
        chooses_damping=True,
    ),
    "auto": Row(
        auto,
        OWN_SYSTEM,
        together=MANY_TOGETHER,
        chooses_damping=True,
        or_hessian=True,
    ),
}


def row_of(config: Config) -> Row:
    """The row of the solver that the options name."""
    return SOLVERS[config.solver_in_use[0]]


def prepare(problem: Problem) -> Prepared:
    """Set up the solver that the options name, with its preconditioner and its damping.

    Raises:
        ValueError: this solver takes no preconditioner, or cannot be used for this problem.
    """
    config, row = problem.config, row_of(problem.config)
    if config.preconditioner is not None and not row.preconditioned:
        able = " and ".join(
            name for name, other in SOLVERS.items() if other.preconditioned
        )
        raise ValueError(
            f"config['preconditioner'] = {config.preconditioner!r} is for {able}, not for "
            f"{config.solver_in_use[0]!r}; leave it out"
        )
    damping = None
    if config.fixed_damping is not None:
        damping = Damping(config.fixed_damping, {})
    elif not row.chooses_damping:
        damping = _automatic_damping(problem)
    return row.prepare(problem, damping)  # type: ignore[arg-type]


def _automatic_damping(problem: Problem) -> Damping:
    """Lambda from the low-rank form, or from products alone where the model allows no such form."""
    try:
        return damping_by_low_rank(problem)
    except NotImplementedError as error:
        logger.info("damping='auto' goes by products alone: %s", error)
        return damping_by_steps(problem)


class Solver:
    """The solver of one run: prepared when it is first needed, with one curvature for all of its groups.

    Attributes:
        problem: what is solved.
        row: of the table.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.row = row_of(problem.config)
        self._prepared: Prepared | None = None
        self._errors: ScoreErrors | None = None
        self._answered = False

    @property
    def group_size(self) -> int:
        """How many test samples are solved together."""
        return self.problem.group_size(self.row.together, self.row.held)

    def shared_group_size(self, processes: int) -> int:
        """The same of so many processes: each solves a group of its own, but holds the solutions and scores of all."""
        together = processes * self.row.together
        held = self.problem.group_size(together, JOINED)
        return min(held, processes * self.group_size)

    def prepared(self) -> Prepared:
        """The solver, set up now if it is not yet."""
        if self._prepared is None:
            self._prepared = prepare(self.problem)
            self._give_back()
        return self._prepared

    def _give_back(self) -> None:
        """What the set-up freed, before the solutions are held: of a ResNet-18 of 11 million parameters 260 MiB."""
        give_back(self.problem.objective.device)

    def take(self, prepared: Prepared | None) -> None:
        """Use what was set up elsewhere."""
        self._prepared = prepared

    def __call__(self, v: Tensor, tests: int) -> Solution:
        """Solve for v [K, P], of `tests` right-hand sides in all.

        Raises:
            NegativeCurvatureError: the Hessian is negative somewhere, and is what the user asked for or what earlier
                groups were solved with: the curvature is one for all of them.
        """
        prepared = self.prepared()
        try:
            solution = prepared.solve(v, tests)
        except NegativeCurvatureError as error:
            if (
                self.problem.config.curvature is not None
                or prepared.system.curvature.kind == "ggn"
            ):
                advice = prepared.system.problem.enough_damping()
                raise NegativeCurvatureError(f"{error}: {advice}") from error
            if self._answered:
                raise NegativeCurvatureError(
                    f"{error}. {ONE_CURVATURE}"
                ) from error
            self.problem = self.problem.instead_of_hessian(
                str(error).partition(":")[0]
            )
            self._prepared = None
            solution = self.prepared().solve(v, tests)
        self._answered = True
        return solution

    def residual(self, v: Tensor, solution: Solution) -> Residual:
        """The residual of a solution for v [K, P]; measured here where the solver did not."""
        return self.prepared().residual(v, solution)

    def score_error(
        self, v: Tensor, solution: Solution, residual: Residual
    ) -> dict[str, Any]:
        """How far the scores of a solution for v [K, P] are off, as plain values; see `ScoreErrors`."""
        prepared = self.prepared()
        if self._errors is None or self._errors.prepared is not prepared:
            self._errors = ScoreErrors(prepared)
        return self._errors(v, solution.vectors, residual)


ONE_CURVATURE = (
    "Earlier test samples were solved with the Hessian, so that the Gauss-Newton matrix is not taken for these alone: "
    "name config['curvature'] = 'ggn' and start again, for all of them"
)
